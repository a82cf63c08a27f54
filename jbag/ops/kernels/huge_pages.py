"""`to_huge_pages`: copies of large arrays in huge memory pages."""

from __future__ import annotations

from typing import Any, TypeVar

import jax

from jbag.ops.kernels import KERNELS, cpu

_Tree = TypeVar("_Tree")

# Two huge pages of x86: a smaller array may contain no aligned one.
_MIN_BYTES = 1 << 22

_copy = jax.jit(cpu.to_huge_pages)


def to_huge_pages(tree: _Tree) -> _Tree:
    """Copy the large arrays of a pytree to huge memory pages.

    A random gather from a large table misses the TLB at almost every row: with Linux's
    4 KiB pages the table has more page-table entries than the TLB holds. Pages of 2 MiB
    avoid most of these misses. Call it once, after initialization. In-place updates of
    a donated table keep the pages; new arrays don't have them.

    Args:
      tree: a pytree: a table, or the parameters of a model.

    Returns:
      The pytree, in which arrays of at least 4 MiB on CPU devices are copies in huge
      pages. Arrays on other devices and traced arrays are not copied. Nothing is copied
      if the system has no huge pages or jbag lacks its CPU kernel.

    Example:
      >>> table = jbag.to_huge_pages(jnp.zeros((1 << 15, 64)))
      >>> table.shape
      (32768, 64)
    """
    return jax.tree.map(_to_huge_pages, tree)


def _to_huge_pages(x: Any) -> Any:
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
        return x
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) or x.nbytes < _MIN_BYTES:
        return x
    platforms = [device.platform for device in x.devices()]
    if KERNELS["cpu"].missing or set(platforms) != {"cpu"}:
        return x
    if len(platforms) == 1:
        return _copy(x)
    shards = [_copy(shard.data) for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)

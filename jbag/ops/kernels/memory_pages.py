"""Huge pages: memory that large tables are read from faster."""

from __future__ import annotations

from typing import Any, TypeVar

import jax

from jbag.ops.kernels import KERNELS, cpu

_Tree = TypeVar("_Tree")

# Two of x86's huge pages: of less, none may be whole.
_LEAST_BYTES = 1 << 22

_copy = jax.jit(cpu.to_huge_pages)


def to_huge_pages(tree: _Tree) -> _Tree:
    """Copy the large arrays of a pytree to huge pages, once, before they are used.

    A row gathered at random costs a page-table miss before it costs a cache miss. Linux
    maps memory in pages of 4 KiB, for which a large table has more page-table entries
    than the processor holds; in pages of 2 MiB it has few. Updates in place (of a
    donated table, by `x.at[...].add` say) keep the pages. A new array hasn't them.

    Args:
      tree: any pytree: a table, the parameters of a model.

    Returns:
      The same, where arrays of at least 4 MiB on CPU devices are copies on huge pages.
      Arrays on other devices, and traced ones, whose memory is the compiler's, are
      returned as they are; so is everything where the system has no huge pages to give,
      or jbag was installed without its CPU kernel.

    Example:
      >>> table = jnp.zeros((1 << 15, 64))
      >>> table = jbag.to_huge_pages(table)
    """
    return jax.tree.map(_to_huge_pages, tree)


def _to_huge_pages(x: Any) -> Any:
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
        return x
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) or x.nbytes < _LEAST_BYTES:
        return x
    platforms = [device.platform for device in x.devices()]
    if KERNELS["cpu"].missing or set(platforms) != {"cpu"}:
        return x
    if len(platforms) == 1:
        return _copy(x)
    shards = [_copy(shard.data) for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)

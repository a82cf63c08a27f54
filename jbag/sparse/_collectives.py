"""`psum` and `pmean` of trees with `RowSparse` leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jbag.ops._factored_gradient import sum_batch
from jbag.sparse._row_sparse import RowSparse, is_rows

AxisName = str | Sequence[str]


def psum(tree: Any, axis_name: AxisName) -> Any:
    """Sum a tree over a mapped axis: `jax.lax.psum` for trees with `RowSparse` leaves.

    A `RowSparse` leaf is all-gathered: the sum has the bags of every device.

    Args:
      tree: a tree of arrays and `RowSparse`.
      axis_name: the name of an axis of `jax.shard_map`, `jax.pmap` or `jax.vmap`, or a
        sequence of names.

    Returns:
      The tree of sums.

    Raises:
      ValueError: a `RowSparse` is the gradient of a table sharded over a mesh.

    Example:
      >>> loss = lambda t, ids: jbag.embedding_bag(t, ids, sparse=True).sum()
      >>> def gradient(table, ids):
      ...     return jbag.sparse.psum(jbag.grad(loss)(table, ids), "batch").todense()
      >>> over_batch = jax.vmap(gradient, in_axes=(None, 0), axis_name="batch")
      >>> over_batch(jnp.ones((4, 1)), jnp.array([[[1, 2]], [[2, 3]]]))[0, :, 0]
      Array([0. , 0.5, 1. , 0.5], dtype=float32)
    """

    def sum_leaf(x: Any) -> Any:
        if not is_rows(x):
            return jax.lax.psum(x, axis_name)
        terms = [jax.tree.map(lambda a: _gather(a, axis_name), t) for t in x.terms]
        if any(term.placement.over_mesh for term in terms):
            raise ValueError(
                "`psum` must be given gradients of replicated tables; got one of a "
                "table sharded over a mesh, which is already summed."
            )
        summed = [sum_batch(term, x.shape[0]) for term in terms]
        return RowSparse(summed, x.shape, x.dtype)

    return jax.tree.map(sum_leaf, tree, is_leaf=is_rows)


def pmean(tree: Any, axis_name: AxisName) -> Any:
    """Average a tree over a mapped axis: `jax.lax.pmean` with `RowSparse` leaves.

    Args:
      tree: as in `psum`.
      axis_name: as in `psum`.

    Returns:
      The tree of means.

    Raises:
      ValueError: as `psum`.

    Example:
      >>> loss = lambda t, ids: jbag.embedding_bag(t, ids, sparse=True).sum()
      >>> def gradient(table, ids):
      ...     return jbag.sparse.pmean(jbag.grad(loss)(table, ids), "batch").todense()
      >>> over_batch = jax.vmap(gradient, in_axes=(None, 0), axis_name="batch")
      >>> over_batch(jnp.ones((4, 1)), jnp.array([[[1, 2]], [[2, 3]]]))[0, :, 0]
      Array([0.  , 0.25, 0.5 , 0.25], dtype=float32)
    """
    scale = 1 / jax.lax.psum(1, axis_name)
    return jax.tree.map(lambda x: x * scale, psum(tree, axis_name), is_leaf=is_rows)


def _gather(x: Array, axis_name: AxisName) -> Array:
    """All-gather arrays on a new first axis, as a value that varies over no device."""
    names = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    if not names <= jax.typeof(x).manual_axis_type.varying:
        return jax.lax.all_gather(x, axis_name)
    # With `check_vma`, `shard_map` types a psum as replicated, but not an all-gather.
    size = jax.lax.psum(1, axis_name)
    own = jnp.zeros((size, *x.shape), x.dtype)
    own = own.at[jax.lax.axis_index(axis_name)].set(x)
    return jax.lax.psum(own, axis_name)

"""Explicit row-sparse gradients: `pool` returns the pooled bags and their pullback.

The pullback maps a cotangent to a `RowSparse`. Use it in custom training loops,
pipelines and `jax.custom_vjp` rules; for a loss use `jbag.value_and_grad`. `pool` works
under every transformation of JAX, also in the body of `jax.lax.scan`. `psum` and
`pmean` reduce trees with `RowSparse` leaves over the axes of `jax.shard_map`,
`jax.vmap` and `jax.pmap`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jbag._validation import Floats, Integers
from jbag.ops import _pooling
from jbag.ops._embedding_bag import check_call
from jbag.ops._factored_gradient import sum_batch
from jbag.ragged._bags import Bags
from jbag.sparse._pullback import pull_back
from jbag.sparse._row_sparse import RowSparse, is_rows

__all__ = [
    "pmean",
    "pool",
    "psum",
]

AxisName = str | Sequence[str]


def pool(
    table: ArrayLike,
    indices: Integers | Bags,
    offsets: Integers | None = None,
    *,
    mode: str = "mean",
    weights: Floats | None = None,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    max_norm: Any = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "B D"], Callable[[Float[Array, "B D"]], RowSparse]]:
    """Pool bags; return the output and the pullback to the table.

    To autodiff the output is a constant function of the table, and a differentiable
    function of the weights.

    Args:
      table: [V, D]; the arguments are those of `jbag.embedding_bag`.
      indices: [N], [B, L] or a `Bags`.
      offsets: [B] or [B + 1].
      mode: "sum", "mean", "max", "min" or "sqrtn".
      weights: of the shape of `indices`.
      padding_idx: the id that marks padding.
      include_last_offset: whether `offsets` ends with the number of slots in use.
      max_norm: the largest norm of a row.
      norm_type: p of the p-norm.
      scale_grad_by_freq: whether to divide each row's gradient by its id's count.
      implementation: the kernel, or None.

    Returns:
      The output [B, D], and a function of a cotangent [B, D] that returns the gradient
      of the table as a `RowSparse`. The function is a pytree, like those of `jax.vjp`.
      Nothing of size V * D is formed.

    Raises:
      IndexError, TypeError, ValueError: as `jbag.embedding_bag`.

    Example:
      >>> table = jnp.ones((1000, 2))
      >>> pooled, pullback = jbag.sparse.pool(table, [[7, 8]], mode="sum")
      >>> pullback(pooled - 1).coalesce().values
      Array([[1., 1.],
             [1., 1.]], dtype=float32)
    """
    table, bags, max_norm, options = check_call(
        table,
        indices,
        offsets,
        mode=mode,
        weights=weights,
        padding_idx=padding_idx,
        include_last_offset=include_last_offset,
        max_norm=max_norm,
        norm_type=norm_type,
        scale_grad_by_freq=scale_grad_by_freq,
        implementation=implementation,
    )
    pooling = options["pooling"]
    ids, ends, own_weights = jax.tree.map(jnp.asarray, bags)
    csr, pad_id = _pooling.prepare(table, ids, ends, own_weights, max_norm, **options)
    total, winners = _pooling.combine(
        jax.lax.stop_gradient(table), csr, pooling=pooling, pad_id=pad_id
    )
    pullback = _Pullback(pooling, pad_id, table.shape, table.dtype)
    out = pullback.finish(total, csr)
    return out, jax.tree_util.Partial(pullback, total, winners, csr)


@dataclasses.dataclass(frozen=True)
class _Pullback:
    """The static part of a pullback."""

    pooling: _pooling.PoolingOptions
    pad_id: int | None
    shape: tuple[int, ...]
    dtype: Any

    def finish(self, total: Array, csr: _pooling.CsrBags) -> Float[Array, "B D"]:
        table: Any = jax.ShapeDtypeStruct(self.shape, self.dtype)
        return _pooling.finish(
            total, csr, table, pooling=self.pooling, pad_id=self.pad_id
        )

    def __call__(
        self,
        total: Array,
        winners: Array | None,
        csr: _pooling.CsrBags,
        cotangent: Float[Array, "B D"],
    ) -> RowSparse:
        """Return the gradient of the table."""
        _, vjp = jax.vjp(lambda total: self.finish(total, csr), total)
        (ct,) = vjp(jnp.asarray(cotangent, self.dtype))
        ids, offsets, coefficients, options = _pooling.transposed(
            csr, self.pooling, self.pad_id
        )
        bags = (ids, offsets, coefficients, winners)
        return pull_back(ct, *bags, shape=self.shape, dtype=self.dtype, **options)


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

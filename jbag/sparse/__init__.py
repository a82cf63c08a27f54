"""Row-sparse gradients made by hand: what `jbag.value_and_grad` does for a loss.

`pool` gives what is pooled together with its pullback, which makes a `RowSparse` of a
cotangent: for training loops, pipelines and `jax.custom_vjp` rules of your own. It
works wherever JAX's own operations do, in the body of `jax.lax.scan` too. `psum` and
`pmean` sum gradients with rows over the devices of `jax.shard_map`, or a mapped axis.
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
    """Pool the bags; return what is pooled, and the pullback to the table.

    The result is constant with respect to the table, whose gradient the pullback gives,
    and differentiable with respect to the weights.

    Args:
      table: [V, D]; this and the rest as in `jbag.embedding_bag`.
      indices: [N], [B, L] or a `Bags`.
      offsets: [B] or [B + 1].
      mode: "sum", "mean", "max", "min" or "sqrtn".
      weights: of the shape of `indices`.
      padding_idx: the row that stands for nothing.
      include_last_offset: whether offsets end with the number of slots in use.
      max_norm: rows are used scaled down to this norm.
      norm_type: p of that norm.
      scale_grad_by_freq: divide each row's gradient by its count.
      implementation: the kernel by name, or None.

    Returns:
      [B, D], and a function of a cotangent [B, D] that returns the gradient of the
      table as a `RowSparse`, from nothing larger than the cotangent and the bags. It is
      a pytree, as the functions of `jax.vjp` are.

    Raises:
      As `jbag.embedding_bag`.

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
    how = options["how"]
    ids, ends, own_weights = jax.tree.map(jnp.asarray, bags)
    csr, pad_id = _pooling.prepare(table, ids, ends, own_weights, max_norm, **options)
    total, winners = _pooling.combine(
        jax.lax.stop_gradient(table), csr, how=how, pad_id=pad_id
    )
    pullback = _Pullback(how, pad_id, table.shape, table.dtype)
    out = pullback.finish(total, csr)
    return out, jax.tree_util.Partial(pullback, total, winners, csr)


@dataclasses.dataclass(frozen=True)
class _Pullback:
    """What is known of a pullback when a program is traced."""

    how: _pooling.PoolingOptions
    pad_id: int | None
    shape: tuple[int, ...]
    dtype: Any

    def finish(self, total: Array, csr: _pooling.CsrBags) -> Float[Array, "B D"]:
        table: Any = jax.ShapeDtypeStruct(self.shape, self.dtype)
        return _pooling.finish(total, csr, table, how=self.how, pad_id=self.pad_id)

    def __call__(
        self,
        total: Array,
        winners: Array | None,
        csr: _pooling.CsrBags,
        cotangent: Float[Array, "B D"],
    ) -> RowSparse:
        """Return the gradient of the table."""
        _, to_total = jax.vjp(lambda total: self.finish(total, csr), total)
        (own,) = to_total(jnp.asarray(cotangent, self.dtype))
        ids, offsets, coefficients, options = _pooling.transposed(
            csr, self.how, self.pad_id
        )
        bags = (ids, offsets, coefficients, winners)
        return pull_back(own, *bags, shape=self.shape, dtype=self.dtype, **options)


def psum(tree: Any, axis_name: AxisName) -> Any:
    """Sum a tree over a mapped axis; its `RowSparse` leaves get the rows of all.

    It is `jax.lax.psum` for gradients: of `jax.shard_map`, `jax.pmap`, and `jax.vmap`
    with an `axis_name`.

    Args:
      tree: of arrays and `RowSparse`.
      axis_name: the name of the axis, or several.

    Example:
      >>> loss = lambda t, ids: jbag.embedding_bag(t, ids, sparse=True).sum()
      >>> def gradient(table, ids):
      ...     return jbag.sparse.psum(jbag.grad(loss)(table, ids), "batch").todense()
      >>> over_batch = jax.vmap(gradient, in_axes=(None, 0), axis_name="batch")
      >>> over_batch(jnp.ones((4, 1)), jnp.array([[[1, 2]], [[2, 3]]]))[0, :, 0]
      Array([0. , 0.5, 1. , 0.5], dtype=float32)
    """

    def one(x: Any) -> Any:
        if not is_rows(x):
            return jax.lax.psum(x, axis_name)
        terms = [jax.tree.map(lambda a: _gather(a, axis_name), t) for t in x.terms]
        if any(term.placement.over_mesh for term in terms):
            raise ValueError(
                "The gradient of a table over a mesh is summed already: `psum` takes "
                "those of tables that each device holds."
            )
        summed = [sum_batch(term, x.shape[0]) for term in terms]
        return RowSparse(summed, x.shape, x.dtype)

    return jax.tree.map(one, tree, is_leaf=is_rows)


def pmean(tree: Any, axis_name: AxisName) -> Any:
    """Average a tree over a mapped axis, as `psum` sums it.

    Example:
      >>> mean = jbag.sparse.pmean  # in place of `jax.lax.pmean`
    """
    share = 1 / jax.lax.psum(1, axis_name)
    return jax.tree.map(lambda x: x * share, psum(tree, axis_name), is_leaf=is_rows)


def _gather(x: Array, axis_name: AxisName) -> Array:
    """Return the arrays of all devices on a new first axis, equal on all of them."""
    names = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    if not names <= jax.typeof(x).manual_axis_type.varying:
        return jax.lax.all_gather(x, axis_name)
    # Where `shard_map` checks what varies, a sum is known to be equal, a gathering not.
    size = jax.lax.psum(1, axis_name)
    own = jnp.zeros((size, *x.shape), x.dtype)
    own = own.at[jax.lax.axis_index(axis_name)].set(x)
    return jax.lax.psum(own, axis_name)

"""`pool`: the pooled bags, and their pullback to a `RowSparse`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jbag._validation import Floats, Integers
from jbag.ops import _pooling
from jbag.ops._embedding_bag import check_call
from jbag.ops._factored_gradient import OneDevice
from jbag.ops._packed_table import PackedTable, packing_of
from jbag.ops._packing import Packing
from jbag.ragged._bags import Bags
from jbag.sparse._pullback import pull_back
from jbag.sparse._row_sparse import RowSparse


def pool(
    table: ArrayLike | PackedTable,
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
    pullback = _Pullback(pooling, pad_id, table.shape, table.dtype, packing_of(table))
    out = pullback.finish(total, csr)
    return out, jax.tree_util.Partial(pullback, total, winners, csr)


@dataclasses.dataclass(frozen=True)
class _Pullback:
    """The static part of a pullback."""

    pooling: _pooling.PoolingOptions
    pad_id: int | None
    shape: tuple[int, ...]
    dtype: Any
    packing: Packing | None

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
        options |= {"placement": OneDevice(packing=self.packing)}
        return pull_back(ct, *bags, shape=self.shape, dtype=self.dtype, **options)

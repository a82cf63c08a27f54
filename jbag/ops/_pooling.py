"""Pooling, once the arguments are checked: the modes as coefficients.

Three steps, which a mesh takes on different devices: `prepare` makes the coefficients,
`combine` reads the table, `finish` divides by what the weights sum up to.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jbag._validation import unsharded
from jbag.ops import _spmm
from jbag.ops._explicit_axes import partitioned, pooled_sharding
from jbag.ops._factored_gradient import ONE_DEVICE, Placement
from jbag.ops._max_norm import row_scale
from jbag.ops._row_gather import accumulation_dtype, take
from jbag.ops._segment_max import extremum
from jbag.ops._sparse_marks import mark_pooled, mark_table
from jbag.ragged import _csr
from jbag.ragged._concatenate import num_bags
from jbag.ragged._csr import OUT_OF_RANGE_ID, PAD_ID, Ids, Offsets, Size, Slots


class PoolingOptions(NamedTuple):
    """How bags are pooled: the options that are known when a program is traced."""

    mode: str = "mean"
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    implementation: str | None = None


class CsrBags(NamedTuple):
    """Bags as the kernels take them; each slot's row is scaled by the last three."""

    ids: Ids
    offsets: Offsets
    weights: Slots | None = None
    value_scale: Slots | None = None  # seen by the value, a constant
    gradient_scale: Slots | None = None  # seen by the gradient to the table, a constant


@functools.partial(jax.jit, static_argnames=("how", "padding_idx", "sparse"))
def pool(
    table: Float[Array, "V D"],
    indices: Ids,
    offsets: Offsets,
    weights: Slots | None,
    max_norm: Shaped[Array, ""] | None,
    frequencies: Slots | None = None,
    *,
    how: PoolingOptions,
    padding_idx: int | None,
    sparse: bool,
) -> Float[Array, "B D"]:
    """Pool the bags of one array; with `sparse`, leave marks: see `_sparse_marks`.

    `frequencies` are how often the batch names each slot's row, if that is known.
    """
    sharding = pooled_sharding(table, indices, offsets, weights)
    indices, offsets, weights, frequencies = map(
        unsharded, (indices, offsets, weights, frequencies)
    )
    csr, pad_id = prepare(
        table,
        indices,
        offsets,
        weights,
        max_norm,
        how=how,
        padding_idx=padding_idx,
        frequencies=frequencies,
    )
    if sparse:
        table = mark_table(table)
    combined = functools.partial(combine, how=how, pad_id=pad_id)
    total, winners = partitioned(combined, sharding)(table, csr)
    if sparse:
        total = mark(total, unsharded(winners), table, csr, how=how, pad_id=pad_id)
    return finish(total, csr, table, how=how, pad_id=pad_id)


def prepare(
    table: Float[Array, "V D"],
    ids: Ids,
    offsets: Offsets,
    weights: Slots | None,
    max_norm: Shaped[Array, ""] | None = None,
    *,
    how: PoolingOptions,
    padding_idx: int | None,
    frequencies: Slots | None = None,
    columns: Any = None,
    replicas: Any = None,
) -> tuple[CsrBags, int | None]:
    """Return the bags with all that scales their slots, and the id of an empty slot.

    Args:
      table: of which the rows' norms are, if there is a `max_norm`.
      ids: of the slots.
      offsets: of the bags.
      weights: of the slots.
      max_norm: of the rows.
      how: the options.
      padding_idx: the row that stands for nothing.
      frequencies: how often the batch names each slot's row, if that is known.
      columns: the axis of a mesh over which the columns of the table are cut.
      replicas: the axis of a mesh over which the batch is cut.
    """
    num_embeddings = table.shape[0]
    dtype = accumulation_dtype(table.dtype)
    pad_id = padding_idx
    counted = how.scale_grad_by_freq and frequencies is None
    if offsets is not None and (
        max_norm is not None or counted or (weights is not None and how.mode == "sqrtn")
    ):
        # These read the slots past the bags, too: empty them. The largest offset is the
        # last one, unless malformed: then those that are well formed keep their slots.
        outside = jnp.arange(ids.size, dtype=offsets.dtype) >= offsets.max()
        if padding_idx is not None:
            outside |= ids == padding_idx
        ids = jnp.where(ids < 0, OUT_OF_RANGE_ID, ids)
        ids, pad_id = jnp.where(outside, PAD_ID, ids), PAD_ID
    if weights is not None:
        weights = weights.astype(dtype)
        if pad_id is not None:
            # What stands beside an empty slot, a NaN say, must not reach the gradient.
            weights = jnp.where(ids == pad_id, 0, weights)
    value_scale = gradient_scale = None
    if max_norm is not None:
        value_scale = row_scale(table, ids, max_norm, how.norm_type, columns)
    if counted:
        frequencies = _occurrences(
            ids, offsets, num_embeddings, dtype, pad_id, how.implementation, replicas
        )
    if frequencies is not None:
        gradient_scale = 1 / frequencies
    return CsrBags(ids, offsets, weights, value_scale, gradient_scale), pad_id


def combine(
    table: Float[Array, "V D"], csr: CsrBags, *, how: PoolingOptions, pad_id: int | None
) -> tuple[Float[Array, "B D"], Int[Array, "B D"] | None]:
    """Return what the bags' rows make together, and the winning slots of an extremum.

    Sums that `finish` divides are in the accumulation dtype.
    """
    options: dict[str, Any] = {"pad_id": pad_id, "implementation": how.implementation}
    if how.mode in ("max", "min"):
        return extremum(table, *csr, largest=how.mode == "max", **options)
    if not _is_divided(csr, how):
        options |= {"average": _average(csr, how), "dtype": table.dtype}
    return _spmm.spmm_scaled(table, *csr, **options), None


def mark(
    total: Float[Array, "B D"],
    winners: Int[Array, "B D"] | None,
    table: Float[Array, "V D"],
    csr: CsrBags,
    *,
    how: PoolingOptions,
    pad_id: int | None,
    placement: Placement = ONE_DEVICE,
) -> Float[Array, "B D"]:
    """Return what was combined of a marked table, marked."""
    ids, offsets, coefficients, options = transposed(csr, how, pad_id)
    return mark_pooled(
        total,
        table,
        ids,
        offsets,
        coefficients,
        winners,
        placement=placement,
        **options,
    )


def transposed(
    csr: CsrBags, how: PoolingOptions, pad_id: int | None
) -> tuple[Ids, Offsets, Slots | None, dict[str, Any]]:
    """Return the bags by which the gradient flows to the table, and their options."""
    coefficients = _spmm.times(csr.weights, csr.gradient_scale)
    options = {
        "average": _average(csr, how),
        "pad_id": pad_id,
        "implementation": how.implementation,
    }
    return csr.ids, csr.offsets, coefficients, options


def finish(
    total: Float[Array, "B D"],
    csr: CsrBags,
    table: Float[Array, "V D"],
    *,
    how: PoolingOptions,
    pad_id: int | None,
) -> Float[Array, "B D"]:
    """Return the pooled bags, in the dtype of the table, of which the type is read."""
    if _is_divided(csr, how):
        total = _divide(total, csr, table.shape[0], how, pad_id)
    return total.astype(table.dtype)


def _is_divided(csr: CsrBags, how: PoolingOptions) -> bool:
    return csr.weights is not None and how.mode in ("mean", "sqrtn")


def _average(csr: CsrBags, how: PoolingOptions) -> str | None:
    unweighted = csr.weights is None and how.mode in ("mean", "sqrtn")
    return how.mode if unweighted else None


def _divide(
    total: Float[Array, "B D"],
    csr: CsrBags,
    num_embeddings: Size,
    how: PoolingOptions,
    pad_id: int | None,
) -> Float[Array, "B D"]:
    """Divide the sums by their weights' sum ("mean") or root of squares ("sqrtn")."""
    ids, offsets, weights = csr[:3]
    assert weights is not None

    def tally(
        chosen: Bool[Array, "*slots"], coefficients: Float[Array, "*slots"] | None
    ) -> Float[Array, "B 1"]:
        """Sum the coefficients of the chosen slots: a table whose one row is one."""
        one = jnp.ones((1, 1), total.dtype)
        rows = jnp.where(chosen, 0, PAD_ID)
        return _spmm.spmm(
            one,
            rows,
            offsets,
            coefficients,
            pad_id=PAD_ID,
            implementation=how.implementation,
        )

    filled = _csr.filled(ids, pad_id)
    if how.mode == "mean":
        sizes = tally(filled, weights)
    else:
        sizes = tally(filled, weights * weights)
    is_zero = sizes == 0
    divisors = jnp.where(is_zero, 1, sizes)
    if how.mode == "sqrtn":
        divisors = jnp.sqrt(divisors)
    num_out_of_range = tally(filled & ((ids < 0) | (ids >= num_embeddings)), None)
    nothing = jnp.where(num_out_of_range == 0, 0, jnp.nan)
    return jnp.where(is_zero, nothing, total / divisors)


def _occurrences(
    ids: Ids,
    offsets: Offsets,
    num_embeddings: Size,
    dtype: jnp.dtype,
    pad_id: int | None,
    implementation: str | None,
    replicas: Any,
) -> Slots:
    """Return, for each slot, how many slots name the same row, at least 1."""
    counts = _spmm.spmm_transpose(
        jnp.ones((num_bags(ids, offsets), 1), dtype),
        ids,
        offsets,
        None,
        num_embeddings=num_embeddings,
        dtype=dtype,
        pad_id=pad_id,
        implementation=implementation,
    )
    if replicas is not None:
        counts = jax.lax.psum(counts, replicas)
    return jnp.maximum(take(counts[:, 0], ids, 1), 1)

"""The pooling modes as sparse matrix products, on checked arguments.

`prepare` computes the coefficients, `combine` gathers and combines rows, and `finish`
divides weighted averages. On a mesh these steps run on different devices. Who divides,
and by what:

==============  ==============================  =======================================
mode            without weights                 with weights
==============  ==============================  =======================================
"sum"           not divided                     not divided
"mean"          the kernel: the number of       `finish`: the sum of the weights
                filled slots, at least 1
"sqrtn"         the kernel: the square root     `finish`: the square root of the sum of
                of that number                  the squared weights
"max", "min"    not divided                     not divided
==============  ==============================  =======================================

The kernel divides in `spmm`, by its option `average`. Where the divisor of `finish` is
zero, the bag is zero. `kernels/contract.py` defines what empty bags give. Derivatives
are in `_spmm.py` and `_extremum.py`.
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
from jbag.ops._extremum import extremum
from jbag.ops._factored_gradient import ONE_DEVICE, Placement
from jbag.ops._max_norm import row_scale
from jbag.ops._packed_table import AnyTable, storage
from jbag.ops._row_gather import accumulation_dtype, take
from jbag.ops._sparse_marks import mark_pooled, mark_table
from jbag.ragged import _csr_arrays
from jbag.ragged._concatenate import num_bags
from jbag.ragged._csr_arrays import OUT_OF_RANGE_ID, PAD_ID, Ids, Offsets, Size, Slots


class PoolingOptions(NamedTuple):
    """The static options of pooling."""

    mode: str = "mean"
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    implementation: str | None = None


class CsrBags(NamedTuple):
    """The sparse matrix A of the bags: its values are the weights times a scale."""

    ids: Ids
    offsets: Offsets
    weights: Slots | None = None
    value_scale: Slots | None = None  # constant; scales values only
    gradient_scale: Slots | None = None  # constant; scales the table's gradient only
    gradient_ids: Ids | None = None  # of the table's gradient; None means `ids`


@functools.partial(jax.jit, static_argnames=("pooling", "padding_idx", "sparse"))
def pool(
    table: AnyTable,
    indices: Ids,
    offsets: Offsets,
    weights: Slots | None,
    max_norm: Shaped[Array, ""] | None,
    frequencies: Slots | None = None,
    gradient_ids: Ids | None = None,
    *,
    pooling: PoolingOptions,
    padding_idx: int | None,
    sparse: bool,
) -> Float[Array, "B D"]:
    """Pool bags; with `sparse`, insert the marks of `_sparse_marks`.

    `frequencies` counts the slots of the batch that hold each slot's id; None computes
    it if it is needed. `gradient_ids` are the ids of the table's gradient, with
    `padding_idx` in slots that give none; None means `indices`. "max" and "min" take no
    `gradient_ids`.
    """
    sharding = pooled_sharding(storage(table), indices, offsets, weights)
    indices, offsets, weights, frequencies = map(
        unsharded, (indices, offsets, weights, frequencies)
    )
    csr, pad_id = prepare(
        table,
        indices,
        offsets,
        weights,
        max_norm,
        pooling=pooling,
        padding_idx=padding_idx,
        frequencies=frequencies,
        gradient_ids=unsharded(gradient_ids),
    )
    if sparse:
        table = mark_table(table)
    combined = functools.partial(combine, pooling=pooling, pad_id=pad_id)
    total, winners = partitioned(combined, sharding)(table, csr)
    if sparse:
        total = mark(
            total, unsharded(winners), table, csr, pooling=pooling, pad_id=pad_id
        )
    return finish(total, csr, table, pooling=pooling, pad_id=pad_id)


def prepare(
    table: AnyTable,
    ids: Ids,
    offsets: Offsets,
    weights: Slots | None,
    max_norm: Shaped[Array, ""] | None = None,
    *,
    pooling: PoolingOptions,
    padding_idx: int | None,
    frequencies: Slots | None = None,
    gradient_ids: Ids | None = None,
    columns: Any = None,
    replicas: Any = None,
) -> tuple[CsrBags, int | None]:
    """Return the bags with their scales, and the id of an empty slot.

    Args:
      table: [V, D].
      ids: [N] or [B, L].
      offsets: [B + 1], or None with ids [B, L].
      weights: of the shape of `ids`, or None.
      max_norm: the largest norm of a row, or None.
      pooling: the options.
      padding_idx: the id that marks padding, or None.
      frequencies: as in `pool`.
      gradient_ids: as in `pool`.
      columns: the mesh axis that shards the columns of the table.
      replicas: the mesh axis that shards the batch.
    """
    num_embeddings = table.shape[0]
    dtype = accumulation_dtype(table.dtype)
    pad_id = padding_idx
    counted = pooling.scale_grad_by_freq and frequencies is None
    if offsets is not None and (
        max_norm is not None
        or counted
        or (weights is not None and pooling.mode == "sqrtn")
    ):
        # These options read tail slots too, so tail slots are set to `PAD_ID`. The
        # tail starts at the last offset, which is the largest one. In malformed offsets
        # an earlier one may be larger: the slots before it may be in well-formed bags.
        outside = jnp.arange(ids.size, dtype=offsets.dtype) >= offsets.max()
        if padding_idx is not None:
            outside |= ids == padding_idx
        ids = jnp.where(ids < 0, OUT_OF_RANGE_ID, ids)
        ids, pad_id = jnp.where(outside, PAD_ID, ids), PAD_ID
    if weights is not None:
        weights = weights.astype(dtype)
        if pad_id is not None:
            # The weight of an empty slot may be NaN and must not reach the gradient.
            weights = jnp.where(ids == pad_id, 0, weights)
    value_scale = gradient_scale = None
    if max_norm is not None:
        value_scale = row_scale(table, ids, max_norm, pooling.norm_type, columns)
    if counted:
        frequencies = _count_ids(
            ids if gradient_ids is None else gradient_ids,
            offsets,
            num_embeddings,
            dtype,
            pad_id,
            pooling.implementation,
            replicas,
        )
    if frequencies is not None:
        gradient_scale = 1 / frequencies
    scales = value_scale, gradient_scale
    return CsrBags(ids, offsets, weights, *scales, gradient_ids), pad_id


def combine(
    table: AnyTable,
    csr: CsrBags,
    *,
    pooling: PoolingOptions,
    pad_id: int | None,
) -> tuple[Float[Array, "B D"], Int[Array, "B D"] | None]:
    """Combine the rows of each bag; in "max" and "min", return the winning slots too.

    Sums that `finish` divides are in the accumulation dtype.
    """
    options: dict[str, Any] = {
        "pad_id": pad_id,
        "implementation": pooling.implementation,
    }
    if pooling.mode in ("max", "min"):
        return extremum(table, *csr[:5], largest=pooling.mode == "max", **options)
    if not _is_divided(csr, pooling):
        options |= {"average": _average(csr, pooling), "dtype": table.dtype}
    return _spmm.spmm_scaled(table, *csr, **options), None


def mark(
    total: Float[Array, "B D"],
    winners: Int[Array, "B D"] | None,
    table: AnyTable,
    csr: CsrBags,
    *,
    pooling: PoolingOptions,
    pad_id: int | None,
    placement: Placement = ONE_DEVICE,
) -> Float[Array, "B D"]:
    """Insert a mark with the factors of the table's gradient."""
    ids, offsets, coefficients, options = transposed(csr, pooling, pad_id)
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
    csr: CsrBags, pooling: PoolingOptions, pad_id: int | None
) -> tuple[Ids, Offsets, Slots | None, dict[str, Any]]:
    """Return ids, offsets and coefficients of the table's gradient, and its options."""
    coefficients = _spmm.times(csr.weights, csr.gradient_scale)
    options = {
        "average": _average(csr, pooling),
        "pad_id": pad_id,
        "implementation": pooling.implementation,
    }
    ids = csr.ids if csr.gradient_ids is None else csr.gradient_ids
    return ids, csr.offsets, coefficients, options


def finish(
    total: Float[Array, "B D"],
    csr: CsrBags,
    table: AnyTable,
    *,
    pooling: PoolingOptions,
    pad_id: int | None,
) -> Float[Array, "B D"]:
    """Return the pooled bags in the dtype of `table`; read its shape and dtype only."""
    if _is_divided(csr, pooling):
        total = _divide(total, csr, table.shape[0], pooling, pad_id)
    return total.astype(table.dtype)


def _is_divided(csr: CsrBags, pooling: PoolingOptions) -> bool:
    """Return whether `finish` divides."""
    return csr.weights is not None and pooling.mode in ("mean", "sqrtn")


def _average(csr: CsrBags, pooling: PoolingOptions) -> str | None:
    """Return the average that the kernel computes; None if it doesn't divide."""
    unweighted = csr.weights is None and pooling.mode in ("mean", "sqrtn")
    return pooling.mode if unweighted else None


def _divide(
    total: Float[Array, "B D"],
    csr: CsrBags,
    num_embeddings: Size,
    pooling: PoolingOptions,
    pad_id: int | None,
) -> Float[Array, "B D"]:
    r"""Divide by the sum of the weights, or by :math:`\sqrt{\sum w^2}` in "sqrtn"."""
    ids, offsets, weights = csr[:3]
    assert weights is not None

    def sum_slots(
        mask: Bool[Array, "*slots"], coefficients: Float[Array, "*slots"] | None
    ) -> Float[Array, "B 1"]:
        """Sum the coefficients of the masked slots of each bag."""
        one = jnp.ones((1, 1), total.dtype)
        rows = jnp.where(mask, 0, PAD_ID)
        return _spmm.spmm(
            one,
            rows,
            offsets,
            coefficients,
            pad_id=PAD_ID,
            implementation=pooling.implementation,
        )

    filled = _csr_arrays.filled(ids, pad_id)
    if pooling.mode == "mean":
        sums = sum_slots(filled, weights)
    else:
        sums = sum_slots(filled, weights * weights)
    is_zero = sums == 0
    divisors = jnp.where(is_zero, 1, sums)
    if pooling.mode == "sqrtn":
        divisors = jnp.sqrt(divisors)
    num_out_of_range = sum_slots(filled & ((ids < 0) | (ids >= num_embeddings)), None)
    empty = jnp.where(num_out_of_range == 0, 0, jnp.nan)
    return jnp.where(is_zero, empty, total / divisors)


def _count_ids(
    ids: Ids,
    offsets: Offsets,
    num_embeddings: Size,
    dtype: jnp.dtype,
    pad_id: int | None,
    implementation: str | None,
    replicas: Any,
) -> Slots:
    """Count, for each slot, the slots with the same id; at least 1."""
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

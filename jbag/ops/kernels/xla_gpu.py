"""The operations as XLA compiles them well for GPUs: sums by pieces, without atomics.

`contract` defines the operations. `jax.ops.segment_sum` becomes atomic additions there:
in some versions compare-and-swap loops, and never the same bits twice. Here bags are
reduced as `segment_reductions` does it. `spmm_transpose` and `coalesce` sort the slots
by id first, by 32-bit keys, for which XLA has a radix sort.

Memory traffic: a row is read once; pieces write and read at most one row for 4 slots.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jbag.ops._row_gather import accumulation_dtype, take
from jbag.ops.kernels import xla
from jbag.ops.kernels.segment_reductions import (
    SUM,
    Read,
    Reduction,
    Terms,
    count_up_to,
    reduce_few,
    reduce_segments,
    take_slots,
)
from jbag.ragged._csr_arrays import (
    Ids,
    Offsets,
    Size,
    Slots,
    bag_bounds,
    filled,
)


def spmm(
    table: Float[Array, "V D"],
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    *,
    pad_id: int | None,
    average: str | None,
    dtype: jnp.dtype,
) -> Float[Array, "B D"]:
    """Compute `contract.Operations.spmm`."""
    options: dict[str, Any] = {"pad_id": pad_id, "average": average}
    if not _is_static(ids, offsets):
        return xla.spmm(table, ids, offsets, coefficients, dtype=dtype, **options)
    read = _weighted_rows(table, ids, coefficients, pad_id, 0.0)
    (out,), malformed = _reduce_bags(lambda i: (read(i),), ids, offsets, SUM)
    if malformed is not None:
        out = jnp.where(malformed[:, None], jnp.nan, out)
    if average is not None:
        out /= xla.divisors(spmm, ids, offsets, out.dtype, **options)
    return out.astype(dtype)


def spmm_transpose(
    cotangent: Float[Array, "B D"],
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    *,
    pad_id: int | None,
    num_embeddings: Size,
    dtype: jnp.dtype,
) -> Float[Array, "V D"]:
    """Compute `contract.Operations.spmm_transpose`."""
    operands = (cotangent, ids, offsets, coefficients)
    options: dict[str, Any] = {"pad_id": pad_id, "num_embeddings": num_embeddings}
    if not _is_static(ids, offsets, num_embeddings):
        return xla.spmm_transpose(*operands, dtype=dtype, **options)
    return xla.coalesce_and_store(coalesce, *operands, dtype=dtype, **options)


sddmm = xla.sddmm


def extremum(
    table: Float[Array, "V D"],
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    *,
    pad_id: int | None,
    largest: bool,
) -> tuple[Float[Array, "B D"], Int[Array, "B D"]]:
    """Compute `contract.Operations.extremum`."""
    if not _is_static(ids, offsets):
        options: dict[str, Any] = {"pad_id": pad_id, "largest": largest}
        return xla.extremum(table, ids, offsets, coefficients, **options)
    none = ids.size
    worst = -jnp.inf if largest else jnp.inf
    read = _weighted_rows(table, ids, coefficients, pad_id, worst)
    present = filled(ids, pad_id).reshape(-1)

    def candidates(slots: Int[Array, "*slots"]) -> Terms:
        values = read(slots)
        own = jnp.where(take_slots(present, slots), slots, none)
        return values, jnp.broadcast_to(own[..., None], values.shape)

    def better(a: Terms, b: Terms) -> Terms:
        (x, i), (y, j) = a, b
        is_first = (x > y if largest else x < y) | (jnp.isnan(x) & ~jnp.isnan(y))
        is_equal = (x == y) | (jnp.isnan(x) & jnp.isnan(y))
        is_first |= is_equal & (i < j)
        return jnp.where(is_first, x, y), jnp.where(is_first, i, j)

    best = Reduction((worst, none), better)
    (values, winners), malformed = _reduce_bags(candidates, ids, offsets, best)
    values = jnp.where(winners == none, 0, values)
    if malformed is not None:
        values = jnp.where(malformed[:, None], jnp.nan, values)
        winners = jnp.where(malformed[:, None], none, winners)
    return values, winners


def coalesce(
    cotangent: Float[Array, "B D"],
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    *,
    pad_id: int | None,
    num_embeddings: Size,
    max_unique_ids: Size,
) -> tuple[Int[Array, " U"], Float[Array, "U D"]]:
    """Compute `contract.Operations.coalesce`."""
    if not _is_static(ids, offsets, max_unique_ids):
        return xla.coalesce(
            cotangent,
            ids,
            offsets,
            coefficients,
            pad_id=pad_id,
            num_embeddings=num_embeddings,
            max_unique_ids=max_unique_ids,
        )
    slots = jnp.arange(ids.size, dtype=jnp.int32)
    if offsets is None:
        bags, kept = slots // max(ids.shape[1], 1), jnp.ones(ids.size, bool)
    else:
        bounds, malformed = bag_bounds(offsets, ids.size)
        bags = count_up_to(bounds[1:].astype(jnp.int32), ids.size)
        kept = ~take(malformed, bags, True)
    kept &= filled(ids, pad_id).reshape(-1)
    keys = xla.sort_keys(ids.reshape(-1), kept, num_embeddings)
    keys, order = jax.lax.sort((keys, slots), num_keys=1)
    bags = take_slots(bags, order)
    scale = (
        None if coefficients is None else take_slots(coefficients.reshape(-1), order)
    )

    def terms(slots: Int[Array, "*slots"]) -> Terms:
        rows = take(cotangent, take_slots(bags, slots), 0)
        return (rows if scale is None else take_slots(scale, slots)[..., None] * rows,)

    is_first = (jnp.diff(keys, prepend=-1) > 0) & (keys < num_embeddings)
    rank = jnp.where(is_first, jnp.cumsum(is_first) - 1, max_unique_ids + 1)
    num_slots = (keys < num_embeddings).sum(dtype=jnp.int32)
    starts = jnp.full(max_unique_ids + 1, num_slots).at[rank].set(slots, mode="drop")
    indices = take(
        keys, jnp.where(starts < num_slots, starts, ids.size), num_embeddings
    )
    indices = indices[:-1].astype(ids.dtype)
    (sums,) = reduce_segments(terms, starts, ids.size, SUM)
    return indices, sums


update_rows = functools.partial(xla.update_rows, coalesce=coalesce)


def _is_static(ids: Ids, offsets: Offsets, *sizes: Size) -> bool:
    """Return whether sizes are known, as they aren't in some exported programs."""
    shape = ids.shape if offsets is None else ids.shape + offsets.shape
    return all(isinstance(size, int) for size in (*shape, *sizes))


def _weighted_rows(
    table: Float[Array, "V D"],
    ids: Ids,
    coefficients: Slots | None,
    pad_id: int | None,
    empty: float,
) -> Callable[[Int[Array, "*slots"]], Float[Array, "*slots D"]]:
    """Return the function from slots to c[i] * table[ids[i]], or `empty`."""
    ids = ids.reshape(-1)

    def read(slots: Int[Array, "*slots"]) -> Float[Array, "*slots D"]:
        chosen = take_slots(ids, slots)
        rows = take(table, chosen, jnp.nan).astype(accumulation_dtype(table.dtype))
        if coefficients is not None:
            rows = take_slots(coefficients.reshape(-1), slots)[..., None] * rows
        return jnp.where(filled(chosen, pad_id)[..., None], rows, empty)

    return read


def _reduce_bags(
    read: Read, ids: Ids, offsets: Offsets, reduction: Reduction
) -> tuple[Terms, Bool[Array, " B"] | None]:
    """Reduce the terms of each bag; mask malformed bags."""
    if offsets is None:
        num_bags, length = ids.shape
        starts = jnp.arange(num_bags, dtype=jnp.int32) * length
        return reduce_few(read, starts, None, length, ids.size, reduction), None
    bounds, malformed = bag_bounds(offsets, ids.size)
    bounds = bounds.astype(jnp.int32)
    return reduce_segments(read, bounds, ids.size, reduction), malformed

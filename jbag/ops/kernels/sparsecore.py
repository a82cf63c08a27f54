"""The kernel for the SparseCores of TPUs (v5p, v6e and later), in Pallas.

It implements `contract`: sums and extrema of bags, and sums over the slots sorted by
id, by `sparsecore_chunks`. XLA sorts, and computes the bag of each slot. Results have
the same bits from run to run. `sddmm` is the reference's: XLA gathers rows on the
SparseCores by itself.

Tables are float32 or bfloat16. An array is read in place if D is a multiple of 128; a
`PackedTable` of one block, if D is a multiple of 16 or a line has one row. Others are
copied in every call.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jbag.ops._packed_table import AnyTable, PackedTable, storage
from jbag.ops._row_gather import take
from jbag.ops.kernels import sparsecore_chunks as on_chip
from jbag.ops.kernels import sparsecore_gather_add as gather_add
from jbag.ops.kernels import xla
from jbag.ops.kernels.sparsecore_chunks import (
    MAX,
    MIN,
    MIN_LANES,
    SUM,
    Lines,
    chunks,
    lines_of,
    packed_lines,
    plan_for,
)
from jbag.ragged._csr_arrays import (
    Ids,
    Offsets,
    Size,
    Slots,
    bag_bounds,
    filled,
    segment_ids,
)


def spmm(
    table: AnyTable,
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    *,
    pad_id: int | None,
    average: str | None,
    dtype: jnp.dtype,
) -> Float[Array, "B D"]:
    """Compute `contract.Operations.spmm`."""
    _check(table, ids, offsets)
    options: dict[str, Any] = {"pad_id": pad_id, "average": average}
    # Counts and sums of weights have a table of one number, which every slot would
    # gather from the same place.
    if table.shape == (1, 1) or not _has_work(table, ids, offsets):
        return xla.spmm(table, ids, offsets, coefficients, dtype=dtype, **options)
    lines, kept = _lines_of(table), filled(ids, pad_id)
    malformed = None
    if offsets is None and coefficients is None and gather_add.takes(lines):
        out = _sum_rows(lines, ids, kept)
    else:
        bags, is_filled, malformed = _bags(ids, offsets)
        scale = None if coefficients is None else coefficients.reshape(-1)
        flat, kept = ids.reshape(-1), kept.reshape(-1)
        out = _sum_segments(lines, flat, bags, kept, scale, is_filled)
    out = out[:, : table.shape[1]]
    if malformed is not None:
        out = jnp.where(malformed[:, None], jnp.nan, out)
    if average is not None:
        out /= xla.divisors(xla.spmm, ids, offsets, out.dtype, **options)
    return out.astype(dtype)


# XLA's gathers run on the SparseCores, and the TensorCore multiplies.
sddmm = xla.sddmm


def extremum(
    table: AnyTable,
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    *,
    pad_id: int | None,
    largest: bool,
) -> tuple[Float[Array, "B D"], Int[Array, "B D"]]:
    """Compute `contract.Operations.extremum`."""
    _check(table, ids, offsets)
    if not _has_work(table, ids, offsets):
        return xla.extremum(
            table, ids, offsets, coefficients, pad_id=pad_id, largest=largest
        )
    none, width = ids.size, table.shape[1]
    bags, is_filled, malformed = _bags(ids, offsets)
    num_bags = is_filled.size
    lines = _lines_of(table)
    plan = plan_for(lines, MAX if largest else MIN)
    slots, first, continues = chunks(
        lines,
        ids.reshape(-1),
        bags,
        filled(ids, pad_id).reshape(-1),
        None if coefficients is None else coefficients.reshape(-1),
        num_bags,
        plan.chunk,
    )
    results = on_chip.reduce_chunks(lines, slots, num_bags + first.size, plan)
    values, winners = (x[:, :width] for x in results)
    # The chunks end with slots of no bag.
    winners = jnp.minimum(winners, none)

    # The best of the parts of each bag in later chunks. All features of a part have a
    # winner, or none has.
    parts, part_winners = values[num_bags:], winners[num_bags:]
    numbers = jnp.arange(first.size, dtype=jnp.int32)
    has_winner = continues & (part_winners[:, 0] < none)
    bounds = jnp.searchsorted(first, jnp.arange(num_bags + 1, dtype=first.dtype))
    later, part = xla.extremum(
        parts,
        jnp.where(has_winner, numbers, -1),
        bounds.astype(jnp.int32),
        None,
        pad_id=-1,
        largest=largest,
    )
    features = jnp.arange(width, dtype=jnp.int32)
    later_winners = part_winners.at[part, features].get(mode="fill", fill_value=none)

    winners = jnp.where(is_filled[:, None], winners[:num_bags], none)
    values = values[:num_bags]
    better = later > values if largest else later < values
    better |= jnp.isnan(later) & ~jnp.isnan(values)
    better = (later_winners < none) & (better | (winners == none))
    values = jnp.where(better, later, values)
    winners = jnp.where(better, later_winners, winners)
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
    _check(cotangent, ids, offsets, num_embeddings, max_unique_ids)
    if max_unique_ids == 0 or not _has_work(cotangent, ids, offsets):
        return xla.coalesce(
            cotangent,
            ids,
            offsets,
            coefficients,
            pad_id=pad_id,
            num_embeddings=num_embeddings,
            max_unique_ids=max_unique_ids,
        )
    bags, _, malformed = _bags(ids, offsets)
    kept = filled(ids, pad_id).reshape(-1)
    if malformed is not None:
        kept &= ~take(malformed, bags, True)
    keys = xla.sort_keys(ids.reshape(-1), kept, num_embeddings)
    keys, order = jax.lax.sort(
        (keys, jnp.arange(ids.size, dtype=jnp.int32)), num_keys=1
    )
    scale = None if coefficients is None else coefficients.reshape(-1)[order]

    is_first = jnp.diff(keys, prepend=-1) > 0
    rank = jnp.minimum(jnp.cumsum(is_first) - 1, max_unique_ids)
    kept = keys < num_embeddings
    position = jnp.where(kept, rank, max_unique_ids).astype(jnp.int32)
    indices = jnp.full(max_unique_ids, num_embeddings, ids.dtype)
    indices = indices.at[position].set(keys.astype(ids.dtype), mode="drop")
    sums = _sum_segments(
        lines_of(cotangent),
        bags[order],
        position,
        kept,
        scale,
        indices < num_embeddings,
    )
    return indices, sums[:, : cotangent.shape[1]].astype(cotangent.dtype)


spmm_transpose = functools.partial(xla.coalesce_and_store, coalesce)
update_rows = functools.partial(xla.update_rows, coalesce=coalesce)


def _check(dense: AnyTable, ids: Ids, offsets: Offsets, *sizes: Size) -> None:
    """Raise if the kernel doesn't take a dtype or a symbolic size."""
    if dense.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(
            "`implementation` 'sparsecore' takes tables of float32 and bfloat16; got "
            f"{dense.dtype}."
        )
    shapes = (*dense.shape, *ids.shape, *(() if offsets is None else offsets.shape))
    if not all(isinstance(size, int) for size in (*shapes, *sizes)):
        raise ValueError("`implementation` 'sparsecore' takes no symbolic sizes.")


def _lines_of(table: AnyTable) -> Lines:
    """Return the rows of a table."""
    if isinstance(table, PackedTable):
        packing = table.packing
        if packing.num_blocks == 1 and packing.rows_per_line == 1:
            return Lines(table.lines, packing.num_embeddings, packing.width)
        if packing.num_blocks == 1 and packing.features % MIN_LANES == 0:
            return packed_lines(table.lines, *packing[:2])
        table = packing.unpack(table.lines)
    return lines_of(table)


def _has_work(dense: AnyTable, ids: Ids, offsets: Offsets) -> bool:
    """Return whether there are rows, slots and bags."""
    num_bags = ids.shape[0] if offsets is None else offsets.size - 1
    return storage(dense).size > 0 and ids.size > 0 and num_bags > 0


def _bags(
    ids: Ids, offsets: Offsets
) -> tuple[Int[Array, " N"], Bool[Array, " B"], Bool[Array, " B"] | None]:
    """Return the bag of each slot, the bags with slots, and the malformed ones."""
    if offsets is None:
        num_bags, length = ids.shape
        bags = jnp.arange(ids.size, dtype=jnp.int32) // length
        return bags, jnp.ones(num_bags, bool), None
    bounds, malformed = bag_bounds(offsets, ids.size)
    return segment_ids(bounds, ids.size), jnp.diff(bounds) > 0, malformed


def _sum_rows(
    lines: Lines, ids: Int[Array, "B L"], kept: Bool[Array, "B L"]
) -> Float[Array, "B lanes"]:
    """Sum the rows of rectangular bags without coefficients."""
    rows, bags, is_nan = gather_add.steps(lines, ids, kept)
    sums = gather_add.add_rows(lines, rows, bags, ids.shape[0])
    return jnp.where(is_nan[:, None], jnp.nan, sums)


def _sum_segments(
    lines: Lines,
    rows: Int[Array, " N"],
    segments: Int[Array, " N"],
    kept: Bool[Array, " N"],
    coefficients: Float[Array, " N"] | None,
    has_slots: Bool[Array, " S"],
) -> Float[Array, "S lanes"]:
    """Sum c[i] * row of slot i over the slots of each sorted segment."""
    num_segments = has_slots.size
    plan = plan_for(lines, SUM)
    slots, first, continues = chunks(
        lines, rows, segments, kept, coefficients, num_segments, plan.chunk
    )
    (out,) = on_chip.reduce_chunks(lines, slots, num_segments + first.size, plan)
    sums = jnp.where(has_slots[:, None], out[:num_segments], 0)
    parts = jnp.where(continues[:, None], out[num_segments:], 0)
    return sums.at[first].add(parts, mode="drop", indices_are_sorted=True)

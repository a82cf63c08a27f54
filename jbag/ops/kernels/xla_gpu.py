"""The operations as XLA compiles them well for GPUs: sums by pieces, without atomics.

`contract` defines the operations. `jax.ops.segment_sum` becomes atomic additions there:
in some versions compare-and-swap loops, and never the same bits twice. Here each bag is
the sum of its first slots and of pieces of a fixed number of slots, each read by one
thread per feature, and pieces are summed in the same way. `spmm_transpose` and
`coalesce` sort the slots by id first, by 32-bit keys, for which XLA has a radix sort.

Memory traffic: a row is read once; pieces write and read at most one row for 4 slots.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from jbag.ops._row_gather import accumulation_dtype, take
from jbag.ops.kernels import xla
from jbag.ragged._csr_arrays import (
    Ids,
    Offsets,
    Size,
    Slots,
    bag_bounds,
    filled,
)

# Arrays [*slots, D]: the terms of a sum, or values and the slots that hold them.
Terms = tuple[Array, ...]
Read = Callable[[Int[Array, "*slots"]], Terms]

# XLA reduces an axis of up to 31 in the loop of one thread, with many loads in flight.
# It transposes a longer one first, which needs an [N, D] array.
_PIECE = 16
# Up to so many terms of all segments are read without a division into pieces.
_FEW = 2**16


@dataclasses.dataclass(frozen=True)
class Reduction:
    """A commutative monoid over terms: its identity, and the combination of two."""

    identity: tuple[Any, ...]
    combine: Callable[[Terms, Terms], Terms]


SUM = Reduction((0.0,), lambda a, b: (a[0] + b[0],))


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
    max_unique_ids = min(ids.size, num_embeddings)
    indices, sums = coalesce(*operands, max_unique_ids=max_unique_ids, **options)
    out = jnp.zeros((num_embeddings, cotangent.shape[1]), dtype)
    return xla.set_rows(out, indices, sums.astype(dtype))


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
        own = jnp.where(_at(present, slots), slots, none)
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
        bags = _count_up_to(bounds[1:].astype(jnp.int32), ids.size)
        kept = ~take(malformed, bags, True)
    kept &= filled(ids, pad_id).reshape(-1)
    keys = xla.sort_keys(ids.reshape(-1), kept, num_embeddings)
    keys, order = jax.lax.sort((keys, slots), num_keys=1)
    bags = _at(bags, order)
    scale = None if coefficients is None else _at(coefficients.reshape(-1), order)

    def terms(slots: Int[Array, "*slots"]) -> Terms:
        rows = take(cotangent, _at(bags, slots), 0)
        return (rows if scale is None else _at(scale, slots)[..., None] * rows,)

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


def update_rows(
    table: Float[Array, "V D"],
    states: tuple[Array, ...],
    scalars: Float[Array, " H"],
    seed: UInt32[Array, "2"] | None,
    cotangent: Float[Array, "B D"],
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    *,
    pad_id: int | None,
    rule: str,
) -> tuple[Array, ...]:
    """Compute `contract.Operations.update_rows`."""
    num_embeddings = table.shape[0]
    indices, gradient = coalesce(
        cotangent,
        ids,
        offsets,
        coefficients,
        pad_id=pad_id,
        num_embeddings=num_embeddings,
        max_unique_ids=min(ids.size, num_embeddings),
    )
    return xla.update_unique_rows(
        table, states, scalars, seed, indices, gradient, rule=rule
    )


def _is_static(ids: Ids, offsets: Offsets, *sizes: Size) -> bool:
    """Return whether sizes are known, as they aren't in some exported programs."""
    shape = ids.shape if offsets is None else ids.shape + offsets.shape
    return all(isinstance(size, int) for size in (*shape, *sizes))


def _at(x: Array, slots: Int[Array, "*slots"]) -> Array:
    """Gather from x at slots in bounds; zeros if it has none."""
    if x.shape[0] == 0:
        return jnp.zeros((*slots.shape, *x.shape[1:]), x.dtype)
    return x.at[slots].get(mode="promise_in_bounds")


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
        chosen = _at(ids, slots)
        rows = take(table, chosen, jnp.nan).astype(accumulation_dtype(table.dtype))
        if coefficients is not None:
            rows = _at(coefficients.reshape(-1), slots)[..., None] * rows
        return jnp.where(filled(chosen, pad_id)[..., None], rows, empty)

    return read


def _reduce_bags(
    read: Read, ids: Ids, offsets: Offsets, reduction: Reduction
) -> tuple[Terms, Bool[Array, " B"] | None]:
    """Reduce the terms of each bag; mask malformed bags."""
    if offsets is None:
        num_bags, length = ids.shape
        starts = jnp.arange(num_bags, dtype=jnp.int32) * length
        return _reduce_few(read, starts, None, length, ids.size, reduction), None
    bounds, malformed = bag_bounds(offsets, ids.size)
    bounds = bounds.astype(jnp.int32)
    return reduce_segments(read, bounds, ids.size, reduction), malformed


def reduce_segments(
    read: Read, bounds: Int[Array, " ends"], capacity: int, reduction: Reduction
) -> Terms:
    """Reduce the terms read(bounds[m]), ..., read(bounds[m + 1] - 1) for each m.

    The bounds are non-decreasing, in [0, capacity]. Each segment is its first terms, a
    few pieces of 16 terms, and if it is very long, more pieces. Where a number of terms
    isn't known, the shapes have room for the most.
    """
    starts, counts = bounds[:-1], jnp.diff(bounds)
    num_segments = starts.size
    if num_segments * capacity <= _FEW:
        return _reduce_few(read, starts, counts, capacity, capacity, reduction)
    head = _twice_the_mean(capacity, num_segments)
    out = _reduce_few(read, starts, counts, head, capacity, reduction)

    max_pieces = capacity // _PIECE + min(num_segments, capacity // (head + 1))
    num_pieces = jnp.maximum(counts - head + _PIECE - 1, 0) // _PIECE
    piece_head = _twice_the_mean(max_pieces, num_segments)
    is_very_long = num_pieces > piece_head
    ends, ranks = jnp.cumsum(
        jnp.stack([num_pieces, is_very_long.astype(jnp.int32)]), axis=1
    )

    owners = jnp.minimum(_count_up_to(ends, max_pieces), num_segments - 1)
    first_pieces = ends - num_pieces
    done = jnp.arange(max_pieces, dtype=jnp.int32) - _at(first_pieces, owners)
    done = head + _PIECE * done
    pieces = _reduce_few(
        read,
        _at(starts, owners) + done,
        _at(counts, owners) - done,
        _PIECE,
        capacity,
        reduction,
    )
    read_piece = functools.partial(_read_from, pieces)
    some = _reduce_few(
        read_piece, first_pieces, num_pieces, piece_head, max_pieces, reduction
    )
    out = reduction.combine(out, some)

    max_very_long = capacity // (head + _PIECE * piece_head + 1)
    if not max_very_long:
        return out
    very_long = jnp.minimum(_count_up_to(ranks, max_very_long), num_segments - 1)
    rest = _reduce_ranges(
        pieces,
        _at(first_pieces, very_long) + piece_head,
        _at(ends, very_long),
        reduction,
    )
    rank = jnp.where(is_very_long, ranks - 1, 0)
    rest = tuple(
        jnp.where(is_very_long[:, None], _at(x, rank), jnp.asarray(identity, x.dtype))
        for x, identity in zip(rest, reduction.identity, strict=True)
    )
    return reduction.combine(out, rest)


def _twice_the_mean(capacity: int, num_segments: int) -> int:
    """Return how many terms of a segment to read first."""
    return min(max(4, 2 * capacity // num_segments), _PIECE)


def _count_up_to(ends: Int[Array, " M"], size: int) -> Int[Array, " size"]:
    """Return for each i < size the number of ends that are at most i.

    The ends are sorted: these are the segments of i, by one kernel.
    """
    return jnp.searchsorted(
        ends, jnp.arange(size, dtype=ends.dtype), side="right", method="scan_unrolled"
    ).astype(jnp.int32)


def _reduce_ranges(
    terms: Terms, starts: Int[Array, " M"], ends: Int[Array, " M"], reduction: Reduction
) -> Terms:
    """Reduce the terms starts[m], ..., ends[m] - 1 for each m, by a tree of blocks."""
    size = terms[0].shape[0]
    read = functools.partial(_read_from, terms)
    if size <= 2 * _PIECE:
        return _reduce_few(read, starts, ends - starts, size, size, reduction)
    # The terms up to a block, and those after the last.
    block_start = jnp.minimum(-(-starts // _PIECE), ends // _PIECE)
    first = jnp.minimum(-(-starts // _PIECE) * _PIECE, jnp.maximum(ends, starts))
    last = jnp.maximum(ends // _PIECE * _PIECE, first)
    out = reduction.combine(
        _reduce_few(read, starts, first - starts, _PIECE, size, reduction),
        _reduce_few(read, last, ends - last, _PIECE, size, reduction),
    )
    num_blocks = size // _PIECE
    every = jnp.arange(num_blocks, dtype=jnp.int32) * _PIECE
    blocks = _reduce_few(read, every, None, _PIECE, size, reduction)
    inner = _reduce_ranges(blocks, block_start, ends // _PIECE, reduction)
    return reduction.combine(out, inner)


def _read_from(terms: Terms, slots: Int[Array, "*slots"]) -> Terms:
    return tuple(_at(x, slots) for x in terms)


def _reduce_few(
    read: Read,
    starts: Int[Array, " M"],
    counts: Int[Array, " M"] | None,
    length: int,
    capacity: int,
    reduction: Reduction,
) -> Terms:
    """Reduce the first min(counts[m], length) terms from starts[m] on for each m.

    Without counts there are `length` terms for each m. XLA makes one loop of it.
    """
    outer = 1 if length < 2 * _PIECE else -(-length // _PIECE)
    inner = -(-length // outer)
    steps = jnp.arange(outer * inner, dtype=jnp.int32).reshape(outer, inner)
    is_term = jnp.broadcast_to(steps < length, (starts.size, outer, inner))
    if counts is not None:
        is_term &= steps < counts[:, None, None]
    # Where there is no term, the first one is read, which is in the cache.
    slots = starts[:, None, None] + jnp.where(is_term, steps, 0)
    terms = read(jnp.clip(slots, 0, max(capacity - 1, 0)))
    terms = tuple(
        jnp.where(is_term[..., None], x, jnp.asarray(identity, x.dtype))
        for x, identity in zip(terms, reduction.identity, strict=True)
    )
    terms = _reduce_axis(terms, 2, reduction)
    # XLA would make one reduction of two. This changes no number, and keeps them apart.
    terms = tuple(
        jax.lax.reduce_precision(x, jnp.finfo(x.dtype).nexp, jnp.finfo(x.dtype).nmant)
        if jnp.issubdtype(x.dtype, jnp.floating)
        else x
        for x in terms
    )
    return _reduce_axis(terms, 1, reduction)


def _reduce_axis(terms: Terms, axis: int, reduction: Reduction) -> Terms:
    identity = tuple(
        jnp.asarray(value, x.dtype)
        for x, value in zip(terms, reduction.identity, strict=True)
    )
    return jax.lax.reduce(terms, identity, reduction.combine, (axis,))

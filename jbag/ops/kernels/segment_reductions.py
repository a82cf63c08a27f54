"""Reductions of sorted segments, as XLA compiles them well for GPUs.

A segment is its first terms, a few pieces of 16 terms and, if it is very long, a tree
of blocks of pieces: loops of one thread per feature, without atomics, with the same
bits from run to run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

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


def take_slots(x: Array, slots: Int[Array, "*slots"]) -> Array:
    """Gather from x at slots in bounds; zeros if it has none."""
    if x.shape[0] == 0:
        return jnp.zeros((*slots.shape, *x.shape[1:]), x.dtype)
    return x.at[slots].get(mode="promise_in_bounds")


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
        return reduce_few(read, starts, counts, capacity, capacity, reduction)
    head = _twice_the_mean(capacity, num_segments)
    out = reduce_few(read, starts, counts, head, capacity, reduction)

    max_pieces = capacity // _PIECE + min(num_segments, capacity // (head + 1))
    num_pieces = jnp.maximum(counts - head + _PIECE - 1, 0) // _PIECE
    piece_head = _twice_the_mean(max_pieces, num_segments)
    is_very_long = num_pieces > piece_head
    ends, ranks = jnp.cumsum(
        jnp.stack([num_pieces, is_very_long.astype(jnp.int32)]), axis=1
    )

    owners = jnp.minimum(count_up_to(ends, max_pieces), num_segments - 1)
    first_pieces = ends - num_pieces
    done = jnp.arange(max_pieces, dtype=jnp.int32) - take_slots(first_pieces, owners)
    done = head + _PIECE * done
    pieces = reduce_few(
        read,
        take_slots(starts, owners) + done,
        take_slots(counts, owners) - done,
        _PIECE,
        capacity,
        reduction,
    )
    read_piece = functools.partial(_read_from, pieces)
    some = reduce_few(
        read_piece, first_pieces, num_pieces, piece_head, max_pieces, reduction
    )
    out = reduction.combine(out, some)

    max_very_long = capacity // (head + _PIECE * piece_head + 1)
    if not max_very_long:
        return out
    very_long = jnp.minimum(count_up_to(ranks, max_very_long), num_segments - 1)
    rest = _reduce_ranges(
        pieces,
        take_slots(first_pieces, very_long) + piece_head,
        take_slots(ends, very_long),
        reduction,
    )
    rank = jnp.where(is_very_long, ranks - 1, 0)
    rest = _where(is_very_long, _read_from(rest, rank), reduction)
    return reduction.combine(out, rest)


def _twice_the_mean(capacity: int, num_segments: int) -> int:
    """Return how many terms of a segment to read first."""
    return min(max(4, 2 * capacity // num_segments), _PIECE)


def count_up_to(ends: Int[Array, " M"], size: int) -> Int[Array, " size"]:
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
        return reduce_few(read, starts, ends - starts, size, size, reduction)
    # The terms up to a block, and those after the last.
    block_start = jnp.minimum(-(-starts // _PIECE), ends // _PIECE)
    first = jnp.minimum(-(-starts // _PIECE) * _PIECE, jnp.maximum(ends, starts))
    last = jnp.maximum(ends // _PIECE * _PIECE, first)
    out = reduction.combine(
        reduce_few(read, starts, first - starts, _PIECE, size, reduction),
        reduce_few(read, last, ends - last, _PIECE, size, reduction),
    )
    num_blocks = size // _PIECE
    every = jnp.arange(num_blocks, dtype=jnp.int32) * _PIECE
    blocks = reduce_few(read, every, None, _PIECE, size, reduction)
    inner = _reduce_ranges(blocks, block_start, ends // _PIECE, reduction)
    return reduction.combine(out, inner)


def _read_from(terms: Terms, slots: Int[Array, "*slots"]) -> Terms:
    return tuple(take_slots(x, slots) for x in terms)


def reduce_few(
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
    terms = _reduce_axis(_where(is_term, terms, reduction), 2, reduction)
    # XLA would make one reduction of two. This changes no number, and keeps them apart.
    terms = tuple(
        jax.lax.reduce_precision(x, jnp.finfo(x.dtype).nexp, jnp.finfo(x.dtype).nmant)
        if jnp.issubdtype(x.dtype, jnp.floating)
        else x
        for x in terms
    )
    return _reduce_axis(terms, 1, reduction)


def _where(mask: Bool[Array, "*slots"], terms: Terms, reduction: Reduction) -> Terms:
    """Return the terms where the mask is set, the identity elsewhere."""
    return tuple(
        jnp.where(mask[..., None], x, jnp.asarray(identity, x.dtype))
        for x, identity in zip(terms, reduction.identity, strict=True)
    )


def _reduce_axis(terms: Terms, axis: int, reduction: Reduction) -> Terms:
    identity = tuple(
        jnp.asarray(value, x.dtype)
        for x, value in zip(terms, reduction.identity, strict=True)
    )
    return jax.lax.reduce(terms, identity, reduction.combine, (axis,))

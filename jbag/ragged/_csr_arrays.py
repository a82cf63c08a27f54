"""CSR arrays of bags: ids, offsets and coefficients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

# The axes `*slots` are [N] or [B, L], and `ends` is B + 1.
# A size is an int, or symbolic under `jax.export`.
Size = Any
Ids = Int[Array, "*slots"]
Offsets = Int[Array, " ends"] | None
Slots = Float[Array, "*slots"]

# The canonical ids of an empty slot, and of an id outside [0, V).
PAD_ID = -1
OUT_OF_RANGE_ID = -2


def filled(ids: Ids, pad_id: int | None) -> Bool[Array, "*slots"]:
    """Mask the slots that are not empty."""
    return jnp.ones(ids.shape, bool) if pad_id is None else ids != pad_id


def bag_bounds(
    offsets: Int[Array, " ends"], capacity: Size
) -> tuple[Int[Array, " ends"], Bool[Array, " B"]]:
    """Return non-decreasing offsets in [0, capacity], and a mask of malformed bags.

    A bag is malformed if one of its two offsets is less than an earlier offset or
    greater than the capacity, or is the first and not 0.
    """
    bounds = jax.lax.cummax(jnp.clip(offsets.at[0].set(0), 0, capacity))
    is_changed = bounds != offsets
    return bounds, is_changed[:-1] | is_changed[1:]


def segment_ids(bounds: Int[Array, " ends"], capacity: Size) -> Int[Array, " N"]:
    """Return the bag of each slot; B in the tail."""
    ends = jnp.zeros(capacity + 1, jnp.int32).at[bounds[1:]].add(1)
    # Without a barrier XLA computes the sums again for each slot that reads them.
    return jax.lax.optimization_barrier(jnp.cumsum(ends[:capacity]))


def slots_of_bags(ids: Int[Array, " N"], offsets: Int[Array, " ends"]) -> Ids:
    """Return the id of each slot, for lookups without pooling.

    Slots in no bag get `PAD_ID`; negative ids, and the ids of malformed bags, get
    `OUT_OF_RANGE_ID`.
    """
    bounds, malformed = bag_bounds(offsets, ids.size)
    ids = jnp.where(ids < 0, OUT_OF_RANGE_ID, ids)
    outside = jnp.arange(ids.size, dtype=bounds.dtype) >= bounds[-1]
    ids = jnp.where(outside, PAD_ID, ids)

    def with_malformed(ids: Ids) -> Ids:
        bags = segment_ids(bounds, ids.size)
        return jnp.where(jnp.append(malformed, False)[bags], OUT_OF_RANGE_ID, ids)

    # The bag of each slot would take as long as a lookup of narrow rows.
    return jax.lax.cond(malformed.any(), with_malformed, lambda ids: ids, ids)


def merge_axes(x: Shaped[Array, "K first ..."]) -> Shaped[Array, "K*first ..."]:
    """Merge the two leading axes of x."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def canonicalize_ids(
    ids: Int[Array, "..."], pad_id: int | None, rows: Any
) -> Int[Array, "..."]:
    """Replace ids of empty slots by `PAD_ID`, others out of range by `OUT_OF_RANGE_ID`.

    Ids of rows can then be shifted, and slots emptied, without a conflict.
    """
    canonical = jnp.where((ids < 0) | (ids >= rows), OUT_OF_RANGE_ID, ids)
    return canonical if pad_id is None else jnp.where(ids == pad_id, PAD_ID, canonical)


def concatenate_ragged(
    ids: Int[Array, "K N"], offsets: Int[Array, "K ends"]
) -> tuple[Int[Array, "K N"], Int[Array, " all_ends"], Bool[Array, "K B"]]:
    """Concatenate K ragged batches; return ids, offsets, and a mask of malformed bags.

    Slots in no bag become empty slots of the bag before them.
    """
    size, capacity = ids.shape
    num_bags = offsets.shape[1] - 1
    bounds, malformed = jax.vmap(lambda o: bag_bounds(o, capacity))(offsets)
    bags = jax.vmap(lambda o: segment_ids(o, capacity))(bounds)
    outside = jnp.pad(malformed, ((0, 0), (0, 1)), constant_values=True)
    ids = jnp.where(jnp.take_along_axis(outside, bags, axis=1), PAD_ID, ids)
    shift = capacity * jnp.arange(size, dtype=offsets.dtype)[:, None]
    starts = (bounds[:, :-1] + shift).reshape(-1)
    end = jnp.full(1, size * capacity if num_bags else 0, offsets.dtype)
    return ids, jnp.concatenate([starts, end]), malformed

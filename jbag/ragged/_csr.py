"""Bags as CSR arrays: ids, offsets and coefficients; empty slots and segment ids."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

# `slots` is N or B L, and `ends` is B + 1.
# A size is an int, or symbolic under `jax.export`.
Size = Any
Ids = Int[Array, "*slots"]
Offsets = Int[Array, " ends"] | None
Slots = Float[Array, "*slots"]

# What `canonicalize_ids` calls an empty slot, and an id that names no row.
PAD_ID = -1
OUT_OF_RANGE_ID = -2


def filled(ids: Ids, pad_id: int | None) -> Bool[Array, "*slots"]:
    """Return which slots are not empty."""
    return jnp.ones(ids.shape, bool) if pad_id is None else ids != pad_id


def bag_bounds(
    offsets: Int[Array, " ends"], capacity: Size
) -> tuple[Int[Array, " ends"], Bool[Array, " B"]]:
    """Return offsets that partition the slots, and which bags were malformed.

    A bag is malformed where its own bounds start below an earlier offset, start above 0
    in the first bag, or pass the end of the slots.
    """
    bounds = jax.lax.cummax(jnp.clip(offsets.at[0].set(0), 0, capacity))
    moved = bounds != offsets
    return bounds, moved[:-1] | moved[1:]


def segment_ids(bounds: Int[Array, " ends"], capacity: Size) -> Int[Array, " N"]:
    """Return the bag of each slot, B where the slot lies past the last bag."""
    ends = jnp.zeros(capacity + 1, jnp.int32).at[bounds[1:]].add(1)
    return jnp.cumsum(ends[:capacity])


def merge_axes(x: Shaped[Array, "K first ..."]) -> Shaped[Array, "K*first ..."]:
    """Return x with its two leading axes as one."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def canonicalize_ids(
    ids: Int[Array, "..."], pad_id: int | None, rows: Any
) -> Int[Array, "..."]:
    """Return ids of which those in [0, V) are rows, and the negative ones tell why not.

    Rows may then be numbered anew, and slots emptied.
    """
    named = jnp.where((ids < 0) | (ids >= rows), OUT_OF_RANGE_ID, ids)
    return named if pad_id is None else jnp.where(ids == pad_id, PAD_ID, named)


def concatenate_ragged(
    ids: Int[Array, "K N"], offsets: Int[Array, "K ends"]
) -> tuple[Int[Array, "K N"], Int[Array, " all_ends"], Bool[Array, "K B"]]:
    """Return the offsets of K ragged batches laid end to end, and the malformed bags.

    Slots in no bag, which now lie between bags, become empty slots of the bag before.
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

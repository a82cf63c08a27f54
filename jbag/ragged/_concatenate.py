"""Concatenation of batches of bags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jbag.ragged import _csr_arrays
from jbag.ragged._csr_arrays import (
    OUT_OF_RANGE_ID,
    PAD_ID,
    Ids,
    Offsets,
    Slots,
    canonicalize_ids,
    concatenate_ragged,
    merge_axes,
)


def concatenate_bags(parts: Sequence[tuple[Ids, Offsets]]) -> tuple[Ids, Offsets]:
    """Concatenate the ids and offsets of bags.

    Slots in no bag get `PAD_ID`. A malformed bag stays malformed or gets an id out of
    range, so it is still NaN and gives the table no gradient. Ids [B, L] with equal L
    stay rectangular.
    """
    if len(parts) == 1:
        return parts[0]
    if _is_rectangle(parts):
        return jnp.concatenate([ids for ids, _ in parts]), None
    ids: list[Array] = []
    offsets: list[Array] = []
    dtype = max((ids.dtype for ids, _ in parts), key=lambda dtype: dtype.itemsize)
    first = 0
    for part in parts:
        own, ends = to_ragged(*part)
        if ends.size == 1:  # no bags
            continue
        bounds, _ = _csr_arrays.bag_bounds(ends, own.size)
        # Adjacent parts share a bound, so it can't be malformed for one of them alone.
        # Instead, a slot is added at each end of a part: it holds an id out of range if
        # the first or last bound is malformed, and else it is empty.
        is_moved = bounds != ends
        before, after = jnp.where(is_moved[jnp.array([0, -1])], OUT_OF_RANGE_ID, PAD_ID)
        low = jnp.where(is_moved[0], bounds[1], 0)
        high = jnp.where(is_moved[-1], bounds[-2], bounds[-1])
        slots = jnp.arange(own.size, dtype=bounds.dtype)
        own = jnp.where((slots >= low) & (slots < high), own, PAD_ID).astype(dtype)
        ids += [before.astype(dtype)[None], own, after.astype(dtype)[None]]
        inner = jnp.where(is_moved, -1, ends.astype(dtype) + (first + 1))[1:-1]
        offsets += [jnp.full(1, first, dtype), inner]
        first += own.size + 2
    if not ids:
        return jnp.zeros(0, dtype), jnp.zeros(1, dtype)
    return jnp.concatenate(ids), jnp.concatenate([*offsets, jnp.full(1, first, dtype)])


def concatenate_slots(
    parts: Sequence[tuple[Ids, Offsets]], values: Sequence[Shaped[Array, "*slots"]]
) -> Shaped[Array, "*slots"]:
    """Concatenate the values of slots in the order of `concatenate_bags`."""
    if len(parts) == 1:
        return values[0]
    if _is_rectangle(parts):
        return jnp.concatenate(values)
    kept = [
        jnp.pad(own.reshape(-1), 1)
        for (ids, ends), own in zip(parts, values, strict=True)
        if (ids.shape[0] if ends is None else ends.size - 1) > 0
    ]
    return jnp.concatenate(kept) if kept else jnp.zeros(0, values[0].dtype)


def merge_batches(
    ids: Int[Array, "K *slots"],
    offsets: Int[Array, "K ends"] | None,
    coefficients: Float[Array, "K *slots"] | None,
    winners: Int[Array, "K B D"] | None,
    *,
    pad_id: int | None,
    num_embeddings: Any,
) -> tuple[Ids, Offsets, Slots | None, Int[Array, "K*B D"] | None]:
    """Merge K batches of bags of one table; empty slots get `PAD_ID`.

    Winners are shifted to the slots of the merged batch; N, which means no winner,
    becomes K * N.
    """
    size, slots = ids.shape[0], ids[0].size
    ids = canonicalize_ids(ids, pad_id, num_embeddings)
    if offsets is not None:
        ids, offsets, _ = concatenate_ragged(ids, offsets)
    if winners is not None:
        shift = slots * jnp.arange(size, dtype=winners.dtype)[:, None, None]
        winners = merge_axes(jnp.where(winners == slots, size * slots, winners + shift))
    return (
        merge_axes(ids),
        offsets,
        coefficients if coefficients is None else merge_axes(coefficients),
        winners,
    )


def to_ragged(
    ids: Ids, offsets: Offsets
) -> tuple[Int[Array, " N"], Int[Array, " ends"]]:
    """Convert rectangular bags to ragged ones; return ragged bags unchanged."""
    if offsets is not None:
        return ids, offsets
    bounds = ids.shape[1] * jnp.arange(ids.shape[0] + 1, dtype=ids.dtype)
    return ids.reshape(-1), bounds


def num_bags(ids: Ids, offsets: Offsets) -> int:
    """Return B."""
    return ids.shape[0] if offsets is None else offsets.size - 1


def unit_weights(ids: Ids, dtype: jnp.dtype) -> Float[Array, "*slots"]:
    """Return weights of one."""
    return jnp.ones(ids.shape, dtype)


def _is_rectangle(parts: Sequence[tuple[Int[Array, "..."], Offsets]]) -> bool:
    return (
        all(offsets is None for _, offsets in parts)
        and len({ids.shape[1] for ids, _ in parts}) == 1
    )

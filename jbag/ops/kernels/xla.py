"""The reference kernel: gather, then `jax.ops.segment_sum`. It runs on every platform.

`contract` has the meaning of the operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float32, Int, UInt32

from jbag.ops._row_gather import accumulation_dtype, bag_rows, take
from jbag.ops.kernels import update_rules as rules
from jbag.ragged._csr import (
    Ids,
    Offsets,
    Size,
    Slots,
    bag_bounds,
    filled,
    segment_ids,
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
    """Return out[b] = sum of c[i] * table[ids[i]] over the slots i of bag b.

    An `average` divides it by the number of filled slots ("mean"), or by the root of
    that ("sqrtn"); see `divisors`. Rounds to `dtype` once.
    """
    rows = _rows(table, ids)
    if coefficients is not None:
        rows = coefficients[..., None] * rows
    if pad_id is not None:
        rows = jnp.where((ids == pad_id)[..., None], 0, rows)
    if offsets is None:
        out = rows.sum(1)
    else:
        bounds, malformed = bag_bounds(offsets, ids.size)
        bags = segment_ids(bounds, ids.size)
        num_bags = offsets.size - 1
        out = jax.ops.segment_sum(rows, bags, num_bags, indices_are_sorted=True)
        out = jnp.where(malformed[:, None], jnp.nan, out)
    if average is not None:
        out /= divisors(spmm, ids, offsets, out.dtype, pad_id=pad_id, average=average)
    return out.astype(dtype)


def divisors(
    pool: Callable[..., Any],
    ids: Ids,
    offsets: Offsets,
    dtype: jnp.dtype,
    *,
    pad_id: int | None,
    average: str,
) -> Float[Array, "#B 1"]:
    """Return what an average divides by: counts of filled slots, or their roots.

    A bag that has none divides by 1. `pool` is the product, which counts.
    """
    if pad_id is not None:
        one = jnp.ones((1, 1), dtype)
        rows = jnp.where(ids == pad_id, -1, 0)
        counts = pool(one, rows, offsets, None, pad_id=-1, average=None, dtype=dtype)
    elif offsets is None:
        counts = jnp.full((1, 1), ids.shape[1], dtype)
    else:
        counts = jnp.diff(offsets)[:, None].astype(dtype)
    counts = jnp.maximum(counts, 1)
    return counts if average == "mean" else jnp.sqrt(counts)


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
    """Return out[v] = sum of c[i] * cotangent[bag of i] over the slots i that hold v.

    Accumulates in the dtype of `cotangent`; rounds to `dtype` once.
    """
    rows, kept = bag_rows(cotangent, ids, offsets)
    if coefficients is not None:
        rows = coefficients[..., None] * rows
    # A 64-bit id must not wrap round to a row: see `take`.
    named = jnp.minimum(ids, num_embeddings)
    kept &= (ids >= 0) & filled(ids, pad_id)
    kept_ids = jnp.where(kept, named, num_embeddings)
    rows = rows.reshape(ids.size, cotangent.shape[1])
    out = jax.ops.segment_sum(rows, kept_ids.reshape(-1), num_embeddings)
    return out.astype(dtype)


def sddmm(
    table: Float[Array, "V D"],
    cotangent: Float[Array, "B D"],
    ids: Ids,
    offsets: Offsets,
    *,
    pad_id: int | None,
) -> Slots:
    """Return out[i] = <table[ids[i]], cotangent[bag of i]>, zero at empty slots."""
    rows, kept = bag_rows(cotangent, ids, offsets)
    dots = (_rows(table, ids) * rows).sum(-1)
    return jnp.where(kept & filled(ids, pad_id), dots, 0)


def extremum(
    table: Float[Array, "V D"],
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    *,
    pad_id: int | None,
    largest: bool,
) -> tuple[Float[Array, "B D"], Int[Array, "B D"]]:
    """Return the largest (or smallest) c[i] * table[ids[i]] of each bag and feature.

    With it comes the first slot that holds it: a flat index into `ids`, or N where the
    bag is empty, whose value is zero. A NaN wins wherever it stands.
    """
    rows = _rows(table, ids)
    if coefficients is not None:
        rows = coefficients[..., None] * rows
    worst = jnp.array(-jnp.inf if largest else jnp.inf, rows.dtype)
    present = jnp.broadcast_to(filled(ids, pad_id)[..., None], rows.shape)
    rows = jnp.where(present, rows, worst)
    none = ids.size
    slots = jnp.arange(none, dtype=jnp.int32).reshape((*ids.shape, 1))

    if offsets is None:
        values = (rows.max if largest else rows.min)(axis=1, initial=worst)
        best = values[:, None, :]
    else:
        bounds, malformed = bag_bounds(offsets, none)
        bags = segment_ids(bounds, none)
        num_bags = offsets.size - 1
        pool = jax.ops.segment_max if largest else jax.ops.segment_min
        values = pool(rows, bags, num_bags, indices_are_sorted=True)
        # An atomic maximum may lose a NaN, so NaNs are counted on their own.
        nans = jax.ops.segment_max(
            jnp.isnan(rows).astype(jnp.int32), bags, num_bags, indices_are_sorted=True
        )
        values = jnp.where(nans > 0, jnp.nan, values)
        best = take(values, bags, 0)

    wins = present & ((rows == best) | (jnp.isnan(rows) & jnp.isnan(best)))
    winners = jnp.where(wins, slots, none)
    if offsets is None:
        winners = winners.min(axis=1, initial=none)
        values = jnp.where(winners == none, 0, values)
    else:
        winners = jax.ops.segment_min(
            winners, bags, num_bags, indices_are_sorted=True
        ).clip(max=none)
        values = jnp.where(winners == none, 0, values)
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
    """Return the rows of `spmm_transpose` that slots name: which, and their sums.

    They come in order, each once. Behind them, up to `max_unique_ids`, the index is V
    and the sum zero.
    """
    rows, kept = bag_rows(cotangent, ids, offsets)
    if coefficients is not None:
        rows = coefficients[..., None] * rows
    named = jnp.minimum(ids, num_embeddings)
    kept &= (ids >= 0) & filled(ids, pad_id)
    named = jnp.where(kept, named, num_embeddings).reshape(-1)
    order = jnp.argsort(named, stable=True)
    named = named[order]
    is_first = jnp.diff(named, prepend=-1) > 0
    place = jnp.where(named < num_embeddings, jnp.cumsum(is_first) - 1, max_unique_ids)
    rows = rows.reshape(ids.size, cotangent.shape[1])[order]
    sums = jax.ops.segment_sum(rows, place, max_unique_ids, indices_are_sorted=True)
    indices = jnp.full(max_unique_ids, num_embeddings, ids.dtype)
    return indices.at[place].set(named, mode="drop"), sums


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
    """Move the rows that slots name by a rule; return the table and its states.

    Their gradient is that of `spmm_transpose`. Other rows stay. The table is rounded
    once; with a `seed`, up or down at random, so that it is right on average.
    """
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
    return move_rows(table, states, scalars, seed, indices, gradient, rule=rule)


def move_rows(
    table: Float[Array, "V D"],
    states: tuple[Array, ...],
    scalars: Float[Array, " H"],
    seed: UInt32[Array, "2"] | None,
    indices: Int[Array, " U"],
    gradient: Float[Array, "U D"],
    *,
    rule: str,
    mean_square: Float[Array, " U"] | None = None,
) -> tuple[Array, ...]:
    """Move rows, each named once, by a rule; return the table and its states.

    Indices of no row come last. The gradient's `mean_square` is given where the table
    has only some of the columns.
    """
    rows = take(table, indices, 0).astype(gradient.dtype)
    before = [take(state, indices, 0) for state in states]
    delta, after = rules.step(rule, rows, gradient, before, scalars, mean_square)
    rows += delta
    if seed is None:
        rows = rows.astype(table.dtype)
    else:
        rows = _round_at_random(rows, seed, indices)
    return tuple(
        x.at[indices].set(moved, mode="drop", indices_are_sorted=True)
        for x, moved in zip((table, *states), (rows, *after), strict=True)
    )


def _round_at_random(
    rows: Float32[Array, "U D"], seed: UInt32[Array, "2"], indices: Int[Array, " U"]
) -> BFloat16[Array, "U D"]:
    """Round to bfloat16, up or down with the odds that make it right on average.

    The seed, the row's number and the column's alone decide.
    """
    columns = jnp.arange(rows.shape[1], dtype=jnp.uint32)
    hashed = _mix(indices.astype(jnp.uint32) ^ seed[0])[:, None]
    noise = _mix(hashed + columns * jnp.uint32(0x9E3779B9) + seed[1]) >> 16
    bits = jax.lax.bitcast_convert_type(rows, jnp.uint32)
    upper = ((bits + noise) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isfinite(rows), rounded, rows.astype(jnp.bfloat16))


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Hash: every bit of x sways every bit of the result (C. Wellons, 2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _rows(table: Float[Array, "V D"], ids: Ids) -> Float[Array, "*slots D"]:
    """Gather the row of each slot, in the accumulation dtype."""
    return take(table, ids, jnp.nan).astype(accumulation_dtype(table.dtype))

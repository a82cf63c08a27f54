"""The reference kernel: gather, then `jax.ops.segment_sum`, on every platform.

`contract` defines the operations. Memory traffic: every operation writes and reads an
[N, D] intermediate, unless XLA fuses it. Of a `PackedTable` it reads whole lines and
pools them: outside the lanes of a slot's row they count as zeros, and the rows of a
pooled line are added at last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from jbag.ops._packed_table import AnyTable, PackedTable, packing_of, take_rows
from jbag.ops._packing import Packing
from jbag.ops._row_gather import accumulation_dtype, bag_rows, take
from jbag.ops.kernels import update_rules as rules
from jbag.ops.kernels.stochastic_rounding import round_stochastically
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
    """Return out[b] = sum of c[i] * table[ids[i]] over the slots i of bag b.

    An `average` divides it by the number of filled slots ("mean"), or by the square
    root of that ("sqrtn"). It rounds to `dtype` once.
    """
    rows = _stored_rows(table, ids)
    if coefficients is not None:
        rows = coefficients[..., None] * rows
    rows = _own_lanes(packing_of(table), ids, rows)
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
    if isinstance(table, PackedTable):
        out = table.packing.fold(out)
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
    """Return the number of filled slots of each bag, at least 1, or its square root.

    `pool` is the kernel's `spmm`, which counts the slots.
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
    packing: Packing | None = None,
) -> Float[Array, "rows width"]:
    """Return out[v] = sum of c[i] * cotangent[bag of i] over the slots i with id v.

    It accumulates in the dtype of `cotangent` and rounds to `dtype` once. With a
    `packing` it returns the lines of the result.
    """
    if _is_narrow(dtype, cotangent.dtype) and _is_less(ids.size, num_embeddings):
        # The sums of N rows; `segment_sum` makes V rows of a dtype twice as wide.
        return coalesce_and_store(
            coalesce,
            cotangent,
            ids,
            offsets,
            coefficients,
            pad_id=pad_id,
            num_embeddings=num_embeddings,
            dtype=dtype,
            packing=packing,
        )
    rows, kept = bag_rows(_as_wide(packing, cotangent), ids, offsets)
    if coefficients is not None:
        rows = coefficients[..., None] * rows
    # `segment_sum` narrows 64-bit ids to 32 bits; clip so that none wraps.
    clipped = jnp.minimum(ids, num_embeddings)
    kept &= (ids >= 0) & filled(ids, pad_id)
    kept_ids = jnp.where(kept, clipped, num_embeddings)
    rows = _own_lanes(packing, ids, rows)
    rows, num_rows = rows.reshape(ids.size, rows.shape[-1]), num_embeddings
    if packing is not None:
        (kept_ids, _), num_rows = packing.locate(kept_ids), packing.shape[0]
    out = jax.ops.segment_sum(rows, kept_ids.reshape(-1), num_rows)
    return out.astype(dtype)


def _is_narrow(dtype: jnp.dtype, wider: jnp.dtype) -> bool:
    return jnp.dtype(dtype).itemsize < jnp.dtype(wider).itemsize


def _is_less(size: Size, other: Size) -> bool:
    """Return whether a size is less than another; symbolic ones never are."""
    return isinstance(size, int) and isinstance(other, int) and size < other


def sddmm(
    table: AnyTable,
    cotangent: Float[Array, "B D"],
    ids: Ids,
    offsets: Offsets,
    *,
    pad_id: int | None,
) -> Slots:
    """Return out[i] = <table[ids[i]], cotangent[bag of i]>, zero at empty slots."""
    packing = packing_of(table)
    rows, kept = bag_rows(_as_wide(packing, cotangent), ids, offsets)
    dots = _own_lanes(packing, ids, _stored_rows(table, ids) * rows).sum(-1)
    return jnp.where(kept & filled(ids, pad_id), dots, 0)


def extremum(
    table: AnyTable,
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    *,
    pad_id: int | None,
    largest: bool,
) -> tuple[Float[Array, "B D"], Int[Array, "B D"]]:
    """Return the extremum of c[i] * table[ids[i]] per bag and feature, and its slot.

    The slot is the first that holds the extremum, as a flat index into `ids`. An empty
    bag has the value zero and the slot N. A NaN wins.
    """
    rows = take_rows(table, ids, jnp.nan).astype(accumulation_dtype(table.dtype))
    if coefficients is not None:
        rows = coefficients[..., None] * rows
    worst = jnp.array(-jnp.inf if largest else jnp.inf, rows.dtype)
    present = jnp.broadcast_to(filled(ids, pad_id)[..., None], rows.shape)
    rows = jnp.where(present, rows, worst)
    none = ids.size
    slots = jnp.arange(none, dtype=jnp.int32).reshape((*ids.shape, 1))

    if offsets is None:
        values = (rows.max if largest else rows.min)(axis=1, initial=worst)
        # XLA's maximum on CPUs drops NaNs if there are some 100 features.
        values = jnp.where(jnp.isnan(rows).any(axis=1), jnp.nan, values)
        best = values[:, None, :]
    else:
        bounds, malformed = bag_bounds(offsets, none)
        bags = segment_ids(bounds, none)
        num_bags = offsets.size - 1
        pool = jax.ops.segment_max if largest else jax.ops.segment_min
        values = pool(rows, bags, num_bags, indices_are_sorted=True)
        # The atomic maximum of a GPU may drop NaNs, so they are found separately.
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
    """Return the distinct ids, sorted, and their rows of `spmm_transpose`.

    Entries past the last distinct id have the index V and a zero row.
    """
    rows, kept = bag_rows(cotangent, ids, offsets)
    if coefficients is not None:
        rows = coefficients[..., None] * rows
    kept_ids = sort_keys(ids, kept & filled(ids, pad_id), num_embeddings).reshape(-1)
    order = jnp.argsort(kept_ids, stable=True)
    kept_ids = kept_ids[order]
    is_first = jnp.diff(kept_ids, prepend=-1) > 0
    is_row = kept_ids < num_embeddings
    position = jnp.where(is_row, jnp.cumsum(is_first) - 1, max_unique_ids)
    rows = rows.reshape(ids.size, cotangent.shape[1])[order]
    sums = jax.ops.segment_sum(rows, position, max_unique_ids, indices_are_sorted=True)
    indices = jnp.full(max_unique_ids, num_embeddings, ids.dtype)
    return indices.at[position].set(kept_ids.astype(ids.dtype), mode="drop"), sums


def sort_keys(
    ids: Ids, kept: Bool[Array, "*slots"], num_embeddings: Size
) -> Int[Array, "*slots"]:
    """Return the ids of rows, V elsewhere; in 32 bits where V fits, to sort faster."""
    is_row = kept & (ids >= 0) & (ids < num_embeddings)
    keys = jnp.where(is_row, ids, num_embeddings)
    narrow = isinstance(num_embeddings, int) and num_embeddings < 2**31
    return keys.astype(jnp.int32) if narrow else keys


def coalesce_and_store(
    coalesce: Callable[..., Any],
    cotangent: Float[Array, "B D"],
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    *,
    pad_id: int | None,
    num_embeddings: Size,
    dtype: jnp.dtype,
    packing: Packing | None = None,
) -> Float[Array, "rows width"]:
    """Compute `spmm_transpose` by a kernel's `coalesce`: store the sum of each row."""
    indices, sums = coalesce(
        cotangent,
        ids,
        offsets,
        coefficients,
        pad_id=pad_id,
        num_embeddings=num_embeddings,
        max_unique_ids=min(ids.size, num_embeddings),
    )
    if packing is not None:
        return packing.put_in_zeros(indices, sums, dtype)
    out = jnp.zeros((num_embeddings, cotangent.shape[1]), dtype)
    return set_rows(out, indices, sums.astype(dtype))


def update_rows(
    table: AnyTable,
    states: tuple[Shaped[Array, "V ..."] | PackedTable, ...],
    scalars: Float[Array, " H"],
    seed: UInt32[Array, "2"] | None,
    cotangent: Float[Array, "B D"],
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    *,
    pad_id: int | None,
    rule: str,
    coalesce: Callable[..., Any] = coalesce,
) -> tuple[Array, ...]:
    """Update the rows of the bags' ids by an update rule; return table and states.

    Their gradient is that of `coalesce`, which may be another kernel's. Other rows
    don't change. The table rounds once; with a `seed`, stochastically.
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
    return update_unique_rows(
        table, states, scalars, seed, indices, gradient, rule=rule
    )


def update_unique_rows(
    table: AnyTable,
    states: tuple[Shaped[Array, "V ..."] | PackedTable, ...],
    scalars: Float[Array, " H"],
    seed: UInt32[Array, "2"] | None,
    indices: Int[Array, " U"],
    gradient: Float[Array, "U D"],
    *,
    rule: str,
    mean_square: Float[Array, " U"] | None = None,
) -> tuple[Array, ...]:
    """Update rows at distinct, sorted indices by a rule; return table and states.

    Indices out of range come last. Pass the `mean_square` of the gradient's rows if
    they are sharded by columns.
    """
    rows = take_rows(table, indices, 0).astype(gradient.dtype)
    before = [take_rows(state, indices, 0) for state in states]
    delta, after = rules.step(rule, rows, gradient, before, scalars, mean_square)
    rows += delta
    if seed is None:
        rows = rows.astype(table.dtype)
    else:
        rows = round_stochastically(rows, seed, indices)
    return tuple(
        x.packing.put(x.lines, indices, new)
        if isinstance(x, PackedTable)
        else set_rows(x, indices, new)
        for x, new in zip((table, *states), (rows, *after), strict=True)
    )


def set_rows(
    x: Shaped[Array, "V ..."], indices: Int[Array, " U"], rows: Shaped[Array, "U ..."]
) -> Shaped[Array, "V ..."]:
    """Set rows at distinct, sorted indices; those out of range come last, and are V."""
    # With `unique_indices` GPUs store, where XLA would compare and swap 16-bit numbers.
    # Indices out of range have to be distinct, too, and must not overflow.
    num_rows, num_indices = x.shape[0], indices.size
    is_static = isinstance(num_rows, int) and isinstance(num_indices, int)
    unique = is_static and num_rows + num_indices <= jnp.iinfo(indices.dtype).max
    if unique:
        positions = jnp.arange(num_indices, dtype=indices.dtype)
        indices += jnp.where(indices < num_rows, 0, positions)
    return x.at[indices].set(
        rows, mode="drop", indices_are_sorted=True, unique_indices=unique
    )


def _stored_rows(table: AnyTable, ids: Ids) -> Float[Array, "*slots width"]:
    """Gather the row of each slot, or its line, in the accumulation dtype."""
    if isinstance(table, PackedTable):
        ids, _ = table.packing.locate(ids)
        rows = take(table.lines, ids, jnp.nan)
    else:
        rows = take(table, ids, jnp.nan)
    return rows.astype(accumulation_dtype(table.dtype))


def _own_lanes(
    packing: Packing | None, ids: Ids, rows: Float[Array, "*slots width"]
) -> Float[Array, "*slots width"]:
    """Return lines with zeros outside the row of each slot; rows as they are."""
    return rows if packing is None else packing.own_lanes(rows, packing.locate(ids)[1])


def _as_wide(
    packing: Packing | None, rows: Float[Array, "B D"]
) -> Float[Array, "B width"]:
    """Return each row repeated in a line; without a packing, the rows."""
    return rows if packing is None else packing.repeat(rows)

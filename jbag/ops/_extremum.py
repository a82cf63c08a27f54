"""The maximum or minimum of each bag and feature, and its derivative.

It is the sparse matrix product over the semiring (max, *) or (min, *).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jbag.ops import _row_gather
from jbag.ops._packed_table import AnyTable, PackedTable
from jbag.ops._primitive import bind, define
from jbag.ops._spmm import spmm, times, varies
from jbag.ragged._csr_arrays import Ids, Offsets, Slots


def extremum(
    table: AnyTable,
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    value_scale: Slots | None,
    gradient_scale: Slots | None,
    *,
    largest: bool,
    **options: Any,
) -> tuple[Float[Array, "B D"], Int[Array, "B D"]]:
    """Return the extremum of c[i] * table[ids[i]] per bag and feature, and its slot.

    The derivative is that of the winning slot. The scales are those of `spmm_scaled`.
    """
    scaled = times(coefficients, value_scale)
    values, slots = bind(
        extremum_p,
        (jax.lax.stop_gradient(table),),
        ids,
        offsets,
        jax.lax.stop_gradient(scaled),
        largest=largest,
        **options,
    )
    out = _differentiable(
        values, slots, table, ids, coefficients, value_scale, gradient_scale
    )
    return out, slots


@jax.custom_jvp
def _differentiable(
    values: Float[Array, "B D"],
    slots: Int[Array, "B D"],
    table: AnyTable,
    ids: Ids,
    coefficients: Slots | None,
    value_scale: Slots | None,
    gradient_scale: Slots | None,
) -> Float[Array, "B D"]:
    """Return the values; the derivative is that of the winning slots."""
    del slots, table, ids, coefficients, value_scale, gradient_scale
    return values


@functools.partial(_differentiable.defjvp, symbolic_zeros=True)
def _differentiable_jvp(
    primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    _, slots, table, ids, coefficients, value_scale, gradient_scale = primals
    values = _differentiable(*primals)
    tangent = jnp.zeros_like(values)
    if varies(tangents[2]):
        scale = times(coefficients, gradient_scale)
        tangent += _winning(tangents[2], ids, slots, scale)
    if coefficients is not None and varies(tangents[4]):
        scaled = tangents[4] if value_scale is None else tangents[4] * value_scale
        tangent += _winning(table, ids, slots, scaled)
    return values, tangent


def _winning(
    table: AnyTable,
    ids: Ids,
    slots: Int[Array, "B D"],
    scale: Slots | None,
) -> Float[Array, "B D"]:
    """Return the elements c[i] * table[ids[i], d] of the winning slots i of each d."""
    sizes = (*ids.shape, *slots.shape)
    is_empty = any(isinstance(size, int) and size == 0 for size in sizes)
    if is_empty:
        return jnp.zeros(slots.shape, _row_gather.accumulation_dtype(table.dtype))
    if isinstance(table, PackedTable):
        return _winning_by_slots(table, ids, slots, scale)
    by_slots = dict.fromkeys(("cuda", "rocm", "tpu"), _winning_by_slots)
    return jax.lax.platform_dependent(
        table, ids, slots, scale, **by_slots, default=_winning_elements
    )


def _winning_elements(
    table: Float[Array, "V D"],
    ids: Ids,
    slots: Int[Array, "B D"],
    scale: Slots | None,
) -> Float[Array, "B D"]:
    """Gather elements of the table; the transpose adds to its elements."""
    # A negative id is out of range like V; an empty bag, without a winner, gets -1.
    non_negative = jnp.where(ids < 0, table.shape[0], ids)
    elements = _gather_elements(table, _gather_slots(non_negative, slots, fill=-1))
    return elements if scale is None else _gather_slots(scale, slots) * elements


def _winning_by_slots(
    table: AnyTable,
    ids: Ids,
    slots: Int[Array, "B D"],
    scale: Slots | None,
) -> Float[Array, "B D"]:
    """Gather elements from the rows of all slots.

    The transpose stores each slot's elements once, and sums the slots of each row in
    `spmm_transpose`, at the cost of an [N, D] array: without the atomic additions of
    GPUs, and without the copies of V * D elements that TPUs make to add to elements.
    """
    num_slots, width = ids.size, table.shape[1]
    rows = spmm(table, ids.reshape(-1, 1), None, None, pad_id=None, implementation=None)
    # Distinct where there is no winner, too.
    none = num_slots + jnp.arange(slots.shape[0], dtype=slots.dtype)[:, None]
    distinct = jnp.where(slots < num_slots, slots, none)

    def win(elements: Float[Array, "N D"]) -> Float[Array, "B D"]:
        return elements.at[distinct, jnp.arange(width)].get(
            mode="fill", fill_value=0, unique_indices=True
        )

    if scale is None:
        return win(rows)
    # Multiplied after the selection: the weight of a slot that does not win may be NaN.
    return win(jnp.broadcast_to(scale.reshape(-1, 1), rows.shape)) * win(rows)


def _gather_elements(
    table: Float[Array, "V D"], rows: Int[Array, "B D"]
) -> Float[Array, "B D"]:
    """Return table[rows[b, d], d]: zero at negative rows, NaN at V and above."""
    # The cast comes first, so that the transpose accumulates in float32.
    values = table.astype(_row_gather.accumulation_dtype(table.dtype))
    gather = functools.partial(_row_gather.take, fill=jnp.nan)
    elements = jax.vmap(gather, in_axes=1, out_axes=1)(values, rows)
    return jnp.where(rows < 0, 0, elements)


def _gather_slots(x: Array, slots: Int[Array, "B D"], fill: int = 0) -> Array:
    """Gather from x at flat slots; a slot of N or above gives `fill`."""
    return _row_gather.take(x.reshape(-1), slots, fill)


extremum_p = define(
    "extremum", dense=["rows"], has_coefficients=True, outputs=["bags", "winners"]
)

"""The product over (max, *) or (min, *): the extremum of each bag and feature.

Its derivative follows the winning slot.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jbag.ops import _row_gather
from jbag.ops._primitive import bind, define
from jbag.ops._spmm import times, varies
from jbag.ragged._csr import Ids, Offsets, Slots


def extremum(
    table: Float[Array, "V D"],
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    value_scale: Slots | None,
    gradient_scale: Slots | None,
    *,
    largest: bool,
    **options: Any,
) -> tuple[Float[Array, "B D"], Int[Array, "B D"]]:
    """Return the largest (smallest) c[i] * table[ids[i]] of each bag and feature.

    With it come the winning slots. The scales are those of `spmm_scaled`.
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
    out = _follow(values, slots, table, ids, coefficients, value_scale, gradient_scale)
    return out, slots


@jax.custom_jvp
def _follow(
    values: Float[Array, "B D"],
    slots: Int[Array, "B D"],
    table: Float[Array, "V D"],
    ids: Ids,
    coefficients: Slots | None,
    value_scale: Slots | None,
    gradient_scale: Slots | None,
) -> Float[Array, "B D"]:
    """Return the values; derivatives follow the winning slots."""
    del slots, table, ids, coefficients, value_scale, gradient_scale
    return values


@functools.partial(_follow.defjvp, symbolic_zeros=True)
def _follow_jvp(
    primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    _, slots, table, ids, coefficients, value_scale, gradient_scale = primals
    values = _follow(*primals)
    # A negative id that won names no row, and reads as one past the last.
    known = jnp.where(ids < 0, table.shape[0], ids)
    won = _at_slots(known, slots, fill=-1)
    tangent = jnp.zeros_like(values)
    if varies(tangents[2]):
        scale = times(coefficients, gradient_scale)
        rows = _pick(tangents[2], won)
        tangent += rows if scale is None else _at_slots(scale, slots) * rows
    if coefficients is not None and varies(tangents[4]):
        moved = tangents[4] if value_scale is None else tangents[4] * value_scale
        tangent += _at_slots(moved, slots) * _pick(table, won)
    return values, tangent


def _pick(table: Float[Array, "V D"], rows: Int[Array, "B D"]) -> Float[Array, "B D"]:
    """Return table[rows[b, d], d]: zero at a negative row, NaN past the last."""
    # Cast first: the transpose then accumulates in float32 and rounds once.
    values = table.astype(_row_gather.accumulation_dtype(table.dtype))
    pick = functools.partial(_row_gather.take, fill=jnp.nan)
    picked = jax.vmap(pick, in_axes=1, out_axes=1)(values, rows)
    return jnp.where(rows < 0, 0, picked)


def _at_slots(x: Array, slots: Int[Array, "B D"], fill: int = 0) -> Array:
    """Return x at each flat slot, `fill` where the slot lies past the last."""
    return _row_gather.take(x.reshape(-1), slots, fill)


extremum_p = define(
    "extremum", dense=["rows"], coefficients=True, outputs=["bags", "winners"]
)

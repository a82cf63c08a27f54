"""Marks of `sparse=True` in a traced program, which `value_and_grad` finds.

The table passes through one before it is pooled, the pooled rows pass through another
after, which also takes what the gradient to the table is made of. Both are identities:
without `value_and_grad` they mean nothing, to any order of derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Int

from jbag.ops._factored_gradient import ONE_DEVICE, Placement
from jbag.ops._primitive import equally_varying, layout
from jbag.ragged._concatenate import merge_batches
from jbag.ragged._csr import PAD_ID, Ids, Offsets, Slots, merge_axes


def mark_table(table: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """Return the table, about to be pooled."""
    return table_mark.bind(table)


def mark_pooled(
    pooled: Float[Array, "B D"],
    table: Float[Array, "V D"],
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    winners: Int[Array, "B D"] | None = None,
    *,
    average: str | None = None,
    placement: Placement = ONE_DEVICE,
    **options: Any,
) -> Float[Array, "B D"]:
    """Return what was pooled from a marked table, to which its gradient flows so.

    Each slot gets its bag's row of the cotangent, divided as the average was, times its
    coefficient. With `winners`, flat slots, a feature goes to the one slot that won it.
    The `placement` tells how the arrays lie on devices. Over a mesh every one has a
    block for each device, in which bags and slots are numbered by themselves.
    """
    optional = [x for x in (winners,) if x is not None]
    bags = [x for x in (offsets, coefficients) if x is not None]
    operands = equally_varying(pooled, table, *optional, ids, *bags)
    return pooled_mark.bind(
        *operands,
        has_winners=winners is not None,
        average=average,
        placement=placement,
        **options,
    )


def read(
    operands: Sequence[Array], *, has_winners: bool, **_: Any
) -> tuple[Array | None, Ids, Offsets, Slots | None]:
    """Return the winners and the bags among the operands of a mark."""
    dense, *bags = layout(3 if has_winners else 2, operands)
    return (dense[2] if has_winners else None, *bags)


def _identity(x: Array, *_: Any, **__: Any) -> Array:
    return x


def _define(name: str) -> Primitive:
    mark = Primitive(f"jbag_{name}")
    mark.def_impl(_identity)
    mark.def_abstract_eval(_identity)
    mlir.register_lowering(mark, lambda _, x, *__, **___: [x])
    ad.primitive_jvps[mark] = functools.partial(_jvp, mark)
    ad.primitive_transposes[mark] = _transpose
    return mark


def _jvp(
    mark: Primitive, primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[Any, Any]:
    return mark.bind(*primals, **params), tangents[0]


def _transpose(cotangent: Any, *operands: Any, **_: Any) -> list[Any]:
    return [cotangent, *(None for _ in operands[1:])]


def _batch_table(operands: Sequence[Any], dims: Sequence[Any]) -> tuple[Any, Any]:
    # Several tables: the mark stays on all, but nothing that is pooled belongs to it.
    return table_mark.bind(operands[0]), dims[0]


def _batch_pooled(
    operands: Sequence[Array],
    dims: Sequence[int | None],
    *,
    has_winners: bool,
    pad_id: int | None,
    **params: Any,
) -> tuple[Any, Any]:
    """Mark K batches of bags as one of K * B bags, unless each has its own table."""
    size = next(
        x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None
    )
    pooled, table, *rest = (
        jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(operands, dims, strict=True)
    )
    if dims[1] is not None or size == 0 or params["placement"].over_mesh:
        return pooled, 0  # none of them is marked
    dense, ids, offsets, coefficients = layout(int(has_winners), rest, batch_ndim=1)
    ids, offsets, coefficients, winners = merge_batches(
        ids,
        offsets,
        coefficients,
        dense[0] if has_winners else None,
        pad_id=pad_id,
        num_embeddings=table.shape[1],
    )
    out = mark_pooled(
        merge_axes(pooled),
        operands[1],
        ids,
        offsets,
        coefficients,
        winners,
        pad_id=PAD_ID,
        **params,
    )
    return out.reshape(pooled.shape), 0


table_mark = _define("sparse_table")
pooled_mark = _define("sparse_pooled")
batching.primitive_batchers[table_mark] = _batch_table
batching.primitive_batchers[pooled_mark] = _batch_pooled

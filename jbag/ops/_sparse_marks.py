"""Identity primitives that mark `sparse=True` in a jaxpr for `value_and_grad`.

One marks the table before pooling, the other the pooled rows. The second also takes the
factors of the table's gradient as operands. Outside `value_and_grad` both are
identities, to any order of derivative. `jbag/sparse/_gradient.py` lists the steps from
these marks to an updated row.
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
from jbag.ops._packed_table import AnyTable, PackedTable, packing_of, storage, stored
from jbag.ops._primitive import equally_varying, layout
from jbag.ragged._concatenate import merge_batches
from jbag.ragged._csr_arrays import PAD_ID, Ids, Offsets, Slots, merge_axes


def mark_table(table: AnyTable) -> AnyTable:
    """Mark the table before pooling."""
    return stored(table_mark.bind(storage(table)), packing_of(table))


def mark_pooled(
    pooled: Float[Array, "B D"],
    table: AnyTable,
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    winners: Int[Array, "B D"] | None = None,
    *,
    average: str | None = None,
    placement: Placement = ONE_DEVICE,
    **options: Any,
) -> Float[Array, "B D"]:
    """Mark the pooled rows, with the factors of the table's gradient.

    See `FactoredGradient` for the operands. Over a mesh every array has one block per
    device, and bags and slots are numbered within a block.
    """
    if isinstance(table, PackedTable):
        placement = placement.of_packed(table.packing)
    optional = [x for x in (winners,) if x is not None]
    bags = [x for x in (offsets, coefficients) if x is not None]
    operands = equally_varying(pooled, storage(table), *optional, ids, *bags)
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
    """Split the operands of a mark: (winners, ids, offsets, coefficients)."""
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
    # The pooled rows of batched tables are not marked: see `_batch_pooled`.
    return table_mark.bind(operands[0]), dims[0]


def _batch_pooled(
    operands: Sequence[Array],
    dims: Sequence[int | None],
    *,
    has_winners: bool,
    pad_id: int | None,
    **params: Any,
) -> tuple[Any, Any]:
    """Mark K batches of bags as one of K * B bags; don't mark batched tables."""
    size = next(
        x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None
    )
    pooled, table, *rest = (
        jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(operands, dims, strict=True)
    )
    if dims[1] is not None or size == 0 or params["placement"].over_mesh:
        return pooled, 0
    dense, ids, offsets, coefficients = layout(int(has_winners), rest, batch_ndim=1)
    ids, offsets, coefficients, winners = merge_batches(
        ids,
        offsets,
        coefficients,
        dense[0] if has_winners else None,
        pad_id=pad_id,
        num_embeddings=params["placement"].table_shape(table.shape[1:])[0],
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

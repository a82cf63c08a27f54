"""Sparse matrix products as JAX primitives, and their derivative rules.

A is the sparse [B, V] matrix of the bags (ids, offsets, coefficients c):

    spmm              A @ table, or its average per bag           [B, D]
    spmm_transpose    A.T @ cotangent                             [V, D]
    sddmm             <table[ids[i]], cotangent[bag of i]>        per slot i

Each is linear in each floating operand. The derivatives of each are the other two, so
the three are closed under differentiation. With a `packing`, arrays [V, D] are the
lines of a `PackedTable`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad
from jaxtyping import Array, Float

from jbag.ops import _row_gather
from jbag.ops._packed_table import AnyTable, storage, stored
from jbag.ops._packing import Packing
from jbag.ops._primitive import bind, define, equally_varying, layout
from jbag.ops.kernels import xla
from jbag.ragged import _csr_arrays

Ids = _csr_arrays.Ids
Offsets = _csr_arrays.Offsets
Slots = _csr_arrays.Slots


def spmm_scaled(
    table: AnyTable,
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    value_scale: Slots | None,
    gradient_scale: Slots | None,
    gradient_ids: Ids | None,
    **options: Any,
) -> Float[Array, "B D"]:
    """Compute `spmm` with the coefficients c[i] * value_scale[i].

    The gradient of the table has the coefficients c[i] * gradient_scale[i] and the ids
    `gradient_ids` instead. The scales are constants to autodiff, and None means ones;
    `gradient_ids` of None means `ids`.
    """
    pool: Callable[..., Any] = functools.partial(spmm, **options)
    bags = (ids, offsets, coefficients)
    constants = (value_scale, gradient_scale, gradient_ids)
    if all(x is None for x in constants):
        return pool(table, *bags)
    return _spmm_scaled(pool, table, *bags, *constants)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _spmm_scaled(
    pool: Callable[..., Any],
    table: AnyTable,
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    value_scale: Slots | None,
    gradient_scale: Slots | None,
    gradient_ids: Ids | None,
) -> Float[Array, "B D"]:
    del gradient_scale, gradient_ids
    return pool(table, ids, offsets, times(coefficients, value_scale))


@functools.partial(_spmm_scaled.defjvp, symbolic_zeros=True)
def _spmm_scaled_jvp(
    pool: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    table, ids, offsets, coefficients, value_scale, *of_gradient = primals
    gradient_scale, gradient_ids = of_gradient
    value = _spmm_scaled(pool, *primals)
    pool = functools.partial(pool, dtype=None)  # round only the sum of both terms
    tangent = jnp.zeros(value.shape, _row_gather.accumulation_dtype(table.dtype))
    if varies(tangents[0]):
        scaled = times(coefficients, gradient_scale)
        named = ids if gradient_ids is None else gradient_ids
        tangent += pool(tangents[0], named, offsets, scaled)
    if coefficients is not None and varies(tangents[3]):
        tangent += pool(table, ids, offsets, times(tangents[3], value_scale))
    return value, tangent.astype(value.dtype)


def times(a: Array | None, b: Array | None) -> Array | None:
    """Multiply; None means ones."""
    if a is None or b is None:
        return b if a is None else a
    return a * b


def varies(tangent: Any) -> bool:
    return not isinstance(storage(tangent), SymbolicZero)


def spmm(
    table: AnyTable,
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    *,
    average: str | None = None,
    dtype: jnp.dtype | None = None,
    **options: Any,
) -> Float[Array, "B D"]:
    """Sum or average c[i] * table[ids[i]] over each bag; round once to `dtype`.

    The default `dtype` is the accumulation dtype. Here and below, `options` are the
    `pad_id` of empty slots and the `implementation`.
    """
    return bind(
        spmm_p,
        (table,),
        ids,
        offsets,
        coefficients,
        average=average,
        dtype=jnp.dtype(dtype or _row_gather.accumulation_dtype(table.dtype)),
        **options,
    )


def spmm_transpose(
    cotangent: Float[Array, "B D"],
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    *,
    num_embeddings: _csr_arrays.Size,
    dtype: jnp.dtype,
    packing: Packing | None = None,
    **options: Any,
) -> Float[Array, "rows width"]:
    """Sum c[i] * cotangent[bag of i] over the slots of each id; round to `dtype`.

    With a `packing` it returns the lines of the result.
    """
    if packing is not None:
        options["packing"] = packing
    return bind(
        spmm_transpose_p,
        (cotangent,),
        ids,
        offsets,
        coefficients,
        num_embeddings=num_embeddings,
        dtype=jnp.dtype(dtype),
        **options,
    )


def sddmm(
    table: AnyTable,
    cotangent: Float[Array, "B D"],
    ids: Ids,
    offsets: Offsets,
    **options: Any,
) -> Slots:
    """Return <table[ids[i]], cotangent[bag of i]> for each slot."""
    return bind(sddmm_p, (table, cotangent), ids, offsets, None, **options)


spmm_p = define("spmm", dense=["rows"], has_coefficients=True, outputs=["bags"])
spmm_transpose_p = define(
    "spmm_transpose", dense=["bags"], has_coefficients=True, outputs=["rows"]
)
sddmm_p = define(
    "sddmm", dense=["rows", "bags"], has_coefficients=False, outputs=["slots"]
)


def _jvp(
    primitive: Primitive, primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[Any, Any]:
    """Differentiate an operation that is linear in each floating operand."""
    value = primitive.bind(*equally_varying(*primals), **params)
    active = [
        (position, operand)
        for position, operand in enumerate(tangents)
        if not isinstance(operand, ad.Zero) and operand.dtype != jax.dtypes.float0
    ]
    if not active:
        return value, ad.Zero(jax.typeof(value).to_tangent_aval())
    if len(active) > 1 and "dtype" in params:  # round only the sum of the terms
        params["dtype"] = _row_gather.accumulation_dtype(value.dtype)
    tangent = None
    for position, operand in active:
        operands = [*primals[:position], operand, *primals[position + 1 :]]
        term = primitive.bind(*equally_varying(*operands), **params)
        tangent = term if tangent is None else ad.add_tangents(tangent, term)
    assert tangent is not None
    return value, tangent.astype(value.dtype)


def _transpose(
    num_dense: int, rules: Sequence[Any], cotangent: Any, *operands: Any, **params: Any
) -> list[Any]:
    """Transpose in the one linear operand.

    `rules` has one rule per dense operand and, last, one for the coefficients.
    """
    is_linear = [ad.is_undefined_primal(x) for x in operands]
    position = is_linear.index(True)
    result: list[Any] = [None] * len(operands)
    if isinstance(cotangent, ad.Zero):
        result[position] = ad.Zero(operands[position].aval)
        return result
    rule = rules[min(position, num_dense)]
    dense, ids, offsets, coefficients = layout(num_dense, operands)
    result[position] = rule(cotangent, dense, ids, offsets, coefficients, **params)
    return result


# The transpose rules take (ct, dense operands, ids, offsets, coefficients), where ct is
# the cotangent of the output. The linear operand is an `UndefinedPrimal`, whose type
# alone is known.


def _spmm_to_table(
    ct: Array,
    dense: Any,
    *bags: Any,
    average: str | None,
    dtype: jnp.dtype,
    packing: Packing | None = None,
    **options: Any,
) -> Array:
    ids, offsets, _ = bags
    table = dense[0].aval
    rows = table.shape[0] if packing is None else packing.num_embeddings
    return spmm_transpose(
        divided(ct, ids, offsets, dtype, average, **options),
        *bags,
        num_embeddings=rows,
        dtype=table.dtype,
        packing=packing,
        **options,
    )


def _spmm_to_coefficients(
    ct: Array,
    dense: Any,
    ids: Ids,
    offsets: Offsets,
    _: Any,
    *,
    average: str | None,
    dtype: jnp.dtype,
    packing: Packing | None = None,
    **options: Any,
) -> Array:
    shares = divided(ct, ids, offsets, dtype, average, **options)
    return sddmm(stored(dense[0], packing), shares, ids, offsets, **options)


def divided(
    ct: Float[Array, "B D"],
    ids: Ids,
    offsets: Offsets,
    dtype: jnp.dtype,
    average: str | None,
    *,
    pad_id: int | None,
    implementation: str | None,
) -> Float[Array, "B D"]:
    """Divide by the divisors of the average, in the accumulation dtype."""
    accumulator = _row_gather.accumulation_dtype(dtype)
    ct = ct.astype(accumulator)
    if average is None:
        return ct
    pool = functools.partial(spmm, implementation=implementation)
    options: dict[str, Any] = {"pad_id": pad_id, "average": average}
    return ct / xla.divisors(pool, ids, offsets, accumulator, **options)


def _spmm_transpose_to_cotangent(
    ct: Array,
    _: Any,
    *bags: Any,
    num_embeddings: _csr_arrays.Size,
    dtype: jnp.dtype,
    packing: Packing | None = None,
    **options: Any,
) -> Array:
    del num_embeddings, dtype
    return spmm(stored(ct, packing), *bags, **options)


def _spmm_transpose_to_coefficients(
    ct: Array,
    dense: Any,
    ids: Ids,
    offsets: Offsets,
    _: Any,
    *,
    num_embeddings: _csr_arrays.Size,
    dtype: jnp.dtype,
    packing: Packing | None = None,
    **options: Any,
) -> Array:
    del num_embeddings, dtype
    return sddmm(stored(ct, packing), dense[0], ids, offsets, **options)


def _sddmm_to_table(
    ct: Array, dense: Any, ids: Ids, offsets: Offsets, _: Any, **options: Any
) -> Array:
    table, cotangent = dense
    options |= {"average": None, "dtype": cotangent.dtype}
    return _spmm_to_table(cotangent, [table], ids, offsets, ct, **options)


def _sddmm_to_cotangent(
    ct: Array,
    dense: Any,
    ids: Ids,
    offsets: Offsets,
    _: Any,
    *,
    packing: Packing | None = None,
    **options: Any,
) -> Array:
    return spmm(stored(dense[0], packing), ids, offsets, ct, **options)


for _primitive, _num_dense, _rules in (
    (spmm_p, 1, (_spmm_to_table, _spmm_to_coefficients)),
    (
        spmm_transpose_p,
        1,
        (_spmm_transpose_to_cotangent, _spmm_transpose_to_coefficients),
    ),
    (sddmm_p, 2, (_sddmm_to_table, _sddmm_to_cotangent)),
):
    ad.primitive_jvps[_primitive] = functools.partial(_jvp, _primitive)
    ad.primitive_transposes[_primitive] = functools.partial(
        _transpose, _num_dense, _rules
    )

"""The operations of the bag as JAX primitives, and their derivative rules.

With A the sparse [B, V] matrix of the bags (ids, offsets, coefficients c):

    spmm              A @ table              [B, D], or averaged
    spmm_transpose    A.T @ cotangent        [V, D]
    sddmm             <table[id], cotangent[bag]>, one per slot

Each is linear in its arrays, and each one's derivatives are the other two, so that they
are closed under differentiation.
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
from jbag.ops._primitive import bind, define, equally_varying, layout
from jbag.ops.kernels import xla
from jbag.ragged import _csr

Ids = _csr.Ids
Offsets = _csr.Offsets
Slots = _csr.Slots


def spmm(
    table: Float[Array, "V D"],
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    *,
    average: str | None = None,
    dtype: jnp.dtype | None = None,
    **options: Any,
) -> Float[Array, "B D"]:
    """Sum c[i] * table[ids[i]] over each bag, or average; rounded once to `dtype`.

    Without a `dtype` it is the accumulation dtype. Here as below, `options` are the
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
    num_embeddings: _csr.Size,
    dtype: jnp.dtype,
    **options: Any,
) -> Float[Array, "V D"]:
    """Sum c[i] * cotangent[bag of i] over each row of the table, rounded once."""
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
    table: Float[Array, "V D"],
    cotangent: Float[Array, "B D"],
    ids: Ids,
    offsets: Offsets,
    **options: Any,
) -> Slots:
    """Return <table[ids[i]], cotangent[bag of i]> for each slot."""
    return bind(sddmm_p, (table, cotangent), ids, offsets, None, **options)


def spmm_scaled(
    table: Float[Array, "V D"],
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    value_scale: Slots | None,
    gradient_scale: Slots | None,
    **options: Any,
) -> Float[Array, "B D"]:
    """Like `spmm`, with each slot's row scaled.

    `value_scale` is seen by the value and by the gradient to the coefficients,
    `gradient_scale` by the gradient to the table; both are constants to autodiff.
    """
    pool: Callable[..., Any] = functools.partial(spmm, **options)
    bags = (ids, offsets, coefficients)
    if value_scale is None and gradient_scale is None:
        return pool(table, *bags)
    return _spmm_scaled(pool, table, *bags, value_scale, gradient_scale)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _spmm_scaled(
    pool: Callable[..., Any],
    table: Float[Array, "V D"],
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    value_scale: Slots | None,
    gradient_scale: Slots | None,
) -> Float[Array, "B D"]:
    del gradient_scale
    return pool(table, ids, offsets, times(coefficients, value_scale))


@functools.partial(_spmm_scaled.defjvp, symbolic_zeros=True)
def _spmm_scaled_jvp(
    pool: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    table, ids, offsets, coefficients, value_scale, gradient_scale = primals
    value = _spmm_scaled(pool, *primals)
    pool = functools.partial(pool, dtype=None)  # rounded when all is added up
    tangent = jnp.zeros(value.shape, _row_gather.accumulation_dtype(table.dtype))
    if varies(tangents[0]):
        scaled = times(coefficients, gradient_scale)
        tangent += pool(tangents[0], ids, offsets, scaled)
    if coefficients is not None and varies(tangents[3]):
        tangent += pool(table, ids, offsets, times(tangents[3], value_scale))
    return value, tangent.astype(value.dtype)


def times(a: Array | None, b: Array | None) -> Array | None:
    """Multiply where None stands for ones."""
    if a is None or b is None:
        return b if a is None else a
    return a * b


def varies(tangent: Any) -> bool:
    return not isinstance(tangent, SymbolicZero)


spmm_p = define("spmm", dense=["rows"], coefficients=True, outputs=["bags"])
spmm_transpose_p = define(
    "spmm_transpose", dense=["bags"], coefficients=True, outputs=["rows"]
)
sddmm_p = define("sddmm", dense=["rows", "bags"], coefficients=False, outputs=["slots"])


def _jvp(
    primitive: Primitive, primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[Any, Any]:
    """Differentiate an operation that is linear in each floating operand."""
    value = primitive.bind(*equally_varying(*primals), **params)
    active = [
        (position, moved)
        for position, moved in enumerate(tangents)
        if not isinstance(moved, ad.Zero) and moved.dtype != jax.dtypes.float0
    ]
    if not active:
        return value, ad.Zero(jax.typeof(value).to_tangent_aval())
    if len(active) > 1 and "dtype" in params:  # rounded when all is added up
        params["dtype"] = _row_gather.accumulation_dtype(value.dtype)
    tangent = None
    for position, moved in active:
        operands = [*primals[:position], moved, *primals[position + 1 :]]
        term = primitive.bind(*equally_varying(*operands), **params)
        tangent = term if tangent is None else ad.add_tangents(tangent, term)
    assert tangent is not None
    return value, tangent.astype(value.dtype)


def _transpose(
    num_dense: int, rules: Sequence[Any], cotangent: Any, *operands: Any, **params: Any
) -> list[Any]:
    """Transpose in the one operand that is unknown; `rules` has one for each place.

    The places are the dense operands and, last, the coefficients.
    """
    unknown = [ad.is_undefined_primal(x) for x in operands]
    place = unknown.index(True)
    result: list[Any] = [None] * len(operands)
    if isinstance(cotangent, ad.Zero):
        result[place] = ad.Zero(operands[place].aval)
        return result
    rule = rules[min(place, num_dense)]
    dense, ids, offsets, coefficients = layout(num_dense, operands)
    result[place] = rule(cotangent, dense, ids, offsets, coefficients, **params)
    return result


# The rules, of (what comes back, dense operands, ids, offsets, coefficients). The
# unknown among them is an `UndefinedPrimal`, of which the type alone is known.


def _spmm_to_table(
    back: Array,
    dense: Any,
    *bags: Any,
    average: str | None,
    dtype: jnp.dtype,
    **options: Any,
) -> Array:
    ids, offsets, _ = bags
    table = dense[0].aval
    return spmm_transpose(
        divided(back, ids, offsets, dtype, average, **options),
        *bags,
        num_embeddings=table.shape[0],
        dtype=table.dtype,
        **options,
    )


def _spmm_to_coefficients(
    back: Array,
    dense: Any,
    ids: Ids,
    offsets: Offsets,
    _: Any,
    *,
    average: str | None,
    dtype: jnp.dtype,
    **options: Any,
) -> Array:
    shares = divided(back, ids, offsets, dtype, average, **options)
    return sddmm(dense[0], shares, ids, offsets, **options)


def divided(
    back: Float[Array, "B D"],
    ids: Ids,
    offsets: Offsets,
    dtype: jnp.dtype,
    average: str | None,
    *,
    pad_id: int | None,
    implementation: str | None,
) -> Float[Array, "B D"]:
    """Divide by what the average divided by, in the accumulation dtype."""
    accumulator = _row_gather.accumulation_dtype(dtype)
    back = back.astype(accumulator)
    if average is None:
        return back
    pool = functools.partial(spmm, implementation=implementation)
    options: dict[str, Any] = {"pad_id": pad_id, "average": average}
    return back / xla.divisors(pool, ids, offsets, accumulator, **options)


def _spmm_transpose_to_cotangent(
    back: Array,
    _: Any,
    *bags: Any,
    num_embeddings: _csr.Size,
    dtype: jnp.dtype,
    **options: Any,
) -> Array:
    del num_embeddings, dtype
    return spmm(back, *bags, **options)


def _spmm_transpose_to_coefficients(
    back: Array,
    dense: Any,
    ids: Ids,
    offsets: Offsets,
    _: Any,
    *,
    num_embeddings: _csr.Size,
    dtype: jnp.dtype,
    **options: Any,
) -> Array:
    del num_embeddings, dtype
    return sddmm(back, dense[0], ids, offsets, **options)


def _sddmm_to_table(
    back: Array, dense: Any, ids: Ids, offsets: Offsets, _: Any, **options: Any
) -> Array:
    table, cotangent = dense
    options |= {"average": None, "dtype": cotangent.dtype}
    return _spmm_to_table(cotangent, [table], ids, offsets, back, **options)


def _sddmm_to_cotangent(
    back: Array, dense: Any, ids: Ids, offsets: Offsets, _: Any, **options: Any
) -> Array:
    return spmm(dense[0], ids, offsets, back, **options)


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

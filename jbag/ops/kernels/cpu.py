"""The CPU kernel: bindings to the C++ code in `csrc` through XLA's FFI.

It implements `contract` without an [N, D] intermediate: it accumulates rows as it
gathers them, and `spmm_transpose` sorts the slots by id. Results don't depend on the
number of threads.
"""

from __future__ import annotations

import ctypes
import importlib.resources
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from jbag.ops._row_gather import accumulation_dtype
from jbag.ragged._csr_arrays import Ids, Offsets, Size, Slots


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
    """Compute `contract.Operations.spmm`."""
    shape = (_num_bags(ids, offsets), table.shape[1])
    pooled = jax.ShapeDtypeStruct(shape, dtype)
    bags = _bags(table, ids, offsets, coefficients)
    return _call("spmm", pooled, table, *bags, pad_id=pad_id, average=average or "none")


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
    """Compute `contract.Operations.spmm_transpose`."""
    rows = jax.ShapeDtypeStruct((num_embeddings, cotangent.shape[1]), dtype)
    bags = _bags(cotangent, ids, offsets, coefficients)
    return _call("spmm_transpose", rows, cotangent, *bags, pad_id=pad_id)


def sddmm(
    table: Float[Array, "V D"],
    cotangent: Float[Array, "B D"],
    ids: Ids,
    offsets: Offsets,
    *,
    pad_id: int | None,
) -> Slots:
    """Compute `contract.Operations.sddmm`."""
    dots = jax.ShapeDtypeStruct(ids.shape, accumulation_dtype(table.dtype))
    bags = _bags(table, ids, offsets, None)[:-1]
    return _call("sddmm", dots, table, cotangent, *bags, pad_id=pad_id)


def extremum(
    table: Float[Array, "V D"],
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    *,
    pad_id: int | None,
    largest: bool,
) -> tuple[Float[Array, "B D"], Int[Array, "B D"]]:
    """Compute `contract.Operations.extremum`."""
    shape = (_num_bags(ids, offsets), table.shape[1])
    values = jax.ShapeDtypeStruct(shape, accumulation_dtype(table.dtype))
    winners = jax.ShapeDtypeStruct(shape, jnp.int32)
    bags = _bags(table, ids, offsets, coefficients)
    best = _call(
        "extremum", (values, winners), table, *bags, pad_id=pad_id, largest=largest
    )
    return best[0], best[1]


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
    """Compute `contract.Operations.coalesce`."""
    indices = jax.ShapeDtypeStruct((max_unique_ids,), ids.dtype)
    sums = jax.ShapeDtypeStruct((max_unique_ids, cotangent.shape[1]), cotangent.dtype)
    bags = _bags(cotangent, ids, offsets, coefficients)
    # An operand, as FFI attributes can't be symbolic sizes.
    size = jnp.asarray(num_embeddings, ids.dtype)
    unique = _call("coalesce", (indices, sums), cotangent, *bags, size, pad_id=pad_id)
    return unique[0], unique[1]


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
    """Compute `contract.Operations.update_rows`.

    The outputs alias the operands: unless XLA copies the operands, other rows are
    neither read nor written.
    """
    if seed is None:
        seed = jnp.zeros(0, jnp.uint32)
    bags = _bags(table, ids, offsets, coefficients)
    operands = (table, scalars, seed, cotangent, *bags)
    updated = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (table, *states))
    aliases = {0: 0}
    aliases |= {len(operands) + i: 1 + i for i in range(len(states))}
    return tuple(
        _call(
            "update_rows",
            updated,
            *operands,
            *states,
            pad_id=pad_id,
            aliases=aliases,
            rule=rule,
        )
    )


def to_huge_pages(x: Array) -> Array:
    """Copy an array to huge pages if the system has them."""
    copy = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ffi.ffi_call("jbag_cpu_to_huge_pages", copy)(x)


def _num_bags(ids: Ids, offsets: Offsets) -> Size:
    return ids.shape[0] if offsets is None else offsets.shape[0] - 1


def _bags(
    dense: Array, ids: Ids, offsets: Offsets, coefficients: Slots | None
) -> tuple[Array, Array, Array]:
    """Return ids, offsets and coefficients; None becomes an empty array."""
    if offsets is None:
        offsets = jnp.zeros(0, ids.dtype)
    if coefficients is None:
        coefficients = jnp.zeros(0, accumulation_dtype(dense.dtype))
    return ids, offsets, coefficients


def _call(
    name: str,
    results: Any,
    *operands: Array,
    pad_id: int | None,
    aliases: dict[int, int] | None = None,
    **attributes: bool | str,
) -> Any:
    target = f"jbag_cpu_{name}"
    call: Callable[..., Any] = jax.ffi.ffi_call(
        target, results, input_output_aliases=aliases
    )
    padding = {"has_empty": pad_id is not None, "empty": np.int64(pad_id or 0)}
    return call(*operands, **padding, **attributes)


MAX_ROWS = 2**31 - 1  # it narrows ids to 32 bits

OPERATIONS = (
    "spmm",
    "spmm_transpose",
    "sddmm",
    "extremum",
    "coalesce",
    "update_rows",
    "to_huge_pages",
    "vocabulary_assign",
    "vocabulary_lookup",
    "vocabulary_new_rows",
)


def _load() -> str | None:
    """Load the library and register its handlers; return an error message or None."""
    package = importlib.resources.files("jbag") / "ops" / "kernels"
    reason = package / "cpu_missing.txt"
    if reason.is_file():
        return reason.read_text().strip()
    library = package / "libjbag_cpu.so"
    if not library.is_file():
        return "`pip install` builds it, and this copy of jbag is not installed"
    with importlib.resources.as_file(library) as path:
        try:
            handlers = ctypes.CDLL(str(path))
        except OSError as error:
            return f"its library can't be loaded: {error}"
    for name in OPERATIONS:
        handler = jax.ffi.pycapsule(getattr(handlers, f"jbag_cpu_{name}"))
        jax.ffi.register_ffi_target(f"jbag_cpu_{name}", handler, platform="cpu")
    return None


MISSING = _load()

"""The CUDA kernel: bindings to the code in `csrc/cuda` through XLA's FFI.

It implements `contract` without an [N, D] intermediate and without atomics on floats:
results have the same bits from run to run. NVRTC, which comes with `jax[cuda12]` and
`jax[cuda13]`, compiles the device code when a program is first run. XLA sorts the slots
by id; the kernels of the forward pass then sum over the sorted slots.

To add a device kernel, with `csrc/cuda/` for `jbag/csrc/cuda/`: its code in a file of
`csrc/cuda/device/`, listed in `device_code` of `csrc/CMakeLists.txt`; its handlers in
`csrc/cuda/bag_operations.cc` or `sorted_slots.cc`; its name in `OPERATIONS` below; its
instances in `kernels` of `tests/ops/kernels/test_cuda.py`.
"""

from __future__ import annotations

import ctypes
import importlib.resources
import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from jbag.ops._row_gather import accumulation_dtype
from jbag.ops.kernels import xla
from jbag.ops.kernels.update_rules import RULES
from jbag.ragged._csr_arrays import Ids, Offsets, Size, Slots

# As in csrc/cuda/device/arguments.h.
_PIECE = 256
_CHUNK = 1024


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
    num_bags, width = _num_bags(ids, offsets), table.shape[1]
    pieces = _max_pieces(ids)
    pooled = jax.ShapeDtypeStruct((num_bags, width), dtype)
    scratch = (
        _integers(_num_bounds(offsets) + pieces),
        _partials(pieces, width, table),
    )
    bags = _bags(table, ids, offsets, coefficients)
    options = {"average": average or "none", **_padding(pad_id)}
    return _call("spmm", (pooled, *scratch), table, *bags, **options)[0]


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
    width = cotangent.shape[1]
    slots = _sort(ids, offsets, coefficients, pad_id, num_embeddings, cotangent)
    capacity = min(ids.size, num_embeddings)
    rows = jax.ShapeDtypeStruct((num_embeddings, width), dtype)
    # The segments' rows, beside their bounds.
    segments = _integers(_num_segment_bounds(ids, capacity) + capacity)
    partials = _partials(_pieces(ids.size), width, cotangent)
    return _call("spmm_transpose", (rows, segments, partials), cotangent, *slots)[0]


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
    results = (dots, _integers(_num_bounds(offsets)))
    return _call("sddmm", results, table, cotangent, *bags, **_padding(pad_id))[0]


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
    width = table.shape[1]
    shape = (_num_bags(ids, offsets), width)
    pieces = _max_pieces(ids)
    values = jax.ShapeDtypeStruct(shape, accumulation_dtype(table.dtype))
    winners = jax.ShapeDtypeStruct(shape, jnp.int32)
    scratch = (
        _integers(_num_bounds(offsets)),
        _partials(pieces, width, table),
        jax.ShapeDtypeStruct((pieces, width), jnp.int32),
    )
    bags = _bags(table, ids, offsets, coefficients)
    options = {"largest": largest, **_padding(pad_id)}
    best = _call("extremum", (values, winners, *scratch), table, *bags, **options)
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
    width = cotangent.shape[1]
    slots = _sort(ids, offsets, coefficients, pad_id, num_embeddings, cotangent)
    indices = jax.ShapeDtypeStruct((max_unique_ids,), ids.dtype)
    sums = jax.ShapeDtypeStruct((max_unique_ids, width), cotangent.dtype)
    segments = _integers(_num_segment_bounds(ids, max_unique_ids))
    partials = _partials(_pieces(ids.size), width, cotangent)
    results = (indices, sums, segments, partials)
    unique = _call("coalesce", results, cotangent, *slots)
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
    neither read nor written. It has the rules of `RULES`; others are the reference's.
    """
    if rule not in RULES:
        bags = (ids, offsets, coefficients)
        options: Any = {"pad_id": pad_id, "rule": rule, "coalesce": coalesce}
        return xla.update_rows(
            table, states, scalars, seed, cotangent, *bags, **options
        )
    num_embeddings, width = table.shape
    if seed is None:
        seed = jnp.zeros(0, jnp.uint32)
    slots = _sort(ids, offsets, coefficients, pad_id, num_embeddings, cotangent)
    capacity = min(ids.size, num_embeddings)
    operands = (table, scalars, seed, cotangent, *slots)
    moved = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (table, *states)]
    scratch = (
        _integers(_num_segment_bounds(ids, capacity) + capacity),
        _partials(_pieces(ids.size), width, cotangent),
    )
    aliases = {0: 0}
    aliases |= {len(operands) + i: 3 + i for i in range(len(states))}
    results = (moved[0], *scratch, *moved[1:])
    updated = _call(
        "update_rows", results, *operands, *states, aliases=aliases, rule=rule
    )
    return updated[0], *updated[3:]


def _sort(
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    pad_id: int | None,
    num_embeddings: Size,
    cotangent: Array,
) -> tuple[Array, Array, Array, Array]:
    """Sort the slots by id: keys, bags and coefficients, and V in an array.

    The key of a slot that names no row is V.
    """
    size = jnp.asarray(num_embeddings, jnp.int32)
    pair = (jax.ShapeDtypeStruct((ids.size,), jnp.int32),) * 2
    ids, ends, flat = _bags(cotangent, ids, offsets, coefficients)
    results = (*pair, _integers(_num_bounds(offsets)))
    keys, bags, _ = _call("slot_keys", results, ids, ends, size, **_padding(pad_id))
    if coefficients is None:
        keys, bags = jax.lax.sort((keys, bags), num_keys=1, is_stable=True)
        return keys, bags, flat, size
    # XLA sorts 32-bit pairs by a radix sort: the slots first, then what they hold.
    slots = jnp.arange(ids.size, dtype=jnp.int32)
    keys, order = jax.lax.sort((keys, slots), num_keys=1, is_stable=True)
    return keys, bags[order], flat.reshape(-1)[order], size


def _num_bags(ids: Ids, offsets: Offsets) -> Size:
    return ids.shape[0] if offsets is None else offsets.shape[0] - 1


def _num_bounds(offsets: Offsets) -> Size:
    """The bounds of the bags, and a flag."""
    return 0 if offsets is None else offsets.shape[0] + 1


def _num_segment_bounds(ids: Ids, capacity: Size) -> Size:
    """The bounds of the segments, and counts of those in each chunk of the keys."""
    return capacity + 1 + -(-ids.size // _CHUNK) + 2


def _max_pieces(ids: Ids) -> Size:
    longest = ids.shape[-1]
    return 0 if isinstance(longest, int) and longest <= _PIECE else _pieces(ids.size)


def _pieces(num_slots: Size) -> Size:
    """The pieces that bags of more than `_PIECE` slots may have."""
    if isinstance(num_slots, int) and num_slots <= _PIECE:
        return 0
    return 2 * -(-num_slots // _PIECE)


def _integers(size: Size) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size,), jnp.int32)


def _partials(pieces: Size, width: Size, dense: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((pieces, width), accumulation_dtype(dense.dtype))


def _bags(
    dense: Array, ids: Ids, offsets: Offsets, coefficients: Slots | None
) -> tuple[Array, Array, Array]:
    """Return ids, offsets and coefficients; None becomes an empty array."""
    if offsets is None:
        offsets = jnp.zeros(0, ids.dtype)
    if coefficients is None:
        coefficients = jnp.zeros(0, accumulation_dtype(dense.dtype))
    return ids, offsets, coefficients


def _padding(pad_id: int | None) -> dict[str, Any]:
    return {"has_empty": pad_id is not None, "empty": np.int64(pad_id or 0)}


def _call(
    name: str,
    results: Any,
    *operands: Array,
    aliases: dict[int, int] | None = None,
    **attributes: Any,
) -> Any:
    call: Callable[..., Any] = jax.ffi.ffi_call(
        f"jbag_cuda_{name}", results, input_output_aliases=aliases
    )
    return call(*operands, **attributes)


MAX_ROWS = 2**31 - 1  # keys are 32-bit integers

OPERATIONS = (
    "spmm",
    "spmm_transpose",
    "sddmm",
    "extremum",
    "slot_keys",
    "coalesce",
    "update_rows",
)


def load(driver: str, nvrtc: str, platform: str) -> str | None:
    """Open the driver and NVRTC, and register the handlers for a platform.

    Returns an error message or None.
    """
    package = importlib.resources.files("jbag") / "ops" / "kernels"
    library = package / "libjbag_cuda.so"
    if not library.is_file():
        no_compiler = package / "cpu_missing.txt"
        if no_compiler.is_file():
            return no_compiler.read_text().strip()
        return "`pip install` builds it, and this copy of jbag is not installed"
    with importlib.resources.as_file(library) as path:
        try:
            handlers = ctypes.CDLL(str(path))
        except OSError as error:
            return f"its library can't be loaded: {error}"
    handlers.jbag_cuda_open.restype = ctypes.c_char_p
    reason = handlers.jbag_cuda_open(driver.encode(), nvrtc.encode())
    if reason is not None:
        return str(reason.decode())
    for name in OPERATIONS:
        stages = {"execute": name, "initialize": f"{name}_initialize"}
        bundle = {
            stage: jax.ffi.pycapsule(getattr(handlers, f"jbag_cuda_{symbol}"))
            for stage, symbol in stages.items()
        }
        jax.ffi.register_ffi_target(f"jbag_cuda_{name}", bundle, platform=platform)
    return None


def _load() -> str | None:
    for version in (13, 12):
        # JAX's plugin for CUDA, with which NVRTC comes.
        if importlib.util.find_spec(f"jax_cuda{version}_plugin") is not None:
            return load("libcuda.so.1", _nvrtc(version), "CUDA")
    return "JAX for CUDA is not installed"


def _nvrtc(version: int) -> str:
    """Return the path of NVRTC in NVIDIA's packages, or its name elsewhere."""
    library = f"libnvrtc.so.{version}"
    nvidia = importlib.util.find_spec("nvidia")
    for folder in (nvidia and nvidia.submodule_search_locations) or ():
        for package in (f"cu{version}", "cuda_nvrtc"):
            path = pathlib.Path(folder) / package / "lib" / library
            if path.is_file():
                return str(path)
    return library


MISSING = _load()

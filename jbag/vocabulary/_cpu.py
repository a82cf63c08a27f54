"""The CPU kernel: bindings to `csrc/kernels/vocabulary.cc` through XLA's FFI.

Its results have the same bits as those of `_reference`. `jbag.ops.kernels.cpu` loads
the library.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from jbag.vocabulary._reference import Options, Words
from jbag.vocabulary._state import VocabularyState, to_state


def assign(
    state: VocabularyState,
    high: Words,
    low: Words,
    is_valid: Bool[Array, " N"],
    step: Int32[Array, ""],
    first_bucket: Int32[Array, ""],
    options: Options,
) -> tuple[Int32[Array, " N"], VocabularyState]:
    """Compute `_reference.assign`.

    The state's outputs alias its operands: unless XLA copies the operands, only the
    probes of the ids are read or written, and `is_new` whole.
    """
    arrays, counters = state[:-1], state.statistics
    operands = (*arrays, high, low, is_valid, step, first_bucket, *counters)
    aliases = {i: 1 + i for i in range(len(arrays))}
    first = len(operands) - len(counters)
    aliases |= {first + i: 1 + len(arrays) + i for i in range(len(counters))}
    results = [jax.ShapeDtypeStruct(low.shape, jnp.int32)]
    results += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*arrays, *counters)]
    call = jax.ffi.ffi_call(
        "jbag_cpu_vocabulary_assign", results, input_output_aliases=aliases
    )
    rows, *updated = call(*operands, **_attributes(options))
    return rows, to_state(updated)


def lookup(
    state: VocabularyState,
    high: Words,
    low: Words,
    is_valid: Bool[Array, " N"],
    first_bucket: Int32[Array, ""],
    options: Options,
) -> Int32[Array, " N"]:
    """Compute `_reference.lookup`."""
    rows = jax.ShapeDtypeStruct(low.shape, jnp.int32)
    call = jax.ffi.ffi_call("jbag_cpu_vocabulary_lookup", rows)
    keys = (state.high, state.low, state.last_seen)
    operands = (high, low, is_valid, first_bucket)
    return call(*keys, *operands, **_attributes(options))


def new_rows(is_new: Bool[Array, " V"], max_rows: Any) -> Int32[Array, " M"]:
    """Compute `_reference.new_rows`."""
    rows = jax.ShapeDtypeStruct((max_rows,), jnp.int32)
    return jax.ffi.ffi_call("jbag_cpu_vocabulary_new_rows", rows)(is_new)


def _attributes(options: Options) -> dict[str, Any]:
    return {
        name: value if isinstance(value, bool | str) else np.int64(value)
        for name, value in options._asdict().items()
    }

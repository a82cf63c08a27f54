"""The operations of a vocabulary as JAX primitives, with a kernel for each platform."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Bool, Int32, UInt32

from jbag.ops._primitive import dispatch, equally_varying
from jbag.ops.kernels import KERNELS, Kernel
from jbag.vocabulary import _cpu, _reference
from jbag.vocabulary._reference import Options
from jbag.vocabulary._state import Statistics, VocabularyState, to_state

_NUM_ARRAYS = len(VocabularyState._fields) - 1 + len(Statistics._fields)


def assign(
    state: VocabularyState,
    high: UInt32[Array, " N"],
    low: UInt32[Array, " N"],
    is_valid: Bool[Array, " N"],
    step: Int32[Array, ""],
    first_bucket: Int32[Array, ""],
    options: Options,
    implementation: str | None,
) -> tuple[Int32[Array, " N"], VocabularyState]:
    """Return `_reference.assign`, with the arrays of the state updated in place."""
    operands = (*jax.tree.leaves(state), high, low, is_valid, step, first_bucket)
    rows, *arrays = assign_p.bind(
        *equally_varying(*operands), options=options, implementation=implementation
    )
    return rows, to_state(arrays)


def lookup(
    state: VocabularyState,
    high: UInt32[Array, " N"],
    low: UInt32[Array, " N"],
    is_valid: Bool[Array, " N"],
    first_bucket: Int32[Array, ""],
    options: Options,
    implementation: str | None,
) -> Int32[Array, " N"]:
    """Return `_reference.lookup`."""
    operands = (*jax.tree.leaves(state), high, low, is_valid, first_bucket)
    return lookup_p.bind(
        *equally_varying(*operands), options=options, implementation=implementation
    )


def new_rows(
    is_new: Bool[Array, " V"], max_rows: Any, implementation: str | None
) -> Int32[Array, " M"]:
    """Return `_reference.new_rows`."""
    return new_rows_p.bind(is_new, max_rows=max_rows, implementation=implementation)


def _implementation(kernel: Kernel) -> Any:
    """Return the C++ kernel where the embedding bag has its own; else the reference."""
    return _cpu if kernel is KERNELS["cpu"] else _reference


def _call_assign(kernel: Kernel, *operands: Array, options: Options) -> Any:
    state = to_state(operands[:_NUM_ARRAYS])
    rows, state = _implementation(kernel).assign(
        state, *operands[_NUM_ARRAYS:], options
    )
    return (rows, *jax.tree.leaves(state))


def _call_lookup(kernel: Kernel, *operands: Array, options: Options) -> Any:
    state = to_state(operands[:_NUM_ARRAYS])
    return _implementation(kernel).lookup(state, *operands[_NUM_ARRAYS:], options)


def _call_new_rows(kernel: Kernel, is_new: Array, *, max_rows: Any) -> Any:
    return _implementation(kernel).new_rows(is_new, max_rows)


assign_p = dispatch("vocabulary_assign", _call_assign, several=True)
lookup_p = dispatch("vocabulary_lookup", _call_lookup, several=False)
new_rows_p = dispatch("vocabulary_new_rows", _call_new_rows, several=False)

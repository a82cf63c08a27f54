"""Coalescing of gradients and in-place row updates, as JAX primitives.

Both compute only the rows of `spmm_transpose` whose ids occur in the bags. Their
derivatives are those of the reference implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from jbag.ops._packed_table import (
    AnyTable,
    PackedTable,
    packing_of,
    storage,
    stored,
)
from jbag.ops._packing import Packing
from jbag.ops._primitive import bind, dispatch, equally_varying, layout
from jbag.ops._row_gather import accumulation_dtype
from jbag.ops.kernels import Kernel
from jbag.ops.kernels.update_rules import rule_of
from jbag.ragged._csr_arrays import Ids, Offsets, Size, Slots


def coalesce(
    cotangent: Float[Array, "B D"],
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    *,
    num_embeddings: Size,
    **options: Any,
) -> tuple[Int[Array, " U"], Float[Array, "U D"]]:
    """Return the distinct ids, sorted, and the sum of each one's rows.

    U is min(N, V). Entries past the last distinct id have the index V and a zero row.
    """
    options["max_unique_ids"] = min(ids.size, num_embeddings)
    options["num_embeddings"] = num_embeddings
    indices, sums = bind(
        coalesce_p, (cotangent,), ids, offsets, coefficients, **options
    )
    return indices, sums


def update_rows(
    table: AnyTable,
    states: Sequence[Array | PackedTable],
    scalars: Sequence[Any] | Array,
    seed: UInt32[Array, "2"] | None,
    cotangent: Float[Array, "B D"],
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    *,
    rule: str,
    **options: Any,
) -> tuple[Array, ...]:
    """Update the rows of the bags' ids by an update rule; return table and states.

    A packed table has packed states, and what is packed is returned as its lines. XLA
    updates in place where the operands are donated or not used again. With a `seed`, a
    bfloat16 table rounds stochastically.
    """
    dtype = accumulation_dtype(table.dtype)
    numbers = stack_scalars(scalars, dtype)
    optional = [
        x for x in (seed, cotangent, ids, offsets, coefficients) if x is not None
    ]
    arrays = map(storage, (table, *states))
    operands = equally_varying(*arrays, numbers, *optional)
    options |= {
        "rule": rule,
        "at_random": seed is not None,
        "packing": packing_of(table),
    }
    return tuple(update_rows_p.bind(*operands, **options))


def stack_scalars(scalars: Sequence[Any] | Array, dtype: jnp.dtype) -> Array:
    """Return the scalars of a rule as an array."""
    if isinstance(scalars, jax.Array):
        return scalars.astype(dtype)
    return jnp.stack([jnp.asarray(x, dtype) for x in scalars])


def _call_coalesce(kernel: Kernel, *operands: Array, **params: Any) -> Any:
    (cotangent,), *bags = layout(1, operands)
    return kernel.operations.coalesce(cotangent, *bags, **params)


def _call_update_rows(
    kernel: Kernel,
    table: Array,
    *operands: Array,
    at_random: bool,
    packing: Packing | None,
    **params: Any,
) -> Any:
    num_states = len(rule_of(params["rule"]).states)
    states, (scalars, *rest) = operands[:num_states], operands[num_states:]
    seed = rest.pop(0) if at_random else None
    (cotangent,), *bags = layout(1, rest)
    tables: list[Any] = [
        kernel.readable(stored(x, packing if x.ndim == 2 else None))
        for x in (table, *states)
    ]
    updated = kernel.operations.update_rows(
        tables[0], tuple(tables[1:]), scalars, seed, cotangent, *bags, **params
    )
    if packing is None or kernel.reads_packed:
        return updated
    return tuple(packing.pack(x) if x.ndim == 2 else x for x in updated)


coalesce_p = dispatch("coalesce", _call_coalesce, several=True)
update_rows_p = dispatch("update_rows", _call_update_rows, several=True)

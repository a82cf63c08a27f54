"""The operations as Pallas kernels for the TensorCore of TPUs, by DMAs of single rows.

`contract` defines the operations, and `line_reductions` the kernels. These read a table
as lines of 128 lanes or more. A table whose D is a multiple of 128 is that already. Any
other table is copied into lines in every call, and so are float16 tables and those of
bfloat16 with an odd number of rows. A `PackedTable` of one block is not.

`spmm_transpose` and `coalesce` sort the slots by id, and sum the bags' cotangents over
the sorted slots by the kernel of `spmm`: the same bits in each run.

Tables are float32, bfloat16 or float16, and all sizes are static.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jbag.ops._packed_table import AnyTable, PackedTable
from jbag.ops._row_gather import take
from jbag.ops.kernels import xla
from jbag.ops.kernels.line_reductions import (
    LANES,
    Lines,
    extremum_lines,
    pad,
    sddmm_lines,
    spmm_lines,
)
from jbag.ragged._csr_arrays import (
    Ids,
    Offsets,
    Size,
    Slots,
    bag_bounds,
    filled,
    segment_ids,
)

_DTYPES = ("float32", "bfloat16", "float16")


def spmm(
    table: AnyTable,
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    *,
    pad_id: int | None,
    average: str | None,
    dtype: jnp.dtype,
) -> Float[Array, "B D"]:
    """Compute `contract.Operations.spmm`."""
    lines = _as_lines(table, ids, offsets)
    options: dict[str, Any] = {"pad_id": pad_id, "average": average, "dtype": dtype}
    return spmm_lines(lines, ids, offsets, coefficients, **options)


def sddmm(
    table: AnyTable,
    cotangent: Float[Array, "B D"],
    ids: Ids,
    offsets: Offsets,
    *,
    pad_id: int | None,
) -> Slots:
    """Compute `contract.Operations.sddmm`."""
    lines = _as_lines(table, ids, offsets)
    return sddmm_lines(lines, cotangent, ids, offsets, pad_id=pad_id)


def extremum(
    table: AnyTable,
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    *,
    pad_id: int | None,
    largest: bool,
) -> tuple[Float[Array, "B D"], Int[Array, "B D"]]:
    """Compute `contract.Operations.extremum`."""
    lines = _as_lines(table, ids, offsets)
    options: dict[str, Any] = {"pad_id": pad_id, "largest": largest}
    return extremum_lines(lines, ids, offsets, coefficients, **options)


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
    _check_static(*ids.shape, *cotangent.shape, num_embeddings, max_unique_ids)
    slots = jnp.arange(ids.size, dtype=jnp.int32)
    kept = filled(ids, pad_id).reshape(-1)
    if offsets is None:
        bags = jax.lax.broadcasted_iota(jnp.int32, ids.shape, 0).reshape(-1)
    else:
        bounds, malformed = bag_bounds(offsets, ids.size)
        bags = segment_ids(bounds, ids.size)
        kept &= ~take(malformed, bags, True)
    keys = xla.sort_keys(ids.reshape(-1), kept, num_embeddings)
    carried = [] if coefficients is None else [coefficients.reshape(-1)]
    # With the bags as keys it needs no slots to be stable.
    keys, bags, *carried = jax.lax.sort(
        (keys, bags, *carried), num_keys=2, is_stable=False
    )

    # A second sort moves the first slots of ids to the front. A scatter would take the
    # slots one by one.
    is_first = (jnp.diff(keys, prepend=-1) > 0) & (keys < num_embeddings)
    num_slots = (keys < num_embeddings).sum(dtype=jnp.int32)
    starts = jnp.where(is_first, slots, num_slots)
    starts, keys = jax.lax.sort((starts, keys), num_keys=1, is_stable=False)
    keys = jnp.where(starts < num_slots, keys, num_embeddings).astype(ids.dtype)
    room = (0, max(0, max_unique_ids + 1 - ids.size))
    indices = jnp.pad(keys, room, constant_values=num_embeddings)[:max_unique_ids]
    missing = jnp.broadcast_to(num_slots, room[1:])
    starts = jnp.concatenate([starts, missing])[: max_unique_ids + 1]
    lines = _as_lines(cotangent, bags, starts, rows_per_line=1)
    options: dict[str, Any] = {"pad_id": None, "average": None}
    scale = carried[0] if carried else None
    sums = spmm_lines(lines, bags, starts, scale, dtype=cotangent.dtype, **options)
    return indices, sums


spmm_transpose = functools.partial(xla.coalesce_and_store, coalesce)
update_rows = functools.partial(xla.update_rows, coalesce=coalesce)


def _as_lines(
    table: AnyTable,
    ids: Ids,
    offsets: Offsets,
    rows_per_line: int | None = None,
) -> Lines:
    """Store a table as lines; check what the kernels take."""
    if table.dtype.name not in _DTYPES:
        raise ValueError(
            f"`implementation` 'tensorcore' takes tables of {', '.join(_DTYPES)}; "
            f"got {table.dtype.name}."
        )
    _check_static(*table.shape, *ids.shape, *(() if offsets is None else offsets.shape))
    num_embeddings, width = table.shape
    # Two 16-bit lines share their words.
    together = 4 // table.dtype.itemsize
    if isinstance(table, PackedTable):
        if table.packing.num_blocks == 1:
            rows_per_line = table.packing.rows_per_line
            return Lines(table.lines, num_embeddings, width, rows_per_line)
        table = table.packing.unpack(table.lines)
    if rows_per_line is None:
        rows_per_line = max(1, LANES // max(width, 1))
    num_lines = -(-max(num_embeddings, 1) // (rows_per_line * together)) * together
    lines = pad(table, (num_lines * rows_per_line, width))
    lines = lines.reshape(num_lines, rows_per_line * width)
    lines = pad(lines, (num_lines, -(-max(lines.shape[1], 1) // LANES) * LANES))
    return Lines(lines, num_embeddings, width, rows_per_line)


def _check_static(*sizes: Size) -> None:
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError(
            "`implementation` 'tensorcore' takes no symbolic sizes; got "
            f"{', '.join(map(str, sizes))}."
        )

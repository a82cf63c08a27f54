"""Sums of rectangular bags by gathers that add, on the SparseCores of a TPU.

A vector subcore takes every n-th chunk of 128 bags. For each slot of the bags in turn,
an indirect stream gathers the row of each bag and adds it to the bag's sum in the
subcore's memory: no vector operation touches the rows. The streams of a subcore follow
each other, so the sum of a bag has the order of its slots. What a subcore holds does
not depend on the number of bags, of their slots or of rows.

Memory traffic: a row is read once, in pieces of 128 lanes, and a sum written once.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jbag.ops.kernels.sparsecore_chunks import (
    LANES,
    NO_ROW,
    Lines,
    subcores,
)

CHUNK = 128
# Slots whose indices are read together: the rows of a tile of the TensorCore's layouts.
STEPS = 8


def takes(lines: Lines) -> bool:
    """Return whether streams can add the rows: they add whole words of float32."""
    return lines.rows_per_line == 1 and not lines.has_halves


def steps(
    lines: Lines, ids: Int[Array, "B L"], kept: Bool[Array, "B L"]
) -> tuple[Int[Array, "steps chunk"], Int[Array, " bags"], Bool[Array, " B"]]:
    """Return the rows that each stream gathers, the bags, and a mask of NaN bags.

    The rows of chunk c are [c * T : (c + 1) * T], where T is L rounded up to `STEPS`. A
    slot that is not kept, or that holds an id outside [0, V), gathers nothing. The bags
    are padded to whole chunks by `NO_ROW`.
    """
    num_bags, length = ids.shape
    is_row = (ids >= 0) & (ids < lines.num_rows)
    rows = jnp.where(kept & is_row, ids, NO_ROW).astype(jnp.int32)
    more = ((0, -num_bags % CHUNK), (0, -length % STEPS))
    rows = jnp.pad(rows, more, constant_values=NO_ROW)
    rows = rows.reshape(-1, CHUNK, rows.shape[1]).swapaxes(1, 2)
    bags = jnp.arange(num_bags, dtype=jnp.int32)
    bags = jnp.pad(bags, more[0], constant_values=NO_ROW)
    return rows.reshape(-1, CHUNK), bags, (kept & ~is_row).any(1)


def buffers(lines: Lines) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return the shapes and dtypes of the arrays in a subcore's memory."""
    width = LANES if lines.is_tiled else lines.width
    return {
        "rows": ((STEPS, CHUNK), jnp.int32),
        "bags": ((CHUNK,), jnp.int32),
        "sums": ((CHUNK, width), jnp.float32),
    }


def memory(lines: Lines) -> int:
    """Return the number of bytes in a subcore's memory."""
    return sum(4 * math.prod(shape) for shape, _ in buffers(lines).values())


def add_rows(
    lines: Lines,
    rows: Int[Array, "steps chunk"],
    bags: Int[Array, " bags"],
    num_bags: int,
) -> Float[Array, "B D"]:
    """Sum the rows of each bag.

    Raises:
      ValueError: the TPU has no SparseCore.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu
    from jax.experimental.pallas import tpu_sc as plsc

    mesh, lanes = subcores()
    num_workers = mesh.num_cores * mesh.num_subcores
    num_chunks = bags.size // CHUNK
    blocks_per_chunk = rows.shape[0] // STEPS // num_chunks
    shapes = buffers(lines)
    width = shapes["sums"][0][1]
    passes = lines.width // width

    def body(
        lines_ref: Any,
        rows_ref: Any,
        bags_ref: Any,
        out_ref: Any,
        own: Any,
        bags: Any,
        sums: Any,
        semaphore: Any,
    ) -> None:
        core, subcore = jax.lax.axis_index("core"), jax.lax.axis_index("subcore")
        worker = subcore * mesh.num_cores + core

        def add_chunk(c: Any, index: Any) -> None:
            def part(ref: Any, indices: Any) -> Any:
                rows = plsc.Indices(indices, ignored_value=NO_ROW)
                if passes == 1:
                    return ref.at[rows]
                return ref.at[rows, pl.ds(pl.multiple_of(index * width, width), width)]

            @pl.loop(0, CHUNK)
            def _(bag: Any) -> None:
                for lane in range(0, width, lanes):
                    sums[bag, pl.ds(lane, lanes)] = jnp.zeros(lanes, jnp.float32)

            @pl.loop(0, blocks_per_chunk)
            def _(block: Any) -> None:
                first = (c * blocks_per_chunk + block) * STEPS
                first = pl.multiple_of(first, STEPS)
                pltpu.sync_copy(rows_ref.at[pl.ds(first, STEPS)], own)
                for step in range(STEPS):
                    source = part(lines_ref, own.at[step])
                    pltpu.async_copy(source, sums, semaphore, add=True).wait()

            chunk = pl.ds(pl.multiple_of(c * CHUNK, CHUNK), CHUNK)
            pltpu.sync_copy(bags_ref.at[chunk], bags)
            pltpu.async_copy(sums, part(out_ref, bags), semaphore).wait()

        @pl.loop(0, -(-num_chunks // num_workers))
        def _(i: Any) -> None:
            @pl.when(i * num_workers + worker < num_chunks)
            def _() -> None:
                @pl.loop(0, passes)
                def _(index: Any) -> None:
                    add_chunk(i * num_workers + worker, index)

    kernel: Any = pl.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(
            (num_bags, lines.width),
            jnp.float32,
            # Under `shard_map` the sums vary as the operands do, which all vary alike.
            manual_axis_type=jax.typeof(lines.array).manual_axis_type,
        ),
        mesh=mesh,
        scratch_types=[
            *(pltpu.VMEM(shape, dtype) for shape, dtype in shapes.values()),
            pltpu.SemaphoreType.DMA,
        ],
        compiler_params=pltpu.CompilerParams(
            use_tc_tiling_on_sc=lines.is_tiled, needs_layout_passes=False
        ),
        name="jbag_sparsecore_gather_add",
    )
    with jax.enable_x64(False):  # a subcore's integers have 32 bits
        return kernel(lines.array, rows, bags)

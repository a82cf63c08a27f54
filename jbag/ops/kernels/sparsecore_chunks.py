"""Reductions of sorted segments of table rows on the SparseCores of a TPU.

The slots are cut into chunks of equal size. A vector subcore takes every n-th chunk:
an indirect stream gathers the rows of its slots into the subcore's memory, vector
operations reduce them by segment, and another stream scatters the results. A segment
that continues from an earlier chunk has its part in a row of its own, and XLA adds
these parts: no atomics, and the same bits from run to run. What a subcore holds does
not depend on the number of slots, rows or segments.

Memory traffic: a row is read once, in pieces of 128 lanes; 20 bytes are read for a
slot; a row is written for each segment, and for each chunk that continues one.

`chunks` computes on the TensorCore what the subcores read. Only `reduce_chunks` is a
Pallas kernel.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jbag.ragged._csr_arrays import Size

# Lanes of a tile of the TensorCore's layouts, in which rows are read without a copy.
LANES = 128
# Vectors have 8 or 16 lanes.
MIN_LANES = 16
# Most indices of an indirect stream.
MAX_CHUNK = 128
# Of the 256 KiB that a subcore of TPU v6e has, the least of all generations.
MEMORY_LIMIT = 192 * 2**10
# The row that streams skip.
NO_ROW = -1

SUM, MAX, MIN = "sum", "max", "min"


@dataclasses.dataclass(frozen=True)
class Lines:
    """Rows of a table in lines of equal length, as the SparseCores read them.

    Row v lies in line v // k, in `width` lanes from lane (v % k) * width on.

    Attributes:
      array: [R, W], float32 or bfloat16; W is a multiple of 128, or equals `width`.
      num_rows: V, at most k * R.
      width: the number of lanes of a row, a multiple of 16.
      rows_per_line: k.
    """

    array: Float[Array, "R W"]
    num_rows: int
    width: int
    rows_per_line: int = 1

    @property
    def is_tiled(self) -> bool:
        """Whether the lines have the TensorCore's tiling; else they are contiguous."""
        return self.array.shape[1] % LANES == 0

    @property
    def has_halves(self) -> bool:
        """Whether streams read the lines by pairs, as words of two 16-bit numbers."""
        return self.array.dtype.itemsize == 2


def lines_of(table: Float[Array, "V D"]) -> Lines:
    """Return the rows of a table.

    They are read in place if D is a multiple of 128, and V is even for a 16-bit table.
    Otherwise they are padded with zeros or laid out anew, which copies the table.
    """
    num_rows, width = table.shape
    is_narrow = table.dtype.itemsize == 4 and width < LANES
    unit = MIN_LANES if is_narrow else LANES
    more_rows = num_rows % 2 if table.dtype.itemsize == 2 else 0
    if width % unit or more_rows:
        table = jnp.pad(table, ((0, more_rows), (0, -width % unit)))
    return Lines(table, num_rows, table.shape[1])


def packed_lines(array: Float[Array, "R W"], num_rows: int, width: int) -> Lines:
    """Return the rows that lines of W // width of them hold, read in place.

    W is a multiple of 128, and `width` of 16. R is even for a 16-bit table.
    """
    line_width = array.shape[1]
    if line_width == LANES and LANES % width == 0 and array.dtype.itemsize == 4:
        # Lines of 128 words are contiguous, and so are their rows.
        return Lines(array.reshape(-1, width), num_rows, width)
    return Lines(array, num_rows, width, line_width // width)


class Chunks(NamedTuple):
    """What the subcores read: [C * K] for C chunks of K slots.

    Attributes:
      lines: the line to gather (half of it where lines are read by pairs), or `NO_ROW`.
      places: 2 * lane + half: where in the line or the pair of lines the row is.
      owners: the accumulator: the first slot of the segment in the chunk; K for none.
      coefficients: the factor of the row.
      targets: the row of the output for each accumulator, or `NO_ROW`.
    """

    lines: Int[Array, " CK"]
    places: Int[Array, " CK"]
    owners: Int[Array, " CK"]
    coefficients: Float[Array, " CK"]
    targets: Int[Array, " CK"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of a subcore's work.

    Attributes:
      chunk: K, the number of slots of a chunk.
      gathered: the number of lanes that are gathered together.
      accumulated: the number of lanes of an accumulator.
      passes: how often a chunk is gathered, to cover all lanes of a row.
      reduction: "sum", "max" or "min".
    """

    chunk: int
    gathered: int
    accumulated: int
    passes: int
    reduction: str

    @property
    def out_width(self) -> int:
        """The number of lanes of a row of the output."""
        return self.accumulated * self.passes

    def buffers(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Return the shapes and dtypes of the arrays in a subcore's memory."""
        slots = (self.chunk,)
        accumulators = (self.chunk + 1, self.accumulated)
        arrays: dict[str, tuple[tuple[int, ...], Any]] = {
            "lines": (slots, jnp.int32),
            "places": (slots, jnp.int32),
            "owners": (slots, jnp.int32),
            "coefficients": (slots, jnp.float32),
            "targets": (slots, jnp.int32),
            "gathered": ((self.chunk, self.gathered), jnp.float32),
            "values": (accumulators, jnp.float32),
        }
        if self.reduction != SUM:
            arrays["winners"] = (accumulators, jnp.int32)
        return arrays

    def memory(self) -> int:
        """Return the number of bytes in a subcore's memory."""
        return sum(4 * math.prod(shape) for shape, _ in self.buffers().values())


def plan_for(lines: Lines, reduction: str) -> Plan:
    """Return the plan with the largest chunk that a subcore's memory holds.

    Raises:
      ValueError: not even the smallest chunk fits.
    """
    line_width, width = lines.array.shape[1], lines.width
    by_tiles = lines.is_tiled and lines.rows_per_line == 1
    gathered = LANES if by_tiles else line_width
    passes = line_width // LANES if by_tiles else 1
    accumulated = -(-width // LANES) * LANES if lines.is_tiled else width
    for chunk in (MAX_CHUNK, MAX_CHUNK // 2, MAX_CHUNK // 4, MAX_CHUNK // 8):
        found = Plan(chunk, gathered, accumulated // passes, passes, reduction)
        if found.memory() <= MEMORY_LIMIT:
            return found
    raise ValueError(
        "`implementation` 'sparsecore' takes lines of several rows up to "
        f"{MEMORY_LIMIT} bytes for {found.chunk} of them; got {line_width} lanes."
    )


def chunks(
    lines: Lines,
    rows: Int[Array, " N"],
    segments: Int[Array, " N"],
    kept: Bool[Array, " N"],
    coefficients: Float[Array, " N"] | None,
    num_segments: Size,
    chunk: int,
) -> tuple[Chunks, Int[Array, " C"], Bool[Array, " C"]]:
    """Cut the slots into chunks; return also each chunk's first segment and its kind.

    The segments are non-decreasing; slots of none have `num_segments`. A kept slot with
    a row outside [0, V) reads nothing, and has the coefficient NaN. The first segment
    of a chunk of the last kind, True, continues from the chunk before: its part goes to
    row `num_segments` + c of the output.
    """
    num_chunks = max(1, -(-rows.size // chunk))
    k = lines.rows_per_line
    if coefficients is None:
        coefficients = jnp.ones(rows.size, jnp.float32)

    kept &= segments < num_segments
    is_row = (rows >= 0) & (rows < lines.num_rows)
    coefficients = jnp.where(is_row, coefficients, jnp.nan).astype(jnp.float32)
    rows = jnp.where(is_row, rows, 0).astype(jnp.int32)
    line, lane = rows // k, rows % k * lines.width
    places = 2 * lane
    if lines.has_halves:
        line, places = line // 2, places + line % 2
    line = jnp.where(kept & is_row, line, NO_ROW)

    def split(x: Array, fill: Any) -> Array:
        x = jnp.pad(x, (0, num_chunks * chunk - x.size), constant_values=fill)
        return x.reshape(num_chunks, chunk)

    segments = split(segments.astype(jnp.int32), num_segments)
    first, last = segments[:, 0], segments[:, -1]
    starts = jnp.diff(segments, axis=1, prepend=NO_ROW) != 0
    slots = jnp.arange(chunk, dtype=jnp.int32)
    owners = jax.lax.cummax(jnp.where(starts, slots, 0), axis=1)
    owners = jnp.where(split(kept, False), owners, chunk)
    targets = jnp.where(starts & (segments < num_segments), segments, NO_ROW)
    continues = jnp.concatenate([jnp.zeros(1, bool), first[1:] == last[:-1]])
    continues &= first < num_segments
    heads = num_segments + jnp.arange(num_chunks, dtype=jnp.int32)
    targets = targets.at[:, 0].set(jnp.where(continues, heads, targets[:, 0]))
    arrays = Chunks(
        split(line, NO_ROW), split(places, 0), owners, split(coefficients, 0), targets
    )
    return Chunks(*(x.reshape(-1) for x in arrays)), first, continues


def subcores() -> tuple[Any, int]:
    """Return the mesh of all vector subcores of a device, and the lanes of a vector.

    Raises:
      ValueError: the TPU has no SparseCore.
    """
    # Pallas takes about a second to import, and few programs need it.
    from jax.experimental.pallas import tpu, tpu_sc

    info = tpu.get_tpu_info()
    if info.sparse_core is None:
        raise ValueError(
            "`implementation` 'sparsecore' needs a TPU with SparseCores (v5p, v6e or "
            f"later); got {info.chip_version}."
        )
    mesh = tpu_sc.VectorSubcoreMesh(core_axis_name="core", subcore_axis_name="subcore")
    return mesh, info.sparse_core.num_lanes


def reduce_chunks(
    lines: Lines, slots: Chunks, num_rows: int, plan: Plan
) -> tuple[Array, ...]:
    """Reduce each chunk by segment; return values, and winners of an extremum.

    Both are [num_rows, out_width]; a row that no chunk targets is undefined. A winner
    is the first slot that holds the extremum, or C * K if the segment has no slot.

    Raises:
      ValueError: the TPU has no SparseCore.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu
    from jax.experimental.pallas import tpu_sc as plsc

    mesh, lanes = subcores()
    chunk, none = plan.chunk, slots.lines.size
    num_chunks = none // chunk
    num_workers = mesh.num_cores * mesh.num_subcores
    worst = {SUM: 0.0, MAX: -math.inf, MIN: math.inf}[plan.reduction]
    # The lanes of a row within those that are gathered.
    width = lines.width if plan.passes == 1 else plan.gathered

    def body(lines_ref: Any, *refs: Any) -> None:
        hbm = dict(zip(Chunks._fields, refs, strict=False))
        out = refs[len(hbm) : len(hbm) + num_outputs]
        *scratch, semaphore = refs[len(hbm) + num_outputs :]
        buffers = dict(zip(plan.buffers(), scratch, strict=True))
        accumulators = scratch[len(scratch) - num_outputs :]
        if lines.has_halves:
            lines_ref = lines_ref.bitcast(jnp.int32)
        core, subcore = jax.lax.axis_index("core"), jax.lax.axis_index("subcore")
        worker = subcore * mesh.num_cores + core

        def add_slot(c: Any, row: Any, owner: Any, place: Any, factor: Any) -> None:
            start: Any = 0
            if lines.rows_per_line > 1:
                start = pl.multiple_of(place >> 1, lanes)
            for lane in range(0, width, lanes):
                x = buffers["gathered"][row, pl.ds(start + lane, lanes)]
                if lines.has_halves:
                    # The even line of a pair is in the lower halves of the words.
                    upper = (x << (16 - 16 * (place & 1))) & jnp.int32(-(2**16))
                    x = plsc.bitcast(upper, jnp.float32)
                x = factor * x
                at = (owner, pl.ds(lane, lanes))
                if plan.reduction == SUM:
                    plsc.addupdate(buffers["values"].at[at], x)
                    continue
                best, winner = buffers["values"][at], buffers["winners"][at]
                better = x > best if plan.reduction == MAX else x < best
                # x != x is a NaN.
                better |= ((x != x) & (best == best)) | (winner == none)
                buffers["values"][at] = jnp.where(better, x, best)
                buffers["winners"][at] = jnp.where(better, c * chunk + row, winner)

        def reduce_pass(c: Any, index: Any) -> None:
            def columns(ref: Any, indices: Any, size: int) -> Any:
                rows = plsc.Indices(indices, ignored_value=NO_ROW)
                if plan.passes == 1:
                    return ref.at[rows]
                return ref.at[rows, pl.ds(pl.multiple_of(index * size, size), size)]

            source = columns(lines_ref, buffers["lines"], plan.gathered)
            gather = pltpu.async_copy(source, buffers["gathered"], semaphore)

            @pl.loop(0, chunk)
            def _(row: Any) -> None:
                for lane in range(0, plan.accumulated, lanes):
                    buffers["values"][row, pl.ds(lane, lanes)] = jnp.full(
                        lanes, worst, jnp.float32
                    )
                    if plan.reduction != SUM:
                        buffers["winners"][row, pl.ds(lane, lanes)] = jnp.full(
                            lanes, none, jnp.int32
                        )

            gather.wait()

            @pl.loop(0, chunk, step=lanes)
            def _(first: Any) -> None:
                some = pl.ds(first, lanes)
                owners = buffers["owners"][some]
                places = buffers["places"][some]
                coefficients = buffers["coefficients"][some]
                for j in range(lanes):
                    row = first + j
                    add_slot(c, row, owners[j], places[j], coefficients[j])

            for accumulator, ref in zip(accumulators, out, strict=True):
                target = columns(ref, buffers["targets"], plan.accumulated)
                rows = accumulator.at[pl.ds(0, chunk)]
                pltpu.async_copy(rows, target, semaphore).wait()

        def reduce_chunk(c: Any) -> None:
            own = pl.ds(pl.multiple_of(c * chunk, chunk), chunk)
            copies = [
                pltpu.async_copy(ref.at[own], buffers[name], semaphore)
                for name, ref in hbm.items()
            ]
            for copy in copies:
                copy.wait()

            @pl.loop(0, plan.passes)
            def _(index: Any) -> None:
                reduce_pass(c, index)

        @pl.loop(0, -(-num_chunks // num_workers))
        def _(i: Any) -> None:
            @pl.when(i * num_workers + worker < num_chunks)
            def _() -> None:
                reduce_chunk(i * num_workers + worker)

    shapes = dict(plan.buffers())
    if lines.has_halves:
        shapes["gathered"] = (shapes["gathered"][0], jnp.int32)
    accumulated = [jnp.float32] if plan.reduction == SUM else [jnp.float32, jnp.int32]
    num_outputs = len(accumulated)
    # Under `shard_map` the results vary as the operands do, which all vary alike.
    varying = jax.typeof(lines.array).manual_axis_type
    kernel: Any = pl.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct(
                (num_rows, plan.out_width), dtype, manual_axis_type=varying
            )
            for dtype in accumulated
        ],
        mesh=mesh,
        scratch_types=[
            *(pltpu.VMEM(shape, dtype) for shape, dtype in shapes.values()),
            pltpu.SemaphoreType.DMA,
        ],
        compiler_params=pltpu.CompilerParams(
            use_tc_tiling_on_sc=lines.is_tiled,
            # JAX 0.10 has no bitcast of vectors with these passes.
            needs_layout_passes=False,
        ),
        name=f"jbag_sparsecore_{plan.reduction}",
    )
    with jax.enable_x64(False):  # a subcore's integers have 32 bits
        return tuple(kernel(lines.array, *slots))

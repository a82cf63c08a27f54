"""Pallas kernels for the TensorCore of TPUs: bags over tables stored as lines.

A table is lines [R, W], W a multiple of 128. A line holds k rows: row v lies in line
v // k, in the lanes [(v % k) * D, (v % k + 1) * D).

A kernel visits the slots of a block of bags in order. Their ids come from HBM to SMEM
in pieces, their lines to VMEM by a DMA each, many at a time. So the memory on chip
depends on W alone. Each filled slot reads a line, as 32-bit words: a 16-bit line shares
its words with its neighbour, and both are read. No DMA reads outside the table. What a
bag reduces to stays in registers, and is written once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int, Shaped

from jbag.ops.kernels import xla
from jbag.ragged._csr_arrays import (
    OUT_OF_RANGE_ID,
    Ids,
    Offsets,
    Slots,
    bag_bounds,
    canonicalize_ids,
)

# Powers of two. A piece of slots is a DMA to SMEM. The row DMAs are ahead of the sums,
# so the pieces in SMEM are those of both, and the next.
LANES = 128
_PIECE_BITS = 10
_PIECE = 1 << _PIECE_BITS
_PIECES = 4
# Row DMAs. One takes about a microsecond.
_IN_FLIGHT = 32
_BLOCK_BYTES = 2**19  # of what a block of bags reduces to
_MOST_BAGS = 256  # of a block

# What a bag reduces to so far: arrays [1, W].
Carry = tuple[Array, ...]
Visit = Callable[..., None]


class Lines(NamedTuple):
    """A table of V rows of D features, stored as lines.

    A 16-bit table has an even number of lines.
    """

    array: Shaped[Array, "R W"]
    num_embeddings: int
    embedding_dim: int
    rows_per_line: int


def spmm_lines(
    table: Lines,
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    *,
    pad_id: int | None,
    average: str | None,
    dtype: jnp.dtype,
) -> Float[Array, "B D"]:
    """Compute `contract.Operations.spmm` of a table of lines."""
    slots, bounds, malformed = _flatten(ids, offsets, pad_id, table.num_embeddings)

    def body(visit: Visit, _bounds: Any, out: Any) -> None:
        def add(_bag: Any, _slot: Any, sums: Carry, row: Array, _own: Array) -> Carry:
            return (sums[0] + row,)

        def write(bag: Any, sums: Carry) -> None:
            out[pl.ds(bag, 1), :] = sums[0]

        visit((jnp.zeros((1, table.array.shape[1]), jnp.float32),), add, write)

    bags = (slots, bounds, malformed, coefficients)
    (sums,) = _call(body, table, bags, outputs=(jnp.float32,))
    out = _split(sums, table).sum(1)
    out = jnp.where(malformed[:, None], jnp.nan, out)
    if average is not None:
        # To count slots takes no rows.
        options: dict[str, Any] = {"pad_id": pad_id, "average": average}
        out /= xla.divisors(xla.spmm, ids, offsets, out.dtype, **options)
    return out.astype(dtype)


def sddmm_lines(
    table: Lines,
    cotangent: Float[Array, "B D"],
    ids: Ids,
    offsets: Offsets,
    *,
    pad_id: int | None,
) -> Slots:
    """Compute `contract.Operations.sddmm` of a table of lines."""
    slots, bounds, malformed = _flatten(ids, offsets, pad_id, table.num_embeddings)

    def body(visit: Visit, bounds: Any, factors: Any, out: Any, *scratch: Any) -> None:
        dots, done = scratch
        last = bounds[1, bounds.shape[1] - 1] - 1

        def dot(bag: Any, slot: Any, none: Carry, row: Array, own: Array) -> Carry:
            product = jnp.where(own, row * factors[pl.ds(bag, 1), :], 0.0).sum()
            position = slot & (_PIECE - 1)
            dots[position] = jnp.where(bounds[2, bag] == 0, product, 0.0)

            # The dots of a piece stay in SMEM from one block of bags to the next.
            @pl.when((position == _PIECE - 1) | (slot == last))
            def _() -> None:
                piece = out.at[slot >> _PIECE_BITS]
                copy = pltpu.make_async_copy(dots, piece, done)
                copy.start()
                copy.wait()

            return none

        visit((), dot, lambda *_: None)

    bags = (slots, bounds, malformed, None)
    factors = jnp.tile(cotangent.astype(jnp.float32), (1, table.rows_per_line))
    factors = pad(factors, (factors.shape[0], table.array.shape[1]))
    (dots,) = _call(body, table, bags, factors=factors)
    dots = dots.reshape(-1)[: ids.size]
    # Nothing writes the dots of the tail.
    visited = jnp.arange(ids.size, dtype=jnp.int32) < bounds[-1]
    return jnp.where(visited, dots, 0).reshape(ids.shape)


def extremum_lines(
    table: Lines,
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    *,
    pad_id: int | None,
    largest: bool,
) -> tuple[Float[Array, "B D"], Int[Array, "B D"]]:
    """Compute `contract.Operations.extremum` of a table of lines."""
    slots, bounds, malformed = _flatten(ids, offsets, pad_id, table.num_embeddings)
    none = ids.size

    def body(visit: Visit, _bounds: Any, values: Any, winners: Any) -> None:
        def keep(_bag: Any, slot: Any, best: Carry, row: Array, own: Array) -> Carry:
            value, winner = best
            wins = (row > value if largest else row < value) | jnp.isnan(row)
            # The first value wins, and the first NaN.
            wins = own & ((winner == none) | (wins & ~jnp.isnan(value)))
            return jnp.where(wins, row, value), jnp.where(wins, slot, winner)

        def write(bag: Any, best: Carry) -> None:
            values[pl.ds(bag, 1), :], winners[pl.ds(bag, 1), :] = best

        first = jnp.zeros((1, table.array.shape[1]), jnp.float32)
        visit((first, jnp.full(first.shape, none, jnp.int32)), keep, write)

    bags = (slots, bounds, malformed, coefficients)
    best = _call(body, table, bags, outputs=(jnp.float32, jnp.int32))
    values, winners = (_split(x, table) for x in best)
    worst = -jnp.inf if largest else jnp.inf
    values = jnp.where(winners < none, values, worst)
    value = values.max(1) if largest else values.min(1)
    value = jnp.where(jnp.isnan(values).any(1), jnp.nan, value)  # see xla.extremum
    is_best = (values == value[:, None]) | jnp.isnan(values)
    winner = jnp.where(is_best, winners, none).min(1)
    value = jnp.where(winner < none, value, 0)
    value = jnp.where(malformed[:, None], jnp.nan, value)
    return value, jnp.where(malformed[:, None], none, winner)


def pad(x: Shaped[Array, "..."], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
    """Append zeros to each axis."""
    pads = [(0, size - own) for size, own in zip(shape, x.shape, strict=True)]
    return jnp.pad(x, pads) if x.shape != shape else x


def _split(x: Shaped[Array, "B W"], table: Lines) -> Shaped[Array, "B k D"]:
    """Split lines into rows."""
    shape = (x.shape[0], table.rows_per_line, table.embedding_dim)
    return x[:, : shape[1] * shape[2]].reshape(shape)


def _flatten(
    ids: Ids, offsets: Offsets, pad_id: int | None, num_embeddings: int
) -> tuple[Int[Array, " N"], Int[Array, " ends"], Bool[Array, " B"]]:
    """Return canonical ids, the bounds of bags, and a mask of malformed bags."""
    slots = canonicalize_ids(ids, pad_id, num_embeddings).reshape(-1).astype(jnp.int32)
    if offsets is None:
        num_bags, length = ids.shape
        bounds = length * jnp.arange(num_bags + 1, dtype=jnp.int32)
        return slots, bounds, jnp.zeros(num_bags, bool)
    bounds, malformed = bag_bounds(offsets, ids.size)
    return slots, bounds.astype(jnp.int32), malformed


def _call(
    body: Callable[..., None],
    table: Lines,
    bags: tuple[Array, Array, Array, Array | None],
    *,
    outputs: Sequence[Any] = (),
    factors: Float[Array, "B W"] | None = None,
) -> Sequence[Array]:
    """Call a kernel over blocks of bags.

    Its body gets the function `visit` and references: to the starts, ends and flags of
    the block's bags, and to the outputs [B, W]. With `factors` these are replaced by
    the factors, an output by pieces of slots, one piece in SMEM, and a semaphore.
    """
    slots, bounds, malformed, coefficients = bags
    num_bags, lanes = bounds.size - 1, table.array.shape[1]
    fits = max(8, _BLOCK_BYTES // (4 * lanes) // 8 * 8)
    block = min(fits, _MOST_BAGS, max(num_bags, 1))
    num_blocks = pl.cdiv(max(num_bags, 1), block)
    after = (0, num_blocks * block - num_bags)
    padded = jnp.pad(bounds, after, mode="edge")
    flags = jnp.pad(malformed, after).astype(jnp.int32)
    columns = (padded[:-1], padded[1:], flags)
    blocks = jnp.stack([x.reshape(num_blocks, block) for x in columns], axis=1)
    num_pieces = pl.cdiv(max(slots.size, 1), _PIECE)
    streams = [
        pad(x.reshape(-1), (num_pieces * _PIECE,)).reshape(num_pieces, _PIECE)
        for x in (slots, coefficients)
        if x is not None
    ]
    lines, dtype = table.array, table.array.dtype
    if dtype == jnp.float16:  # Mosaic loads none; in bfloat16 the words are the same
        lines = jax.lax.bitcast_convert_type(lines, jnp.bfloat16)

    def kernel(bounds: Any, *refs: Any) -> None:
        num = len(streams)
        copied = (refs[num], *refs[-2:])
        slots = (bounds, refs[:num], refs[-num - 3 : -3], refs[-3])
        visit = functools.partial(_visit, slots, copied, table)
        body(visit, bounds, *refs[num + 1 : -num - 3])

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    by_bag = pl.BlockSpec((block, lanes), lambda i: (i, 0))
    by_block = ((None, 3, block), lambda i: (i, 0, 0))
    operands = [blocks, *streams, lines]
    in_specs = [pl.BlockSpec(*by_block, memory_space=pltpu.SMEM)]
    in_specs += [anywhere] * (len(operands) - 1)
    shapes = [((max(num_bags, 1), lanes), x) for x in outputs]
    out_specs, dots = [by_bag] * len(outputs), []
    if factors is not None:
        operands.append(pad(factors, (max(num_bags, 1), lanes)))
        in_specs.append(by_bag)
        out_specs, shapes = [anywhere], [((num_pieces, _PIECE), jnp.float32)]
        dots = [pltpu.SMEM((_PIECE,), jnp.float32), pltpu.SemaphoreType.DMA]
    varying = jax.typeof(lines).manual_axis_type
    results = pl.pallas_call(
        kernel,
        grid=(num_blocks,),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[
            jax.ShapeDtypeStruct(*shape, manual_axis_type=varying) for shape in shapes
        ],
        scratch_shapes=[
            *dots,
            *(pltpu.SMEM((_PIECES, _PIECE), x.dtype) for x in streams),
            pltpu.SemaphoreType.DMA((len(streams), _PIECES)),
            pltpu.VMEM((_IN_FLIGHT, 4 // dtype.itemsize, lanes), lines.dtype),
            pltpu.SemaphoreType.DMA((_IN_FLIGHT,)),
        ],
        # Pieces of dots go from one block to the next.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary" if dots else "parallel",)
        ),
    )(*operands)
    return results if dots else [x[:num_bags] for x in results]


def _visit(
    slots: tuple[Any, ...],
    copied: tuple[Any, ...],
    table: Lines,
    start: Carry,
    step: Callable[..., Carry],
    finish: Callable[[Any, Carry], None],
) -> None:
    """Reduce each bag of a block.

    `step(bag, slot, carry, row, own)` gets the weighted row of a slot among zeros, or
    NaN where no row has its id, and masks the lanes of the row.
    """
    bounds, sources, pieces, arrived = slots
    lines, rows, read = copied
    dtype, block = table.array.dtype, bounds.shape[1]
    first, last = bounds[0, 0], bounds[1, block - 1]

    def copies(piece: Any) -> list[Any]:
        part = piece & (_PIECES - 1)
        both = enumerate(zip(sources, pieces, strict=True))
        return [
            pltpu.make_async_copy(x.at[piece], y.at[part], arrived.at[n, part])
            for n, (x, y) in both
        ]

    def load(piece: Any) -> None:
        @pl.when(piece * _PIECE < last)
        def _() -> None:
            for copy in copies(piece):
                copy.start()

    def read_piece(n: int, slot: Any) -> Any:
        part = (slot >> _PIECE_BITS) & (_PIECES - 1)
        return pieces[n][part, slot & (_PIECE - 1)]

    def line_of(index: Any) -> Any:
        return jax.lax.div(index, jnp.int32(table.rows_per_line))

    def line_copy(slot: Any, index: Any) -> Any:
        line, buffer = line_of(index), slot & (_IN_FLIGHT - 1)
        if dtype.itemsize == 2:
            source = lines.at[pl.ds(pl.multiple_of(line & ~1, 2), 2)]
        else:
            source = lines.at[pl.ds(line, 1)]
        return pltpu.make_async_copy(source, rows.at[buffer], read.at[buffer])

    def fetch(slot: Any) -> None:
        @pl.when((slot & (_PIECE - 1) == 0) | (slot == first))
        def _() -> None:
            piece = slot >> _PIECE_BITS
            for copy in copies(piece):
                copy.wait()
            load(piece + 1)

        index = read_piece(0, slot)

        @pl.when(index >= 0)
        def _() -> None:
            line_copy(slot, index).start()

    lane = jax.lax.broadcasted_iota(jnp.int32, (1, lines.shape[1]), 1)

    def reduce_bag(bag: Any, _: Any) -> None:
        def visit(slot: Any, carry: Carry) -> Carry:
            index = read_piece(0, slot)

            @pl.when(index >= 0)
            def _() -> None:
                line_copy(slot, index).wait()

            is_row, line = index >= 0, line_of(index)
            # An unknown id has all lanes, an empty slot none.
            most = jnp.where(index == OUT_OF_RANGE_ID, lane.size, 0)
            begin = (index - line * table.rows_per_line) * table.embedding_dim
            begin = jnp.where(is_row, begin, 0)
            end = jnp.where(is_row, begin + table.embedding_dim, most)
            own = (lane >= begin) & (lane < end)
            scale = read_piece(1, slot) if len(sources) > 1 else jnp.float32(1)
            scale = jnp.where(is_row, scale, jnp.nan)
            row = _decode(rows[slot & (_IN_FLIGHT - 1)], line, dtype)
            row = jnp.where(own, scale * row, 0.0)
            carry = step(bag, slot, carry, row, own)

            @pl.when(slot + _IN_FLIGHT < last)
            def _() -> None:
                fetch(slot + _IN_FLIGHT)

            return carry

        carry = jax.lax.fori_loop(bounds[0, bag], bounds[1, bag], visit, start)
        finish(bag, carry)

    @pl.when(first < last)
    def _() -> None:
        load(first >> _PIECE_BITS)

    ahead = jnp.minimum(first + _IN_FLIGHT, last)
    jax.lax.fori_loop(first, ahead, lambda slot, _: fetch(slot), None)
    jax.lax.fori_loop(jnp.int32(0), jnp.int32(block), reduce_bag, None)


def _decode(words: Array, line: Any, dtype: jnp.dtype) -> Float[Array, "1 W"]:
    """Convert a line to float32: of 16 bits, the lower or the upper half of words."""
    if dtype.itemsize == 4:
        return words
    words = pltpu.bitcast(words, jnp.uint32)
    half = (words >> ((line & 1) * 16).astype(jnp.uint32)) & 0xFFFF
    if dtype == jnp.bfloat16:
        return pltpu.bitcast(half << 16, jnp.float32)
    # Float16 has 5 bits of an exponent with bias 15, and 10 of a fraction. TPUs flush
    # subnormal numbers, so those are made of the integer.
    magnitude = half & 0x7FFF
    exponent = jnp.where(magnitude < 0x7C00, jnp.uint32(127 - 15), jnp.uint32(255 - 31))
    normal = pltpu.bitcast((magnitude << 13) + (exponent << 23), jnp.float32)
    subnormal = magnitude.astype(jnp.int32).astype(jnp.float32) * 2.0**-24
    value = jnp.where(magnitude < 0x400, subnormal, normal)
    return jnp.where(half < 0x8000, value, -value)

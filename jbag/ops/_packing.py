"""`Packing`: the geometry of tables whose rows are packed into lines."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jbag.ops._row_gather import take

LANES = 128  # the numbers of a row of a TPU's tile

# A line is at most this many times as long as its rows.
_MOST_PADDING = 1.3

# The rows that are packed at once.
_ROWS_AT_ONCE = 1 << 14


class Packing(NamedTuple):
    """The geometry of a `PackedTable`.

    A line holds k rows, one after another, then zeros up to W. Each block of rows
    begins with a new line, so that devices that shard the rows by blocks hold whole
    lines.

    Attributes:
      num_embeddings: V.
      features: D.
      num_blocks: the number of blocks of equally many rows, a divisor of V; over a
        mesh, that of the devices that shard the rows.
    """

    num_embeddings: int
    features: int
    num_blocks: int = 1

    @property
    def width(self) -> int:
        """W, the numbers of a line: the least multiple of 128 with little padding."""
        return next(
            width
            for width in range(LANES, LANES * (self.features + 2), LANES)
            if width <= _MOST_PADDING * self.features * (width // self.features)
        )

    @property
    def rows_per_line(self) -> int:
        """k, the rows of a line."""
        return self.width // self.features

    @property
    def rows_per_block(self) -> int:
        """The rows of a block."""
        return self.num_embeddings // max(self.num_blocks, 1)

    @property
    def lines_per_block(self) -> int:
        """The lines of a block, an even number."""
        lines = -(-self.rows_per_block // self.rows_per_line)
        return lines + lines % 2  # two lines of 16-bit numbers share 32-bit words

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the lines, (R, W)."""
        return self.num_blocks * self.lines_per_block, self.width

    def divide(self, num_parts: int) -> Packing:
        """Return the packing of one of equal parts of the blocks."""
        rows, blocks = self.num_embeddings // num_parts, self.num_blocks // num_parts
        return Packing(rows, self.features, blocks)

    def pack(self, table: Shaped[Array, "V D"]) -> Shaped[Array, "R W"]:
        """Return the lines of a table."""
        return self._each_block(Packing._pack_block, table).reshape(self.shape)

    def unpack(self, lines: Shaped[Array, "R W"]) -> Shaped[Array, "V D"]:
        """Return the table of lines."""
        return self._each_block(Packing._unpack_block, lines).reshape(self[:2])

    def _each_block(
        self, function: Callable[[Packing, Array], Array], array: Array
    ) -> Array:
        """Apply a function to each block of rows or lines, side by side."""
        if self.num_blocks == 1:
            return function(self, array)
        # The compiler keeps blocks on the devices of a mesh that hold them.
        rows, width = array.shape
        blocks = array.reshape(self.num_blocks, rows // self.num_blocks, width)
        own = self.divide(self.num_blocks)
        return jax.vmap(functools.partial(function, own))(blocks)

    def _pack_block(self, table: Shaped[Array, "V D"]) -> Shaped[Array, "R W"]:
        lines = jnp.zeros(self.shape, table.dtype)

        def copy(lines: Array, row: Any, line: Any, num_rows: int) -> Array:
            rows = jax.lax.dynamic_slice_in_dim(table, row, num_rows)
            new = self._to_lines(rows)
            return jax.lax.dynamic_update_slice_in_dim(lines, new, line, axis=0)

        return self._in_parts(copy, lines)

    def _unpack_block(self, lines: Shaped[Array, "R W"]) -> Shaped[Array, "V D"]:
        table = jnp.zeros(self[:2], lines.dtype)

        def copy(table: Array, row: Any, line: Any, num_rows: int) -> Array:
            num_lines = -(-num_rows // self.rows_per_line)
            own = jax.lax.dynamic_slice_in_dim(lines, line, num_lines)
            new = self._to_rows(own)[:num_rows]
            return jax.lax.dynamic_update_slice_in_dim(table, new, row, axis=0)

        return self._in_parts(copy, table)

    def _in_parts(self, copy: Callable[..., Array], result: Array) -> Array:
        """Fold `copy` over parts of the table that begin with a line.

        XLA makes an array of rows of 128 numbers of each part, so all rows at once
        would take many times the memory of a narrow table.
        """
        num_lines = max(16, _ROWS_AT_ONCE // self.rows_per_line // 16 * 16)
        num_rows = num_lines * self.rows_per_line
        num_parts, rest = divmod(self.num_embeddings, num_rows)

        def copy_part(part: Any, result: Array) -> Array:
            return copy(result, part * num_rows, part * num_lines, num_rows)

        if num_parts == 1:
            result = copy_part(0, result)
        elif num_parts:
            result = jax.lax.fori_loop(0, num_parts, copy_part, result)
        if rest:
            result = copy(result, num_parts * num_rows, num_parts * num_lines, rest)
        return result

    def _to_lines(self, rows: Shaped[Array, "N D"]) -> Shaped[Array, "lines W"]:
        rows = jnp.pad(rows, ((0, -rows.shape[0] % self.rows_per_line), (0, 0)))
        used = rows.reshape(-1, self.rows_per_line * self.features)
        return jnp.pad(used, ((0, 0), (0, self.width - used.shape[1])))

    def _to_rows(self, lines: Shaped[Array, "lines W"]) -> Shaped[Array, "N D"]:
        used = lines[:, : self.rows_per_line * self.features]
        return used.reshape(-1, self.features)

    def locate(
        self, ids: Int[Array, "*slots"]
    ) -> tuple[Int[Array, "*slots"], Int[Array, "*slots"]]:
        """Return the line of each row, and its place among the rows of the line.

        The line of an id outside [0, V) is R.
        """
        known = (ids >= 0) & (ids < self.num_embeddings)
        inside = jnp.where(known, ids, 0)
        if self.num_blocks > 1:
            block, row = inside // self.rows_per_block, inside % self.rows_per_block
            lines = block * self.lines_per_block + row // self.rows_per_line
        else:
            row, lines = inside, inside // self.rows_per_line
        return jnp.where(known, lines, self.shape[0]), row % self.rows_per_line

    def own_lanes(
        self,
        lines: Shaped[Array, "*slots W"],
        places: Int[Array, "*slots"],
        fill: float = 0,
    ) -> Shaped[Array, "*slots W"]:
        """Return the lines with `fill` outside the row at each line's place."""
        return jnp.where(self._is_own(places), lines, fill)

    def _is_own(self, places: Int[Array, "*slots"]) -> Bool[Array, "*slots W"]:
        lanes = jnp.arange(self.width, dtype=places.dtype)
        return lanes // self.features == places[..., None]

    def fold(self, lines: Float[Array, "*slots W"]) -> Float[Array, "*slots D"]:
        """Return the sum of the rows of each line."""
        used = lines[..., : self.rows_per_line * self.features]
        shape = (*lines.shape[:-1], self.rows_per_line, self.features)
        return used.reshape(shape).sum(-2)

    def repeat(self, rows: Shaped[Array, "*slots D"]) -> Shaped[Array, "*slots W"]:
        """Return lines with the same row at each place."""
        used = jnp.tile(rows, self.rows_per_line)
        pad = [(0, 0)] * (rows.ndim - 1) + [(0, self.width - used.shape[-1])]
        return jnp.pad(used, pad)

    def select(
        self, lines: Shaped[Array, "*slots W"], places: Int[Array, "*slots"]
    ) -> Shaped[Array, "*slots D"]:
        """Return the row at a place of each line."""
        # One binary digit of the places after another halves the lines.
        rows = lines[..., : self.rows_per_line * self.features]
        count = self.rows_per_line
        while count > 1:
            half = 1 << (count - 1).bit_length() - 1
            low, high = jnp.split(rows, [half * self.features], axis=-1)
            pad = [(0, 0)] * (rows.ndim - 1) + [(0, low.shape[-1] - high.shape[-1])]
            rows = jnp.where(((places & half) != 0)[..., None], jnp.pad(high, pad), low)
            count = half
        return rows

    def put(
        self,
        lines: Shaped[Array, "R W"],
        ids: Int[Array, " U"],
        rows: Shaped[Array, "U D"],
    ) -> Shaped[Array, "R W"]:
        """Set rows at distinct, sorted ids; those out of range come last."""
        numbers, values, own = self._join(ids, rows.astype(lines.dtype))
        values = jnp.where(own, values, take(lines, numbers, 0))
        return lines.at[numbers].set(values, mode="drop", unique_indices=True)

    def put_in_zeros(
        self, ids: Int[Array, " U"], rows: Shaped[Array, "U D"], dtype: Any
    ) -> Shaped[Array, "R W"]:
        """Return `put` in lines of zeros."""
        numbers, values, _ = self._join(ids, rows.astype(dtype))
        lines = jnp.zeros(self.shape, dtype)
        return lines.at[numbers].set(values, mode="drop", unique_indices=True)

    def _join(
        self, ids: Int[Array, " U"], rows: Shaped[Array, "U D"]
    ) -> tuple[Int[Array, " U"], Shaped[Array, "U W"], Bool[Array, "U W"]]:
        """Return distinct lines, and in each the rows of all of its ids; and a mask."""
        numbers, places = self.locate(ids)
        own = self._is_own(places)
        values = jnp.where(own, self.repeat(rows), 0)
        # Rows of one line are neighbours. Each takes over those before it, of which
        # there are fewer than k, so the last one has them all.
        step = 1
        while step < self.rows_per_line:
            same = (_shift(numbers, step, -1) == numbers)[:, None]
            before = jnp.where(same, _shift(values, step, 0), 0)
            values = jnp.where(own, values, before)
            own |= _shift(own, step, False) & same
            step *= 2
        is_last = jnp.append(numbers[1:] != numbers[:-1], True)
        # The others are dropped; they are distinct, too.
        dropped = self.shape[0] + jnp.arange(ids.size, dtype=numbers.dtype)
        numbers = jnp.where(is_last & (numbers < self.shape[0]), numbers, dropped)
        return numbers, values, own


def _shift(x: Shaped[Array, "U ..."], step: int, fill: Any) -> Shaped[Array, "U ..."]:
    """Return x moved by `step` entries along the first axis."""
    filled = jnp.full((min(step, x.shape[0]), *x.shape[1:]), fill, x.dtype)
    return jnp.concatenate([filled, x[:-step]])

"""`Packing`: the geometry of tables whose rows are packed into lines."""

from __future__ import annotations

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
      num_blocks: the number of blocks of equally many rows, a divisor of V.
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
        """The lines of a block; an even number if it is the only one."""
        lines = -(-self.rows_per_block // self.rows_per_line)
        # Two lines of 16-bit numbers share 32-bit words.
        return lines + lines % 2 if self.num_blocks == 1 else lines

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the lines, (R, W)."""
        return self.num_blocks * self.lines_per_block, self.width

    def pack(self, table: Shaped[Array, "V D"]) -> Shaped[Array, "R W"]:
        """Return the lines of a table."""
        lines = jnp.zeros(self.shape, table.dtype)

        def copy(lines: Array, row: Any, line: Any, num_rows: int) -> Array:
            rows = jax.lax.dynamic_slice_in_dim(table, row, num_rows)
            new = self._to_lines(rows)
            return jax.lax.dynamic_update_slice_in_dim(lines, new, line, axis=0)

        return self._in_parts(copy, lines)

    def unpack(self, lines: Shaped[Array, "R W"]) -> Shaped[Array, "V D"]:
        """Return the table of lines."""
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
        num_rows, total = num_lines * self.rows_per_line, self.rows_per_block
        num_parts = total // num_rows

        def copy_block(number: Any, result: Array) -> Array:
            row, line = number * self.rows_per_block, number * self.lines_per_block

            def copy_part(part: Any, result: Array) -> Array:
                return copy(
                    result, row + part * num_rows, line + part * num_lines, num_rows
                )

            result = _repeat(num_parts, copy_part, result)
            if rest := total - num_parts * num_rows:
                at = row + num_parts * num_rows, line + num_parts * num_lines
                result = copy(result, *at, rest)
            return result

        return _repeat(self.num_blocks, copy_block, result)

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
        return jnp.arange(self.width) // self.features == places[..., None]

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


def _repeat(count: int, body: Callable[[Any, Array], Array], result: Array) -> Array:
    """Run `result = body(number, result)`; once without a loop."""
    if count <= 1:
        return body(0, result) if count else result
    return jax.lax.fori_loop(0, count, body, result)


def _shift(x: Shaped[Array, "U ..."], step: int, fill: Any) -> Shaped[Array, "U ..."]:
    """Return x moved by `step` entries along the first axis."""
    filled = jnp.full((min(step, x.shape[0]), *x.shape[1:]), fill, x.dtype)
    return jnp.concatenate([filled, x[:-step]])

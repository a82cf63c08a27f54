"""Layouts: the row of the stacked array that holds each row of each table."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from jbag._validation import check_integer
from jbag.ragged._csr_arrays import OUT_OF_RANGE_ID

# Divisible by 1 to 10, 12, 14, 15, 16, 18, 20, ..., and 64.
GRID = 20160


@dataclasses.dataclass(frozen=True)
class Layout:
    r"""Permute the rows of a table so that frequent rows spread over the devices.

    Logical row i is at physical row

    .. math:: (i \cdot m \bmod K) \lceil V / K \rceil + \lfloor i / K \rfloor

    The array has K columns of equal length, stored one after another, and a device has
    K / P columns. Because m is near K / 1.618, consecutive rows, such as the most
    frequent words, are spread evenly over any number of devices. The permutation does
    not depend on P, so an array from 8 devices also fits 12. The multiplier is that of
    Fibonacci hashing (Knuth, "The Art of Computer Programming", volume 3, 1973).

    Attributes:
      num_embeddings: V.
      grid: K, a multiple of the number of devices; 1 keeps the order of the rows.

    Example:
      >>> layout = jbag.sharding.Layout(num_embeddings=10, grid=4)
      >>> layout.num_rows
      12
      >>> layout.place(np.arange(10))
      array([ 0,  9,  6,  3,  1, 10,  7,  4,  2, 11])
    """

    num_embeddings: int
    grid: int = GRID

    def __post_init__(self) -> None:
        check_integer("num_embeddings", self.num_embeddings, low=0)
        # `_multiply` takes factors of at most 20 bits.
        check_integer("grid", self.grid, low=1, high=(1 << 20) + 1)

    @property
    def height(self) -> int:
        """The number of rows per column, ceil(V / K)."""
        return -(-self.num_embeddings // self.grid)

    @property
    def num_rows(self) -> int:
        """V', the rows of the array: V rounded up to a multiple of K."""
        return self.grid * self.height

    @functools.cached_property
    def multiplier(self) -> int:
        """m, the first number of at least K / 1.618 that is coprime to K."""
        golden = math.ceil(self.grid * (math.sqrt(5) - 1) / 2)
        return next(m for m in range(golden, 2 * self.grid + 2) if self._is_coprime(m))

    def _is_coprime(self, m: int) -> bool:
        return math.gcd(m, self.grid) == 1

    def place(self, ids: Int[Any, "..."]) -> Int[Any, "..."]:
        """Return the physical row of each id in [0, V)."""
        if self.grid == 1:
            return ids
        column = _multiply(ids % self.grid, self.multiplier % self.grid, self.grid)
        return column * self.height + ids // self.grid

    def find(self, rows: Int[Any, "..."]) -> Int[Any, "..."]:
        """Return the id of each physical row; padding rows have ids of at least V."""
        inverse = pow(self.multiplier, -1, self.grid) if self.grid > 1 else 0
        height = max(self.height, 1)
        column = _multiply(rows // height, inverse, self.grid)
        return rows % height * self.grid + column

    def to_logical(self, array: Shaped[Any, "rows ..."]) -> Shaped[Any, "V ..."]:
        """Return a physical array [V', ...] in the order of the ids, [V, ...]."""
        numpy = np if isinstance(array, np.ndarray) else jnp
        return array[self.place(numpy.arange(self.num_embeddings))]

    def to_physical(
        self, rows: Shaped[Any, "V ..."], fill: float = 0
    ) -> Shaped[Any, "rows ..."]:
        """Return the physical array [V', ...] of rows in the order of the ids."""
        numpy = np if isinstance(rows, np.ndarray) else jnp
        padding = [(0, self.num_rows - rows.shape[0])] + [(0, 0)] * (rows.ndim - 1)
        padded = numpy.pad(rows, padding, constant_values=fill)
        return padded[self.find(numpy.arange(self.num_rows))]


def _multiply(a: Int[Any, "..."], b: int, modulus: int) -> Int[Any, "..."]:
    """Return a * b modulo a modulus of at most 20 bits, in 32-bit arithmetic."""
    if modulus * b < 1 << 31:
        return a * b % modulus
    high, low = divmod(b, 1 << 10)
    return (a * high % modulus * (1 << 10) + a * low) % modulus


@dataclasses.dataclass(frozen=True)
class Lanes:
    """Assign tables to lanes of equal length, for table-wise sharding.

    Attributes:
      sizes: the rows of each table.
      num_lanes: the number of lanes, a multiple of the number of devices.
    """

    sizes: tuple[int, ...]
    num_lanes: int

    @functools.cached_property
    def _assignment(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Return the lane of each table, its start in the lane, and the lane length."""
        filled = [0] * self.num_lanes
        lanes, starts = [0] * len(self.sizes), [0] * len(self.sizes)
        # The largest table first, each to the emptiest lane.
        for table in sorted(range(len(self.sizes)), key=lambda t: -self.sizes[t]):
            lane = filled.index(min(filled))
            lanes[table], starts[table] = lane, filled[lane]
            filled[lane] += self.sizes[table]
        return tuple(lanes), tuple(starts), max(filled)

    @property
    def lanes(self) -> tuple[int, ...]:
        """The lane of each table."""
        return self._assignment[0]

    @property
    def length(self) -> int:
        """The rows per lane."""
        return self._assignment[2]

    @property
    def num_rows(self) -> int:
        """V', the rows of the array."""
        return self.num_lanes * self.length

    def start(self, table: int) -> int:
        """Return the first row of a table in the array."""
        return self.lanes[table] * self.length + self._assignment[1][table]


def place(
    layout: Layout | Lanes, table: int, base: int, size: int, ids: Array
) -> Array:
    """Return the physical row of each id of a table, or `OUT_OF_RANGE_ID`.

    `base` is the number of rows of the tables before it in a `Layout`.
    """
    known = (ids >= 0) & (ids < size)
    # Clamp ids to avoid overflow: arrays have fewer than 2^31 rows.
    inside = jnp.where(known, ids, 0).astype(jnp.int32)
    if isinstance(layout, Layout):
        rows = layout.place(inside + base)
    else:
        rows = inside + layout.start(table)
    return jnp.where(known, rows, OUT_OF_RANGE_ID)

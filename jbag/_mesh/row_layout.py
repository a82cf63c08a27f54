"""Where the rows of tables lie in the one array that holds them."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from jbag._validation import check_integer
from jbag.ragged._csr import OUT_OF_RANGE_ID

# Divisible by every number up to 10, by 12, 14, 15, 16, 18, 20, ..., and by 64.
GRID = 20160


@dataclasses.dataclass(frozen=True)
class Layout:
    r"""V rows, dealt to the columns of a grid, that any number of owners can share.

    Row i stands in column :math:`i \cdot m \bmod K` of K, and is number
    :math:`\lfloor i / K \rfloor` there; the columns lie one after another. An owner has
    K / P columns. As m is near K / 1.618, rows in sequence, such as the most frequent
    words, spread evenly over owners, however many these are. Nothing depends on P, so
    that an array goes from 8 devices to 12 as it is.

    Attributes:
      num_embeddings: V.
      grid: K, divisible by the number of owners; 1 keeps rows in their order.

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
        # Past that, products of two columns' numbers have more than 40 bits.
        check_integer("grid", self.grid, low=1, high=(1 << 20) + 1)

    @property
    def height(self) -> int:
        """The number of rows of a column."""
        return -(-self.num_embeddings // self.grid)

    @property
    def num_rows(self) -> int:
        """V', the rows of the array: V and the rest of the last row of the grid."""
        return self.grid * self.height

    @functools.cached_property
    def multiplier(self) -> int:
        """m: the first number above K / 1.618 that has no divisor in common with K."""
        golden = math.ceil(self.grid * (math.sqrt(5) - 1) / 2)
        return next(m for m in range(golden, 2 * self.grid + 2) if self._is_coprime(m))

    def _is_coprime(self, m: int) -> bool:
        return math.gcd(m, self.grid) == 1

    def place(self, ids: Int[Any, "..."]) -> Int[Any, "..."]:
        """Return the row of the array that holds each id; ids must lie in [0, V)."""
        if self.grid == 1:
            return ids
        column = _multiply(ids % self.grid, self.multiplier % self.grid, self.grid)
        return column * self.height + ids // self.grid

    def find(self, rows: Int[Any, "..."]) -> Int[Any, "..."]:
        """Return the id that each row of the array holds; at least V where none."""
        inverse = pow(self.multiplier, -1, self.grid) if self.grid > 1 else 0
        height = max(self.height, 1)
        column = _multiply(rows // height, inverse, self.grid)
        return rows % height * self.grid + column

    def to_logical(self, array: Shaped[Any, "rows ..."]) -> Shaped[Any, "V ..."]:
        """Return the rows in the order of their ids, without the padding."""
        numpy = np if isinstance(array, np.ndarray) else jnp
        return array[self.place(numpy.arange(self.num_embeddings))]

    def to_physical(
        self, rows: Shaped[Any, "V ..."], fill: float = 0
    ) -> Shaped[Any, "rows ..."]:
        """Return the array that holds rows given in the order of their ids."""
        numpy = np if isinstance(rows, np.ndarray) else jnp
        padding = [(0, self.num_rows - rows.shape[0])] + [(0, 0)] * (rows.ndim - 1)
        padded = numpy.pad(rows, padding, constant_values=fill)
        return padded[self.find(numpy.arange(self.num_rows))]


def _multiply(a: Int[Any, "..."], b: int, modulus: int) -> Int[Any, "..."]:
    """Return a * b modulo a number of at most 20 bits, in 32 bits."""
    if modulus * b < 1 << 31:
        return a * b % modulus
    high, low = divmod(b, 1 << 10)
    return (a * high % modulus * (1 << 10) + a * low) % modulus


@dataclasses.dataclass(frozen=True)
class Lanes:
    """Whole tables, dealt to lanes of one length, which devices own.

    Attributes:
      sizes: the rows of each table.
      num_lanes: a multiple of the number of devices.
    """

    sizes: tuple[int, ...]
    num_lanes: int

    @functools.cached_property
    def _assignment(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Return the lane of each table, where it starts there, and lanes' length."""
        filled = [0] * self.num_lanes
        lanes, starts = [0] * len(self.sizes), [0] * len(self.sizes)
        # The largest first, each to the lane that has the least so far.
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
        """The rows of a lane."""
        return self._assignment[2]

    @property
    def num_rows(self) -> int:
        """The rows of the array."""
        return self.num_lanes * self.length

    def start(self, table: int) -> int:
        """Return the row of the array where a table starts."""
        return self.lanes[table] * self.length + self._assignment[1][table]


def place(
    layout: Layout | Lanes, table: int, base: int, size: int, ids: Array
) -> Array:
    """Return the rows of the array that hold a table's ids, or `OUT_OF_RANGE_ID`.

    In a `Layout`, `base` is how many rows the tables before it have.
    """
    known = (ids >= 0) & (ids < size)
    # Kept in range, so that nothing overflows: arrays have less than 2^31 rows.
    inside = jnp.where(known, ids, 0).astype(jnp.int32)
    if isinstance(layout, Layout):
        rows = layout.place(inside + base)
    else:
        rows = inside + layout.start(table)
    return jnp.where(known, rows, OUT_OF_RANGE_ID)

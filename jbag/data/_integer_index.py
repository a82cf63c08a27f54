"""`IntegerIndex`: the positions of integers among distinct ones."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

# 2**64 divided by the golden ratio: odd, so multiplication is a bijection of 64 bits,
# and its high bits spread ids that are close (Knuth, "The Art of Computer Programming",
# volume 3, section 6.4).
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_CHUNK = 1 << 15  # integers whose temporary arrays fit in the cache
_ROUNDS = 4
# A table over the range of the ids is used up to this many entries per id.
_SPARSITY = 8


class IntegerIndex:
    """Find integers among W distinct ones.

    Ids that fill an eighth of their range are found in a table of the range. Others are
    sorted by a hash. A table of 2W to 4W entries has the first hash of each prefix. The
    search goes up from there, `_ROUNDS` steps at most, and by bisection for the rest,
    so ids chosen to collide cost log W.
    """

    def __init__(self, ids: Int[np.ndarray, " W"]) -> None:
        self._dtype, self._size = ids.dtype, ids.size
        self._table = None
        if not ids.size:
            return
        low, high = int(ids.min()), int(ids.max())
        if high - low < _SPARSITY * ids.size + _CHUNK:
            self._low, self._high = low, high
            self._table = np.full(high - low + 1, -1, np.int32)
            self._table[ids - ids.dtype.type(low)] = np.arange(ids.size, dtype=np.int32)
            return
        hashes = ids.view(np.uint64) * _FACTOR
        order = np.argsort(hashes)
        # The last entry is above every hash, and has no id.
        self._hashes = np.append(hashes[order], np.uint64(2**64 - 1))
        self._rows = np.append(order.astype(np.int32), np.int32(-1))
        bits = ids.size.bit_length() + 1
        self._shift = np.uint64(64 - bits)
        prefixes = (self._hashes[:-1] >> self._shift).astype(np.int64)
        counts = np.bincount(prefixes, minlength=1 << bits)
        self._starts = (np.cumsum(counts) - counts).astype(np.int32)

    def find(self, integers: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Return the position of each integer, or -1, in int32."""
        out = np.full(integers.size, -1, np.int32)
        if not self._size:
            return out
        search = self._search if self._table is None else self._look_up
        for start in range(0, integers.size, _CHUNK):
            chunk = integers[start : start + _CHUNK]
            found = search(chunk)
            if chunk.dtype != self._dtype:  # one is uint64, and the sign bits differ
                found[chunk.view(np.int64) < 0] = -1
            out[start : start + _CHUNK] = found
        return out

    def _look_up(self, integers: np.ndarray) -> np.ndarray:
        assert self._table is not None
        if self._dtype != integers.dtype:
            integers = integers.view(self._dtype)
        inside = (integers >= self._low) & (integers <= self._high)
        at = np.where(inside, integers, self._low) - self._dtype.type(self._low)
        return np.where(inside, self._table[at], np.int32(-1))

    def _search(self, integers: np.ndarray) -> np.ndarray:
        hashes = integers.view(np.uint64) * _FACTOR
        at = self._starts[(hashes >> self._shift).view(np.int64)]
        found = self._hashes[at]
        below = np.flatnonzero(found < hashes)
        for _ in range(_ROUNDS):
            if not below.size:
                break
            at[below] += 1
            found[below] = self._hashes[at[below]]
            below = below[found[below] < hashes[below]]
        if below.size:
            at[below] = np.searchsorted(self._hashes[:-1], hashes[below])
            found[below] = self._hashes[at[below]]
        return np.where(found == hashes, self._rows[at], np.int32(-1))

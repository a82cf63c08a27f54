"""`IdCounts`: the distinct ids of columns, and how often each occurs."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np

from jbag.data._id_column import Column, join_integers

# Merge the distinct integers of columns once they exceed this, and twice those merged.
_PENDING = 1 << 20


class IdCounts:
    """Count ids, column by column."""

    def __init__(self) -> None:
        self._kind = ""
        self._objects: collections.Counter[Any] = collections.Counter()
        self._integers = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]

    def add(self, name: str, column: Column) -> None:
        """Count the ids of a column; raise TypeError if they are of another kind."""
        if not column.kind:
            return
        if self._kind and column.kind != self._kind:
            raise TypeError(
                f"`{name}` must hold {self._kind}, as the columns before; "
                f"got {column.kind}."
            )
        self._kind = column.kind
        counts = None
        if column.codes is not None:
            codes = column.codes[column.codes >= 0]
            counts = np.bincount(codes, minlength=len(column.values))
        if self._kind != "integers":
            if counts is None:
                self._objects.update(column.values)
                return
            for value, count in zip(column.values, counts.tolist(), strict=True):
                if count:
                    self._objects[value] += count
            return
        if counts is None:
            self._integers.append(np.unique(column.values, return_counts=True))
        else:
            used = counts > 0
            self._integers.append((column.values[used], counts[used]))
        merged, *pending = [values.size for values, _ in self._integers]
        if sum(pending) > max(_PENDING, 2 * merged):
            self._merge()

    def sorted(self) -> tuple[Any, np.ndarray]:
        """Return the distinct ids, sorted by value, and their counts."""
        if self._kind in ("", "integers"):
            self._merge()
            return self._integers[0]
        ids = sorted(self._objects)
        counts = np.fromiter(map(self._objects.__getitem__, ids), np.int64, len(ids))
        return ids, counts

    def _merge(self) -> None:
        values = join_integers(
            [values for values, _ in self._integers if values.size]
            or [np.zeros(0, np.int64)]
        )
        counts = np.concatenate([counts for _, counts in self._integers])
        order = np.argsort(values, kind="stable")
        values, counts = values[order], counts[order]
        first = np.flatnonzero(
            np.append(True, values[1:] != values[:-1])[: values.size]
        )
        if first.size:
            counts = np.add.reduceat(counts, first, dtype=np.int64)
        self._integers = [(values[first], counts)]

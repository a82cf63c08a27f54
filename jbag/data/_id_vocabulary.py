"""`IdVocabulary`: the rows of raw ids, on the host."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jbag._files import atomic_write, refusing
from jbag._validation import check_integer, check_integers
from jbag.data._id_column import Column
from jbag.data._id_counts import IdCounts
from jbag.data._id_vocabulary_checks import (
    MAX_ROWS,
    Unknown,
    check_ids,
    check_unknown,
    check_unknown_id,
    describe,
)
from jbag.data._id_vocabulary_files import from_arrays, to_arrays
from jbag.data._integer_index import IntegerIndex
from jbag.data._read_column import read_column
from jbag.interop._numpy_files import Archive
from jbag.ragged._bags import Bags


@dataclasses.dataclass(frozen=True, eq=False)
class IdVocabulary:
    """Map raw ids to the rows of a table, in host arrays.

    A column of ids is a list, a NumPy array, a pandas Series, Index or Categorical, or
    an Arrow array, chunked array or dictionary array: of integers, strings or bytes. In
    a column of bags, each element is a list of ids; a `Bags` is one, too. None, NaN and
    the nulls of pandas and Arrow are no ids: `fit` skips them, and `transform` treats
    them as unknown ids. Floats must be integers, such as those that pandas makes of a
    column of integers with nulls. pandas and pyarrow are not imported.

    The vocabulary is fitted before training; that of `jbag.vocabulary` grows during it.

    Attributes:
      ids: the distinct ids, by row: an array [W] of int64, or of uint64 if one needs
        it, or of objects, `str` or `bytes`.
      counts: [W] int64, the number of occurrences in the fitted columns; or None.
      unknown: how `transform` treats unknown ids. "row": they have row 0, and id i has
        row i + 1. "error": it raises. "drop": it returns bags without them. With
        "error" and "drop", id i has row i.

    Raises:
      TypeError: an attribute has a wrong type.
      ValueError: an id is duplicate, or an attribute has a wrong value or shape.

    Example:
      >>> shops = ["oslo", "rome", "oslo", None, "bern"]
      >>> vocabulary = jbag.data.IdVocabulary.fit(shops)
      >>> vocabulary.ids.tolist(), vocabulary.num_rows
      (['oslo', 'bern', 'rome'], 4)
      >>> vocabulary.transform(["rome", "oslo", "lima", None])
      array([3, 1, 0, 0], dtype=int32)
      >>> vocabulary.transform([["rome", "lima"], [], ["oslo"]]).to_lists()
      [[3, 0], [], [1]]
    """

    ids: Any
    counts: Int[np.ndarray, " W"] | None = None
    unknown: Unknown = "row"

    def __post_init__(self) -> None:
        check_unknown(self.unknown)
        object.__setattr__(self, "ids", check_ids(self.ids))
        if self.counts is not None:
            counts = np.array(check_integers("counts", self.counts), np.int64)
            if counts.shape != self.ids.shape:
                raise ValueError(
                    f"`counts` must have the shape of `ids`, {self.ids.shape}; "
                    f"got {counts.shape}."
                )
            counts.flags.writeable = False
            object.__setattr__(self, "counts", counts)

    @classmethod
    def fit(
        cls,
        column: Any,
        *,
        min_count: int = 1,
        max_ids: int | None = None,
        unknown: Unknown = "row",
    ) -> IdVocabulary:
        """Build a vocabulary of the ids of a column.

        Ids are sorted by descending frequency, and ids of equal frequency by value, so
        the order of the column does not matter.

        Args:
          column: n ids, or n lists of ids.
          min_count: the minimum number of occurrences of an id.
          max_ids: the maximum number of ids; None for no limit.
          unknown: "row", "error" or "drop".

        Returns:
          The `IdVocabulary`.

        Raises:
          TypeError: the column holds neither integers, strings nor bytes alone, or an
            option has a wrong type.
          ValueError: an option is out of range, or an integer exceeds 64 bits.

        Example:
          >>> users = np.array([70, 12, 70, 35, 12, 70])
          >>> jbag.data.IdVocabulary.fit(users, min_count=2).ids
          array([70, 12])
        """
        return cls.fit_chunks(
            [column], min_count=min_count, max_ids=max_ids, unknown=unknown
        )

    @classmethod
    def fit_chunks(
        cls,
        columns: Iterable[Any],
        *,
        min_count: int = 1,
        max_ids: int | None = None,
        unknown: Unknown = "row",
    ) -> IdVocabulary:
        """Build a vocabulary of several columns, or of the chunks of one.

        The memory is that of a column and of all distinct ids.

        Args:
          columns: an iterable of columns; each is read once.
          min_count: as for `fit`.
          max_ids: as for `fit`.
          unknown: as for `fit`.

        Returns:
          The `IdVocabulary` that `fit` returns for the columns in one.

        Raises:
          TypeError: as `fit`; or columns hold ids of different kinds.
          ValueError: as `fit`.

        Example:
          >>> chunks = iter([np.array([7, 9]), np.array([9]), [[9, 7], [5]]])
          >>> jbag.data.IdVocabulary.fit_chunks(chunks).counts
          array([3, 2, 1])
        """
        min_count = check_integer("min_count", min_count, low=1)
        if max_ids is not None:
            max_ids = check_integer("max_ids", max_ids, low=0)
        check_unknown(unknown)
        if isinstance(columns, str | bytes) or not isinstance(columns, Iterable):
            raise TypeError(
                f"`columns` must be an iterable of columns; got {columns!r}."
            )
        total = IdCounts()
        for column in columns:
            for part in read_column("column", column):
                total.add("column", part)
        ids, counts = total.sorted()
        chosen = np.argsort(-counts, kind="stable")[:max_ids]
        chosen = chosen[counts[chosen] >= min_count]
        if isinstance(ids, list):
            ids = [ids[at] for at in chosen.tolist()]
        else:
            ids = ids[chosen]
        return cls(ids, counts[chosen], unknown)

    def transform(self, column: Any) -> Any:
        """Return the row of each id.

        Args:
          column: ids [n], or of any shape; or B lists of ids; or a `Bags`.

        Returns:
          Rows in int32 of the shape of the ids. For lists of ids, `Bags` of B bags; for
          a `Bags`, one with its capacity and weights. With `unknown="drop"`, always
          `Bags`, without slots for unknown ids: ids [n] give n bags of at most 1, and
          ids [n, L] n bags of at most L.

        Raises:
          IndexError: an id is unknown, with `unknown="error"`. The error has the first
            one and its position.
          TypeError: the column holds ids of another kind, or none.
          ValueError: there are 2**31 slots or more, or an integer exceeds 64 bits.

        Example:
          >>> vocabulary = jbag.data.IdVocabulary([70, 12], unknown="drop")
          >>> vocabulary.transform(np.array([[12, 35], [70, 12]])).to_lists()
          [[1], [0, 1]]
          >>> jbag.data.IdVocabulary([70, 12], unknown="error").transform([12, 35])
          Traceback (most recent call last):
          IndexError: `column` must hold ids of the vocabulary; got 35 at position 1.
        """
        parts = read_column("column", column)
        rows = np.concatenate([self._find(part) for part in parts])
        if self.unknown == "error" and (rows < 0).any():
            raise IndexError(
                "`column` must hold ids of the vocabulary; got "
                f"{describe(parts, int(np.argmax(rows < 0)))}."
            )
        if self.unknown == "row":
            rows += 1
        shape = rows.shape if len(parts) > 1 else parts[0].shape
        if parts[0].lengths is not None:
            lengths = np.concatenate([part.lengths for part in parts])
        elif self.unknown != "drop":
            return rows.reshape(shape)
        elif len(shape) > 2:
            raise ValueError(
                '`column` must be [n] or [n, L] with unknown="drop"; '
                f"got shape {shape}."
            )
        else:
            lengths = np.full(shape[0], shape[1] if len(shape) == 2 else 1, np.int64)
        weights = None
        if isinstance(column, Bags) and column.weights is not None:
            weights = np.asarray(column.weights)[: rows.size]
        if self.unknown == "drop":
            known = rows >= 0
            before = np.append(0, np.cumsum(known, dtype=np.int64))
            ends = np.append(0, np.cumsum(lengths, dtype=np.int64))
            rows, lengths = rows[known], np.diff(before[ends])
            weights = None if weights is None else weights[known]
        if rows.size > MAX_ROWS:
            raise ValueError(
                "`column` must have fewer than 2**31 slots in all; "
                f"got {rows.size}. Transform fewer ids per call."
            )
        bags = Bags.from_lengths(rows, lengths, weights)
        return bags.pad_to(column.capacity) if isinstance(column, Bags) else bags

    def inverse(self, rows: Any, *, unknown_id: Any = None) -> np.ndarray:
        """Return the id of each row.

        Args:
          rows: integers of any shape, in [0, num_rows).
          unknown_id: the value for row 0 of unknown ids, of the kind of the ids.

        Returns:
          Ids in the shape of `rows`.

        Raises:
          IndexError: a row is out of range, or is the row of unknown ids and there is
            no `unknown_id`.
          TypeError: `rows` are not integers, or `unknown_id` is of another kind.
          ValueError: `unknown_id` exceeds the range of the ids.

        Example:
          >>> vocabulary = jbag.data.IdVocabulary([70, 12])
          >>> vocabulary.inverse([2, 1, 0], unknown_id=-1)
          array([12, 70, -1])
        """
        rows = np.asarray(check_integers("rows", rows))
        first = 0
        if self.unknown == "row":
            first = 1 if unknown_id is None else 0
        bad = (rows < first) | (rows >= self.num_rows)
        if bad.any():
            at = tuple(map(int, np.unravel_index(np.argmax(bad), bad.shape)))
            hint = ""
            if first and rows[at] == 0:
                hint = " Row 0 is that of unknown ids: `unknown_id` gives it a value."
            raise IndexError(
                f"`rows` must lie in [{first}, {self.num_rows}); got {rows[at]} at "
                f"position {at[0] if len(at) == 1 else at}.{hint}"
            )
        if self.unknown != "row":
            return np.asarray(self.ids[rows])
        value = 0 if unknown_id is None else check_unknown_id(unknown_id, self.ids)
        known = rows > 0
        out = np.empty(rows.shape, self.ids.dtype)
        out.fill(value)  # `numpy.full` drops NULs at the end of bytes
        out[known] = self.ids[rows[known] - 1]
        return out

    @property
    def num_rows(self) -> int:
        """V, the number of rows of the table."""
        return len(self.ids) + (self.unknown == "row")

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, IdVocabulary):
            return NotImplemented
        pairs = [(self.ids, other.ids), (self.counts, other.counts)]
        return self.unknown == other.unknown and all(
            getattr(x, "dtype", None) == getattr(y, "dtype", None)
            and np.array_equal(np.asarray(x), np.asarray(y))
            for x, y in pairs
        )

    __hash__ = None  # type: ignore[assignment]  # as of arrays

    def __repr__(self) -> str:
        kind = self._kind or "ids"
        return f"IdVocabulary({len(self)} {kind}, unknown={self.unknown!r})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vocabulary to a `.npz` file of NumPy, atomically, without pickles.

        Args:
          path: the path of the file.

        Raises:
          OSError: the file cannot be written.

        Example:
          >>> vocabulary = jbag.data.IdVocabulary.fit(["oslo", "rome", "oslo"])
          >>> vocabulary.save(directory / "shops.npz")
          >>> jbag.data.IdVocabulary.load(directory / "shops.npz") == vocabulary
          True
        """
        arrays: dict[str, Any] = to_arrays(self._kind, self.unknown, self.ids)
        if self.counts is not None:
            arrays["counts"] = self.counts
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> IdVocabulary:
        """Read a vocabulary from a file of `save`.

        Args:
          path: the path of the file.

        Raises:
          OSError: the file cannot be read.
          ValueError: the file holds no vocabulary of ids.

        Example:
          >>> jbag.data.IdVocabulary([70, 12]).save(directory / "users.npz")
          >>> jbag.data.IdVocabulary.load(directory / "users.npz").ids
          array([70, 12])
        """
        with refusing(path, "holds no vocabulary of ids"), Path(path).open("rb") as f:
            return cls(**from_arrays(Archive(f)))

    def __getstate__(self) -> dict[str, Any]:
        # Copies build their own index.
        return {name: getattr(self, name) for name in ("ids", "counts", "unknown")}

    @property
    def _kind(self) -> str:
        if self.ids.dtype != object:
            return "integers" if len(self.ids) else ""
        return "strings" if isinstance(self.ids[0], str) else "bytes"

    @functools.cached_property
    def _integers(self) -> IntegerIndex:
        return IntegerIndex(self.ids)

    @functools.cached_property
    def _objects(self) -> dict[Any, int]:
        return dict(zip(self.ids.tolist(), itertools.count(), strict=False))

    def _find(self, column: Column) -> np.ndarray:
        """Return the position of each id in `ids`, -1 for unknown ids and nulls."""
        values = column.values
        if column.kind and self._kind and column.kind != self._kind:
            raise TypeError(
                f"`column` must hold {self._kind}, as the vocabulary; "
                f"got {column.kind}."
            )
        if not column.kind or not self._kind:
            found = np.full(len(values), -1, np.int32)
        elif column.kind == "integers":
            found = self._integers.find(values)
        else:
            known = map(self._objects.get, values, itertools.repeat(-1))
            found = np.fromiter(known, np.int32, len(values))
        return column.spread(found)

"""`Column`: the raw ids of a host column, from NumPy arrays and lists."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

# The types of nulls of Python and pandas, by name; so is a NaN.
_NULLS = {"NoneType", "NAType", "NaTType"}


class Column(NamedTuple):
    """The n ids of a column, as values and their positions.

    Attributes:
      kind: "integers", "strings" or "bytes"; "" without ids.
      values: an array of int64, of uint64 if an id needs it; or a list.
      codes: [n], the position of each id in `values`, -1 for a null; or None.
      valid: [n], False for a null, which has no value; or None.
      shape: the shape of the ids.
      lengths: [B], the number of ids per bag; None if the ids are in no bags.
    """

    kind: str
    values: Any
    codes: Int[np.ndarray, " n"] | None
    valid: Bool[np.ndarray, " n"] | None
    shape: tuple[int, ...]
    lengths: Int[np.ndarray, " B"] | None = None

    def spread(self, rows: Int[np.ndarray, " values"]) -> Int[np.ndarray, " n"]:
        """Return the row of each id, from that of each value; -1 for a null."""
        if self.codes is not None:
            return np.append(rows, rows.dtype.type(-1))[self.codes]
        if self.valid is not None:
            out = np.full(self.valid.size, -1, rows.dtype)
            out[self.valid] = rows
            return out
        return rows

    def describe(self, at: int) -> str:
        """Describe the id at a position, for an error."""
        value = "a null"
        if self.codes is not None:
            if self.codes[at] >= 0:
                value = repr(_item(self.values[self.codes[at]]))
        elif self.valid is None:
            value = repr(_item(self.values[at]))
        elif self.valid[at]:
            value = repr(_item(self.values[np.count_nonzero(self.valid[:at])]))
        return value


def from_array(name: str, array: np.ndarray, valid: Any = None) -> Column:
    """Read an array; `valid` marks what is no null."""
    if array.ndim == 0:
        raise TypeError(f"`{name}` must be a column of ids; got {array!r}.")
    shape = array.shape
    if array.dtype.kind in "USTO":
        column = from_list(name, array.reshape(-1).tolist())
        if column.lengths is None:
            return column._replace(shape=shape)
        if array.ndim > 1:
            raise ValueError(f"`{name}` must have lists in 1 axis; got shape {shape}.")
        return column
    if isinstance(array, np.ma.MaskedArray):
        array, valid = array.data, ~np.ma.getmaskarray(array).reshape(-1)
    flat = array.reshape(-1)
    if valid is not None:
        flat = flat[valid]
    if array.dtype.kind == "f":
        numbers = ~np.isnan(flat)
        if not numbers.all():
            flat = flat[numbers]
            if valid is None:
                valid = numbers
            else:
                valid = valid.copy()
                valid[valid] = numbers
        flat = _whole(name, flat)
    elif array.dtype.kind not in "iu":
        raise TypeError(f"`{name}` must hold integers or strings; got {array.dtype}.")
    return Column("integers" if flat.size else "", _widen(flat), None, valid, shape)


def from_list(name: str, values: list[Any], place: str = "") -> Column:
    """Read a list of ids, or of lists of ids; errors tell the position and place."""
    kinds = set(map(type, values))
    if any(issubclass(kind, list | tuple | np.ndarray) for kind in kinds):
        return _from_lists(name, values)
    size, valid, own = len(values), None, values
    if any(_may_be_null(kind) for kind in kinds):
        valid = np.fromiter((not is_null(x) for x in values), bool, size)
        own = list(itertools.compress(values, valid))
        kinds = set(map(type, own))
        if len(own) == size:
            valid = None
    if not own:
        return Column("", np.zeros(0, np.int64), None, valid, (size,))
    kind = _kind_of(type(own[0]))
    for other in kinds:
        if not kind or _kind_of(other) != kind:
            at = next(at for at, x in enumerate(values) if type(x) is other)
            raise TypeError(
                f"`{name}` must hold integers, or strings, or bytes alone; "
                f"got {values[at]!r} at position {at}{place}."
            )
    ids: Any = own
    if kind == "integers" and any(issubclass(x, float | np.floating) for x in kinds):
        # An integer that float64 does not hold exactly is above the bound of `_whole`.
        ids = _whole(name, np.array(own, np.float64))
    elif kind == "integers":
        ids = _from_integers(name, own)
    return Column(kind, ids, None, valid, (size,))


def join_integers(arrays: list[np.ndarray]) -> np.ndarray:
    """Concatenate arrays of int64 and uint64, without conversion to floats."""
    if len({array.dtype for array in arrays}) > 1:
        for array in arrays:
            if array.dtype == np.int64 and array.size and array.min() < 0:
                raise ValueError(
                    "ids must fit in int64, or in uint64; got negative ones, and ones "
                    "of 2**63 or more."
                )
        arrays = [array.astype(np.uint64) for array in arrays]
    return np.concatenate(arrays)


def is_null(value: Any) -> bool:
    """Return whether a value is None, NaN, or pandas' NA or NaT."""
    if type(value).__name__ in _NULLS:
        return True
    return isinstance(value, float | np.floating) and bool(value != value)


def _may_be_null(kind: type) -> bool:
    return kind.__name__ in _NULLS or issubclass(kind, float | np.floating)


def _kind_of(kind: type) -> str:
    if issubclass(kind, str):
        return "strings"
    if issubclass(kind, bytes):
        return "bytes"
    numbers = int | float | np.integer | np.floating
    return "integers" if issubclass(kind, numbers) and kind is not bool else ""


def _from_lists(name: str, rows: list[Any]) -> Column:
    for bag, row in enumerate(rows):
        nested = isinstance(row, list | tuple) or getattr(row, "ndim", 0) > 0
        if not nested and not is_null(row):
            raise TypeError(
                f"`{name}[{bag}]` must be a list of ids, as other elements; "
                f"got {row!r}."
            )
    bags = [() if is_null(row) else row for row in rows]
    lengths = np.fromiter(map(len, bags), np.int64, len(bags))
    filled = [row for row in bags if len(row)]
    dtypes = {(getattr(row, "dtype", None), getattr(row, "ndim", 1)) for row in filled}
    if len(dtypes) == 1 and isinstance(filled[0], np.ndarray):
        flat = from_array(name, np.concatenate(filled))
    else:
        # Arrays of several dtypes would become floats or strings.
        plain = [row.tolist() if isinstance(row, np.ndarray) else row for row in filled]
        ids = list(itertools.chain.from_iterable(plain))
        flat = from_list(name, ids, " of the concatenated lists")
    if flat.lengths is not None or len(flat.shape) > 1:
        raise ValueError(f"`{name}` must hold lists of ids; got deeper lists.")
    return flat._replace(lengths=lengths)


def _from_integers(name: str, values: list[Any]) -> np.ndarray:
    for dtype in (np.int64, np.uint64):
        try:
            return np.array(values, dtype)
        except OverflowError:
            continue
    raise ValueError(
        f"`{name}` must hold ids that fit in int64, or in uint64; got ids from "
        f"{min(values)} to {max(values)}."
    )


def _whole(name: str, numbers: np.ndarray) -> np.ndarray:
    """Convert floats to int64; raise unless each is an integer, exactly."""
    bound = 2.0 ** (np.finfo(numbers.dtype).nmant + 1)
    bad = ~(np.abs(numbers, dtype=np.float64) <= bound) | (numbers != np.trunc(numbers))
    if bad.any():
        raise TypeError(
            f"`{name}` must hold integers, as floats only up to {bound:.0f}; "
            f"got {numbers[np.argmax(bad)]} in {numbers.dtype}."
        )
    return numbers.astype(np.int64)


def _widen(array: np.ndarray) -> np.ndarray:
    """Convert integers to int64, or to uint64 if one needs it."""
    wide = array.dtype.kind == "u" and array.dtype.itemsize == 8 and array.size
    if wide and array.max() > np.iinfo(np.int64).max:
        return array.astype(np.uint64, copy=False)
    return array.astype(np.int64, copy=False)


def _item(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value

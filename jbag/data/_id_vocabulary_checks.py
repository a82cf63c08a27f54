"""Checks of the attributes and arguments of an `IdVocabulary`."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from jbag._validation import check_integer
from jbag.data._id_column import Column
from jbag.data._read_column import read_column

Unknown = Literal["row", "error", "drop"]

MAX_ROWS = np.iinfo(np.int32).max


def check_unknown(unknown: Any) -> None:
    """Raise ValueError unless `unknown` is an option of `IdVocabulary`."""
    if unknown not in get_args(Unknown):
        names = ", ".join(map(repr, get_args(Unknown)))
        raise ValueError(f"`unknown` must be one of {names}; got {unknown!r}.")


def check_unknown_id(value: Any, ids: np.ndarray) -> Any:
    """Return a value for unknown ids; raise unless it is of the kind of the ids."""
    if ids.dtype == object:
        kind = str if isinstance(ids[0], str) else bytes
        if not isinstance(value, kind):
            raise TypeError(
                f"`unknown_id` must be {kind.__name__}, as the ids; got {value!r}."
            )
        return value
    limits = np.iinfo(ids.dtype)
    return check_integer(
        "unknown_id", value, low=int(limits.min), high=int(limits.max) + 1
    )


def check_ids(given: Any) -> np.ndarray:
    """Return distinct ids as an array of int64, uint64, or objects."""
    parts = read_column("ids", given)
    part = parts[0]
    if len(parts) > 1 or part.lengths is not None or len(part.shape) != 1:
        raise ValueError("`ids` must be one flat column without chunks.")
    rows = part.spread(np.arange(len(part.values), dtype=np.int64))
    if (rows < 0).any():
        found = describe(parts, int(np.argmax(rows < 0)))
        raise ValueError(f"`ids` must hold no nulls; got {found}.")
    if rows.size >= MAX_ROWS:
        raise ValueError(f"`ids` must be fewer than 2**31 - 1; got {rows.size}.")
    if isinstance(part.values, np.ndarray):
        ids = part.values[rows]
        ordered = np.sort(ids)
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        duplicates = twice[:1].tolist()
    else:
        # Subclasses of str and bytes, such as NumPy's, become plain.
        plain = str.__str__ if part.kind == "strings" else bytes
        values = [plain(value) for value in part.values]
        ids = np.empty(rows.size, object)
        ids[:] = [values[row] for row in rows.tolist()]
        duplicates = []
        if len(set(values)) < len(values) or part.codes is not None:
            seen: set[Any] = set()
            for value in ids.tolist():
                if value in seen:
                    duplicates = [value]
                    break
                seen.add(value)
    if duplicates:
        raise ValueError(f"`ids` must be distinct; got {duplicates[0]!r} twice.")
    ids.flags.writeable = False
    return ids


def describe(parts: list[Column], at: int) -> str:
    """Describe the id at a position of a column in parts, and the position."""
    value, flat = "", at
    for part in parts:
        size = part.spread(np.zeros(len(part.values), np.int8)).size
        if flat < size:
            value = part.describe(flat)
            break
        flat -= size
    if parts[0].lengths is not None:
        ends = np.cumsum(np.concatenate([part.lengths for part in parts]))
        bag = int(np.searchsorted(ends, at, side="right"))
        start = int(ends[bag - 1]) if bag else 0
        return f"{value} at position {at - start} of bag {bag}"
    shape = parts[0].shape
    if len(shape) > 1:
        return f"{value} at position {tuple(map(int, np.unravel_index(at, shape)))}"
    return f"{value} at position {at}"

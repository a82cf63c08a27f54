"""Concatenation of lists of ids on the host."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import jax.numpy as jnp
import numpy as np


def pack(name: str, lists: Any) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate lists of numbers; return the numbers [N] and the lengths [B].

    Raises:
      TypeError: `lists` is not a list of lists of numbers.
      ValueError: the lists are nested deeper.
    """
    if isinstance(lists, str | bytes | Mapping) or not isinstance(lists, Iterable):
        raise TypeError(f"`{name}` must be a list of lists; got {lists!r}.")
    lists = list(lists)
    for bag, row in enumerate(lists):
        listed = isinstance(row, Sized) and not isinstance(row, str | bytes | Mapping)
        if not listed or getattr(row, "ndim", 1) == 0:
            raise TypeError(f"`{name}[{bag}]` must be a list; got {row!r}.")
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    if lengths.sum() == 0:
        return np.zeros(0, np.int32), lengths
    deeper = f"`{name}` must be lists of numbers; got deeper lists."
    try:
        flat = _concatenate(lists)
    except ValueError as error:
        raise ValueError(deeper) from error
    if flat.ndim != 1:
        raise ValueError(deeper)
    if not any(
        jnp.issubdtype(flat.dtype, kind) for kind in (jnp.integer, jnp.floating)
    ):
        raise TypeError(
            f"`{name}` must hold numbers; got {_describe_non_number(name, lists)}."
        )
    return flat, lengths


def describe_mismatch(lengths: np.ndarray, own: np.ndarray) -> str:
    """Describe the first difference between the lengths of `ids` and `weights`."""
    if len(lengths) != len(own):
        return f"`weights` must hold {len(lengths)} lists, as `ids`; got {len(own)}."
    bag = int(np.argmax(lengths != own))
    return (
        f"`weights[{bag}]` must have the length of `ids[{bag}]`, {lengths[bag]}; "
        f"got {own[bag]}."
    )


def _concatenate(lists: list[Any]) -> np.ndarray:
    if all(isinstance(row, list | tuple) for row in lists):
        return np.array(list(itertools.chain.from_iterable(lists)))
    # Empty arrays are left out, as their default dtype is floating.
    rows = [np.asarray(row if hasattr(row, "dtype") else list(row)) for row in lists]
    return np.concatenate([row for row in rows if row.size])


def _describe_non_number(name: str, lists: list[Any]) -> str:
    for bag, row in enumerate(lists):
        for at, value in enumerate(row):
            if isinstance(value, bool | np.bool_) or not isinstance(
                value, int | float | np.number
            ):
                return f"{value!r} at `{name}[{bag}][{at}]`"
    return "numbers of more than 64 bits"

"""Checks of the attributes of an `Encoder`."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np

from jbag._validation import check_flag, check_integer
from jbag.text._tokenizer_options import SplitName

OPTIONS = {"ngrams", "buckets", "subwords", "split", "lowercase", "skip", "end"}
ARRAYS = ("counts", "weights", "bucket_rows")


def check_options(encoder: Any) -> None:
    """Check the words and options of an `Encoder`."""
    check_integer("ngrams", encoder.ngrams, low=1)
    check_integer("buckets", encoder.buckets, low=0, high=1 << 31)
    check_flag("lowercase", encoder.lowercase)
    if encoder.split not in get_args(SplitName):
        names = ", ".join(map(repr, get_args(SplitName)))
        raise ValueError(f"`split` must be one of {names}; got {encoder.split!r}.")
    for name in ("skip", "end"):
        if not isinstance(getattr(encoder, name), str):
            raise TypeError(
                f"`{name}` must be a string; got {getattr(encoder, name)!r}."
            )
    pair = encoder.subwords
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise TypeError(f"`subwords` must be a pair of integers; got {pair!r}.")
    shortest = check_integer("subwords[0]", pair[0], low=0)
    longest = check_integer("subwords[1]", pair[1], low=0)
    if shortest > longest or (longest and not shortest):
        raise ValueError(
            "`subwords` must be the shortest and the longest character n-grams, or "
            f"(0, 0); got {pair!r}."
        )
    if (encoder.ngrams > 1 or longest) and not encoder.buckets:
        raise ValueError("`buckets` must be at least 1 with n-grams; got 0.")
    if encoder.num_rows > np.iinfo(np.int32).max:
        raise ValueError(
            "`words` and `buckets` must have fewer than 2**31 rows; got "
            f"{encoder.num_rows}."
        )
    if any("\n" in word for word in encoder.words):
        raise ValueError("`words` must not hold line feeds.")


def check_arrays(encoder: Any) -> None:
    """Check the shapes and dtypes of the arrays of an `Encoder`."""
    for name, size, kinds, expected in (
        ("counts", len(encoder.words), "iu", "integers"),
        ("bucket_rows", encoder.buckets, "iu", "integers"),
        ("weights", encoder.num_rows, "f", "floating"),
    ):
        array = getattr(encoder, name)
        if array is not None and np.shape(array) != (size,):
            raise ValueError(
                f"`{name}` must have the shape ({size},); got {np.shape(array)}."
            )
        if array is not None and np.asarray(array).dtype.kind not in kinds:
            raise TypeError(
                f"`{name}` must be {expected}; got {np.asarray(array).dtype}."
            )

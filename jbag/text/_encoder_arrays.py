"""Conversion of an `Encoder` to arrays by name, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jbag.text._encoder_checks import ARRAYS, OPTIONS


def to_arrays(encoder: Any) -> dict[str, np.ndarray]:
    """Return the words and options of an encoder as uint8, and its arrays."""
    options = {name: getattr(encoder, name) for name in sorted(OPTIONS)}
    text = "".join(word + "\n" for word in encoder.words)
    arrays = {"options": _to_bytes(json.dumps(options)), "words": _to_bytes(text)}
    for name in ARRAYS:
        if getattr(encoder, name) is not None:
            arrays[name] = np.asarray(getattr(encoder, name))
    return arrays


def from_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Check the arrays; return the attributes of the encoder."""
    required, known = {"options", "words"}, {"options", "words", *ARRAYS}
    if not required <= set(arrays) <= known:
        raise ValueError(
            f"an encoder must have {sorted(required)} and may have "
            f"{sorted(ARRAYS)}; got {sorted(arrays)[:10]}"
        )
    options = json.loads(_from_bytes(arrays["options"]))
    if not isinstance(options, dict) or set(options) != OPTIONS:
        raise ValueError(f"an encoder must have the options {sorted(OPTIONS)}")
    if isinstance(options["subwords"], list):  # JSON has no tuples
        options["subwords"] = tuple(options["subwords"])
    *words, rest = _from_bytes(arrays["words"]).split("\n")
    if rest:
        raise ValueError("the last word must end with a line feed")
    own: dict[str, Any] = {name: arrays[name] for name in ARRAYS if name in arrays}
    return {"words": words, **options, **own}


def _to_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(errors="surrogatepass"), np.uint8)


def _from_bytes(array: np.ndarray) -> str:
    if array.dtype.kind == "U":  # `numpy.savez` of a string
        return str(array)
    if array.dtype != np.uint8:
        raise TypeError(f"texts must be uint8; got {array.dtype}")
    return array.tobytes().decode(errors="surrogatepass")

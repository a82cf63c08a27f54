"""Conversion of an `IdVocabulary` to arrays by name, and back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from jbag.interop._numpy_files import Archive


def to_arrays(kind: str, unknown: str, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Return the ids as numbers, or as text with the length of each id."""
    options = json.dumps({"kind": kind, "unknown": unknown}).encode()
    arrays = {"options": np.frombuffer(options, np.uint8)}
    if ids.dtype != object:
        return {**arrays, "ids": ids}
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    if kind == "strings":
        text = "".join(ids).encode(errors="surrogatepass")
    else:
        text = b"".join(ids)
    return {**arrays, "text": np.frombuffer(text, np.uint8), "lengths": lengths}


def from_arrays(archive: Archive) -> dict[str, Any]:
    """Check the arrays of a file; return the attributes of the vocabulary."""
    names = set(archive.names())
    counts = names & {"counts"}
    if names - counts not in ({"options", "ids"}, {"options", "text", "lengths"}):
        raise ValueError(
            "it must have the arrays options and ids, or options, text and lengths; "
            f"got {sorted(names)[:10]}"
        )
    options = json.loads(_bytes_of(archive, "options"))
    if not isinstance(options, dict) or set(options) != {"kind", "unknown"}:
        raise ValueError("its options must be kind and unknown")
    kinds = {"integers", ""} if "ids" in names else {"strings", "bytes"}
    if options["kind"] not in kinds:
        raise ValueError(f"its kind must be in {sorted(kinds)}; got {options['kind']}")
    attributes: dict[str, Any] = {"unknown": options["unknown"]}
    if counts:
        attributes["counts"] = archive.array("counts")
    if "ids" in names:
        ids = archive.array("ids")
        if ids.dtype not in (np.int64, np.uint64):
            raise ValueError(f"its ids must be int64 or uint64; got {ids.dtype}")
        return {**attributes, "ids": ids}
    text: Any = _bytes_of(archive, "text")
    if options["kind"] == "strings":
        text = text.decode(errors="surrogatepass")
    lengths = archive.array("lengths")
    if lengths.dtype != np.int64 or lengths.ndim != 1 or (lengths < 0).any():
        raise ValueError("its lengths must be int64, in one axis, and not negative")
    # Python's sum can't overflow.
    if not lengths.size or sum(lengths.tolist()) != len(text):
        raise ValueError(f"its lengths must sum to that of the text, {len(text)}")
    ends = np.cumsum(lengths)
    spans = zip((ends - lengths).tolist(), ends.tolist(), strict=True)
    return {**attributes, "ids": [text[start:end] for start, end in spans]}


def _bytes_of(archive: Archive, name: str) -> bytes:
    array = archive.array(name)
    if array.dtype != np.uint8:
        raise ValueError(f"its {name} must be uint8; got {array.dtype}")
    return array.tobytes()

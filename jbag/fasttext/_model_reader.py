"""The reader of fastText's model files (`.bin`, `.ftz`).

A file has a signature, the training arguments, the dictionary and two matrices, dense
or product-quantised (Jégou et al., "Product Quantization for Nearest Neighbor Search",
2011), in little-endian order without padding.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from jbag._files import check_declared, refusing

_MAGIC = 793712314
_VERSIONS = (11, 12)
_MODELS = {1: "cbow", 2: "skipgram", 3: "supervised"}
_LOSSES = {1: "hs", 2: "ns", 3: "softmax", 4: "ova"}
_ARGUMENTS = np.dtype(
    [
        (name, "<i4")
        for name in (
            *("dim", "window", "epochs", "min_count", "negatives", "ngrams", "loss"),
            *("model", "buckets", "shortest", "longest", "rate_update"),
        )
    ]
    + [("threshold", "<f8")]
)
_SIZES = np.dtype(
    [
        *(("entries", "<i4"), ("words", "<i4"), ("labels", "<i4")),
        *(("tokens", "<i8"), ("pruned", "<i8")),
    ]
)
_ENTRY_END = 1 + 8 + 1  # bytes after a word: a zero, its count and its type
_CENTROIDS = 256
_NO_COUNT = 10**15  # fastText's infinite count in its tree of labels
_ALIGNMENT = 64  # XLA does not copy arrays with this alignment


class ModelFile(NamedTuple):
    """The contents of a model file."""

    kind: str
    loss: str
    ngrams: int
    buckets: int
    subwords: tuple[int, int]
    words: list[str]
    counts: np.ndarray  # [words] int64
    labels: list[str]
    label_counts: np.ndarray  # [labels] int64
    bucket_rows: np.ndarray | None  # [buckets] int32, for a pruned model
    table: np.ndarray  # [V, D] float32
    output: np.ndarray  # [labels, D] float32; [words, D] for unsupervised models


def read(path: str | os.PathLike[str]) -> ModelFile:
    """Read a model file; raise ValueError if it is not one."""
    with refusing(path, "is not a fastText model, or is broken"):
        return _read(_File(path))


def _read(file: _File) -> ModelFile:
    magic, version = file.take("<i4", 2, "signature").tolist()
    if magic != _MAGIC or version not in _VERSIONS:
        file.fail(
            f"it must begin with {_MAGIC} and the version 11 or 12; got {magic} and "
            f"{version}"
        )
    given = dict(
        zip(
            _ARGUMENTS.names or (),
            file.take(_ARGUMENTS, 1, "arguments")[0].tolist(),
            strict=True,
        )
    )
    for name, known in (("model", _MODELS), ("loss", _LOSSES)):
        if given[name] not in known:
            file.fail(f"its {name} must be one of {known}; got {given[name]}")
    if given["buckets"] < 0:
        file.fail(f"its buckets must be at least 0; got {given['buckets']}")
    kind = _MODELS[given["model"]]
    shortest, longest = max(1, given["shortest"]), given["longest"]
    if (version == 11 and kind == "supervised") or shortest > longest:
        shortest, longest = 0, 0  # Supervised models of version 11 have none.
    words, counts, num_words, pairs = _dictionary(file)
    table, quantised = _table(file)
    if pairs is not None and not quantised:
        file.fail("it is pruned, but not quantised")
    output_quantised = file.take("u1", 1, "flag of the output matrix")[0]
    quantised_output = bool(quantised and output_quantised)
    output = _quantised(file, "output") if quantised_output else _dense(file, "output")
    buckets = given["buckets"]
    ngrams = max(1, given["ngrams"])
    if (ngrams > 1 or longest) and not buckets:
        file.fail("its buckets must be at least 1 with n-grams; got 0")
    bucket_rows = None
    if pairs is not None:
        bucket_rows = _bucket_rows(file, pairs, buckets, len(table) - num_words)
    elif len(table) < num_words + buckets:
        file.fail(
            f"its input matrix must have rows for {num_words} words and {buckets} "
            f"buckets; got {len(table)}"
        )
    num_labels = len(words) - num_words
    if kind == "supervised" and not num_labels:
        file.fail("a supervised model must have labels")
    if np.any((counts < 0) | (counts >= _NO_COUNT // max(1, len(counts)))):
        file.fail(f"its counts must be in [0, {_NO_COUNT // max(1, len(counts))})")
    rows = num_labels if kind == "supervised" else num_words
    if output.shape != (rows, table.shape[1]):
        file.fail(
            f"its output matrix must have the shape {(rows, table.shape[1])}; got "
            f"{output.shape}"
        )
    return ModelFile(
        kind=kind,
        loss=_LOSSES[given["loss"]],
        ngrams=ngrams,
        buckets=buckets,
        subwords=(shortest, longest),
        words=words[:num_words],
        counts=counts[:num_words],
        labels=words[num_words:],
        label_counts=counts[num_words:],
        bucket_rows=bucket_rows,
        table=table,
        output=output,
    )


class _File:
    """A memory-mapped file, read sequentially with bounds checks."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with Path(path).open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if not self.size:
                self.fail("it is empty")
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.at = 0

    def take(self, dtype: np.typing.DTypeLike, count: int, what: str) -> np.ndarray:
        """Return the next `count` numbers, as a view of the file."""
        dtype = np.dtype(dtype)
        if count < 0 or count * dtype.itemsize > self.size - self.at:
            self.fail(
                f"its {what} must have {count} times {dtype.itemsize} bytes; "
                f"got {self.size - self.at} bytes at {self.at}"
            )
        numbers = np.frombuffer(self.bytes, dtype, count, self.at)
        self.at += numbers.nbytes
        return numbers

    def fail(self, why: str) -> NoReturn:
        raise ValueError(why)

    def check_declared(self, num_bytes: int, what: str) -> None:
        """Raise if the declared size is implausible for the size of the file."""
        check_declared(num_bytes, self.size, what)


def _dictionary(file: _File) -> tuple[list[str], np.ndarray, int, np.ndarray | None]:
    """Return words and labels, their counts, the number of words, and pruned pairs."""
    sizes = file.take(_SIZES, 1, "sizes of the dictionary")[0]
    entries, num_words, num_labels = (
        int(sizes[name]) for name in ("entries", "words", "labels")
    )
    if min(num_words, num_labels) < 0 or entries != num_words + num_labels:
        file.fail(
            f"its dictionary must have as many entries as words and labels; got "
            f"{entries}, {num_words} and {num_labels}"
        )
    start = file.at
    if entries * _ENTRY_END > file.size - start:
        file.fail(f"its dictionary must have {entries} entries; the file is too small")
    ends = np.empty(entries, np.int64)
    at, find = start, file.bytes.find
    for entry in range(entries):
        ends[entry] = end = find(b"\0", at)
        at = end + _ENTRY_END
        if end < 0 or at > file.size:
            file.fail(f"its dictionary must have {entries} entries; it has {entry}")
    characters = file.take("u1", at - start, "dictionary")
    after = (ends - start)[:, None] + np.arange(1, _ENTRY_END)
    tails = characters[after]
    counts = tails[:, :8].copy().view("<i8")[:, 0].astype(np.int64)
    is_label = tails[:, 8] != 0
    if is_label[:num_words].any() or not is_label[num_words:].all():
        file.fail("its words must come before its labels")
    # Replace the bytes after each word by one line feed.
    is_kept = np.ones(len(characters), bool)
    is_kept[after] = False
    characters = characters.copy()
    characters[ends - start] = ord("\n")
    text = characters[is_kept].tobytes().decode(errors="surrogateescape")
    words = text.split("\n")[:-1]
    if len(words) != entries:
        file.fail("its words must have no line feeds")
    pruned = int(sizes["pruned"])
    pairs = None if pruned < 0 else file.take("<i4", 2 * pruned, "pruned buckets")
    return words, counts, num_words, None if pairs is None else pairs.reshape(-1, 2)


def _bucket_rows(
    file: _File, pairs: np.ndarray, buckets: int, num_rows: int
) -> np.ndarray:
    for name, column, high in (("bucket", 0, buckets), ("row", 1, num_rows)):
        invalid = (pairs[:, column] < 0) | (pairs[:, column] >= high)
        if invalid.any():
            found = pairs[np.argmax(invalid), column]
            file.fail(f"each kept {name} must be in [0, {high}); got {found}")
    file.check_declared(4 * buckets, f"{buckets} buckets")
    rows = np.full(buckets, -1, np.int32)
    rows[pairs[:, 0]] = pairs[:, 1]
    return rows


def _table(file: _File) -> tuple[np.ndarray, bool]:
    quantised = bool(file.take("u1", 1, "flag of the input matrix")[0])
    return (_quantised if quantised else _dense)(file, "input"), quantised


def _shape(file: _File, name: str) -> tuple[int, int]:
    rows, columns = file.take("<i8", 2, f"{name} matrix's shape").tolist()
    if rows < 0 or columns < 1:
        file.fail(f"its {name} matrix must have a valid shape; got ({rows}, {columns})")
    return rows, columns


def _dense(file: _File, name: str) -> np.ndarray:
    rows, columns = _shape(file, name)
    numbers = file.take("u1", 4 * rows * columns, f"{name} matrix")
    matrix = _aligned(rows, columns)
    matrix.reshape(-1).view(np.uint8)[:] = numbers
    return matrix


def _quantised(file: _File, name: str) -> np.ndarray:
    has_norms = file.take("u1", 1, f"{name} matrix's flag of norms")[0]
    rows, columns = _shape(file, name)
    (size,) = file.take("<i4", 1, f"{name} matrix's size").tolist()
    codes = file.take("u1", size, f"{name} matrix's codes")
    centroids = _centroids(file, name, columns)
    if size != rows * len(centroids):
        file.fail(
            f"its {name} matrix must have {rows} times {len(centroids)} codes; got "
            f"{size}"
        )
    codes = codes.reshape(rows, len(centroids))
    file.check_declared(4 * rows * columns, f"its {name} matrix, expanded,")
    matrix = _aligned(rows, columns)
    start = 0
    for part, own in enumerate(centroids):
        matrix[:, start : start + own.shape[1]] = own[codes[:, part]]
        start += own.shape[1]
    if has_norms:
        norm_codes = file.take("u1", rows, f"{name} matrix's norms")
        (norms,) = _centroids(file, name, 1)
        matrix *= norms[norm_codes]
    return matrix


def _centroids(file: _File, name: str, columns: int) -> list[np.ndarray]:
    """Return the centroids [256, width] of each group of columns."""
    given = file.take("<i4", 4, f"{name} matrix's quantiser").tolist()
    width = max(1, given[2])
    parts = -(-columns // width)
    expected = [columns, parts, width, columns - (parts - 1) * width]
    if given != expected:
        file.fail(f"its {name} matrix's quantiser must be {expected}; got {given}")
    widths = [width] * (parts - 1) + expected[3:]
    return [
        file.take("<f4", _CENTROIDS * own, f"{name} matrix's centroids").reshape(
            _CENTROIDS, own
        )
        for own in widths
    ]


def _aligned(rows: int, columns: int) -> np.ndarray:
    size = 4 * rows * columns
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(np.float32).reshape(rows, columns)

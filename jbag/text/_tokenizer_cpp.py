"""The multithreaded tokenizer in C++; its source is `csrc/text/tokenizer.h`."""

from __future__ import annotations

import ctypes
import importlib.resources
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jbag.text import _tokenizer_python as python
from jbag.text._tokenizer_options import (
    Plan,
    Split,
    character_classes,
    from_utf8,
    prepare,
)


class _Texts(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("num", ctypes.c_int64),
    )


class _Split(ctypes.Structure):
    _fields_ = (
        ("classes", ctypes.c_void_p),
        ("num_classes", ctypes.c_int64),
        ("skip", ctypes.c_char_p),
        ("skip_size", ctypes.c_int64),
        ("end", ctypes.c_char_p),
        ("end_size", ctypes.c_int64),
    )


class _Plan(ctypes.Structure):
    _fields_ = (
        ("ngrams", ctypes.c_int64),
        ("buckets", ctypes.c_int64),
        ("first_bucket", ctypes.c_int64),
        ("min_subword", ctypes.c_int64),
        ("max_subword", ctypes.c_int64),
        ("bucket_rows", ctypes.c_void_p),
    )


class Vocabulary:
    """A vocabulary; word i has row i."""

    def __init__(self, words: Sequence[bytes]) -> None:
        packed = _Packed(words)
        handle = _LIBRARY.jbag_text_vocabulary(packed.texts)
        self.handle = _free_with(self, handle, _LIBRARY.jbag_text_free_vocabulary)

    def encode(
        self, texts: Sequence[str], split: Split, plan: Plan
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of texts [N] int32 and their lengths [B] int64."""
        return Corpus(texts, split, known=self).encode(None, plan)


class Corpus:
    """Tokenized texts, and their words in the order of first occurrence."""

    def __init__(
        self, texts: Sequence[str], split: Split, known: Vocabulary | None = None
    ) -> None:
        self._split = split
        self._known = known
        self._packed = packed = _Packed(prepare(texts, split))
        self._classes = character_classes(split.name, ascii_only=packed.ascii_only)
        options = _Split(
            self._classes.ctypes.data,
            self._classes.size,
            split.skip,
            len(split.skip),
            split.end,
            len(split.end),
        )
        vocabulary = known.handle if known else None
        handle = _LIBRARY.jbag_text_read(
            vocabulary, packed.texts, options, _num_threads()
        )
        self._handle = _free_with(self, handle, _LIBRARY.jbag_text_free_corpus)

    @property
    def counts(self) -> np.ndarray:
        """The number of occurrences of each word, [W] int64."""
        counts = np.empty(_LIBRARY.jbag_text_num_words(self._handle), np.int64)
        _LIBRARY.jbag_text_counts(self._handle, counts.ctypes.data)
        return counts

    def words(self, chosen: np.ndarray) -> list[str]:
        """Return the words at these positions."""
        chosen = np.ascontiguousarray(chosen, np.int64)
        arguments = (self._handle, chosen.ctypes.data, chosen.size)
        characters = np.empty(_LIBRARY.jbag_text_words(*arguments, None), np.uint8)
        _LIBRARY.jbag_text_words(*arguments, characters.ctypes.data)
        return from_utf8(characters.tobytes(), self._split.name).split("\n")[:-1]

    def encode(
        self, rows: np.ndarray | None, plan: Plan
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode as `Vocabulary.encode`; a word with a negative row has none."""
        rows = None if rows is None else np.ascontiguousarray(rows, np.int32)
        bucket_rows = plan.bucket_rows
        if bucket_rows is not None:
            bucket_rows = np.ascontiguousarray(bucket_rows, np.int32)
        numbers = (plan.ngrams, plan.buckets, plan.first_bucket, *plan.subwords)
        c_plan = _Plan(*numbers, _address(bucket_rows))
        arguments = (self._handle, _address(rows), c_plan)
        offsets = np.zeros(self._packed.texts.num + 1, np.int64)
        _check(_LIBRARY.jbag_text_measure(*arguments, _address(offsets[1:])))
        lengths = offsets[1:].copy()
        np.cumsum(lengths, out=offsets[1:])
        indices = np.empty(offsets[-1], np.int32)
        _check(
            _LIBRARY.jbag_text_write(*arguments, _address(offsets), _address(indices))
        )
        return indices, lengths


def numbers(text: bytes, num: int) -> np.ndarray | None:
    """Parse exactly `num` numbers as float32; return None if the text has others."""
    found = np.empty(num, np.float32)
    count = _LIBRARY.jbag_text_numbers(text, len(text), found.ctypes.data, num)
    # NumPy parses rare forms, such as "nan".
    return found if count == num else python.numbers(text, num)


def hash_bytes(strings: Sequence[bytes]) -> np.ndarray:
    """Return the FNV-1a hashes of strings, [N] uint64."""
    packed = _Packed(strings)
    hashes = np.empty(len(strings), np.uint64)
    _LIBRARY.jbag_text_hash(packed.texts, hashes.ctypes.data)
    return hashes


def hash_fixed(strings: np.ndarray) -> np.ndarray:
    """Return the FNV-1a hashes of an array of dtype "U" or "S", [N] uint64."""
    hashes = np.empty(strings.size, np.uint64)
    is_utf32 = strings.dtype.kind == "U"
    width = strings.dtype.itemsize // (4 if is_utf32 else 1)
    arguments = (strings.ctypes.data, width, strings.size, hashes.ctypes.data)
    _LIBRARY.jbag_text_hash_fixed(*arguments, is_utf32)
    return hashes


class _Packed:
    """Concatenated texts; owns the memory that `texts` points to."""

    def __init__(self, texts: Iterable[bytes]) -> None:
        data, ends = bytearray(), [0]
        for text in texts:  # One at a time, to hold one copy in memory.
            data += text
            ends.append(len(data))
        self.ascii_only = data.isascii()
        self._characters = (ctypes.c_char * len(data)).from_buffer(data)
        self._starts = np.array(ends, np.int64)
        self.texts = _Texts(
            ctypes.addressof(self._characters), _address(self._starts), len(ends) - 1
        )


def _address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def _free_with(owner: object, handle: int | None, free: Callable[[int], None]) -> int:
    """Free the handle when its owner is collected."""
    if handle is None:
        raise MemoryError("Out of memory for the texts.")
    weakref.finalize(owner, free, handle)
    return handle


def _check(failure: int) -> None:
    if failure:
        raise MemoryError("Out of memory for the rows of the texts.")


def _num_threads() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _load() -> tuple[Any, str | None]:
    """Return (library, None), or (None, the reason why it is missing)."""
    package = importlib.resources.files("jbag") / "text"
    library = package / "libjbag_text.so"
    if not library.is_file():
        return None, "`pip install` builds it with a C++ compiler"
    with importlib.resources.as_file(library) as path:
        try:
            functions = ctypes.CDLL(str(path))
        except OSError as error:
            return None, f"its library cannot be loaded: {error}"
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    texts = ctypes.POINTER(_Texts)
    plan = ctypes.POINTER(_Plan)
    signatures = {
        "vocabulary": (pointer, texts),
        "free_vocabulary": (None, pointer),
        "read": (pointer, pointer, texts, ctypes.POINTER(_Split), number),
        "free_corpus": (None, pointer),
        "num_words": (number, pointer),
        "counts": (None, pointer, pointer),
        "words": (number, pointer, pointer, number, pointer),
        "measure": (ctypes.c_int, pointer, pointer, plan, pointer),
        "numbers": (number, ctypes.c_char_p, number, pointer, number),
        "write": (ctypes.c_int, pointer, pointer, plan, pointer, pointer),
        "hash": (None, texts, pointer),
        "hash_fixed": (None, pointer, number, number, pointer, ctypes.c_int),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(functions, f"jbag_text_{name}")
        function.restype = result
        function.argtypes = arguments
    return functions, None


_LIBRARY, MISSING = _load()

"""The reader of word vectors as text (`.vec`): fastText, word2vec and GloVe."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jbag._files import refusing
from jbag._validation import check_integer
from jbag.text._tokenizer_choice import tokenizer

_BLOCK = 1 << 24  # bytes
_BOM = b"\xef\xbb\xbf"
_DIGITS = 18  # at most, of a size in a file


def load_vectors(
    path: str | os.PathLike[str], max_words: int | None = None
) -> tuple[tuple[str, ...], np.ndarray]:
    """Read word vectors in the text format of fastText, word2vec and GloVe.

    Each line has a word and D numbers. The first line may hold the number of words and
    D, as in fastText and word2vec. Of duplicate words, the first one is kept. A byte
    order mark is skipped. Words are UTF-8; invalid bytes become lone surrogates, as
    with Python's "surrogateescape".

    Args:
      path: the path of the file.
      max_words: the number of lines to read, the most frequent words first; None reads
        all lines.

    Returns:
      (words, table): V words and their vectors [V, D] float32.

    Raises:
      OSError: the file cannot be read.
      TypeError: `max_words` is not an integer.
      ValueError: the file holds no word vectors, or `max_words` is negative.

    Example:
      >>> words, table = jbag.fasttext.load_vectors(directory / "vectors.vec")
      >>> words, table.shape
      (('to', 'be'), (2, 3))
      >>> encoder = jbag.text.Encoder(words=words, split="spaces", lowercase=False)
      >>> jbag.embedding_bag(table, encoder.encode(["to be"]))
      Array([[2.5, 3.5, 4.5]], dtype=float32)
    """
    if max_words is not None:
        max_words = check_integer("max_words", max_words, low=0)
    with refusing(path, "holds no word vectors"), Path(path).open("rb") as file:
        words, table = _load(file, max_words)
    rows = {word: row for row, word in reversed(list(enumerate(words)))}
    if len(rows) < len(words):
        chosen = sorted(rows.values())
        words, table = [words[row] for row in chosen], table[chosen]
    return tuple(word.decode(errors="surrogateescape") for word in words), table


def _load(file: BinaryIO, max_words: int | None) -> tuple[list[bytes], np.ndarray]:
    """Return the words and numbers of all lines, or of the first `max_words`."""
    num, features, first = _measure(file, os.fstat(file.fileno()).st_size)
    file.seek(first)
    wanted = num if max_words is None else min(num, max_words)
    table = np.empty((wanted, features), np.float32)
    words: list[bytes] = []
    for lines in _blocks(file):
        at = len(words)
        lines = lines[: wanted - at] if max_words is not None else lines
        if at + len(lines) > wanted:
            raise ValueError(
                f"it must hold {num} words, as its first line says; got more"
            )
        if lines:
            words += _read(lines, table[at : at + len(lines)], at)
        if max_words is not None and len(words) == wanted:
            break
    if len(words) < wanted:
        raise ValueError(
            f"it must hold {num} words, as its first line says; got {len(words)}"
        )
    return words, table


def _measure(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Return the number of words, the numbers per word, and the start of the words."""
    start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(start)
    line = file.readline(_BLOCK)
    fields = line.split()
    if len(fields) == 2 and all(map(_is_size, fields)):
        num, features = map(int, fields)
        source, first = "as its first line says", file.tell()
        if features < 1:
            raise ValueError(f"its words must have at least 1 number; got {features}")
    elif len(fields) < 2:
        raise ValueError(
            "it must begin with the numbers of words and of features, or with a word "
            f"and its vector; got {line[:80]!r}"
        )
    else:
        source, first = "as many as its first line has", start
        file.seek(first)
        num, features = sum(map(len, _blocks(file))), len(fields) - 1
    if 2 * num * features > size:
        raise ValueError(
            f"it must hold {num} words of {features} numbers, {source}; got "
            f"{size} bytes"
        )
    return num, features, first


def _is_size(field: bytes) -> bool:
    return field.isdigit() and len(field) <= _DIGITS


def _blocks(file: BinaryIO) -> Iterator[list[bytes]]:
    """Yield the non-blank lines of a file, in lists."""
    rest = b""
    while block := file.read(_BLOCK):
        *lines, rest = (rest + block).split(b"\n")
        if len(rest) > _BLOCK:
            raise ValueError(f"its lines must have at most {_BLOCK} bytes")
        yield [line for line in lines if line.strip()]
    if rest.strip():
        yield [rest]


def _read(lines: list[bytes], rows: np.ndarray, at: int) -> list[bytes]:
    """Parse lines: write the numbers to `rows`, return the words."""
    if len({line.count(b" ") for line in lines}) == 1:
        parts = [line.partition(b" ") for line in lines]
        numbers = tokenizer(None).numbers(
            b" ".join([part[2] for part in parts]), rows.size
        )
        if numbers is not None:
            rows[:] = numbers.reshape(rows.shape)
            return [part[0] for part in parts]
    # Line by line: a word has spaces, as in GloVe, or a line is malformed.
    words = []
    for row, line in enumerate(lines):
        word, *fields = line.rsplit(None, rows.shape[1])
        numbers = tokenizer(None).numbers(b" ".join(fields), rows.shape[1])
        if numbers is None:
            raise ValueError(
                f"it must hold a word and {rows.shape[1]} numbers in each line; got "
                f"{line[:80]!r} for word {at + row}"
            )
        rows[row] = numbers
        words.append(word)
    return words

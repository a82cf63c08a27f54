"""Options of a tokenizer: how texts split into tokens, and the rows of tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple
from unicodedata import category

import numpy as np

SplitName = Literal["words", "spaces", "fasttext"]

PART, SPACE, ALONE = range(3)  # classes of characters
FASTTEXT_SPACES = b" \n\r\t\v\f\0"
# Scripts without spaces (Thai, Lao, Burmese, Khmer, kana, Han) split into characters;
# their words are n-grams.
SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_LETTERS_END = 0x40000  # no letter, mark or space is above


class Split(NamedTuple):
    """Split a text into tokens."""

    name: SplitName
    lowercase: bool
    skip: bytes  # the prefix of dropped tokens; empty for none
    end: bytes  # the token after each text; empty for none


class Plan(NamedTuple):
    """Assign rows to the tokens of a text."""

    ngrams: int  # the maximum length of word n-grams
    buckets: int
    first_bucket: int  # the row of bucket 0
    subwords: tuple[int, int]  # minimum and maximum length; (0, 0) for none
    bucket_rows: np.ndarray | None  # [buckets] int32, negative for no row


@functools.cache
def marks() -> str:
    """Return the vowel signs and accents, for which `str.isalnum` is False."""
    return "".join(c for c in map(chr, range(1 << 16)) if category(c)[0] == "M")


@functools.cache
def character_classes(name: SplitName, *, ascii_only: bool) -> np.ndarray:
    """Return the class of each code point, or of each byte, as uint8."""
    if name == "fasttext":
        classes = np.full(256, PART, np.uint8)
        classes[list(FASTTEXT_SPACES)] = SPACE
        return classes
    known = 128 if ascii_only else _LETTERS_END
    other = PART if name == "spaces" else ALONE
    classes = np.full(256 if ascii_only else 0x110000, other, np.uint8)
    points = list(map(chr, range(known)))
    if name == "words":
        classes[:known][np.fromiter(map(str.isalnum, points), bool, known)] = PART
        classes[ord("_")] = PART
        if not ascii_only:
            classes[list(map(ord, marks()))] = PART
            for first, last in zip(SPACELESS[::3], SPACELESS[2::3], strict=True):
                span = classes[ord(first) : ord(last) + 1]
                span[span == PART] = ALONE
    classes[:known][np.fromiter(map(str.isspace, points), bool, known)] = SPACE
    return classes


def prepare(texts: Iterable[str], split: Split) -> Iterator[bytes]:
    """Yield texts, in lower case if the split says so, as UTF-8."""
    for text in texts:
        yield to_utf8(text.lower() if split.lowercase else text, split.name)


def to_utf8(text: str, name: SplitName) -> bytes:
    """Encode a text; lone surrogates become bytes as in fastText, or pass."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        pass
    try:
        errors = "surrogateescape" if name == "fasttext" else "surrogatepass"
        return text.encode(errors=errors)
    except UnicodeEncodeError:  # not an escaped byte
        return text.encode(errors="surrogatepass")


def from_utf8(words: bytes, name: SplitName) -> str:
    """Decode the output of `to_utf8`."""
    try:
        return words.decode()
    except UnicodeDecodeError:
        errors = "surrogateescape" if name == "fasttext" else "surrogatepass"
        return words.decode(errors=errors)

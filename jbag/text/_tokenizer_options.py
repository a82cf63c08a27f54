"""Options of a tokenizer: where tokens end, and which rows they have."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple
from unicodedata import category

import numpy as np

SplitName = Literal["words", "spaces", "fasttext"]

PART, SPACE, ALONE = range(3)  # what a character is
FASTTEXT_SPACES = b" \n\r\t\v\f\0"
# Scripts written without spaces (Thai, Lao, Burmese, Khmer, kana, Han) are taken
# character by character: n-grams make their words.
SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_LETTERS_END = 0x40000  # no letter, mark or space lies above


class Split(NamedTuple):
    """How a text becomes tokens."""

    name: SplitName
    lowercase: bool
    skip: bytes  # tokens that begin with it are left out, unless it is empty
    end: bytes  # follows each text, and ends it where it stands within; or empty


class Plan(NamedTuple):
    """Which rows the tokens of a text have."""

    ngrams: int  # the longest word n-grams
    buckets: int
    first_bucket: int  # the row of bucket 0
    subwords: tuple[int, int]  # shortest and longest, in characters; (0, 0) for none
    bucket_rows: np.ndarray | None  # [buckets] int32, negative where there is none


@functools.cache
def marks() -> str:
    """Return vowel signs and accents, which are no letters to Python."""
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
    """Yield texts in the letters that tokens are of, as UTF-8."""
    for text in texts:
        yield to_utf8(text.lower() if split.lowercase else text, split.name)


def to_utf8(text: str, name: SplitName) -> bytes:
    """Encode a text; lone surrogates are what they stand for: bytes, in fastText's."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        pass
    try:
        errors = "surrogateescape" if name == "fasttext" else "surrogatepass"
        return text.encode(errors=errors)
    except UnicodeEncodeError:  # No byte of a file stands behind it.
        return text.encode(errors="surrogatepass")


def from_utf8(words: bytes, name: SplitName) -> str:
    """Decode what `to_utf8` made."""
    try:
        return words.decode()
    except UnicodeDecodeError:
        errors = "surrogateescape" if name == "fasttext" else "surrogatepass"
        return words.decode(errors=errors)

"""The reference tokenizer, in Python and NumPy."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from jbag.text._tokenizer_options import (
    SPACELESS,
    Plan,
    Split,
    from_utf8,
    marks,
    prepare,
    to_utf8,
)

MISSING = None
_NGRAM_FACTOR = np.uint64(116049371)
_END_OF_TEXT = b"</s>"  # has no subwords in fastText


class Vocabulary:
    """A vocabulary; word i has row i."""

    def __init__(self, words: Sequence[bytes]) -> None:
        # Of equal words, the first has the row.
        self._rows = {word: row for row, word in reversed(list(enumerate(words)))}

    def encode(
        self, texts: Sequence[str], split: Split, plan: Plan
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of texts [N] int32 and their lengths [B] int64."""
        return _rows(list(_tokens(texts, split)), self._rows, plan)


class Corpus:
    """Tokenized texts, and their words in the order of first occurrence."""

    def __init__(self, texts: Sequence[str], split: Split) -> None:
        self._split = split
        self._texts = list(_tokens(texts, split))
        counts = Counter(token for tokens in self._texts for token in tokens)
        self._words = list(counts)
        self.counts = np.fromiter(counts.values(), np.int64, len(counts))

    def words(self, chosen: np.ndarray) -> list[str]:
        """Return the words at these positions."""
        return [from_utf8(self._words[i], self._split.name) for i in chosen]

    def encode(self, rows: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """Encode as `Vocabulary.encode`; a word with a negative row has none."""
        known = zip(self._words, rows.tolist(), strict=True)
        return _rows(self._texts, {w: row for w, row in known if row >= 0}, plan)


def numbers(text: bytes, num: int) -> np.ndarray | None:
    """Parse exactly `num` numbers as float32; return None if the text has others."""
    try:
        found = np.fromstring(text, np.float32, sep=" ")
    except (ValueError, DeprecationWarning):  # the latter if warnings are errors
        return None
    return found if found.size == num else None


@functools.cache
def _word_pattern() -> re.Pattern[str]:
    letters = rf"(?:(?![{SPACELESS}])[\w{marks()}])+"
    return re.compile(rf"[{SPACELESS}]|{letters}|[^\w\s]")


def _tokens(texts: Sequence[str], split: Split) -> Iterator[list[bytes]]:
    """Yield the tokens of each text."""
    for text in prepare(texts, split):
        if split.name == "fasttext":
            tokens = text.replace(b"\0", b" ").split()
        else:
            letters = from_utf8(text, split.name)
            by_words = split.name == "words"
            words = _word_pattern().findall(letters) if by_words else letters.split()
            tokens = [to_utf8(word, split.name) for word in words]
        if split.skip:
            tokens = [token for token in tokens if not token.startswith(split.skip)]
        if split.end:
            tokens = [*tokens, split.end]
            del tokens[tokens.index(split.end) + 1 :]
        yield tokens


def _rows(
    texts: list[list[bytes]], rows: dict[bytes, int], plan: Plan
) -> tuple[np.ndarray, np.ndarray]:
    found = [np.zeros(0, np.int32)]
    for tokens in texts:
        own: list[int] = []
        for token in tokens:
            if token in rows:
                own.append(rows[token])
            if plan.subwords[1]:
                own += _buckets(np.array(_subwords(token, *plan.subwords)), plan)
        grams = _ngrams([_hash(token) for token in tokens], plan.ngrams)
        found.append(np.array([*own, *_buckets(grams, plan)], np.int32))
    return np.concatenate(found), np.array([len(own) for own in found[1:]], np.int64)


def _buckets(hashes: np.ndarray, plan: Plan) -> list[int]:
    """Return the rows of hashes; buckets without a row are dropped."""
    if not hashes.size:
        return []
    buckets = (hashes.astype(np.uint64) % np.uint64(plan.buckets)).astype(np.int64)
    if plan.bucket_rows is not None:
        buckets = plan.bucket_rows[buckets]
        buckets = buckets[buckets >= 0]
    return (plan.first_bucket + buckets).tolist()


def _ngrams(hashes: list[int], longest: int) -> np.ndarray:
    """Return fastText's rolling hashes of n-grams, sorted by first word, then by n."""
    words = np.array(hashes, np.uint32).view(np.int32).astype(np.int64).view(np.uint64)
    grams = np.zeros((len(words), max(0, longest - 1)), np.uint64)
    is_ngram = np.zeros(grams.shape, bool)
    rolling = words
    for n in range(2, min(longest, len(words)) + 1):
        rolling = rolling[:-1] * _NGRAM_FACTOR + words[n - 1 :]  # wraps around
        grams[: len(rolling), n - 2] = rolling
        is_ngram[: len(rolling), n - 2] = True
    return grams[is_ngram]


@functools.lru_cache(1 << 16)
def _subwords(word: bytes, shortest: int, longest: int) -> tuple[int, ...]:
    """Return the hashes of the character n-grams of "<word>"."""
    if word == _END_OF_TEXT:
        return ()
    # A character: a first byte and its continuation bytes.
    letters = re.findall(rb"(?s:.)[\x80-\xbf]*", b"<" + word + b">")
    hashes = []
    for start in range(len(letters)):
        for n in range(max(1, shortest), min(longest, len(letters) - start) + 1):
            if n > 1 or 0 < start < len(letters) - 1:
                hashes.append(_hash(b"".join(letters[start : start + n])))
    return tuple(hashes)


@functools.lru_cache(1 << 16)
def _hash(word: bytes) -> int:
    """Return fastText's hash: FNV-1a with sign-extended bytes."""
    value = 2166136261
    for byte in word:
        value = (value ^ (byte | 0xFFFFFF00 if byte & 0x80 else byte)) * 16777619
        value &= 0xFFFFFFFF
    return value


_FNV_START = np.uint64(0xCBF29CE484222325)
_FNV_PRIME = np.uint64(0x100000001B3)


def hash_bytes(strings: Sequence[bytes]) -> np.ndarray:
    """Return the FNV-1a hashes of strings, [N] uint64."""
    lengths = np.array([len(x) for x in strings], np.int64)
    starts = np.cumsum(lengths) - lengths
    data = np.frombuffer(b"".join(strings), np.uint8).astype(np.uint64)
    hashes = np.full(len(strings), _FNV_START)
    longer = np.arange(len(strings))
    for k in range(int(lengths.max(initial=0))):
        longer = longer[lengths[longer] > k]
        hashes[longer] = (hashes[longer] ^ data[starts[longer] + k]) * _FNV_PRIME
    return hashes


def hash_fixed(strings: np.ndarray) -> np.ndarray:
    """Return the FNV-1a hashes of an array of dtype "U" or "S", [N] uint64."""
    encoded = strings.tolist()
    if strings.dtype.kind == "U":
        encoded = [x.encode("utf-8", "surrogatepass") for x in encoded]
    return hash_bytes(encoded)

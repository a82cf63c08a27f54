"""From texts to bags of rows: words, hashed n-grams of words and of characters.

    encoder, bags = jbag.text.Encoder.fit_encode(texts, ngrams=2, buckets=1 << 21)
    table = jnp.zeros((encoder.num_rows, features))
    pooled = jbag.embedding_bag(table, bags)
    ...
    bags = encoder.encode(other_texts)

Hashes and rows are fastText's (Joulin et al., "Bag of Tricks for Efficient Text
Classification", 2016; Bojanowski et al., "Enriching Word Vectors with Subword
Information", 2017): the words come first, the most frequent one in row 0, and behind
them `buckets` rows that the n-grams share.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from jbag._files import atomic_write, refusing
from jbag._validation import check_flag, check_integer, check_strings
from jbag.interop._numpy_files import Archive
from jbag.ragged._bags import Bags
from jbag.text._tokenizer_options import Plan, Split, SplitName, to_utf8
from jbag.text._tokenizers import reader


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Encoder:
    r"""What turns texts into bags of rows, host arrays.

    Attributes:
      words: word i has row i.
      counts: [W] integers, how often each word occurs in the texts it was fitted to; or
        None.
      ngrams: the longest n-grams of words; 1 for words alone.
      buckets: the rows for n-grams, of words and of characters alike.
      subwords: the shortest and the longest n-grams of characters, "<" and ">" standing
        around a word; (0, 0) for none. A word that isn't in `words` has these alone.
      split: where tokens end. "words" takes runs of letters, digits and marks for
        words, and each other character that isn't a space for a token of its own, as it
        does the characters of scripts that are written without spaces. "spaces" splits
        as `str.split`, "fasttext" at the ASCII spaces and NUL.
      lowercase: whether texts are put into lower case first.
      skip: tokens that begin with it are left out; "" for none. fastText's labels begin
        with "__label__".
      end: a token that follows each text, and ends it where it stands within; "" for
        none. fastText's is "</s>".
      weights: [num_rows] float32, the weight of a slot by its row; or None.
      bucket_rows: [buckets] int32, the row of each bucket behind the words, negative
        where it has none; None for all in order. Pruned models of fastText have them.

    Example:
      >>> texts = ["The cat sat.", "The dog ran!"]
      >>> encoder = jbag.text.Encoder.fit(texts, ngrams=2, buckets=100)
      >>> encoder.words
      ('the', 'cat', 'sat', '.', 'dog', 'ran', '!')
      >>> encoder.num_rows
      107
      >>> encoder.encode(["The dog sat.", "A bird"]).to_lists()
      [[0, 4, 2, 3, 8, 41, 13], [33]]
    """

    words: Sequence[str]
    counts: np.ndarray | None = None
    ngrams: int = 1
    buckets: int = 0
    subwords: tuple[int, int] = (0, 0)
    split: SplitName = "words"
    lowercase: bool = True
    skip: str = ""
    end: str = ""
    weights: np.ndarray | None = None
    bucket_rows: np.ndarray | None = None

    def __post_init__(self) -> None:
        words = check_strings("words", self.words)
        object.__setattr__(self, "words", tuple(words))
        _check_options(self)
        for name, size, kinds in (
            ("counts", len(words), "iu"),
            ("bucket_rows", self.buckets, "iu"),
            ("weights", self.num_rows, "f"),
        ):
            array = getattr(self, name)
            if array is not None and np.shape(array) != (size,):
                raise ValueError(
                    f"`{name}` must have the shape ({size},); got {np.shape(array)}."
                )
            if array is not None and np.asarray(array).dtype.kind not in kinds:
                raise TypeError(
                    f"`{name}` must be numbers of its kind; got "
                    f"{np.asarray(array).dtype}."
                )

    @classmethod
    def fit(cls, texts: Iterable[str], **options: Any) -> Encoder:
        """Make a vocabulary of texts. The options are those of `fit_encode`."""
        return cls.fit_encode(texts, **options)[0]

    @classmethod
    def fit_encode(
        cls,
        texts: Iterable[str],
        *,
        min_count: int = 1,
        max_words: int | None = None,
        tfidf: bool = False,
        implementation: str | None = None,
        **options: Any,
    ) -> tuple[Encoder, Bags]:
        """Make a vocabulary of texts and encode them, reading them once.

        Words come by how often they occur, those that do so equally often as they come
        first.

        Args:
          texts: B strings.
          min_count: how often a word must occur.
          max_words: how many words there may be; None for any number. The most frequent
            ones stay.
          tfidf: whether a slot weighs log((1 + B) / (1 + texts that have its row)) + 1,
            which in sum mode makes term frequency times inverse document frequency.
          implementation: "cpp", "python" or None, the better one that is here.
          **options: the attributes `ngrams`, `buckets`, `subwords`, `split`,
            `lowercase`, `skip` and `end`.

        Raises:
          TypeError, ValueError: an argument isn't what it must be.

        Example:
          >>> texts = ["to be or not to be", "to see or not to see"]
          >>> encoder, bags = jbag.text.Encoder.fit_encode(texts, min_count=3)
          >>> encoder.words
          ('to',)
          >>> bags.to_lists()
          [[0, 0], [0, 0]]
        """
        unknown = sorted(set(options) - _OPTIONS)
        if unknown:
            names = ", ".join(sorted(_OPTIONS))
            raise TypeError(f"`{unknown[0]}` is no option; there are {names}.")
        empty = cls(words=(), **options)
        min_count = check_integer("min_count", min_count, low=1)
        if max_words is not None:
            max_words = check_integer("max_words", max_words, low=0)
        check_flag("tfidf", tfidf)
        corpus = reader(implementation).Corpus(
            check_strings("texts", texts), empty._split
        )
        counts = corpus.counts
        chosen = np.argsort(-counts, kind="stable")[:max_words]
        chosen = chosen[counts[chosen] >= min_count]
        encoder = dataclasses.replace(
            empty, words=corpus.words(chosen), counts=counts[chosen]
        )
        rows = np.full(len(counts), -1, np.int32)
        rows[chosen] = np.arange(len(chosen), dtype=np.int32)
        bags = encoder._bags(*corpus.encode(rows, encoder._plan))
        if tfidf and encoder.num_rows:
            weights = _inverse_document_frequency(bags, encoder.num_rows)
            encoder = dataclasses.replace(encoder, weights=weights)
            bags = dataclasses.replace(bags, weights=weights[bags.indices])
        return encoder, bags

    def encode(
        self, texts: Iterable[str], *, implementation: str | None = None
    ) -> Bags:
        """Return the bags of texts: the rows of the words of each, then of its n-grams.

        A word that isn't in `words` has no row, but n-grams.

        Args:
          texts: B strings.
          implementation: "cpp", "python" or None, the better one that is here.

        Returns:
          B bags of as many slots as there are, host arrays.

        Raises:
          TypeError: `texts` isn't an iterable of strings.
          ValueError: there are 2**31 slots or more.
        """
        texts = check_strings("texts", texts)
        vocabulary = self._vocabularies.get(implementation)
        if vocabulary is None:
            words = [to_utf8(word, self.split) for word in self.words]
            vocabulary = reader(implementation).Vocabulary(words)
            self._vocabularies[implementation] = vocabulary
        return self._bags(*vocabulary.encode(texts, self._split, self._plan))

    @property
    def num_rows(self) -> int:
        """The rows of the table that this encoder is for: V."""
        if self.bucket_rows is None:
            return len(self.words) + self.buckets
        return len(self.words) + int(np.max(self.bucket_rows, initial=-1)) + 1

    def subsample(
        self, bags: Bags, threshold: float, seed: int | Sequence[int]
    ) -> Bags:
        """Leave out slots of frequent words at random, as word2vec does.

        Of a word that is the share f of all, min(1, sqrt(t / f) + t / f) of the slots
        stay, t being the threshold. (Mikolov et al., "Distributed Representations of
        Words and Phrases and their Compositionality", 2013; the formula is fastText's.)

        Args:
          bags: what `encode` returned.
          threshold: t, such as 1e-4.
          seed: what `numpy.random.default_rng` takes; another one for each epoch.

        Raises:
          ValueError: the encoder has no counts, or the threshold isn't above 0.

        Example:
          >>> encoder, bags = jbag.text.Encoder.fit_encode(["so so so so so good"] * 9)
          >>> encoder.subsample(bags, 1e-2, seed=0).capacity < bags.capacity
          True
        """
        if self.counts is None:
            raise ValueError("`counts` are None: there is nothing to subsample by.")
        if not threshold > 0:
            raise ValueError(f"`threshold` must be above 0; got {threshold!r}.")
        share = np.asarray(self.counts) / max(1, np.sum(self.counts))
        kept = np.ones(self.num_rows)
        ratio = threshold / np.maximum(share, np.finfo(float).tiny)
        kept[: len(share)] = np.sqrt(ratio) + ratio
        indices = np.asarray(bags.indices)
        stays = np.random.default_rng(seed).random(indices.size) < kept[indices]
        before = np.concatenate([[0], np.cumsum(stays)])
        return Bags(
            indices[stays],
            before[np.asarray(bags.offsets)].astype(bags.offsets.dtype),
            None if bags.weights is None else np.asarray(bags.weights)[stays],
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return what the encoder consists of, as arrays by name.

        So it can be saved in one file with the tables that belong to it.

        Example:
          >>> encoder = jbag.text.Encoder.fit(["a rose is a rose"])
          >>> sorted(encoder.to_arrays())
          ['counts', 'options', 'words']
          >>> jbag.text.Encoder.from_arrays(encoder.to_arrays()).words
          ('a', 'rose', 'is')
        """
        options = {name: getattr(self, name) for name in sorted(_OPTIONS)}
        letters = "".join(word + "\n" for word in self.words)
        arrays = {
            "options": _to_bytes(json.dumps(options)),
            "words": _to_bytes(letters),
        }
        for name in _ARRAYS:
            if getattr(self, name) is not None:
                arrays[name] = np.asarray(getattr(self, name))
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Encoder:
        """Return the encoder of which `to_arrays` returned these arrays.

        Raises:
          TypeError, ValueError: they aren't an encoder's.
        """
        required, known = {"options", "words"}, {"options", "words", *_ARRAYS}
        if not required <= set(arrays) <= known:
            raise ValueError(
                f"an encoder has {sorted(required)}, and may have {sorted(_ARRAYS)}; "
                f"got {sorted(arrays)[:10]}"
            )
        options = json.loads(_from_bytes(arrays["options"]))
        if not isinstance(options, dict) or set(options) != _OPTIONS:
            raise ValueError(f"an encoder has the options {sorted(_OPTIONS)}")
        if isinstance(options["subwords"], list):  # JSON has no tuples
            options["subwords"] = tuple(options["subwords"])
        *words, rest = _from_bytes(arrays["words"]).split("\n")
        if rest:
            raise ValueError("the last word must end with a line feed")
        own: dict[str, Any] = {name: arrays[name] for name in _ARRAYS if name in arrays}
        return cls(words=words, **options, **own)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the encoder to a file in NumPy's `.npz` format, without pickles.

        The file is written whole or not at all, as `jbag.atomic_write` does.

        Raises:
          OSError: the file can't be written.

        Example:
          >>> encoder = jbag.text.Encoder.fit(["a rose is a rose"])
          >>> encoder.save(directory / "encoder.npz")
          >>> jbag.text.Encoder.load(directory / "encoder.npz").words
          ('a', 'rose', 'is')
        """
        arrays: dict[str, Any] = self.to_arrays()
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Encoder:
        """Read what `save` wrote.

        Raises:
          OSError: the file can't be read.
          ValueError: it isn't an encoder's.
        """
        with refusing(path, "holds no encoder"), Path(path).open("rb") as file:
            archive = Archive(file)
            known = {"options", "words", *_ARRAYS}.intersection(archive.names())
            return cls.from_arrays({name: archive.array(name) for name in known})

    def __getstate__(self) -> dict[str, Any]:
        # Not the vocabularies: copies, and other processes, make their own.
        names = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names}

    @functools.cached_property
    def _vocabularies(self) -> dict[str | None, Any]:
        return {}

    @property
    def _split(self) -> Split:
        skip, end = to_utf8(self.skip, self.split), to_utf8(self.end, self.split)
        return Split(self.split, self.lowercase, skip, end)

    @property
    def _plan(self) -> Plan:
        return Plan(
            self.ngrams,
            self.buckets,
            len(self.words),
            self.subwords,
            self.bucket_rows,
        )

    def _bags(self, indices: np.ndarray, lengths: np.ndarray) -> Bags:
        if indices.size > np.iinfo(np.int32).max:
            raise ValueError(
                f"`texts` must have fewer than 2**31 slots in all; got {indices.size}. "
                "Encode fewer at a time."
            )
        offsets = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        weights = None if self.weights is None else self.weights[indices]
        return Bags(indices, offsets, weights)


_OPTIONS = {"ngrams", "buckets", "subwords", "split", "lowercase", "skip", "end"}
_ARRAYS = ("counts", "weights", "bucket_rows")


def _to_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(errors="surrogatepass"), np.uint8)


def _from_bytes(array: np.ndarray) -> str:
    if array.dtype.kind == "U":  # as NumPy saves a string
        return str(array)
    if array.dtype != np.uint8:
        raise TypeError(f"texts must be bytes; got {array.dtype}")
    return array.tobytes().decode(errors="surrogatepass")


def _check_options(encoder: Encoder) -> None:
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
            "`subwords` must be the shortest and the longest n-grams of characters, or "
            f"(0, 0); got {pair!r}."
        )
    if (encoder.ngrams > 1 or longest) and not encoder.buckets:
        raise ValueError("`buckets` must be at least 1 where there are n-grams; got 0.")
    if encoder.num_rows > np.iinfo(np.int32).max:
        raise ValueError(
            "`words` and `buckets` must make fewer than 2**31 rows; got "
            f"{encoder.num_rows}."
        )
    if any("\n" in word for word in encoder.words):
        raise ValueError("`words` must not hold line feeds.")


def _inverse_document_frequency(bags: Bags, num_rows: int) -> np.ndarray:
    """Return log((1 + B) / (1 + bags that hold the row)) + 1 for each row."""
    bag_ids = np.repeat(np.arange(bags.num_bags), bags.lengths)
    pairs = np.unique(bag_ids * num_rows + np.asarray(bags.indices))
    holders = np.bincount(pairs % num_rows, minlength=num_rows)
    return (np.log((1 + bags.num_bags) / (1 + holders)) + 1).astype(np.float32)

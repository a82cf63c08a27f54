"""`Encoder`: the vocabulary, the encoding of texts as bags, and its files."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jbag._files import atomic_write, refusing
from jbag._validation import check_flag, check_integer, check_strings
from jbag.interop._numpy_files import Archive
from jbag.ragged._bags import Bags
from jbag.text._encoder_arrays import from_arrays, to_arrays
from jbag.text._encoder_checks import ARRAYS, OPTIONS, check_arrays, check_options
from jbag.text._tokenizer_choice import tokenizer
from jbag.text._tokenizer_options import Plan, Split, SplitName, to_utf8


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Encoder:
    r"""Encode texts as `Bags` of table rows, in host arrays.

    Attributes:
      words: the vocabulary; word i has row i.
      counts: [W] integers, the number of occurrences of each word in the fitted texts;
        or None.
      ngrams: the maximum length of word n-grams; 1 for words only.
      buckets: the number of rows for n-grams of words and characters.
      subwords: the minimum and maximum length of character n-grams of "<word>"; (0, 0)
        for none. A word outside the vocabulary has only these.
      split: the tokenization. "words" takes runs of letters, digits and marks as words;
        every other character except spaces is a token, and so is each character of a
        script without spaces. "spaces" is `str.split`. "fasttext" splits at ASCII
        spaces and NUL.
      lowercase: whether to convert texts to lower case.
      skip: a prefix of tokens to drop; "" for none. fastText's labels have the prefix
        "__label__".
      end: a token to append to each text; a text ends at its first occurrence. "" for
        none. fastText uses "</s>".
      weights: [num_rows] float32, the weight of each slot by its row; or None.
      bucket_rows: [buckets] int32, the row of each bucket, counted after the words;
        negative for a bucket without a row. None is the identity. Pruned fastText
        models have it.

    Raises:
      TypeError: an attribute has a wrong type.
      ValueError: an attribute is out of range or has a wrong shape.

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
        check_options(self)
        check_arrays(self)

    @classmethod
    def fit(cls, texts: Iterable[str], **options: Any) -> Encoder:
        """Build an encoder from texts.

        Args:
          texts: B strings.
          **options: the options of `fit_encode`.

        Returns:
          The `Encoder`.

        Raises:
          TypeError: an argument has a wrong type, or an option is unknown.
          ValueError: an argument is out of range.

        Example:
          >>> jbag.text.Encoder.fit(["a rose is a rose"], min_count=2).words
          ('a', 'rose')
        """
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
        r"""Build an encoder from texts and encode them, in one pass.

        Words are sorted by descending frequency; ties keep the order of the texts. With
        `tfidf`, a slot of row r has the weight

        .. math:: \log \frac{1 + B}{1 + \mathrm{df}_r} + 1

        where df is the number of texts with the row. Mode "sum" then computes term
        frequency times inverse document frequency.

        Args:
          texts: B strings.
          min_count: the minimum number of occurrences of a word.
          max_words: the maximum number of words; None for no limit.
          tfidf: whether to compute weights.
          implementation: "cpp" or "python"; None uses "cpp" if it is available.
          **options: the attributes `ngrams`, `buckets`, `subwords`, `split`,
            `lowercase`, `skip` and `end`.

        Returns:
          (encoder, bags): the `Encoder` and B bags.

        Raises:
          TypeError: an argument has a wrong type, or an option is unknown.
          ValueError: an argument is out of range.

        Example:
          >>> texts = ["to be or not to be", "to see or not to see"]
          >>> encoder, bags = jbag.text.Encoder.fit_encode(texts, min_count=3)
          >>> encoder.words
          ('to',)
          >>> bags.to_lists()
          [[0, 0], [0, 0]]
        """
        unknown = sorted(set(options) - OPTIONS)
        if unknown:
            names = ", ".join(sorted(OPTIONS))
            raise TypeError(
                f"`{unknown[0]}` is not an option; the options are {names}."
            )
        empty = cls(words=(), **options)
        min_count = check_integer("min_count", min_count, low=1)
        if max_words is not None:
            max_words = check_integer("max_words", max_words, low=0)
        check_flag("tfidf", tfidf)
        corpus = tokenizer(implementation).Corpus(
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
        """Encode texts as bags: the rows of the words, then the rows of the n-grams.

        A word outside the vocabulary has no row; its n-grams have rows.

        Args:
          texts: B strings.
          implementation: "cpp" or "python"; None uses "cpp" if it is available.

        Returns:
          B bags in host arrays, without empty slots.

        Raises:
          TypeError: `texts` is not an iterable of strings.
          ValueError: there are 2**31 slots or more.

        Example:
          >>> encoder = jbag.text.Encoder(words=["to", "be"])
          >>> encoder.encode(["To be!", "not"]).to_lists()
          [[0, 1], []]
        """
        texts = check_strings("texts", texts)
        vocabulary = self._vocabularies.get(implementation)
        if vocabulary is None:
            words = [to_utf8(word, self.split) for word in self.words]
            vocabulary = tokenizer(implementation).Vocabulary(words)
            self._vocabularies[implementation] = vocabulary
        return self._bags(*vocabulary.encode(texts, self._split, self._plan))

    @property
    def num_rows(self) -> int:
        """V, the number of rows of the table."""
        if self.bucket_rows is None:
            return len(self.words) + self.buckets
        return len(self.words) + int(np.max(self.bucket_rows, initial=-1)) + 1

    def subsample(
        self, bags: Bags, threshold: float, seed: int | Sequence[int]
    ) -> Bags:
        r"""Drop slots of frequent words at random, as word2vec does.

        A slot of a word with relative frequency f stays with the probability

        .. math:: \min(1, \sqrt{t / f} + t / f)

        (Mikolov et al., "Distributed Representations of Words and Phrases and their
        Compositionality", 2013; the formula is fastText's).

        Args:
          bags: B bags of `encode`.
          threshold: t, such as 1e-4.
          seed: a seed of `numpy.random.default_rng`; pass a different one per epoch.

        Returns:
          B bags with fewer slots.

        Raises:
          ValueError: the encoder has no counts, or the threshold is not above 0.

        Example:
          >>> encoder, bags = jbag.text.Encoder.fit_encode(["so so so so so good"] * 9)
          >>> encoder.subsample(bags, 1e-2, seed=0).capacity < bags.capacity
          True
        """
        if self.counts is None:
            raise ValueError("`counts` must be given to subsample; got None.")
        if not threshold > 0:
            raise ValueError(f"`threshold` must be above 0; got {threshold!r}.")
        share = np.asarray(self.counts) / max(1, np.sum(self.counts))
        kept = np.ones(self.num_rows)
        ratio = threshold / np.maximum(share, np.finfo(float).tiny)
        kept[: len(share)] = np.sqrt(ratio) + ratio
        indices = np.asarray(bags.indices)
        is_kept = np.random.default_rng(seed).random(indices.size) < kept[indices]
        before = np.concatenate([[0], np.cumsum(is_kept)])
        return Bags(
            indices[is_kept],
            before[np.asarray(bags.offsets)].astype(bags.offsets.dtype),
            None if bags.weights is None else np.asarray(bags.weights)[is_kept],
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the encoder as arrays by name, to save it with its tables.

        Returns:
          A dict of "words" and "options" in uint8, and of the arrays that are not None.

        Example:
          >>> encoder = jbag.text.Encoder.fit(["a rose is a rose"])
          >>> sorted(encoder.to_arrays())
          ['counts', 'options', 'words']
          >>> jbag.text.Encoder.from_arrays(encoder.to_arrays()).words
          ('a', 'rose', 'is')
        """
        return to_arrays(self)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Encoder:
        """Return the encoder of the arrays of `to_arrays`.

        Raises:
          TypeError: an array has a wrong dtype.
          ValueError: an array is missing, unknown or malformed.

        Example:
          >>> arrays = jbag.text.Encoder(words=["to", "be"]).to_arrays()
          >>> jbag.text.Encoder.from_arrays(arrays).words
          ('to', 'be')
        """
        return cls(**from_arrays(arrays))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the encoder to a `.npz` file of NumPy, atomically and without pickles.

        Args:
          path: the path of the file.

        Raises:
          OSError: the file cannot be written.

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
        """Read an encoder from a file of `save`.

        Args:
          path: the path of the file.

        Raises:
          OSError: the file cannot be read.
          ValueError: the file holds no encoder.

        Example:
          >>> jbag.text.Encoder(words=["to", "be"]).save(directory / "words.npz")
          >>> jbag.text.Encoder.load(directory / "words.npz").words
          ('to', 'be')
        """
        with refusing(path, "holds no encoder"), Path(path).open("rb") as file:
            archive = Archive(file)
            known = {"options", "words", *ARRAYS}.intersection(archive.names())
            return cls.from_arrays({name: archive.array(name) for name in known})

    def __getstate__(self) -> dict[str, Any]:
        # Vocabularies hold C++ pointers; copies build their own.
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
                "Encode fewer texts per call."
            )
        offsets = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        weights = None if self.weights is None else self.weights[indices]
        return Bags(indices, offsets, weights)


def _inverse_document_frequency(bags: Bags, num_rows: int) -> np.ndarray:
    """Return log((1 + B) / (1 + df)) + 1 for each row in df bags."""
    bag_ids = np.repeat(np.arange(bags.num_bags), bags.lengths)
    pairs = np.unique(bag_ids * num_rows + np.asarray(bags.indices))
    df = np.bincount(pairs % num_rows, minlength=num_rows)
    return (np.log((1 + bags.num_bags) / (1 + df)) + 1).astype(np.float32)

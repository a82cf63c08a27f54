"""`FastText`: a model, its predictions and its reader."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jbag._validation import check_integer, check_strings
from jbag.fasttext import _model_reader
from jbag.fasttext._prediction import Tree, best_labels, huffman, largest, values
from jbag.ops._embedding_bag import embedding_bag
from jbag.ragged._bags import Bags
from jbag.ragged._bucket_capacity import bucket
from jbag.text._encoder import Encoder

_T = TypeVar("_T")
_TOKEN = re.compile("[^ \n\r\t\v\f\0]+")
_TEXTS = 4096  # per batch, to amortize the overhead of a call
_NUMBERS = 1 << 24  # probabilities per batch, to bound the memory


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FastText:
    """Hold a fastText model; `jbag.fasttext.load` reads it.

    Here L is the number of labels.

    Attributes:
      kind: "supervised", "cbow" or "skipgram".
      loss: "softmax", "ova" (one against all), "ns" (negative sampling) or "hs"
        (hierarchical softmax).
      encoder: the `jbag.text.Encoder` of texts as bags of table rows.
      labels: the L labels with their prefix, by descending frequency.
      label_counts: [L], the number of occurrences of each label in training.
      label_prefix: the prefix of labels; tokens outside the vocabulary with this prefix
        are dropped.
      table: [V, D] float32; quantised models are dequantised.
      output: [L, D] float32; [words, D] for unsupervised models.

    Example:
      >>> model = jbag.fasttext.load(directory / "model.bin")
      >>> model.labels
      ('__label__good', '__label__bad')
      >>> model.table.shape, model.output.shape
      ((5, 2), (2, 2))
    """

    kind: str
    loss: str
    encoder: Encoder
    labels: tuple[str, ...]
    label_counts: np.ndarray
    label_prefix: str
    table: Float[Array, "V D"]
    output: Float[Array, "L D"]

    def encode(self, texts: Iterable[str]) -> Bags:
        """Encode texts as bags without labels, as `encoder.encode`.

        Args:
          texts: B strings.

        Returns:
          B bags in host arrays.

        Raises:
          TypeError: `texts` is not an iterable of strings.

        Example:
          >>> model = jbag.fasttext.load(directory / "model.bin")
          >>> model.encode(["so fine", "__label__bad poor"]).to_lists()
          [[2, 1, 0], [3, 0]]
        """
        if self.encoder.skip:
            return self.encoder.encode(texts)
        texts = check_strings("texts", texts)
        tokens = (filter(self._is_word, _TOKEN.findall(text)) for text in texts)
        return self.encoder.encode(list(map(" ".join, tokens)))

    def predict(
        self, texts: Iterable[str], k: int = 1, threshold: float = 0.0
    ) -> tuple[list[list[str]], list[np.ndarray]]:
        """Return the k most probable labels of each text, sorted by probability.

        Labels and order equal those of fastText's `predict`; probabilities agree to
        1e-6. fastText adds 1e-5 to each probability. For "ova" and "ns" it rounds the
        sigmoid to a table in steps of 1 / 32, where a rounding error may reach the next
        entry. For "hs", fastText's search may miss the better of two labels within
        1e-5; this method does not. A text without rows has no labels. A line feed,
        which fastText rejects, counts as a space.

        Args:
          texts: B strings.
          k: the maximum number of labels per text; -1 for all.
          threshold: the minimum probability.

        Returns:
          (labels, probabilities): per text, a list of at most k labels and a float32
          array of their probabilities.

        Raises:
          TypeError: `texts` is not an iterable of strings.
          ValueError: the model is not supervised, `k` is below 1 and not -1, or the
            table or the output holds NaN.

        Example:
          >>> model = jbag.fasttext.load(directory / "model.bin")
          >>> labels, probabilities = model.predict(["fine", "so poor"])
          >>> labels
          [['__label__good'], ['__label__bad']]
          >>> probabilities[0].round(2)
          array([0.88], dtype=float32)
        """
        if self.kind != "supervised":
            raise ValueError(
                "`predict` takes a supervised model; this one is of kind "
                f"{self.kind!r}."
            )
        num = len(self.labels)
        k = num if k == -1 else min(check_integer("k", k, low=1), num)
        least = np.float32(threshold)
        texts = check_strings("texts", texts)
        size = max(1, min(_TEXTS, _NUMBERS // num))
        batches = (texts[at : at + size] for at in range(0, len(texts), size))
        names = np.array(self.labels, object)
        labels: list[list[str]] = []
        probabilities: list[np.ndarray] = []
        # The host encodes a batch while the device runs the previous one.
        for finish in _one_ahead(self._dispatch(batch, k, least) for batch in batches):
            places, scores = finish()
            found = places >= 0
            if found.all():
                labels += names[places].tolist()
                probabilities += list(np.exp(scores))
                continue
            for own, score, is_found in zip(places, scores, found, strict=True):
                labels.append(names[own[is_found]].tolist())
                probabilities.append(np.exp(score[is_found]))
        return labels, probabilities

    def probabilities(self, bags: Bags) -> Float[Array, "B L"]:
        """Return the probability of every label; this method works under `jax.jit`.

        It does not add 1e-5 as `predict` does. The row of an empty bag is meaningless.

        Args:
          bags: B bags of `encode`.

        Returns:
          [B, L].

        Raises:
          ValueError: the model is not supervised.

        Example:
          >>> model = jbag.fasttext.load(directory / "model.bin")
          >>> model.probabilities(model.encode(["fine", "so poor"])).round(2)
          Array([[0.88, 0.12],
                 [0.12, 0.88]], dtype=float32)
        """
        if self.kind != "supervised":
            raise ValueError(
                f"`probabilities` takes a supervised model; this one is of kind "
                f"{self.kind!r}."
            )
        p = values(self.table, self.output, bags, self._tree, loss=self.loss)
        return jnp.exp(p) if self.loss == "hs" else p

    def word_vectors(self, words: Iterable[str]) -> Float[np.ndarray, "B D"]:
        """Return fastText's word vectors: the mean over a word's row and its subwords.

        Args:
          words: B words. A word outside the vocabulary has only subwords; without
            subwords its vector is zero.

        Returns:
          [B, D].

        Raises:
          TypeError: `words` is not an iterable of strings.
          ValueError: a word is empty or has spaces.

        Example:
          >>> model = jbag.fasttext.load(directory / "model.bin")
          >>> model.word_vectors(["fine", "strange"])
          array([[2., 0.],
                 [0., 0.]], dtype=float32)
        """
        words = check_strings("words", words)
        for at, word in enumerate(words):
            if not _TOKEN.fullmatch(word):
                raise ValueError(
                    f"`words` must be words without spaces; got {word!r} at {at}."
                )
        return self._pool(self.table, self._word_encoder.encode(words))

    def sentence_vectors(self, texts: Iterable[str]) -> Float[np.ndarray, "B D"]:
        """Return fastText's sentence vectors.

        For a supervised model, the vector of a text is the mean of its rows. For an
        unsupervised model, it is the mean of its word vectors v / ||v||, without zero
        vectors.

        Args:
          texts: B strings.

        Returns:
          [B, D].

        Raises:
          TypeError: `texts` is not an iterable of strings.

        Example:
          >>> model = jbag.fasttext.load(directory / "model.bin")
          >>> model.sentence_vectors(["fine", "so poor"])
          array([[ 1.,  0.],
                 [-1.,  1.]], dtype=float32)
        """
        if self.kind == "supervised":
            return self._pool(self.table, self.encode(texts))
        tokens = list(map(_TOKEN.findall, check_strings("texts", texts)))
        vectors = self.word_vectors(word for words in tokens for word in words)
        norms = np.linalg.norm(vectors, axis=1)
        bags = Bags.from_lengths(
            np.arange(len(norms)),
            np.array([len(words) for words in tokens], int),
            (norms > 0).astype(np.float32),
        )
        norms[norms == 0] = 1
        more = bucket(len(norms)) - len(norms)  # one of few shapes, as in `_padded`
        units = np.pad(vectors / norms[:, None], ((0, more), (0, 0)))
        return self._pool(jnp.asarray(units), bags)

    def _dispatch(
        self, texts: list[str], k: int, least: np.float32
    ) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
        bags = self.encode(texts)
        args = (self.table, self.output, _padded(bags), self._tree)
        p = values(*args, loss=self.loss)
        best = largest(p, min(k + 1, len(self.labels)))
        has_rows = np.asarray(bags.lengths) > 0
        return functools.partial(
            best_labels, p, best, has_rows, k=k, least=least, tree=self._tree
        )

    def _pool(self, table: Array, bags: Bags) -> np.ndarray:
        return np.asarray(_pool(table, _padded(bags)))[: len(bags)]

    @functools.cached_property
    def _tree(self) -> Tree | None:
        if self.loss != "hs":
            return None
        return huffman(self.label_counts.tolist())

    @functools.cached_property
    def _word_encoder(self) -> Encoder:
        return dataclasses.replace(self.encoder, ngrams=1, skip="", end="")

    @functools.cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.encoder.words)

    @functools.cached_property
    def _known_labels(self) -> frozenset[str]:
        return frozenset(self.labels)

    def _is_word(self, token: str) -> bool:
        if token in self._known:
            return True
        return not (token.startswith(self.label_prefix) or token in self._known_labels)


def load(path: str | os.PathLike[str], *, label_prefix: str = "__label__") -> FastText:
    """Read a fastText model: `.bin`, or quantised `.ftz`.

    Args:
      path: the path of the file.
      label_prefix: the prefix of labels, which the file does not store; fastText uses
        "__label__" for every model that it loads. Tokens with this prefix, and the
        labels of the model, are dropped from texts.

    Returns:
      A `FastText`.

    Raises:
      OSError: the file cannot be read.
      TypeError: `label_prefix` is not a string.
      ValueError: the file is not a fastText model, the file is broken, or
        `label_prefix` is empty.

    Example:
      >>> model = jbag.fasttext.load(directory / "model.bin")
      >>> model.kind, model.loss, model.encoder.words
      ('supervised', 'softmax', ('</s>', 'fine', 'so', 'poor', 'dull'))
    """
    if not isinstance(label_prefix, str):
        raise TypeError(f"`label_prefix` must be a string; got {label_prefix!r}.")
    if not label_prefix:
        raise ValueError("`label_prefix` must not be empty; got ''.")
    file = _model_reader.read(path)
    has_prefix = all(
        label.startswith(label_prefix) for label in file.labels
    ) and not any(word.startswith(label_prefix) for word in file.words)
    encoder = Encoder(
        words=file.words,
        counts=file.counts,
        ngrams=file.ngrams,
        buckets=file.buckets,
        subwords=file.subwords,
        split="fasttext",
        lowercase=False,
        skip=label_prefix if has_prefix else "",
        end="</s>",
        bucket_rows=file.bucket_rows,
    )
    return FastText(
        kind=file.kind,
        loss=file.loss,
        encoder=encoder,
        labels=tuple(file.labels),
        label_counts=file.label_counts,
        label_prefix=label_prefix,
        table=jax.device_put(file.table),
        output=jax.device_put(file.output),
    )


@jax.jit
def _pool(table: Float[Array, "V D"], bags: Bags) -> Float[Array, "B D"]:
    return embedding_bag(table, bags, mode="mean")


def _padded(bags: Bags) -> Bags:
    """Pad to one of few shapes, to limit the number of compilations."""
    return bags.pad_to(bucket(bags.capacity), num_bags=bucket(len(bags)))


def _one_ahead(items: Iterable[_T]) -> Iterator[_T]:
    """Yield each item after computing the next one."""
    before: list[_T] = []
    for item in items:
        yield from before
        before = [item]
    yield from before

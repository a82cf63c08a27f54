"""fastText's own files: models that predict what they do there, and word vectors.

    model = jbag.fasttext.load("model.bin")
    labels, probabilities = model.predict(["a text", "another one"], k=2)
    words, table = jbag.fasttext.load_vectors("vectors.vec")

What a model is made of is jbag's: `model.encoder` makes bags of texts, `model.table` is
pooled over them in mode "mean", and `model.output` is the dense layer behind it.
"""

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
from jbag.fasttext import _model_file
from jbag.fasttext._prediction import Tree, best_labels, huffman, largest, values
from jbag.fasttext._vectors import load_vectors as load_vectors
from jbag.ops._embedding_bag import embedding_bag
from jbag.ragged._bags import Bags
from jbag.ragged._bucket import bucket
from jbag.text import Encoder

_T = TypeVar("_T")
_TOKEN = re.compile("[^ \n\r\t\v\f\0]+")
_TEXTS = 4096  # at once: enough to share the costs of a call
_NUMBERS = 1 << 24  # of labels' probabilities at once


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FastText:
    """A model of fastText's, as `load` reads it.

    Attributes:
      kind: "supervised", "cbow" or "skipgram".
      loss: "softmax", "ova" (one against all), "ns" (negative sampling) or "hs"
        (hierarchical softmax).
      encoder: from texts to bags of rows of the table.
      labels: L labels, prefix and all, the most frequent one first.
      label_counts: [L], how often each occurred in training.
      label_prefix: what a token that isn't in the model begins with if it is a label,
        to be left out.
      table: [V, D] float32. Quantised models are expanded.
      output: [L, D] float32, of unsupervised models [words, D].

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
        """Return the bags of texts, labels in them left out: host arrays.

        This is `encoder.encode`, but for models whose labels have another prefix.

        Raises:
          TypeError: `texts` isn't an iterable of strings.
        """
        if self.encoder.skip:
            return self.encoder.encode(texts)
        texts = check_strings("texts", texts)
        tokens = (filter(self._is_word, _TOKEN.findall(text)) for text in texts)
        return self.encoder.encode(list(map(" ".join, tokens)))

    def predict(
        self, texts: Iterable[str], k: int = 1, threshold: float = 0.0
    ) -> tuple[list[list[str]], list[np.ndarray]]:
        """Return the most probable labels of texts, the best ones first.

        They are those that fastText's `predict` gives for a list, in its order. So are
        the probabilities, to some 1e-6: fastText adds 1e-5 to each, and reads the
        sigmoid of "ova" and "ns" from a table in steps of 1 / 32, where a rounding may
        reach the next step. Of labels of "hs" that are equal to 1e-5, fastText's search
        may pass the better one by; it comes first here. A text without rows has no
        labels. A line feed, which fastText refuses, is a space.

        Args:
          texts: B strings.
          k: how many labels, at most; -1 for all.
          threshold: the least probability.

        Returns:
          (labels, probabilities): for each text a list of labels and a [k] float32.

        Raises:
          TypeError: `texts` isn't an iterable of strings.
          ValueError: the model isn't supervised, or `k` isn't a number of labels, or
            there is NaN in the table or the output.

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
                f"A supervised model predicts labels; this one is of kind {self.kind!r}"
                ", and has word vectors alone."
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
        # While the device is at a batch, the host makes the bags of the next one.
        for wait in _one_ahead(self._dispatch(batch, k, least) for batch in batches):
            places, scores = wait()
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
        """Return the probability of every label, for use under `jax.jit`.

        Nothing is added to them, as `predict` does. That of an empty bag means nothing.

        Args:
          bags: B bags, as `encode` returns.

        Raises:
          ValueError: the model isn't supervised.

        Example:
          >>> model = jbag.fasttext.load(directory / "model.bin")
          >>> model.probabilities(model.encode(["fine", "so poor"])).round(2)
          Array([[0.88, 0.12],
                 [0.12, 0.88]], dtype=float32)
        """
        if self.kind != "supervised":
            raise ValueError(
                f"A supervised model has labels; this one is of kind {self.kind!r}."
            )
        p = values(self.table, self.output, bags, self._tree, loss=self.loss)
        return jnp.exp(p) if self.loss == "hs" else p

    def word_vectors(self, words: Iterable[str]) -> Float[np.ndarray, "B D"]:
        """Return fastText's word vectors: the means of a word's row and its subwords'.

        Args:
          words: B words. One that the model doesn't know has its subwords' rows alone,
            and the vector zero without any.

        Raises:
          TypeError: `words` isn't an iterable of strings.
          ValueError: a word is empty or holds spaces.

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

        Those of a supervised model are what its labels are predicted from, the mean of
        a text's rows. Those of an unsupervised one are the means of the word vectors
        that aren't zero, each at length 1.

        Args:
          texts: B strings.

        Raises:
          TypeError: `texts` isn't an iterable of strings.

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
        more = bucket(len(norms)) - len(norms)  # as in `_padded`
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
    """Read a model that fastText saved: `.bin`, or quantised `.ftz`.

    Args:
      path: of the file.
      label_prefix: what marks a label, of which a model's file says nothing: fastText
        takes "__label__" for whatever it loads. Tokens that begin with it are left out
        of texts, and so are the model's own labels.

    Raises:
      OSError: the file can't be read.
      TypeError: `label_prefix` isn't a string.
      ValueError: the file isn't a model's, or broken, or `label_prefix` is empty.

    Example:
      >>> model = jbag.fasttext.load(directory / "model.bin")
      >>> model.kind, model.loss, model.encoder.words
      ('supervised', 'softmax', ('</s>', 'fine', 'so', 'poor', 'dull'))
    """
    if not isinstance(label_prefix, str):
        raise TypeError(f"`label_prefix` must be a string; got {label_prefix!r}.")
    if not label_prefix:
        raise ValueError("`label_prefix` must not be empty; got ''.")
    file = _model_file.read(path)
    usual = all(label.startswith(label_prefix) for label in file.labels) and not any(
        word.startswith(label_prefix) for word in file.words
    )
    encoder = Encoder(
        words=file.words,
        counts=file.counts,
        ngrams=file.ngrams,
        buckets=file.buckets,
        subwords=file.subwords,
        split="fasttext",
        lowercase=False,
        skip=label_prefix if usual else "",
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
    """Pad to one of few shapes, each of which is compiled once."""
    return bags.pad_to(bucket(bags.capacity), num_bags=bucket(len(bags)))


def _one_ahead(items: Iterable[_T]) -> Iterator[_T]:
    """Yield items, each once the next one is made."""
    before: list[_T] = []
    for item in items:
        yield from before
        before = [item]
    yield from before

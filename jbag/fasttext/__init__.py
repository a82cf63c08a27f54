"""Models and word vectors in fastText's file formats.

    model = jbag.fasttext.load("model.bin")
    labels, probabilities = model.predict(["a text", "another one"], k=2)
    words, table = jbag.fasttext.load_vectors("vectors.vec")

`model.encoder` encodes texts as bags, `jbag.embedding_bag` pools `model.table` in mode
"mean", and `model.output` is the dense layer on the pooled rows.
"""

from jbag.fasttext._model import FastText, load
from jbag.fasttext._vector_reader import load_vectors

__all__ = [
    "FastText",
    "load",
    "load_vectors",
]

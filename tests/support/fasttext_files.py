"""A writer of fastText's model files, after the format alone."""

import struct
from typing import NamedTuple

import numpy as np

LOSSES = {"hs": 1, "ns": 2, "softmax": 3, "ova": 4}
KINDS = {"cbow": 1, "skipgram": 2, "supervised": 3}


class Quantised(NamedTuple):
    """A matrix by product quantisation."""

    codes: np.ndarray  # [rows, parts]
    centroids: list  # of each part, [256, width]
    norms: tuple | None = None  # codes [rows] and values [256]


def model(
    *,
    words,  # pairs of word and count
    labels,
    table,
    output,
    loss="softmax",
    kind="supervised",
    ngrams=1,
    buckets=0,
    subwords=(0, 0),
    pruned=None,
    version=12,
    magic=793712314,
):
    """Return the bytes of a model file."""
    entries = [*words, *labels]
    parts = [
        struct.pack("<ii", magic, version),
        struct.pack("<7i", matrix_shape(table)[1], 5, 5, 1, 5, ngrams, LOSSES[loss]),
        struct.pack("<5id", KINDS[kind], buckets, *subwords, 100, 1e-4),
        struct.pack("<iii", len(entries), len(words), len(labels)),
        struct.pack("<qq", 1000, -1 if pruned is None else len(pruned)),
    ]
    for at, (word, count) in enumerate(entries):
        parts += [word.encode(errors="surrogateescape"), b"\0"]
        parts += [struct.pack("<qb", count, at >= len(words))]
    parts += [struct.pack("<ii", *pair) for pair in pruned or ()]
    parts += [matrix(table), matrix(output)]
    return b"".join(parts)


def matrix_shape(x):
    if isinstance(x, Quantised):
        return len(x.codes), sum(own.shape[1] for own in x.centroids)
    return x.shape


def matrix(x):
    rows, columns = matrix_shape(x)
    if not isinstance(x, Quantised):
        return struct.pack("<?qq", False, rows, columns) + x.astype("<f4").tobytes()
    head = struct.pack("<??qqi", True, x.norms is not None, rows, columns, x.codes.size)
    parts = [head, x.codes.astype(np.uint8).tobytes(), quantiser(x.centroids)]
    if x.norms is not None:
        codes, values = x.norms
        parts += [codes.astype(np.uint8).tobytes(), quantiser([values[:, None]])]
    return b"".join(parts)


def quantiser(centroids):
    widths = [own.shape[1] for own in centroids]
    numbers = np.concatenate([own.ravel() for own in centroids]).astype("<f4")
    head = struct.pack("<4i", sum(widths), len(widths), widths[0], widths[-1])
    return head + numbers.tobytes()


WORDS = [("</s>", 9), ("fine", 5), ("so", 4), ("poor", 3), ("dull", 2)]
LABELS = [("__label__good", 5), ("__label__bad", 4)]
TABLE = np.array([[0, 0], [2, 0], [0, 3], [-3, 0], [-1, 0]], np.float32)
OUTPUT = np.array([[1, 0], [-1, 0]], np.float32)
EXAMPLE = {"words": WORDS, "labels": LABELS, "table": TABLE, "output": OUTPUT}

"""A data set of 23 examples, and what its batches hold."""

import itertools

import jax
import numpy as np

from jbag import Bags


def make_lists(size, mean_length, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.geometric(1 / (mean_length + 1), size) - 1
    lists = [rng.integers(0, 1000, length).tolist() for length in lengths]
    weights = [np.round(rng.random(len(row)), 3).tolist() for row in lists]
    return lists, weights


LISTS, WEIGHTS = make_lists(23, 4)
LABELS = np.arange(23) * 10
BAGS = Bags.from_lists(LISTS, WEIGHTS)


def flat(batch):
    """Return (ids, weights, label, position) of each example in a batch."""
    offsets = batch.bags.offsets.tolist()
    rows = []
    for b, (start, end) in enumerate(itertools.pairwise(offsets)):
        if batch.mask[b]:
            rows.append(
                (
                    batch.bags.indices[start:end].tolist(),
                    batch.bags.weights[start:end].tolist(),
                    int(batch.arrays[b]),
                    int(batch.positions[b]),
                )
            )
    return rows


def expected(position, lists=LISTS, weights=WEIGHTS, labels=LABELS):
    rounded = np.asarray(weights[position], np.float32).tolist()
    return lists[position], rounded, int(labels[position]), position


def same(actual, other):
    assert jax.tree.structure(actual) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, actual, other)


def shapes(tree):
    return jax.tree.leaves(jax.tree.map(lambda x: f"{x.dtype}{x.shape}", tree))


RECTANGLE = np.arange(23 * 3, dtype=np.int32).reshape(23, 3) % 50

"""A source of examples, and the collation of some to a batch."""

import pickle

import numpy as np
import pytest
from data_cases import BAGS, LABELS, LISTS, RECTANGLE, expected, same

from jbag import Bags
from jbag.data import Batch, Collate, Example, Source, batches


def test_a_source_gives_each_example():
    source = Source(BAGS, {"y": LABELS})
    assert len(source) == 23
    for at, example in enumerate(source):
        ids, weights, label, _ = expected(at)
        assert example.ids.tolist() == ids
        assert example.weights.tolist() == weights
        assert (example.arrays["y"], example.position) == (label, at)
    same(source[-1], source[22])
    assert np.shares_memory(source[0].ids, BAGS.indices)
    same(list(pickle.loads(pickle.dumps(source))), list(source))
    assert Source(Bags.from_lists(LISTS))[0][1:] == (None, None, 0)
    assert repr(source) == "jbag.data.Source(23 examples)"
    with pytest.raises(IndexError):
        source[23]
    with pytest.raises(TypeError, match="`position` must be an integer"):
        source[1:2]


def test_collating_a_source_gives_what_batches_gives():
    tree = {"a": BAGS, "b": (Bags.from_lists(LISTS[::-1]),), "c": RECTANGLE}
    arrays = (LABELS, {"x": np.ones((23, 2), np.float16)})
    source, collate = (
        Source(tree, arrays),
        Collate(5, capacity={"a": 60, "b": (70,), "c": 15}),
    )
    collate = pickle.loads(pickle.dumps(collate))
    stream = batches(tree, arrays, batch_size=5, capacity=collate.capacity)
    for at, batch in enumerate(stream):
        chosen = range(at * 5, min(at * 5 + 5, 23))
        same(collate([source[i] for i in chosen]), batch)


def test_collating_takes_ids_alone_and_tuples():
    lists = [[1, 2], [], [3]]
    bags = Bags.from_lists(lists, capacity=64, num_bags=4)
    mask = np.array([True, True, True, False])
    same(Collate(4)(lists), Batch(bags, None, mask))
    same(
        Collate(4)([np.array(row, np.int32) for row in lists]), Batch(bags, None, mask)
    )
    labels = np.array([5, 6, 7, 0], np.int32)
    pairs = list(zip(lists, [5, 6, 7], strict=True))
    same(Collate(4)(pairs), Batch(bags, labels, mask))
    weighted = [(row, {"y": 0.5}, [2.0] * len(row)) for row in lists]
    batch = Collate(4)(weighted)
    np.testing.assert_array_equal(batch.bags.weights[:3], 2)
    np.testing.assert_array_equal(batch.arrays["y"], np.float32([0.5] * 3 + [0]))
    assert batch.bags.weights.dtype == batch.arrays["y"].dtype == np.float32


@pytest.mark.parametrize(
    ("examples", "error", "message"),
    [
        ([], ValueError, "`examples` must be 1 to 3, the `batch_size`; got 0"),
        ([[1]] * 4, ValueError, "`examples` must be 1 to 3, the `batch_size`; got 4"),
        ([(1, 2)], TypeError, r"`ids\[0\]` must be a list; got 1"),
        ([[1], None], TypeError, r"`ids\[1\]` must be a list; got None"),
        (
            [[1], (2,) * 5],
            TypeError,
            r"`examples\[1\]` must be ids, or a tuple .* of 5",
        ),
        ([[1], {"a": [1]}], ValueError, "`ids` must be the same tree in all"),
        ([[1.5]], TypeError, "must hold integers"),
        ([[[1, 2]]], ValueError, "got deeper lists"),
        ([[0] * 9], ValueError, "`capacity` must be .* batch, 9; got 8"),
        ([([1], 0), [1]], ValueError, "`arrays` must be the same tree in all"),
        (
            [([1], np.zeros(2)), ([1], np.zeros(3))],
            ValueError,
            r"`arrays` must have one shape in all examples; got \[\(2,\), \(3,\)\]",
        ),
        (
            [([1], None, [1.0]), [1]],
            TypeError,
            r"`weights\[1\]` must be a list; got None",
        ),
        (
            [([1], None, [1.0, 2.0])],
            ValueError,
            r"`weights\[0\]` must have the length",
        ),
        (
            [Example({"a": [1]}, weights=[1.0])],
            ValueError,
            "`weights` must be a tree like `ids`",
        ),
    ],
)
def test_bad_examples_are_named(examples, error, message):
    with pytest.raises(error, match=message):
        Collate(3, capacity=8)(examples)


def test_bad_collations_are_named():
    with pytest.raises(ValueError, match="`batch_size` must be at least 1; got 0"):
        Collate(0)
    with pytest.raises(TypeError, match=r"`capacity` must be an integer; got 1\.5"):
        Collate(3, 1.5)
    with pytest.raises(ValueError, match="`capacity` must be one value, or a tree"):
        Collate(3, {"a": 8})([[1]])

"""A source of examples, their collation to batches, and Grain's pipelines of both."""

import math
import pickle

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from data_cases import BAGS, LABELS, LISTS, RECTANGLE, expected, flat, same, shapes

import jbag
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


def test_grain_takes_the_source_and_the_collation():
    source = Source(BAGS, LABELS)
    assert isinstance(source, grain.sources.RandomAccessDataSource)
    shuffled = grain.MapDataset.source(source).seed(0).shuffle()
    collate = Collate(4, capacity=64)
    for pipeline in (
        shuffled.batch(4, batch_fn=collate),
        shuffled.batch(4, batch_fn=collate).to_iter_dataset(),
        shuffled.to_iter_dataset().batch(4, batch_fn=collate),
    ):
        found = list(pipeline)
        assert [int(batch.mask.sum()) for batch in found] == [4, 4, 4, 4, 4, 3]
        rows = [row for batch in found for row in flat(batch)]
        assert sorted(row[3] for row in rows) == list(range(23))
        assert rows == [expected(row[3]) for row in rows]
        assert len({str(shapes(batch)) for batch in found}) == 1
    twice = shuffled.repeat(2).batch(4, drop_remainder=True, batch_fn=collate)
    assert len(list(twice)) == len(twice) == 11
    stacks = list(shuffled.batch(4, batch_fn=collate).to_iter_dataset().batch(2))
    assert [stack.bags.indices.shape for stack in stacks] == [(2, 64)] * 3


def test_grain_resumes_and_filters():
    kept = grain.MapDataset.source(Source(BAGS, LABELS)).seed(1).shuffle()
    pipeline = (
        kept.to_iter_dataset()
        .filter(lambda example: len(example.ids) > 2)
        .map(lambda example: example._replace(ids=example.ids[:2], weights=None))
        .batch(3, batch_fn=Collate(3))
    )
    iterator = iter(pipeline)
    next(iterator)
    state = iterator.get_state()
    wanted = next(iterator)
    iterator.set_state(state)
    same(next(iterator), wanted)
    assert wanted.bags.lengths.tolist() == [2, 2, 2]
    for row, position in zip(wanted.bags.to_lists(), wanted.positions, strict=True):
        assert row == LISTS[position][:2]


def test_grain_packs_in_workers_of_its_own():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # which Grain's workers ask for
    pipeline = (
        grain.MapDataset.source(Source(BAGS, LABELS))
        .batch(4, batch_fn=Collate(4, capacity=64))
        .to_iter_dataset()
        .mp_prefetch(grain.multiprocessing.MultiprocessingOptions(num_workers=1))
    )
    step = jax.jit(
        lambda batch: jbag.embedding_bag(jnp.ones((1000, 1)), batch.bags, mode="sum")
    )
    positions = []
    for batch in pipeline:
        wanted = [math.fsum(row[1]) for row in flat(batch)]
        pooled = step(batch)[batch.mask, 0]
        np.testing.assert_allclose(pooled, wanted, rtol=1e-5)
        positions += batch.positions[batch.mask].tolist()
    assert positions == list(range(23))
    assert step._cache_size() == 1

"""Grain's pipelines of the source and the collation."""

import math

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from data_cases import BAGS, LABELS, LISTS, expected, flat, same, shapes

import jbag
from jbag.data import Collate, Source


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

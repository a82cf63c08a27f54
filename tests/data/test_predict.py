"""Results of all examples, from masked batches."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_cases import BAGS, LABELS, LISTS
from jax.sharding import PartitionSpec as P

import jbag
from jbag.data import batches, predict

TABLE = np.random.default_rng(0).standard_normal((100, 3)).astype(np.float32)
BARE = jbag.Bags(BAGS.indices % 100, BAGS.offsets)
SUMS = np.stack([TABLE[np.array(x, int) % 100].sum(0) for x in LISTS])


def pool(table, bags):
    return jbag.embedding_bag(table, bags, mode="sum")


@pytest.mark.parametrize("in_flight", [0, 1, 2, 100])
@pytest.mark.parametrize("batch_size", [1, 5, 23, 64])
def test_results_are_those_of_the_examples(batch_size, in_flight):
    traces = []

    @jax.jit
    def step(table, bags):
        traces.append(bags)
        return pool(table, bags)

    stream = batches(BARE, batch_size=batch_size)
    found = predict(lambda b: step(TABLE, b.bags), stream, in_flight=in_flight)
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, SUMS, rtol=1e-5, atol=1e-5)
    assert len(traces) == 1


@pytest.mark.parametrize(
    "options", [{}, {"prefetch": 2}, {"device": jax.devices()[-1]}]
)
def test_shuffled_results_are_in_the_order_of_the_batches(options):
    def function(batch):
        return {"label": batch.arrays, "pair": (batch.positions, batch.arrays * 2)}

    stream = batches(BARE, LABELS, batch_size=4, seed=3, **options)
    found = predict(jax.jit(function), stream)
    order = found["pair"][0]
    assert sorted(order) == list(range(23))
    assert order.tolist() == [p for b in stream for p in b.positions if p >= 0]
    np.testing.assert_array_equal(found["label"], LABELS[order])
    np.testing.assert_array_equal(found["pair"][1], LABELS[order] * 2)


@pytest.mark.parametrize("steps", [2, "epoch"])
def test_stacks_of_batches_have_the_results_of_batches(steps):
    stacks = batches(BARE, batch_size=5, steps=steps)
    function = jax.jit(lambda b: jax.vmap(pool, (None, 0))(TABLE, b.bags))
    np.testing.assert_allclose(predict(function, stacks), SUMS, rtol=1e-5, atol=1e-5)


def test_shards_have_their_own_examples():
    parts = [
        predict(lambda b: b.positions, batches(BARE, batch_size=4, shard=(i, 2)))
        for i in range(2)
    ]
    assert sorted(np.concatenate(parts)) == list(range(23))


def test_results_over_a_mesh_are_gathered():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, P("x"))
    stream = batches(BARE, LABELS, batch_size=8)
    function = jax.jit(lambda b: b.arrays + 1, out_shardings=rows)
    np.testing.assert_array_equal(predict(function, stream), LABELS + 1)


def test_results_keep_their_dtype_and_may_be_empty():
    stream = batches(BARE, batch_size=5)
    for dtype in (jnp.bfloat16, bool, np.int8):
        found = predict(lambda _, t=dtype: jnp.ones((5, 2, 0), t), stream)
        assert found.dtype == dtype
        assert found.shape == (23, 2, 0)
    assert predict(lambda _: (), stream) == ()
    assert predict(lambda _: None, stream) is None
    masked = types.SimpleNamespace(mask=np.zeros(3, bool))
    assert predict(lambda _: np.arange(3), [masked]).shape == (0,)


def test_few_results_are_on_the_device(monkeypatch):
    made, fetched = [], []
    real = np.asarray

    def asarray(x, *rest, **options):
        if isinstance(x, jax.Array):
            fetched.append(x)
            assert len(made) - len(fetched) <= 3
        return real(x, *rest, **options)

    def function(batch):
        made.append(jnp.asarray(batch.positions))
        assert len(made) - len(fetched) <= 3
        return made[-1]

    monkeypatch.setattr(np, "asarray", asarray)
    predict(function, batches(BARE, batch_size=2), in_flight=2)
    assert len(made) == len(fetched) == 12


def test_batches_of_grain_are_predicted():
    grain = pytest.importorskip("grain")
    pipeline = (
        grain.MapDataset.source(jbag.data.Source(BARE, LABELS))
        .batch(5, batch_fn=jbag.data.Collate(5))
        .to_iter_dataset()
    )
    found = predict(lambda b: b.arrays, pipeline)
    np.testing.assert_array_equal(found, LABELS)


def test_wrong_arguments_are_errors():
    stream = batches(BARE, batch_size=20)
    calls = []

    def changing(one, two):
        results = iter([one, two])
        return lambda _: next(results)

    for error, match, function, given, options in [
        (TypeError, "`function` must be callable", 3, stream, {}),
        (TypeError, "`batches` must be an iterable", len, 3, {}),
        (TypeError, "`in_flight`", len, stream, {"in_flight": None}),
        (ValueError, "`in_flight` must be at least 0", len, stream, {"in_flight": -1}),
        (ValueError, "at least one batch", len, [], {}),
        (TypeError, "batch 0 must have a boolean `mask`", calls.append, [BARE], {}),
        (
            TypeError,
            "batch 0 must have a boolean `mask`",
            calls.append,
            [types.SimpleNamespace(mask=np.ones(3))],
            {},
        ),
        (
            ValueError,
            r"the result of batch 0 .* \(20,\); got float64\[3\]",
            lambda _: np.zeros(3),
            stream,
            {},
        ),
        (ValueError, r"result\['a'\] .* got int", lambda _: {"a": 3}, stream, {}),
        (
            ValueError,
            "the same tree .* for batch 1",
            changing(np.zeros(20), (np.zeros(20),)),
            stream,
            {},
        ),
        (
            ValueError,
            r"float64\[20\]; got int64\[20\] for batch 1",
            changing(np.zeros(20), np.zeros(20, int)),
            stream,
            {},
        ),
        (
            ValueError,
            r"float64\[20\]; got float64\[20, 1\] for batch 1",
            changing(np.zeros(20), np.zeros((20, 1))),
            stream,
            {},
        ),
    ]:
        with pytest.raises(error, match=match):
            predict(function, given, **options)
    assert calls == []

"""Batches of a data set: what is in them, their order and their shapes."""

import copy
import subprocess
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_cases import (
    BAGS,
    LABELS,
    LISTS,
    RECTANGLE,
    WEIGHTS,
    expected,
    flat,
    make_lists,
    same,
    shapes,
)

import jbag
from jbag import Bags
from jbag.data import Batch, batches


def test_without_a_seed_the_order_is_that_of_the_data_set():
    stream = batches(BAGS, LABELS, batch_size=5)
    assert len(stream) == 5
    for number, batch in enumerate(stream):
        positions = range(number * 5, min(number * 5 + 5, 23))
        assert flat(batch) == [expected(i) for i in positions]
    same(list(stream), list(stream))


@pytest.mark.parametrize("steps", [None, 3, "epoch"])
@pytest.mark.parametrize("mean_length", [0, 1, 7, 300])
@pytest.mark.parametrize("seed", [None, 0])
def test_batches_hold_what_numpy_shuffled(mean_length, seed, steps):
    lists, weights = make_lists(47, mean_length)
    labels = np.arange(47) + 5
    bags = Bags.from_lists(lists, weights).pad_to(20_000)
    order = np.arange(47)
    if seed is not None:
        order = np.random.default_rng((seed, 4)).permutation(47)
    stream = batches(bags, labels, batch_size=6, seed=seed, epoch=4, steps=steps)
    items = list(stream)
    assert len(items) == len(stream) == {None: 8, 3: 3, "epoch": 1}[steps]
    if steps is not None:
        items = [
            jax.tree.map(lambda x, k=k: x[k], s)
            for s in items
            for k in range(len(s.mask))
        ]
    found = [flat(batch) for batch in items]
    wanted = [expected(int(i), lists, weights, labels) for i in order]
    assert found[:8] == [wanted[i : i + 6] for i in range(0, 47, 6)]
    assert not any(found[8:])


def test_filled_up_batches_are_empty_where_nothing_is():
    pad = jnp.bfloat16
    arrays = {"x": np.ones((23, 2, 3), pad), "y": (np.ones(23, bool), LABELS + 1)}
    *_, last = batches(BAGS, arrays, batch_size=10, seed=3, capacity=100)
    np.testing.assert_array_equal(last.mask, [True] * 3 + [False] * 7)
    np.testing.assert_array_equal(last.positions[3:], -1)
    assert last.arrays["x"].shape == (10, 2, 3)
    assert last.arrays["x"].dtype == pad
    for array in jax.tree.leaves(last.arrays):
        assert array[:3].all()
        assert not array[3:].any()
    used = last.bags.offsets[3]
    assert used == sum(len(LISTS[i]) for i in last.positions[:3])
    np.testing.assert_array_equal(last.bags.offsets[3:], used)
    assert not last.bags.indices[used:].any()
    assert not last.bags.weights[used:].any()


def test_epochs_and_seeds_shuffle_in_their_own_ways():
    def order(**options):
        stream = batches(BAGS, batch_size=23, **options)
        return tuple(next(iter(stream)).positions.tolist())

    orders = {order(seed=s, epoch=e) for s in range(3) for e in range(3)}
    assert len(orders) == 9
    assert all(sorted(o) == list(range(23)) for o in orders)
    assert order(seed=1, epoch=2) == order(seed=1, epoch=2)
    assert order(epoch=0) == order(epoch=1) == tuple(range(23))


@pytest.mark.parametrize("steps", [None, 2])
def test_a_stream_goes_on_where_it_stopped(steps):
    stream = batches(BAGS, LABELS, batch_size=4, seed=5, steps=steps)
    whole = [item for epoch in range(3) for item in stream.at(epoch)]
    for step in range(len(whole)):
        epoch, start = divmod(step, len(stream))
        rest = stream.at(epoch, start)
        assert len(rest) == len(stream) - start
        same(next(iter(rest)), whole[step])
    assert list(stream.at(0, len(stream))) == []


@pytest.mark.parametrize("outliers", [0, 2])
@pytest.mark.parametrize("batch_size", [32, 256])
def test_one_shape_lasts_for_epochs_and_seeds_of_skewed_lengths(batch_size, outliers):
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(3, 1, 3000).astype(int)
    lengths[:outliers] = 20 * lengths.mean()
    bags = Bags.from_lengths(np.zeros(lengths.sum(), np.int32), lengths)
    capacities = set()
    for seed in range(4):
        stream = batches(bags, batch_size=batch_size, seed=seed)
        for epoch in range(10):
            capacities.add(next(iter(stream.at(epoch))).bags.capacity)
    assert len(capacities) == 1
    mean = batch_size * lengths.mean()
    assert mean < capacities.pop() < (2 if batch_size == 256 else 4) * mean


def test_an_epoch_with_a_larger_batch_than_usual_has_room_for_it():
    # Two long bags rarely meet: an epoch in which they do needs more.
    lengths = np.array([1000, 1000, *[1] * 2998])
    bags = Bags.from_lengths(np.arange(lengths.sum()), lengths)
    stream = batches(bags, batch_size=4, seed=0)
    usual, larger = 1280, 2048
    met = {usual: 0, larger: 0}
    for epoch in range(3000):
        order = np.random.default_rng((0, epoch)).permutation(3000)
        first, second = np.flatnonzero(order < 2) // 4
        met[larger if first == second else usual] += 1
        if first == second:
            batch = list(stream.at(epoch))[first]
            assert batch.bags.capacity == larger
            assert batch.bags.lengths.max() == 1000
        elif epoch < 3:
            assert {batch.bags.capacity for batch in stream.at(epoch)} == {usual}
    assert met[larger] > 0


def test_a_step_is_compiled_once():
    step = jax.jit(lambda batch: jbag.embedding_bag(jnp.ones((1000, 2)), batch.bags))
    stream = batches(BAGS, LABELS, batch_size=4, seed=0)
    for epoch in range(3):
        for batch in stream.at(epoch):
            step(batch)
    assert step._cache_size() == 1


def test_bags_of_one_length_leave_no_slot_empty():
    bags = Bags.from_lengths(np.arange(50), np.full(10, 5))
    for batch in batches(bags, batch_size=4, seed=0):
        assert batch.bags.capacity == 20
        for k, position in enumerate(batch.positions[batch.mask]):
            row = batch.bags.indices[5 * k : 5 * k + 5]
            np.testing.assert_array_equal(row, np.arange(5) + 5 * position)


def test_capacities_are_chosen_by_number_or_function():
    used = [sum(map(len, LISTS[i : i + 5])) for i in range(0, 23, 5)]
    capacity = partial(jbag.bucket, minimum=4)
    for options, wanted in (
        ({"capacity": max(used)}, [max(used)] * 5),
        ({"capacity": lambda n: n + 1}, [n + 1 for n in used]),
        ({"capacity": capacity}, [capacity(n) for n in used]),
        ({}, [jbag.bucket(max(used))] * 5),
    ):
        stream = batches(BAGS, LABELS, batch_size=5, **options)
        assert [batch.bags.capacity for batch in stream] == wanted
    stream = batches(BAGS, batch_size=5, steps=2, capacity=lambda n: n)
    wanted = [max(used[i : i + 2]) for i in range(0, 5, 2)]
    assert [stack.bags.capacity for stack in stream] == wanted


def test_capacity_that_is_too_small_is_an_error_before_any_batch():
    largest = max(sum(map(len, LISTS[i : i + 5])) for i in range(0, 23, 5))
    with pytest.raises(ValueError, match=rf"`capacity` must be .* {largest}; got 3"):
        batches(BAGS, batch_size=5, capacity=3)
    stream = batches(BAGS, batch_size=5, capacity=lambda n: n - 1)
    with pytest.raises(ValueError, match=r"`capacity\(\d+\)` must be at least"):
        list(stream)


def test_features_that_belong_together_stay_together():
    other, _ = make_lists(23, 9, seed=1)
    tree = {"a": BAGS, "b": (Bags.from_lists(other),)}
    capacity = {"a": 60, "b": (None,)}
    for batch in batches(tree, LABELS, batch_size=4, seed=0, capacity=capacity):
        plain = Batch(batch.bags["a"], batch.arrays, batch.mask, batch.positions)
        assert flat(plain) == [expected(i) for i in batch.positions[batch.mask]]
        chosen = [other[i] for i in batch.positions[batch.mask]]
        assert batch.bags["b"][0].to_lists() == chosen + [[]] * (4 - len(chosen))
        assert batch.bags["a"].capacity == 60
    with pytest.raises(ValueError, match=r"`capacity\['b'\]\[0\]` must be at least"):
        batches(tree, batch_size=4, capacity={"a": None, "b": (1,)})
    with pytest.raises(ValueError, match="`capacity` must be one value, or a tree"):
        batches(tree, batch_size=4, capacity={"a": 1})


@pytest.mark.parametrize("bad", [-1, 9, 1 << 30])
@pytest.mark.parametrize("options", [{}, {"steps": 2}, {"prefetch": 1}, {"seed": 3}])
def test_an_id_of_no_row_is_named_when_its_batch_is_made(bad, options):
    lists = [[], [1, 2], [3], [], [8, bad, 4], [5]]
    features = {"a": Bags.from_lists(lists).pad_to(20), "b": np.full((6, 2), 30)}
    sizes = {"a": 9, "b": 31}
    options |= {"batch_size": 2, "device": jax.devices()[0]}
    message = (
        r"`bags\['a'\]` must hold ids in \[0, 9\), the rows of the table; "
        rf"got {bad} in example 4 at position 1\."
    )
    with pytest.raises(IndexError, match=message):
        list(batches(features, num_embeddings=sizes, **options))
    with pytest.raises(IndexError, match=r"`bags\['b'\]` .* got 30 in example"):
        list(batches(features, num_embeddings={"a": None, "b": 30}, **options))
    alone = batches(features["b"], num_embeddings=31, **options)
    same(list(alone), list(batches(features["b"], **options)))


def test_only_the_ids_of_a_batch_are_checked():
    bags = Bags(np.array([1, 2, 3, 99]), np.array([0, 1, 3]))
    (batch,) = batches(bags, batch_size=4, capacity=9, num_embeddings=4)
    assert batch.bags.to_lists() == [[1], [2, 3], [], []]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seed": 1, "epoch": 2, "start": 1},
        {"seed": 1, "steps": 2, "shard": (1, 3)},
        {"steps": "epoch", "drop_remainder": True},
        {"prefetch": 2, "capacity": {"a": 60, "b": (20,)}},
    ],
)
@pytest.mark.parametrize("kind", [np.asarray, np.int64, jnp.asarray])
def test_ids_of_one_length_are_bags_of_that_length(options, kind):
    tree = {"a": BAGS, "b": (Bags.from_lists(RECTANGLE),)}
    given = {"a": BAGS, "b": (kind(RECTANGLE),)}
    wanted = list(batches(tree, LABELS, batch_size=4, **options))
    assert wanted
    same(list(batches(given, LABELS, batch_size=4, **options)), wanted)


def test_ids_of_one_length_alone_fill_every_slot():
    *_, last = batches(RECTANGLE, batch_size=5)
    assert last.bags.capacity == 15
    assert last.bags.to_lists() == [*RECTANGLE[20:].tolist(), [], []]


def test_batches_take_what_a_collection_takes():
    collection = jbag.EmbeddingBagCollection(
        {"items": jbag.Table(1000, 4)},
        {"a": jbag.Feature("items", "sum"), "b": jbag.Feature("items")},
    )
    features = {"a": BAGS, "b": RECTANGLE}
    params = collection.init(jax.random.key(0), features)
    whole = collection.apply(params, features)
    for batch in batches(features, batch_size=6, seed=0):
        out = collection.apply(params, batch.bags)
        chosen = batch.positions[batch.mask]
        for name in features:
            np.testing.assert_allclose(
                out[name][batch.mask], whole[name][chosen], atol=1e-6
            )
            assert not np.any(out[name][~batch.mask])


@pytest.mark.parametrize(("steps", "items"), [(None, 5), (2, 2), ("epoch", 1)])
def test_without_the_remainder_every_batch_is_full(steps, items):
    stream = batches(BAGS, batch_size=4, seed=0, drop_remainder=True, steps=steps)
    assert len(stream) == len(list(stream)) == items
    assert all(item.mask.all() for item in stream)


@pytest.mark.parametrize("steps", [None, 2, "epoch"])
def test_no_examples_make_no_batches(steps):
    for drop in (False, True):
        stream = batches(
            Bags.from_lists([]),
            np.zeros(0),
            batch_size=4,
            steps=steps,
            drop_remainder=drop,
        )
        assert len(stream) == len(list(stream)) == 0


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("drop_remainder", [False, True])
def test_processes_share_an_epoch(seed, steps, drop_remainder):
    options = {"seed": seed, "steps": steps, "drop_remainder": drop_remainder}
    whole = list(batches(BAGS, LABELS, batch_size=6, **options))
    parts = [
        list(batches(BAGS, LABELS, batch_size=2, shard=(index, 3), **options))
        for index in range(3)
    ]
    assert [len(part) for part in parts] == [len(whole)] * 3
    for step, *shares in zip(whole, *parts, strict=True):
        # Side by side, the parts of a step are the step of one process.
        joined = np.concatenate([share.positions for share in shares], -1)
        np.testing.assert_array_equal(joined, step.positions)
        assert shapes(shares[0]) == shapes(shares[1]) == shapes(shares[2])


@pytest.mark.parametrize("steps", [None, 2])
def test_capacities_by_function_are_agreed_by_all_processes(steps):
    parts = [
        batches(
            BAGS, batch_size=2, shard=(i, 3), seed=0, steps=steps, capacity=lambda n: n
        )
        for i in range(3)
    ]
    for items in zip(*parts, strict=True):
        assert len({item.bags.capacity for item in items}) == 1
        assert any(
            item.bags.offsets[..., -1].max() == item.bags.capacity for item in items
        )


def test_a_stack_runs_under_scan_as_its_batches_do():
    table = jnp.arange(2000.0).reshape(1000, 2)

    def step(total, batch):
        pooled = jbag.embedding_bag(table, batch.bags, mode="sum")
        return total + pooled.sum(where=batch.mask[:, None]), batch.mask.sum()

    [stack] = batches(BAGS, LABELS, batch_size=4, seed=0, steps="epoch")
    total, counts = jax.jit(lambda s: jax.lax.scan(step, jnp.float32(0), s))(stack)
    wanted = sum(
        w * (4 * i + 1)
        for row, ws in zip(LISTS, WEIGHTS, strict=True)
        for i, w in zip(row, ws, strict=True)
    )
    np.testing.assert_allclose(total, wanted, rtol=1e-5)
    assert counts.tolist() == [4, 4, 4, 4, 4, 3]


def test_data_on_a_device_is_taken_back():
    on_device = jax.tree.map(jnp.asarray, BAGS)
    labels = LABELS.astype(np.int32)
    stream = batches(on_device, jnp.asarray(labels), batch_size=4, seed=0)
    same(list(stream), list(batches(BAGS, labels, batch_size=4, seed=0)))


def test_what_a_loop_does_to_a_batch_stays_in_it():
    stream = batches(BAGS, LABELS, batch_size=5)
    before = copy.deepcopy(list(stream))
    for batch in stream:
        for leaf in jax.tree.leaves(batch):
            leaf[:] = 0
    same(list(stream), before)


def test_an_epoch_is_packed_without_a_loop_over_ids():
    rng = np.random.default_rng(0)
    for mean_length in (5, 500):
        lengths = rng.poisson(mean_length, 4_000_000 // mean_length)
        ids = rng.integers(0, 1000, lengths.sum()).astype(np.int32)
        stream = batches(Bags.from_lengths(ids, lengths), batch_size=4096, seed=0)
        start = time.perf_counter()
        assert sum(int(batch.bags.offsets[-1]) for batch in stream) == lengths.sum()
        # A loop over ids takes many times this; tighter bounds fail on a busy machine.
        assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bags": LISTS}, TypeError, "`bags` must be Bags, .* got list. .*from_lists"),
        ({"bags": None}, TypeError, "`bags` must be Bags, .* got NoneType"),
        ({"bags": {}}, TypeError, r"`bags` must be Bags, or a tree of them; got {}"),
        (
            {"bags": {"a": [BAGS]}},
            TypeError,
            r"`bags\['a'\]` must be Bags, .* got list",
        ),
        ({"bags": {"a": 3}}, TypeError, r"`bags\['a'\]` must be Bags"),
        (
            {"bags": {"a": LABELS}},
            ValueError,
            r"`bags\['a'\]` must be ids \[n, L\]; got shape \(23,\)",
        ),
        (
            {"bags": {"a": np.zeros((23, 2))}},
            TypeError,
            r"`bags\['a'\]` must hold integers; got float64",
        ),
        (
            {"bags": {"a": BAGS, "b": RECTANGLE[:-1]}},
            ValueError,
            r"`bags\['b'\]` must hold 23 bags, as `bags\['a'\]`; got 22",
        ),
        (
            {"bags": {"a": BAGS, "b": Bags.from_lists([[1]])}},
            ValueError,
            r"`bags\['b'\]` must hold 23 bags, as `bags\['a'\]`; got 1",
        ),
        (
            {"bags": Bags(np.zeros((2, 3), np.int32), np.zeros((2, 2), np.int32))},
            ValueError,
            "`bags` must be one batch",
        ),
        (
            {"bags": Bags(np.zeros(3, np.int32), np.array([0, 4]))},
            ValueError,
            "`offsets` must not pass the end",
        ),
        ({"bags": Bags(np.zeros(3), np.array([0, 3]))}, TypeError, "`indices` must"),
        ({"arrays": [1] * 23}, TypeError, r"`arrays\[0\]` must be an array with the"),
        ({"arrays": np.int32(3)}, TypeError, "`arrays` must be an array with the"),
        (
            {"arrays": {"y": np.zeros((22, 23))}},
            ValueError,
            r"`arrays\['y'\]` must have the length of `bags`, 23; got shape \(22, 23\)",
        ),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1; got 0"),
        ({"batch_size": 2.0}, TypeError, "`batch_size` must be an integer; got 2.0"),
        ({"seed": -1}, ValueError, "`seed` must be at least 0; got -1"),
        ({"seed": jax.random.key(0)}, TypeError, "`seed` must be an integer"),
        ({"epoch": -1}, ValueError, "`epoch` must be at least 0; got -1"),
        ({"epoch": None}, TypeError, "`epoch` must be an integer; got None"),
        ({"start": 7}, ValueError, r"`start` must be in \[0, 7\); got 7"),
        ({"start": True}, TypeError, "`start` must be an integer; got True"),
        ({"capacity": -1}, ValueError, "`capacity` must be at least 0; got -1"),
        ({"capacity": 2.5}, TypeError, "`capacity` must be an integer; got 2.5"),
        ({"num_embeddings": -1}, ValueError, "`num_embeddings` must be at least 0"),
        (
            {"bags": {"a": BAGS}, "num_embeddings": {"a": 2.0}},
            TypeError,
            r"`num_embeddings\['a'\]` must be an integer; got 2\.0",
        ),
        (
            {"bags": {"a": BAGS}, "num_embeddings": {"b": 2}},
            ValueError,
            "`num_embeddings` must be one value, or a tree like `bags`",
        ),
        ({"drop_remainder": 1}, TypeError, "`drop_remainder` must be True or False"),
        (
            {"drop_remainder": True, "batch_size": 24},
            ValueError,
            "`drop_remainder` must leave an item: there are 23 .* takes 24",
        ),
        (
            {"drop_remainder": True, "steps": 3, "shard": (0, 2)},
            ValueError,
            "there are 23 examples, .* takes 24",
        ),
        ({"steps": 0}, ValueError, "`steps` must be at least 1; got 0"),
        ({"steps": "all"}, ValueError, "`steps` must be .* got 'all'"),
        ({"steps": 1.5}, TypeError, "`steps` must be an integer; got 1.5"),
        ({"shard": 3}, TypeError, r"`shard` must be \(index, count\); got 3"),
        ({"shard": (2, 2)}, ValueError, r"`shard\[0\]` must be in \[0, 2\); got 2"),
        ({"shard": (0, 0)}, ValueError, r"`shard\[1\]` must be at least 1; got 0"),
        ({"shard": (0.0, 1)}, TypeError, r"`shard\[0\]` must be an integer"),
        ({"prefetch": -1}, ValueError, "`prefetch` must be at least 0; got -1"),
        ({"prefetch": True}, TypeError, "`prefetch` must be an integer; got True"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        batches(**{"bags": BAGS, "arrays": LABELS, "batch_size": 4, **arguments})


def test_traced_bags_are_an_error():
    with pytest.raises(TypeError):
        jax.jit(lambda bags: list(batches(bags, batch_size=4)))(BAGS)


def test_batches_import_neither_grain_nor_flax():
    check = (
        "import sys, jbag; jbag.data.batches; "
        "assert not {'grain', 'flax', 'optax', 'torch'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize("name", ["Batch", "Batches", "Collate", "Example", "Source"])
def test_names_have_an_example(name):
    assert ">>>" in getattr(jbag.data, name).__doc__
    assert ">>>" in batches.__doc__

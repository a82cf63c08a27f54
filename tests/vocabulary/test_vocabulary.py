"""Ids get rows of their own, keep them while they live, and give them back."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vocabulary_oracle
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
from slow import slow

from jbag.vocabulary import (
    FullVocabularyError,
    SplitIds,
    Vocabulary,
    _primitives,
    split_ids,
)

N = 64  # ids of a batch
LARGEST = 2**64 - 1


@pytest.fixture(params=["cpu", "xla"])
def implementation(request, require):
    require(request.param)
    return request.param


# Every policy, with every kind of unknown rows, in one and several buckets.
CASES = {
    "lru": {"num_buckets": 4},
    "one bucket": {"num_buckets": 1, "num_probes": 7},
    "lfu": {"num_buckets": 2, "eviction": "lfu", "num_probes": 5},
    "no eviction": {"num_buckets": 4, "eviction": None, "num_unknown_rows": 8},
    "time to live": {"num_buckets": 2, "time_to_live": 3, "num_probes": 9},
    "counted": {"num_buckets": 4, "admission_count": 3, "num_probes": 6},
    "counted lfu": {
        "num_buckets": 2,
        "admission_count": 2,
        "eviction": "lfu",
        "time_to_live": 2,
        "num_unknown_rows": 4,
    },
    "one probe": {"num_buckets": 8, "num_probes": 1},
    "all probes": {"num_buckets": 1, "num_probes": 1000, "eviction": "lfu"},
}


def colliding_ids(oracle, count):
    """Return ids that have the same probes."""
    wanted = oracle.probes(12345)
    found = (key for key in itertools.count() if oracle.probes(key) == wanted)
    return [*itertools.islice(found, count)]


def streams(oracle, rng):
    """Yield batches of N ids: frequent ones that drift, and adversarial ones."""
    pool = colliding_ids(oracle, 40)
    for step in range(6):
        zipf = rng.zipf(1.2, N) % 400 + 40 * step
        yield [int(x) * 0x9E3779B97F4A7C15 % 2**64 for x in zipf]
    for _ in range(4):  # all in the same probes
        yield [pool[i] for i in rng.integers(len(pool), size=N)]
    ends = [0, LARGEST, 1, 2**32, 2**32 - 1, 2**63, LARGEST - 1]
    for _ in range(3):
        yield [ends[i] for i in rng.integers(len(ends), size=N)]
    yield [0] * N
    for step in range(3):  # words that differ in one half only
        yield [(i % 8 << 32 | i // 8 + step * 3) for i in range(N)]
    for _ in range(3):  # reads of old ids beside many new ones
        known = [*oracle.rows]
        yield [known[i] for i in rng.integers(len(known), size=N // 2)] + [
            int(x) for x in rng.integers(2**63, size=N // 2)
        ]


def to_array(ids):
    return np.array(ids, np.uint64)


@pytest.mark.parametrize("name", CASES)
def test_adversarial_streams_have_the_rows_of_dictionaries(name, implementation):
    options = CASES[name]
    oracle = vocabulary_oracle.Vocabulary(160, **options)
    vocabulary = Vocabulary(160, implementation=implementation, **options)
    assert vocabulary.capacity == oracle.num_buckets * oracle.num_slots
    assign = jax.jit(vocabulary.assign)
    lookup = jax.jit(vocabulary.lookup)
    new_rows = jax.jit(functools.partial(vocabulary.new_rows, max_rows=N))
    state = vocabulary.init()
    rng = np.random.default_rng(0)
    for step, ids in enumerate(streams(oracle, rng)):
        words = split_ids(to_array(ids))
        expected = oracle.assign(ids, step // 2)  # two batches a step
        rows, state = assign(state, words, step // 2)
        assert rows.tolist() == expected
        assert lookup(state, words).tolist() == expected
        new = sorted(oracle.new_rows)
        assert new_rows(state).tolist() == new + [160] * (N - len(new))
        assert_is_state_of(state, oracle)
        if step % 5 == 0:
            others = [int(x) for x in rng.integers(2**63, size=N)]
            found = lookup(state, split_ids(to_array(others)))
            assert found.tolist() == oracle.lookup(others)
    counters = vocabulary.statistics(state)._asdict()
    for name in ("hits", "misses", "admissions", "evictions", "rejections", "size"):
        assert int(counters[name]) == oracle.totals[name], name


def assert_is_state_of(state, oracle):
    high, low, last_seen, counts = map(np.array, state[:4])
    taken = [*np.flatnonzero(last_seen >= 0)]
    assert taken == sorted(oracle.ids)
    for row in taken:
        assert int(high[row]) << 32 | int(low[row]) == oracle.ids[row]
        assert last_seen[row] == oracle.last_seen[row]
        assert counts[row] == oracle.counts[row]


def equal(a, b):
    return all(
        x.dtype == y.dtype and np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def large_batches(steps=4, n=1000):
    rng = np.random.default_rng(1)
    for step in range(steps):
        ids = (rng.zipf(1.05, n) % 9000 + 500 * step).astype(np.uint64)
        yield ids * np.uint64(0x9E3779B97F4A7C15)


@pytest.mark.parametrize("name", [*CASES])
def test_kernels_give_the_same_bits(name, require):
    require("cpu")
    options = CASES[name] | {"num_buckets": 8, "num_unknown_rows": 1}
    # Across the width of vectors.
    options["num_probes"] = min(options.get("num_probes", 33), 70)
    states, rows = {}, {}
    kernels = {
        kernel: Vocabulary(1024, implementation=kernel, **options)
        for kernel in ("cpu", "xla")
    }
    states = {kernel: each.init() for kernel, each in kernels.items()}
    programs = {kernel: jax.jit(each.assign) for kernel, each in kernels.items()}
    for step, ids in enumerate(large_batches()):
        words = split_ids(ids)
        where = np.arange(ids.size) % 11 != 0
        for kernel, assign in programs.items():
            rows[kernel], states[kernel] = assign(
                states[kernel], words, step, where=where
            )
        assert equal(rows["cpu"], rows["xla"])
        assert equal(states["cpu"], states["xla"])


def test_the_order_of_a_batch_does_not_matter(implementation):
    options = {"num_buckets": 4, "admission_count": 2, "num_probes": 4}
    vocabulary = Vocabulary(512, implementation=implementation, **options)
    assign = jax.jit(vocabulary.assign)
    rng = np.random.default_rng(2)
    state = vocabulary.init()
    for step, ids in enumerate(large_batches()):
        order = rng.permutation(ids.size)
        rows, after = assign(state, split_ids(ids), step)
        permuted_rows, permuted = assign(state, split_ids(ids[order]), step)
        assert equal(rows[order], permuted_rows)
        assert equal(after, permuted)
        state = after


def test_devices_with_some_of_the_buckets_give_the_same_bits(implementation):
    mesh = make_mesh(sizes=(4,))
    vocabulary = Vocabulary(
        512, num_buckets=8, admission_count=2, num_unknown_rows=16, num_probes=6,
        implementation=implementation,
    )  # fmt: skip
    options = vocabulary._options

    def local(state, words, step):
        """Assign the ids of the device's buckets, given all ids."""
        first = jax.lax.axis_index("x") * 2
        is_valid = jnp.ones(words.shape, bool)
        rows, state = _primitives.assign(
            state, *words, is_valid, step, first, options, implementation
        )
        found = _primitives.lookup(
            state, *words, is_valid, first, options, implementation
        )
        return *(jax.lax.pmax(x, "x") for x in (rows, found)), state

    specs = {"in_specs": (P("x"), P(), P()), "out_specs": (P(), P(), P("x"))}
    sharded = jax.jit(jax.shard_map(local, mesh=mesh, **specs))
    state = vocabulary.init()
    divided = jax.device_put(state, NamedSharding(mesh, P("x")))
    for step, ids in enumerate(large_batches()):
        words = split_ids(ids)
        rows, state = jax.jit(vocabulary.assign)(state, words, step)
        divided_rows, divided_found, divided = sharded(divided, words, jnp.int32(step))
        assert equal(rows, divided_rows)
        assert equal(rows, divided_found)
        assert equal(state, divided)


def test_a_state_is_restored_on_other_devices(implementation, tmp_path):
    vocabulary = Vocabulary(512, num_buckets=8, implementation=implementation)
    (first, second), state = large_batches(2), vocabulary.init()
    _, state = vocabulary.assign(state, first, 0)
    leaves, tree = jax.tree.flatten(state)
    np.savez(tmp_path / "state.npz", *map(np.array, leaves))
    expected = vocabulary.assign(state, second, 1)
    with np.load(tmp_path / "state.npz") as arrays:
        restored = jax.tree.unflatten(tree, [jnp.array(x) for x in arrays.values()])
    mesh = make_mesh(sizes=(2,))
    restored = jax.device_put(restored, NamedSharding(mesh, P("x")))
    assert equal(jax.jit(vocabulary.assign)(restored, split_ids(second), 1), expected)


@pytest.mark.parametrize("num_probes", [32, *slow(4, 128)])
def test_every_admitted_id_keeps_its_row_while_it_lives(num_probes, implementation):
    """A long stream with drift, checked against the rows that ids had."""
    V = 16384 if implementation == "cpu" else 2048
    steps, n = (300, 4096) if implementation == "cpu" else (40, 1024)
    vocabulary = Vocabulary(
        V, num_probes=num_probes, implementation=implementation, num_buckets=4
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step_of(state, words, step):
        rows, state = vocabulary.assign(state, words, step)
        return state, rows, vocabulary.new_rows(state, n)

    rng = np.random.default_rng(3)
    state, row_of = vocabulary.init(), {}
    id_of = {}
    for step in range(steps):
        ids = (rng.zipf(1.1, n) % 100_000 + 300 * step).astype(np.uint64)
        ids *= np.uint64(0xD1342543DE82EF95)
        state, rows, new = step_of(state, split_ids(ids), step)
        new = set(new.tolist()) - {V}
        for row in new:
            row_of.pop(id_of.pop(row, None), None)
        for key, row in zip(ids.tolist(), rows.tolist(), strict=True):
            if row == 0:
                assert key not in row_of
            elif row in new and row not in id_of:
                assert key not in row_of
                id_of[row], row_of[key] = key, row
            else:
                assert row_of[key] == row
                assert id_of[row] == key
    assert len(row_of) == int(vocabulary.statistics(state).size)
    # With all rows taken, and nothing but evictions.
    assert len(row_of) > 0.99 * vocabulary.capacity


def test_the_least_recently_seen_are_evicted_where_every_slot_is_a_probe(
    implementation,
):
    vocabulary = Vocabulary(
        101, num_probes=100, num_buckets=1, implementation=implementation
    )
    state = vocabulary.init()
    for step in range(10):
        ids = np.arange(10 * step, 10 * step + 10)
        _, state = vocabulary.assign(state, ids, step)
    _, state = vocabulary.assign(state, np.arange(0, 5), 10)
    _, state = vocabulary.assign(state, np.arange(1000, 1015), 11)
    known = np.array(vocabulary.lookup(state, np.arange(100))) > 0
    assert np.flatnonzero(~known).tolist() == [5, 6, 7, 8, 9, *range(10, 20)]


def test_ids_of_a_batch_never_evict_each_other(implementation):
    vocabulary = Vocabulary(8, num_buckets=1, implementation=implementation)
    state = vocabulary.init()
    rows, state = vocabulary.assign(state, np.arange(20), 0)
    assert sorted(rows.tolist()) == [0] * 13 + [1, 2, 3, 4, 5, 6, 7]
    held = np.flatnonzero(rows)
    mixed = np.concatenate([held[:3], np.arange(100, 120)])
    again, state = vocabulary.assign(state, mixed, 1)
    assert again[:3].tolist() == rows[held[:3]].tolist()
    assert (again[3:] > 0).sum() == 4
    same_step, _ = vocabulary.assign(state, np.arange(500, 510), 1)
    assert same_step.tolist() == [0] * 10


def test_masked_ids_are_ignored(implementation):
    vocabulary = Vocabulary(64, implementation=implementation)
    where = np.array([[True, False], [False, True]])
    ids = np.array([[5, 6], [7, 5]])
    rows, state = vocabulary.assign(vocabulary.init(), ids, 0, where=where)
    assert rows[0, 0] == rows[1, 1] > 0
    assert rows[where.nonzero()[::-1]].tolist() == rows[where].tolist()
    assert (np.array(rows)[~where] == -1).all()
    assert int(vocabulary.statistics(state).size) == 1
    assert vocabulary.lookup(state, ids, where=where).tolist() == rows.tolist()


def test_a_batch_may_be_empty(implementation):
    vocabulary = Vocabulary(64, admission_count=2, implementation=implementation)
    state = vocabulary.init()
    rows, after = vocabulary.assign(state, np.zeros((0, 3), np.int64), 4)
    assert rows.shape == (0, 3)
    assert equal(state, after)
    assert vocabulary.lookup(state, []).shape == (0,)
    assert vocabulary.new_rows(state, 0).shape == (0,)


def test_a_full_vocabulary_raises_or_counts():
    options = {"num_buckets": 1, "eviction": None}
    silent = Vocabulary(4, **options)
    rows, state = silent.assign(silent.init(), [1, 2, 3, 4, 4], 0)
    assert sorted(rows.tolist()) == [0, 1, 2, 3, 3] or rows.tolist().count(0) == 1
    assert int(silent.statistics(state).rejections) == 1
    with pytest.raises(FullVocabularyError, match="1 of the ids"):
        silent.check(state)
    strict = Vocabulary(4, raises_when_full=True, **options)
    _, state = strict.assign(strict.init(), [1, 2, 3], 0)
    strict.check(state)
    with pytest.raises(FullVocabularyError, match="3 of 3 rows"):
        strict.assign(state, [4], 1)
    _, state = jax.jit(strict.assign)(state, split_ids(np.array([4])), 1)
    with pytest.raises(FullVocabularyError):
        strict.check(state)
    strict.check(state, since=state)


def test_assignments_scan_and_batch(implementation):
    vocabulary = Vocabulary(128, num_buckets=2, implementation=implementation)
    batches = [x[:50] for x in large_batches(6)]
    words = jax.tree.map(lambda *x: jnp.stack(x), *map(split_ids, batches))
    expected, state = [], vocabulary.init()
    for step, ids in enumerate(batches):
        rows, state = vocabulary.assign(state, ids, step)
        expected.append(rows)

    @jax.jit
    def scanned(state, words):
        def body(state, batch):
            rows, state = vocabulary.assign(state, *batch)
            return state, rows

        return jax.lax.scan(body, state, (words, jnp.arange(6)))

    after, rows = scanned(vocabulary.init(), words)
    assert equal(rows, jnp.stack(expected))
    assert equal(after, state)
    both = jax.tree.map(lambda *x: jnp.stack(x), vocabulary.init(), state)
    two = jax.tree.map(lambda x: x[:2], words)
    rows, after = jax.vmap(vocabulary.assign, in_axes=(0, 0, None))(both, two, 6)
    alone = vocabulary.assign(state, batches[1], 6)
    assert equal((rows[1], jax.tree.map(lambda x: x[1], after)), alone)


def test_rows_are_constants_to_differentiation(implementation):
    vocabulary = Vocabulary(64, implementation=implementation)
    state, words = vocabulary.init(), split_ids(np.arange(8))

    def loss(table):
        rows, after = vocabulary.assign(state, words, 0)
        return (table[rows] ** 2).sum(), after

    table = jnp.arange(64.0)
    for function in (loss, jax.checkpoint(loss)):
        gradient, after = jax.grad(function, has_aux=True)(table)
        rows = vocabulary.lookup(after, words)
        assert equal(gradient, jnp.zeros(64).at[rows].add(2 * table[rows]))


def test_the_state_is_updated_in_place(implementation):
    vocabulary = Vocabulary(1 << 16, implementation=implementation)
    words = split_ids(np.arange(256))

    def step(state, words):
        rows, state = vocabulary.assign(state, words, 0)
        return state, rows

    state = jax.eval_shape(vocabulary.init)
    plan = jax.jit(step, donate_argnums=0).lower(state, words).compile()
    memory = plan.memory_analysis()
    assert memory.alias_size_in_bytes >= 17 << 16
    if implementation == "cpu":
        assert memory.temp_size_in_bytes < 1 << 14


def test_exported_programs_need_no_kernel(implementation):
    if implementation == "cpu":
        pytest.skip("a named kernel in C++ is not portable")
    vocabulary = Vocabulary(64, admission_count=2)
    state, words = vocabulary.init(), split_ids(np.array([3, 3, 9, LARGEST], np.uint64))
    size = jax.export.symbolic_shape("n")
    symbolic = SplitIds(*(jax.ShapeDtypeStruct(size, jnp.uint32) for _ in range(2)))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    platforms = ["cpu", "cuda", "tpu"]
    assigned = jax.export.export(jax.jit(vocabulary.assign), platforms=platforms)(
        shapes, symbolic, jax.ShapeDtypeStruct((), jnp.int32)
    )
    assigned = jax.export.deserialize(assigned.serialize())
    found = jax.export.export(jax.jit(vocabulary.lookup), platforms=platforms)(
        shapes, symbolic
    )
    found = jax.export.deserialize(found.serialize())
    expected = vocabulary.assign(state, words, 0)
    assert equal(assigned.call(state, words, jnp.int32(0)), expected)
    assert equal(found.call(expected[1], words), expected[0])


def test_bad_options_raise():
    for options, message in [
        ({"num_embeddings": 1}, "num_embeddings"),
        ({"num_embeddings": 2**31}, "num_embeddings"),
        ({"num_probes": 0}, "num_probes"),
        ({"admission_count": 0}, "admission_count"),
        ({"eviction": "fifo"}, "eviction"),
        ({"time_to_live": -1}, "time_to_live"),
        ({"time_to_live": 3, "eviction": None}, "time_to_live"),
        ({"num_buckets": 3}, "multiple of `num_buckets`"),
        ({"num_buckets": 4, "num_unknown_rows": 6}, "num_unknown_rows"),
        ({"num_buckets": 100}, "leave each of 100 buckets"),
        ({"num_unknown_rows": 100, "num_buckets": 1}, "leave each"),
        ({"num_embeddings": 2**29, "admission_count": 2}, "2\\^28"),
        ({"implementation": "cuda_"}, "implementation"),
        ({"implementation": "xla_gpu"}, "implementation"),
    ]:
        with pytest.raises(ValueError, match=message):
            Vocabulary(**{"num_embeddings": 100, **options})
    for options in ({"num_probes": 2.5}, {"raises_when_full": 1}):
        with pytest.raises(TypeError):
            Vocabulary(100, **options)


def test_bad_arguments_raise():
    vocabulary = Vocabulary(100)
    state = vocabulary.init()
    with pytest.raises(TypeError, match="`ids` must hold integers"):
        vocabulary.assign(state, np.ones(3), 0)
    with pytest.raises(TypeError, match="step"):
        vocabulary.assign(state, [1], 0.5)
    with pytest.raises(TypeError, match="step"):
        vocabulary.assign(state, [1], jnp.float32(1))
    with pytest.raises(ValueError, match="step"):
        vocabulary.assign(state, [1], -1)
    with pytest.raises(ValueError, match="step"):
        vocabulary.assign(state, [1], jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="where"):
        vocabulary.assign(state, [1], 0, where=[True, False])
    with pytest.raises(TypeError, match="where"):
        vocabulary.assign(state, [1], 0, where=[1])
    with pytest.raises(ValueError, match="one of this vocabulary"):
        Vocabulary(200).lookup(state, [1])
    with pytest.raises(ValueError, match="sketch"):
        Vocabulary(100, admission_count=2).lookup(state, [1])
    with pytest.raises(ValueError, match="max_rows"):
        vocabulary.new_rows(state, -1)


def test_ids_along_an_explicit_axis_are_gathered_and_states_raise():
    mesh = make_mesh("explicit", (2,))
    vocabulary = Vocabulary(64, num_buckets=2)
    state = vocabulary.init()
    with jax.set_mesh(mesh):
        ids = jax.device_put(jnp.arange(8), P("x"))
        rows, after = jax.jit(vocabulary.assign)(state, ids, 0)
        assert len(set(rows.tolist())) == 8
        divided = jax.device_put(after, P("x"))
        with pytest.raises(ValueError, match="Explicit"):
            vocabulary.lookup(divided, ids)


def test_a_step_below_zero_counts_as_zero(implementation):
    vocabulary = Vocabulary(100, implementation=implementation)
    _, state = vocabulary.assign(vocabulary.init(), [1], jnp.int32(-5))
    assert int(state.last_seen.max()) == 0


def test_default_buckets_are_large_and_divide_the_rows():
    for rows, buckets in [(100, 1), (1 << 20, 256), (1_000_000, 64), (1 << 30, 1024)]:
        assert Vocabulary(rows)._num_buckets == buckets

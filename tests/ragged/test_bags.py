"""Bags: every way in, every way out, and through JAX as a pytree."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jbag
from jbag import Bags

LISTS = [[0, 1, 2, 3], [], [4, 5], [6]]
WEIGHTS = [[0.5, 1.5, 2.5, 3.5], [], [4.5, 5.5], [6.5]]


def same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


@pytest.mark.parametrize("row", [list, tuple, np.asarray, jnp.asarray])
def test_lists_pack_end_to_end(row):
    lists = [row(x) for x in LISTS]
    if row in (np.asarray, jnp.asarray):
        lists[1] = np.zeros(0)  # an empty array is floating by default
    bags = Bags.from_lists(lists, WEIGHTS)
    np.testing.assert_array_equal(bags.indices, [0, 1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(bags.offsets, [0, 4, 4, 6, 7])
    np.testing.assert_array_equal(bags.weights, np.arange(7) + 0.5)
    assert (bags.num_bags, bags.capacity, len(bags)) == (4, 7, 4)
    assert bags.indices.dtype == bags.offsets.dtype == np.int32
    assert bags.weights.dtype == np.float32
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(bags))
    np.testing.assert_array_equal(bags.lengths, [4, 0, 2, 1])
    np.testing.assert_array_equal(bags.segment_ids, [0, 0, 0, 0, 2, 2, 3])
    assert bags.to_lists() == LISTS


def test_lists_pack_into_a_capacity_and_a_number_of_bags():
    bags = Bags.from_lists(LISTS, WEIGHTS, capacity=9, num_bags=6)
    assert (bags.num_bags, bags.capacity) == (6, 9)
    np.testing.assert_array_equal(bags.offsets, [0, 4, 4, 6, 7, 7, 7])
    np.testing.assert_array_equal(bags.segment_ids[7:], 6)
    assert bags.to_lists() == [*LISTS, [], []]


def test_nothing_packs():
    for lists in ([], [[]], [[], []], iter([])):
        bags = Bags.from_lists(lists, capacity=3)
        assert bags.capacity == 3
        assert bags.to_lists() in ([], [[]], [[], []])


def test_packing_a_million_ids_is_vectorised():
    rng = np.random.default_rng(0)
    lists = [row.tolist() for row in rng.integers(0, 1000, (50_000, 20))]
    start = time.perf_counter()
    bags = Bags.from_lists(lists)
    # A Python loop over ids with checks takes many times this; no tighter bound holds
    # on a busy machine.
    assert time.perf_counter() - start < 5
    assert bags.capacity == 1_000_000


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ids": [[1], None]}, TypeError, r"`ids\[1\]` must be a list; got None"),
        ({"ids": [[1], "ab"]}, TypeError, r"`ids\[1\]` must be a list; got 'ab'"),
        ({"ids": [1, 2]}, TypeError, r"`ids\[0\]` must be a list; got 1"),
        ({"ids": "ab"}, TypeError, "`ids` must be a list of lists"),
        ({"ids": None}, TypeError, "`ids` must be a list of lists"),
        ({"ids": [[1.5]]}, TypeError, "`indices` must hold integers; got float"),
        ({"ids": [[True]]}, TypeError, r"True at `ids\[0\]\[0\]`"),
        ({"ids": [[[1, 2]]]}, ValueError, "got deeper lists"),
        ({"ids": [[1, [2]]]}, ValueError, "got deeper lists"),
        ({"ids": [[2**31]]}, IndexError, "must fit in int32; got 2147483648"),
        ({"ids": [[2**80]]}, TypeError, "more than 64 bits"),
        (
            {"ids": [[1, 2], [3]], "weights": [[1.0], [2.0, 3.0]]},
            ValueError,
            r"`weights\[0\]` must have the length of `ids\[0\]`, 2; got 1",
        ),
        (
            {"ids": [[1, 2], [3]], "weights": [[1.0, 2.0]]},
            ValueError,
            "`weights` must hold 2 lists, as `ids`; got 1",
        ),
        ({"ids": [[1]], "weights": [["a"]]}, TypeError, r"'a' at `weights\[0\]\[0\]`"),
        ({"ids": [[1, 2]], "capacity": 1}, ValueError, "`capacity` must be at least"),
        (
            {"ids": [[1], [2]], "num_bags": 1},
            ValueError,
            "`num_bags` must be at least 2",
        ),
        ({"ids": [[1]], "capacity": 1.5}, TypeError, "`capacity` must be an integer"),
    ],
)
def test_bad_lists_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        Bags.from_lists(**arguments)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_every_constructor_makes_the_same_bags(convert):
    expected = Bags.from_lists(LISTS, WEIGHTS)
    ids, weights = convert(expected.indices), convert(expected.weights)
    offsets, lengths = convert(expected.offsets), convert(expected.lengths)
    for bags in (
        Bags.from_offsets(ids, offsets, weights, include_last_offset=True),
        Bags.from_offsets(ids, offsets[:-1], weights),
        Bags.from_lengths(ids, lengths, weights),
        Bags.from_segment_ids(ids, convert(expected.segment_ids), 4, weights),
    ):
        same(bags, expected)
        kind = np.ndarray if convert is np.asarray else jax.Array
        assert all(isinstance(x, kind) for x in jax.tree.leaves(bags))
        assert bags.offsets.dtype == np.int32


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_tails_come_from_every_constructor(convert):
    ids = convert([1, 2, 3, 4, 5])
    expected = [0, 2, 3]
    for bags in (
        Bags.from_offsets(ids, convert([0, 2, 3]), include_last_offset=True),
        Bags.from_lengths(ids, convert([2, 1])),
        Bags.from_segment_ids(ids, convert([0, 0, 1, 2, 2]), 2),
    ):
        np.testing.assert_array_equal(bags.offsets, expected)
        np.testing.assert_array_equal(bags.segment_ids, [0, 0, 1, 2, 2])
        assert bags.to_lists() == [[1, 2], [3]]


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_padded_ids_lose_their_empty_slots(convert):
    ids = convert([[5, 9, 6], [9, 9, 9], [7, 8, 9]])
    weights = convert(np.arange(9, dtype=np.float32).reshape(3, 3))
    mask = ids != 9
    for bags in (
        Bags.from_padded(ids, mask, weights),
        Bags.from_padded(ids, weights=weights, pad_id=9),
    ):
        assert bags.capacity == 9
        assert bags.to_lists() == [[5, 6], [], [7, 8]]
        np.testing.assert_array_equal(bags.weights[:4], [0, 2, 6, 7])
        bags.validate(9)
    assert Bags.from_padded(ids).to_lists() == np.asarray(ids).tolist()
    under_jit = jax.jit(lambda i, m, w: Bags.from_padded(i, m, w))(ids, mask, weights)
    same(under_jit, Bags.from_padded(ids, mask, weights))


@pytest.mark.parametrize("length", [4, 6])
@pytest.mark.parametrize("convert", [lambda x: x, on_device])
def test_bags_spread_out_and_back(convert, length):
    bags = convert(Bags.from_lists(LISTS, WEIGHTS, capacity=9))
    padded = bags.to_padded(length)
    assert padded.ids.shape == padded.mask.shape == padded.weights.shape == (4, length)
    back = Bags.from_padded(*padded)
    assert back.to_lists() == LISTS
    table = jnp.asarray(np.random.default_rng(0).normal(size=(7, 2)), jnp.float32)
    np.testing.assert_allclose(
        jbag.embedding_bag(table, back, mode="sum"),
        jbag.embedding_bag(table, bags, mode="sum"),
        rtol=1e-6,
    )


def test_bags_too_long_to_spread_are_never_cut_in_silence():
    bags = Bags.from_lists(LISTS)
    with pytest.raises(
        ValueError, match="`length` must be at least the longest bag, 4"
    ):
        bags.to_padded(3)
    padded = on_device(bags).to_padded(3)
    out = jbag.embedding_bag(jnp.ones((7, 2)), padded.ids)
    np.testing.assert_array_equal(np.isnan(out).all(1), [True, False, False, False])
    with pytest.raises(ValueError, match="`length` must be at least 1; got 0"):
        on_device(bags).to_padded(0)
    assert Bags.from_lists([[], []]).to_padded(2).ids.tolist() == [[0, 0], [0, 0]]


def test_the_tail_alone_can_be_given_up():
    bags = Bags.from_lists(LISTS, WEIGHTS, capacity=20)
    assert bags.pad_to(7).to_lists() == LISTS
    with pytest.raises(
        ValueError, match="`capacity` must be at least the slots in use"
    ):
        bags.pad_to(6)
    # On a device that can't be seen, and must not pass in silence.
    cut = jax.jit(lambda b: jbag.embedding_bag(jnp.ones((7, 2)), b.pad_to(6)))(bags)
    np.testing.assert_array_equal(np.isnan(cut).all(1), [False, False, False, True])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bags.from_lengths([1, 2], [1, -1]), "must be at least 0; got -1"),
        (lambda: Bags.from_lengths([1, 2], [1, 2]), "must sum to at most"),
        (lambda: Bags.from_lengths([1, 2], [[1, 1]]), "`lengths` must be 1-D"),
        (lambda: Bags.from_lengths([[1, 2]], [2]), r"`indices` must be \[N\]"),
        (
            lambda: Bags.from_segment_ids([1, 2], [1, 0], 2),
            "must be sorted; got 1 then",
        ),
        (
            lambda: Bags.from_segment_ids([1, 2], [0, 3], 2),
            r"must lie in \[0, 2\]; got 3",
        ),
        (lambda: Bags.from_segment_ids([1, 2], [-1, 0], 2), "must lie in"),
        (lambda: Bags.from_segment_ids([1, 2], [0], 2), "must have the shape of"),
        (lambda: Bags.from_segment_ids([1, 2], [[0, 1]], 2), "must be 1-D"),
        (lambda: Bags.from_padded([1, 2]), r"`ids` must be \[B, L\]"),
        (
            lambda: Bags.from_padded([[1]], [[True]], pad_id=1),
            "must be None with a mask",
        ),
        (
            lambda: Bags.from_padded([[1]], [[True, True]]),
            "must have the shape of `ids`",
        ),
        (lambda: Bags.from_padded([[1]], None, [[1.0, 2.0]]), "the shape of `ids`"),
        (
            lambda: Bags.from_offsets([1, 2], [0], [1.0]),
            "`weights` must have the shape",
        ),
    ],
)
def test_bad_constructor_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_dtypes_are_type_errors():
    for make in (
        lambda: Bags.from_lengths([1, 2], [1.0]),
        lambda: Bags.from_segment_ids([1, 2], [0.0, 1.0], 2),
        lambda: Bags.from_padded([[1.0]]),
        lambda: Bags.from_padded([[1]], [[1]]),
        lambda: Bags.from_offsets([1.0], [0]),
        lambda: Bags.from_segment_ids([1], [0], 1.0),
    ):
        with pytest.raises(TypeError, match="must"):
            make()


def test_malformed_data_on_a_device_pools_to_nan(implementation):
    table = jnp.ones((7, 2))
    ids = jnp.arange(3)
    pool = lambda bags: np.isnan(
        jbag.embedding_bag(table, bags, implementation=implementation)
    ).all(1)
    unsorted = Bags.from_segment_ids(ids, jnp.array([1, 0, 1]), 2)
    np.testing.assert_array_equal(pool(unsorted), [True, True])
    negative = Bags.from_lengths(ids, jnp.array([1, -1, 1]))
    np.testing.assert_array_equal(pool(negative), [False, True, True])
    too_many = Bags.from_lengths(ids, jnp.array([1, 4]))
    np.testing.assert_array_equal(pool(too_many), [False, True])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int64"])
@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_narrow_segment_ids_count_many_bags(convert, dtype):
    if convert is jnp.asarray and dtype == "int64":
        pytest.skip("JAX keeps 32 bits by default")
    segments = convert(np.array([0, 1, 100], dtype))
    bags = Bags.from_segment_ids(convert([5, 6, 7]), segments, 300)
    np.testing.assert_array_equal(np.flatnonzero(bags.lengths), [0, 1, 100])
    assert bags.offsets[-1] == 3


@pytest.mark.parametrize("pad_id", [300, -1, 2**70])
def test_a_pad_id_that_no_slot_can_hold_marks_none(pad_id):
    for convert in (np.asarray, jnp.asarray):
        ids = convert(np.array([[44, 255]], np.uint8))
        assert Bags.from_padded(ids, pad_id=pad_id).to_lists() == [[44, 255]]


def test_malformed_bags_on_a_device_stay_malformed():
    table = jnp.ones((7, 2))
    pool = lambda bags: np.isnan(jbag.embedding_bag(table, bags)).all(1)
    bags = Bags(jnp.arange(4), jnp.array([0, 2, 9]))
    padded = Bags.from_padded(*bags.to_padded(9))
    np.testing.assert_array_equal(pool(padded), [False, True])
    again = Bags.from_segment_ids(bags.indices, bags.segment_ids, 2)
    np.testing.assert_array_equal(pool(again), [True, True])
    shrunk = Bags(jnp.arange(4), jnp.array([0, 2, 4])).pad_to(2).pad_to(4)
    np.testing.assert_array_equal(pool(shrunk), [False, True])
    for bad in (bags, shrunk):
        with pytest.raises(ValueError, match="`offsets` must not"):
            bad.to_lists()


def test_host_and_traced_parts_mix():
    ids, mask = np.array([[1, 2], [3, 4]]), jnp.array([[True, False], [True, True]])
    bags = jax.jit(lambda m: Bags.from_padded(ids, m))(mask)
    assert bags.to_lists() == [[1], [3, 4]]
    spread = lambda w: Bags(np.arange(3), np.array([0, 1, 3]), w).to_padded(2).weights
    gradient = jax.grad(lambda w: spread(w).sum())(jnp.ones(3))
    np.testing.assert_array_equal(gradient, 1)


def test_lengths_too_large_to_add_up():
    for lengths in (np.array([2**62] * 4), np.array([2**64 - 1, 2], np.uint64)):
        with pytest.raises(ValueError, match="`lengths` must sum to at most"):
            Bags.from_lengths([1, 2], lengths)


@pytest.mark.parametrize("pad_id", [1.5, "x", True, [1]])
def test_a_pad_id_that_is_no_integer(pad_id):
    with pytest.raises(TypeError, match="`pad_id` must be an integer"):
        Bags.from_padded([[1, 2]], pad_id=pad_id)


@pytest.mark.parametrize("convert", [lambda x: x, on_device])
def test_stacked_bags_are_one_batch_at_a_time(convert):
    stacked = convert(jax.tree.map(lambda x: np.stack([x, x]), Bags.from_lists(LISTS)))
    for use in (
        lambda b: b.pad_to(20),
        lambda b: b.to_lists(),
        lambda b: b.to_padded(4),
    ):
        with pytest.raises(ValueError, match=r"one batch.* use jax\.vmap"):
            use(stacked)
    padded = jax.vmap(lambda b: b.pad_to(20))(on_device(stacked))
    assert padded.indices.shape == (2, 20)


def test_validate_looks_at_the_values():
    good = on_device(Bags.from_lists(LISTS, WEIGHTS, capacity=9))
    assert good.validate(7) is good
    with pytest.raises(IndexError, match="got 6 at position 6"):
        good.validate(6)
    with pytest.raises(ValueError, match="must not decrease"):
        dataclasses.replace(good, offsets=jnp.array([0, 3, 1, 4, 7])).validate(7)
    with pytest.raises(ValueError, match="`weights` must have the shape"):
        dataclasses.replace(good, weights=good.weights[:3]).validate(7)


def test_bags_pass_through_jit_vmap_scan_and_device_put():
    bags = Bags.from_lists(LISTS, WEIGHTS)
    same(jax.jit(lambda b: b)(bags), bags)
    placed = jax.device_put(bags, jax.devices()[-1])
    assert placed.indices.devices() == {jax.devices()[-1]}
    same(placed, bags)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), bags)
    assert (stacked.num_bags, stacked.capacity) == (4, 7)
    np.testing.assert_array_equal(
        jax.vmap(lambda b: b.lengths)(stacked)[1], bags.lengths
    )
    same(jax.vmap(lambda b: b)(stacked), stacked)
    _, scanned = jax.lax.scan(lambda c, b: (c, b.segment_ids), 0, stacked)
    np.testing.assert_array_equal(scanned[0], bags.segment_ids)
    assert jax.eval_shape(lambda b: b, bags).num_bags == 4
    names = [
        jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(bags)
    ]
    assert names == [".indices", ".offsets", ".weights"]


def test_bags_pass_through_orbax(tmp_path):
    for bags in (Bags.from_lists(LISTS, WEIGHTS), Bags.from_lists(LISTS)):
        tree = on_device({"batch": bags, "step": 3})
        path = tmp_path / f"checkpoint-{len(jax.tree.leaves(bags))}"
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(path, tree)
        assert isinstance(restored["batch"], Bags)
        same(restored["batch"], bags)


@pytest.mark.usefixtures("x64")
def test_64_bit_ids_stay_where_jax_keeps_them():
    bags = Bags.from_lists([[2**40], [1]])
    assert bags.indices.dtype == np.int64
    assert bags.to_lists() == [[2**40], [1]]


def test_segment_ids_and_offsets_are_inverse():
    offsets = np.array([0, 0, 3, 3, 5], np.int32)
    for convert in (np.asarray, jnp.asarray):
        segments = jbag.offsets_to_segment_ids(convert(offsets), 7)
        np.testing.assert_array_equal(segments, [1, 1, 1, 3, 3, 4, 4])
        assert segments.dtype == np.int32
        back = jbag.segment_ids_to_offsets(segments, 4)
        np.testing.assert_array_equal(back, offsets)
    assert jbag.offsets_to_segment_ids(jnp.array([0]), 0).shape == (0,)
    np.testing.assert_array_equal(
        jbag.offsets_to_segment_ids(jnp.array([0]), 2), [0, 0]
    )
    with pytest.raises(ValueError, match="`capacity` must be at least 0"):
        jbag.offsets_to_segment_ids([0], -1)


@pytest.mark.parametrize("minimum", [4, 64])
def test_buckets_are_few_and_waste_at_most_a_quarter(minimum):
    sizes = [jbag.bucket(n, minimum) for n in range(1, 20_000)]
    for n, size in enumerate(sizes, start=1):
        assert size >= n
        assert size <= max(minimum, 1.25 * n)
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 4 * np.log2(20_000 / minimum) + 2
    assert jbag.bucket(0, minimum) == minimum


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((-1,), ValueError),
        ((1.5,), TypeError),
        ((3, 5), ValueError),
        ((3, 2), ValueError),
    ],
)
def test_bad_buckets_raise(arguments, error):
    with pytest.raises(error):
        jbag.bucket(*arguments)

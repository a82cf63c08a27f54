"""The fourteen meanings, each over every implementation, against the oracle."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from modes import PAIRS, TWO, every_mode
from oracle import MODES, assert_close
from pooling import WORKED_IDS, WORKED_OFFSETS, check, make_table, make_weights
from slow import every_kernel, slow

import jbag

# Flat ids with offsets [B + 1]: what every mode must get right.
CASES = {
    "worked example": (WORKED_IDS, WORKED_OFFSETS),
    "all bags empty": ([], [0, 0, 0]),
    "no bags": ([], [0]),
    "one huge bag": ([7] + [0, 5, 9] * 300 + [2], [0, 1, 901, 902]),
    "nothing but tail": ([1, 2, 3], [0, 0]),
    "no bags and tail": ([1, 2, 3], [0]),
    # Of one shape, which compiles once.
    "empty bags at both ends and within": ([3, 1, 2, 4, 4, 5, 6], [0, 0, 2, 2, 7, 7]),
    "duplicates": ([4, 4, 4, 1, 4, 1, 1], [0, 3, 7, 7, 7, 7]),
    "tail slots": ([1, 2, 3, 4, 5, 0, 9], [0, 1, 3, 3, 4, 4]),
}


# At XLA's best level, as users compile.
OPTIMIZED = ("worked example", *list(CASES)[-3:])
# Of the shapes with few slots or none, each with weights or without.
WEIGHTED = {"all bags empty": (False,), "no bags and tail": (False,)}
WEIGHTED |= {"no bags": (True,), "nothing but tail": (True,), "one huge bag": (True,)}
EACH = [(case, w) for case in CASES for w in WEIGHTED.get(case, (False, True))]


@pytest.mark.parametrize(
    ("case", "weighted", "optimized"),
    [
        *((case, weighted, case in OPTIMIZED) for case, weighted in EACH),
        *slow(*((case, w, True) for case, w in EACH if case not in OPTIMIZED)),
    ],
)
def test_value_and_gradients_equal_the_oracle(
    case, weighted, optimized, implementation
):
    ids, offsets = CASES[case]
    weights = make_weights(len(ids)) if weighted else None
    # Where there are few slots or none, the slow tests have every mode.
    modes = TWO if case in WEIGHTED and not optimized else MODES
    options = {"optimized": optimized, "implementation": implementation}
    check(make_table(), ids, offsets, weights, modes=modes, **options)


# With weights of each dtype, 16-bit tables are in test_dtypes.py.
@every_kernel
@pytest.mark.parametrize(
    ("dtype", "weighted"), [("bfloat16", False), *slow(("float16", True))]
)
def test_every_16_bit_dtype_equals_the_oracle(dtype, weighted, implementation):
    weights = make_weights(10, dtype) if weighted else None
    options = {"optimized": True, "implementation": implementation}
    check(make_table(dtype), WORKED_IDS, WORKED_OFFSETS, weights, **options)


@pytest.mark.usefixtures("x64")
def test_float64_equals_the_oracle(implementation):
    weights = make_weights(10, "float64")
    options = {"optimized": True, "implementation": implementation}
    check(make_table("float64"), WORKED_IDS, WORKED_OFFSETS, weights, **options)


@every_kernel
@pytest.mark.parametrize("features", [0, 1, 10, *slow(3, 64, 300)])
def test_every_width_equals_the_oracle(features, implementation):
    table, options = make_table(features=features), {"implementation": implementation}
    check(table, WORKED_IDS, WORKED_OFFSETS, modes=TWO, **options)


@every_kernel
@pytest.mark.parametrize("seed", [1, 6, *slow(3, 4)])
def test_random_bags_with_every_option_equal_the_oracle(seed, implementation):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 6, size=rng.integers(1, 12))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(0, 10, size=offsets[-1] + rng.integers(0, 5))
    check(
        make_table(seed=seed),
        ids.tolist(),
        offsets.tolist(),
        make_weights(len(ids), seed=seed) if seed % 2 else None,
        padding_idx=[None, 3, -1][seed % 3],
        max_norm=[None, 1.1][seed // 2 % 2],
        norm_type=[2.0, 1.0, np.inf, 3.0][seed % 4],
        scale_grad_by_freq=bool(seed // 4),
        modes=PAIRS[seed % 3],
        implementation=implementation,
    )


# Every three of the four together: with each padding half of the eight others, no two
# of which differ in one alone; with the next padding the other half. All but
# a few are slow; in these, of two modes each, every two of the flags stand together.
FEW = [(None, 0, 0, 1), (None, 1, 1, 1), (4, 0, 1, 1), (4, 1, 1, 0)]
FEW += [(-10, 0, 1, 0), (-10, 1, 0, 0)]
COMBINATIONS = [
    (padding_idx, *flags)
    for k, padding_idx in enumerate([None, 4, -10])
    for flags in itertools.product([False, True], repeat=3)
    if (sum(flags) + k) % 2
]


@pytest.mark.parametrize(
    ("padding_idx", "limited", "freq", "weighted", "modes"),
    [
        *((*case, PAIRS[k % 3]) for k, case in enumerate(FEW)),
        *slow(*((*case, MODES) for case in COMBINATIONS if case not in FEW)),
    ],
)
def test_options_combine(padding_idx, limited, freq, weighted, modes, implementation):
    ids = [0, 4, 2, 4, 4, 0, 4, 4, 7, 8, 0]
    check(
        make_table(),
        ids,
        [0, 4, 6, 8, 10],
        make_weights(len(ids)) if weighted else None,
        padding_idx=padding_idx,
        max_norm=0.5 if limited else None,
        scale_grad_by_freq=bool(freq),
        modes=modes,
        implementation=implementation,
    )


@pytest.mark.parametrize("mode", MODES)
def test_the_last_offset_is_read_in_both_ways(mode, implementation):
    pool = functools.partial(
        jbag.embedding_bag, make_table(), mode=mode, implementation=implementation
    )
    starts = pool(WORKED_IDS, [0, 4, 6])
    ends = pool(WORKED_IDS, WORKED_OFFSETS, include_last_offset=True)
    four_bags = pool(WORKED_IDS, WORKED_OFFSETS)
    bags = pool(jbag.Bags.from_lists([[0, 1, 2, 3], [4, 5], [6, 0, 7, 8]]))
    assert starts.shape == (3, 3)
    np.testing.assert_array_equal(starts, ends)
    np.testing.assert_array_equal(starts, bags)
    np.testing.assert_array_equal(four_bags[:3], starts)
    np.testing.assert_array_equal(four_bags[3], 0)


@pytest.mark.parametrize(
    ("shape", "weighted"),
    [
        ((4, 5), True),
        ((1, 1), False),
        ((3, 0), True),
        ((0, 4), True),
        ((0, 0), False),
        *slow(((4, 5), False)),
    ],
)
def test_rectangular_indices_are_bags_of_one_length(shape, weighted, implementation):
    check(
        make_table(),
        np.random.default_rng(0).integers(0, 10, size=shape),
        None,
        make_weights(shape) if weighted else None,
        padding_idx=3,
        scale_grad_by_freq=True,
        max_norm=1.0,
        modes=MODES if shape == (4, 5) else TWO,
        implementation=implementation,
    )


@every_kernel
def test_tail_slots_may_hold_anything(implementation):
    table, limit = make_table(), {"max_norm": 1.0}
    results = every_mode(
        table,
        jnp.array([1.0, 2.0, jnp.nan, jnp.inf, -jnp.inf]),
        jnp.array([1, 2, 99, -7, 2**31 - 1]),
        jnp.array([0, 1, 2]),
        jnp.ones((2, 3)),
        include_last_offset=True,
        scale_grad_by_freq=True,
        implementation=implementation,
        **limit,
    )
    bags = [[(1, 1.0)], [(2, 2.0)]]
    for mode, (value, to_table, to_weights) in results.items():
        assert_close(value, oracle.forward(table, bags, mode, **limit))
        meant = oracle.gradients(table, bags, np.ones((2, 3)), mode, **limit)
        assert_close(to_table, meant[0])
        assert_close(to_weights[:2], np.concatenate(meant[1]))
        np.testing.assert_array_equal(to_weights[2:], 0)


@pytest.mark.parametrize(("weighted", "padding_idx"), [(True, -8), *slow((False, 2))])
def test_padding_never_leaks(weighted, padding_idx, implementation):
    weights = jnp.array([jnp.nan, 1.0, jnp.inf, 2.0, 3.0, -1.0]) if weighted else None
    results = every_mode(
        make_table().at[2].set(jnp.nan),
        weights,
        jnp.array([2, 1, 2, 2, 3, 5]),
        jnp.array([0, 2, 4]),
        jnp.ones((3, 3)),
        padding_idx=padding_idx,
        max_norm=1.0,
        implementation=implementation,
    )
    for value, to_table, to_weights in results.values():
        assert np.isfinite(value).all()
        np.testing.assert_array_equal(value[1], 0)
        assert np.isfinite(to_table).all()
        np.testing.assert_array_equal(to_table[2], 0)
        if weighted:
            assert np.isfinite(to_weights).all()
            np.testing.assert_array_equal(np.asarray(to_weights)[[0, 2, 3]], 0)


@pytest.mark.parametrize(
    ("rectangular", "padding_idx"), [(False, -1), (True, 2), *slow((True, -1))]
)
def test_negative_ids_on_a_device_are_no_padding(
    rectangular, padding_idx, implementation
):
    padding = padding_idx % 10
    # Within, -1 and -2 may stand for what is empty and what is unknown.
    ids = np.array([padding, 1, -1, padding, -2, 3, -8, 4, padding, padding])
    table, weights, offsets = make_table(), make_weights(10), np.arange(0, 11, 2)
    bags = oracle.slices(ids, offsets, weights)
    for mode in MODES:
        expected = oracle.forward(table, bags, mode, padding)
        np.testing.assert_array_equal(np.isnan(expected).all(1), [0, 1, 1, 1, 0])
    options = {"padding_idx": padding_idx, "implementation": implementation}
    options["modes"] = TWO if rectangular else MODES
    if rectangular:
        ids, weights, offsets = ids.reshape(5, 2), weights.reshape(5, 2), None
    check(table, ids, offsets, weights, **options)


@pytest.mark.parametrize("mode", ["mean", "sqrtn"])
def test_a_zero_denominator_pools_to_zero_with_zero_gradient(mode, implementation):
    table = make_table()
    weights = jnp.array([1.0, -1.0, 0.0]) if mode == "mean" else jnp.zeros(3)

    def pool(table, weights):
        return jbag.embedding_bag(
            table,
            [[1, 2, 3]],
            mode=mode,
            weights=weights[None],
            implementation=implementation,
        )

    value, pullback = jax.vjp(pool, table, weights)
    np.testing.assert_array_equal(value, 0)
    for gradient in pullback(jnp.ones_like(value)):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("sum", [7.0, 8.0]), ("mean", [7 / 4, 2.0]), ("sqrtn", [2.21359436, 2.52982213])],
)
def test_weighted_modes_mean_what_tensorflow_means(mode, expected, implementation):
    # tf.nn.embedding_lookup_sparse documents sum(w e) / sum(w) and / sqrt(sum(w^2)).
    table = jnp.array([[1.0, 2.0], [2.0, 2.0]])
    out = jbag.embedding_bag(
        table,
        [[0, 1]],
        mode=mode,
        weights=[[1.0, 3.0]],
        implementation=implementation,
    )
    np.testing.assert_allclose(out[0], expected, rtol=1e-6)


@every_kernel
@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_first_of_several_winners_takes_the_whole_gradient(mode, implementation):
    table = jnp.array([[1.0, 5.0], [1.0, 5.0], [1.0, 5.0]])
    pool = lambda t: jbag.embedding_bag(
        t,
        jnp.array([2, 1, 0]),
        jnp.array([0]),
        mode=mode,
        implementation=implementation,
    ).sum()
    np.testing.assert_array_equal(jax.grad(pool)(table), [[0, 0], [0, 0], [1, 1]])


@every_kernel
@pytest.mark.parametrize("rectangular", [False, True])
def test_a_nan_wins_wherever_it_stands(rectangular, implementation):
    table = jnp.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [jnp.nan, 0.5]])
    for position in range(3):
        ids = np.insert([1, 2], position, 3)
        results = every_mode(
            table,
            None,
            jnp.asarray(ids[None] if rectangular else ids),
            None if rectangular else jnp.array([0]),
            jnp.ones((1, 2)),
            modes=("max", "min"),
            implementation=implementation,
        )
        for value, gradient, _ in results.values():
            assert np.isnan(value[0, 0])
            assert not np.isnan(value[0, 1])
            assert gradient[3, 0] == 1


@every_kernel
@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("worst", [-np.inf, np.inf])
def test_infinities_pool_as_numbers(worst, mode, implementation):
    table = jnp.full((3, 2), worst)
    value, pullback = jax.vjp(
        lambda t: jbag.embedding_bag(
            t,
            [0, 1, 2],
            [0, 2, 3],
            mode=mode,
            padding_idx=0,
            implementation=implementation,
        ),
        table,
    )
    np.testing.assert_array_equal(value[:2], worst)
    (gradient,) = pullback(jnp.ones_like(value))
    np.testing.assert_array_equal(gradient, [[0, 0], [1, 1], [1, 1]])


def test_max_norm_leaves_the_table_and_passes_the_gradient_by(implementation):
    table = make_table() * 10
    before = np.array(table)
    run = functools.partial(
        every_mode,
        weights=None,
        ids=jnp.array(WORKED_IDS),
        offsets=jnp.array([0, 4, 6]),
        cotangent=jnp.ones((3, 3)),
        modes=TWO,
        implementation=implementation,
    )
    limited = run(table, max_norm=1.0)
    np.testing.assert_array_equal(table, before)
    jax.tree.map(assert_close, limited, run(jbag.renorm(table, WORKED_IDS, 1.0)))


def test_max_norm_may_be_traced(implementation):
    table = make_table() * 10
    pool = lambda n: jbag.embedding_bag(
        table, WORKED_IDS, [0], max_norm=n, implementation=implementation
    )
    assert_close(jax.jit(pool)(1.0), pool(1.0))


@every_kernel
@pytest.mark.parametrize("shape", [(0, 3), (0, 0), (4, 0)])
def test_empty_tables_pool_empty_bags_to_zero(shape, implementation):
    bag = functools.partial(jbag.embedding_bag, implementation=implementation)

    @jax.jit
    def pool(table, ids):
        return {
            mode: (bag(table, [], [0, 0], mode=mode), bag(table, ids, mode=mode))
            for mode in MODES
        }

    for empty, unknown in pool(jnp.zeros(shape), jnp.array([[7]])).values():
        np.testing.assert_array_equal(empty, np.zeros((2, shape[1])))
        np.testing.assert_array_equal(unknown, np.full((1, shape[1]), np.nan))


def test_sparse_gives_the_same_value_and_gradient(implementation):
    table = make_table()
    pool = lambda t, sparse: jbag.embedding_bag(
        t, [[1, 1, 2]], sparse=sparse, implementation=implementation
    ).sum()
    assert pool(table, True) == pool(table, False)
    np.testing.assert_array_equal(
        jax.grad(pool)(table, True), jax.grad(pool)(table, False)
    )


def test_lists_numpy_and_device_arrays_give_the_same(implementation):
    table = np.asarray(make_table())
    results = [
        jbag.embedding_bag(
            as_table(table),
            as_ids(WORKED_IDS),
            as_ids([0, 4, 6]),
            implementation=implementation,
        )
        for as_table, as_ids in itertools.product(
            (np.asarray, jnp.asarray), (list, np.asarray, jnp.asarray)
        )
    ]
    for result in results:
        np.testing.assert_array_equal(result, results[0])


@every_kernel
def test_results_are_the_same_from_run_to_run(implementation):
    rng = np.random.default_rng(0)
    table = make_table(rows=100, features=17)
    ids = jnp.asarray(rng.integers(0, 100, 5000), jnp.int32)
    offsets = jnp.asarray(np.sort(rng.integers(0, 5000, 63)), jnp.int32).at[0].set(0)
    run = jax.jit(
        jax.value_and_grad(
            lambda t: jbag.embedding_bag(
                t, ids, offsets, implementation=implementation
            ).sum()
        )
    )
    first, second = run(table), run(table)
    jax.tree.map(np.testing.assert_array_equal, first, second)

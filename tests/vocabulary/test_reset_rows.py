"""What is evicted gives its row back clean, in the table and in the optimizer."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jbag
from jbag.vocabulary import Vocabulary, reset_rows, split_ids

V, D = 300, 3
normal = jax.nn.initializers.normal(0.1)
ones = jax.nn.initializers.ones
OPTIMIZERS = {
    "sgd": jbag.optim.sgd(0.1, momentum=0.9),
    "adagrad": jbag.optim.adagrad(0.1, initial_accumulator_value=0.5),
    "rowwise_adagrad": jbag.optim.rowwise_adagrad(0.1),
    "adam": jbag.optim.adam(0.1),
    "rowwise_adam": jbag.optim.rowwise_adam(0.1),
    "ftrl": jbag.optim.ftrl(0.1),
    "optax.adam": optax.adam(0.1),
    "optax.adagrad": optax.adagrad(0.1, initial_accumulator_value=0.2),
    "chain": optax.chain(optax.clip(1.0), optax.trace(0.9), optax.scale_by_adam()),
}
ROWS = jnp.array([2, 5, 299, V, V, V], jnp.int32)


def is_reset(shape):
    return jnp.isin(jnp.arange(shape[0]), ROWS).reshape(-1, *[1] * (len(shape) - 1))


def filled(tree):
    """Return a tree of other values than any initial ones."""
    return jax.tree.map(lambda x: jnp.full_like(x, 7), tree)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_and_their_states_are_as_at_the_start(name, dtype):
    optimizer = OPTIMIZERS[name]
    old = jnp.full((V, D), 7, dtype)
    state = filled(optimizer.init(old))
    reset = jax.jit(
        functools.partial(reset_rows, optimizer=optimizer, initializer=ones)
    )
    table, new_state = reset(ROWS, old, state, key=jax.random.key(0))
    assert table.dtype == old.dtype
    expected = jnp.where(is_reset((V, 1)), jnp.ones_like(old), old)
    np.testing.assert_array_equal(table, expected)
    fresh = optimizer.init(jnp.ones((V, D), dtype))
    for before, after, start in zip(
        *map(jax.tree.leaves, (state, new_state, fresh)), strict=True
    ):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
        rows = is_reset(before.shape) if before.ndim else False
        np.testing.assert_array_equal(after, jnp.where(rows, start, before))
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


@pytest.mark.standard_promotion
def test_one_table_of_several_is_reset():
    params = {
        "item": jnp.ones((V, D)),
        "other": jnp.ones((V, D)),
        "dense": {"kernel": jnp.ones((D, V))},
    }
    labels = {"item": "tables", "other": "tables", "dense": "rest"}
    optimizer = optax.partition(
        {"tables": jbag.optim.adagrad(0.1), "rest": optax.adam(0.1)}, labels
    )
    state = filled(optimizer.init(params))
    options = {"optimizer": optimizer, "key": jax.random.key(1), "initializer": normal}
    select = {"table": lambda params: params["item"]}
    new, new_state = jax.jit(
        lambda params, state: reset_rows(ROWS, params, state, **options, **select)
    )(params, state)
    changed = {
        jax.tree_util.keystr(path): np.flatnonzero((x != y).reshape(len(x), -1).any(1))
        for (path, x), y in zip(
            jax.tree_util.tree_leaves_with_path((params, state)),
            jax.tree.leaves((new, new_state)),
            strict=True,
        )
        if x.ndim and (x != y).any()
    }
    assert len(changed) == 2
    assert all("item" in path for path in changed)
    assert all(rows.tolist() == [2, 5, 299] for rows in changed.values())
    frozen, _ = reset_rows(
        ROWS,
        flax.core.freeze(params),
        key=jax.random.key(1),
        initializer=normal,
        **select,
    )
    np.testing.assert_allclose(frozen["item"], new["item"], rtol=1e-6)


def test_a_row_depends_on_the_key_and_itself_alone():
    draw = functools.partial(reset_rows, initializer=normal)
    table = jnp.zeros((5000, 16))
    rows = jnp.arange(5000, dtype=jnp.int32)
    every, _ = draw(rows, table, key=jax.random.key(0))
    some, _ = draw(rows[1234:1240], table, key=jax.random.key(0))
    np.testing.assert_allclose(some[1234:1240], every[1234:1240], rtol=1e-6)
    assert not some[:1234].any()
    assert not some[1240:].any()
    other, _ = draw(rows, table, key=jax.random.key(1))
    assert (np.array(every) != np.array(other)).mean() > 0.99
    legacy, _ = draw(rows, table, key=jax.random.PRNGKey(0))
    np.testing.assert_allclose(legacy, every, rtol=1e-6)


def test_drawn_rows_have_the_distribution_of_the_initializer():
    rows = jnp.arange(8192, dtype=jnp.int32)
    key = jax.random.key(3)
    table, _ = reset_rows(rows, jnp.zeros((8192, 32)), key=key, initializer=normal)
    values = np.array(table) / 0.1
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert abs((values**4).mean() - 3) < 0.1
    for axis in (0, 1):  # of neighbouring rows and columns
        a, b = np.split(values, [values.shape[axis] // 2], axis=axis)
        assert abs((a * b).mean()) < 0.01
        a, b = (np.delete(values, at, axis=axis) for at in (0, -1))
        assert abs((a * b).mean()) < 0.01
    uniform = jax.nn.initializers.uniform(1.0)
    table, _ = reset_rows(rows, jnp.zeros((8192, 32)), key=key, initializer=uniform)
    counts, _ = np.histogram(np.array(table), bins=64, range=(0, 1))
    expected = table.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 120


@pytest.mark.usefixtures("x64")
def test_float64_and_other_bits_are_drawn():
    rows = jnp.arange(64, dtype=jnp.int32)
    for dtype in ("float64", "float16"):
        for initializer in (
            jax.nn.initializers.truncated_normal(1.0),
            jax.nn.initializers.variance_scaling(1.0, "fan_in", "uniform"),
        ):
            table, _ = reset_rows(
                rows,
                jnp.zeros((64, 32), dtype),
                key=jax.random.key(0),
                initializer=initializer,
            )
            assert table.dtype == dtype
            assert len(np.unique(table)) > 500
            assert float(table.astype("float64").std()) > 0.1


def test_evicted_rows_start_clean_in_the_step_that_evicts(require):
    require("cpu")
    vocabulary = Vocabulary(9, num_buckets=1)
    optimizer = jbag.optim.adagrad(1.0)
    table = jnp.zeros((9, 2))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(trained, words, at):
        table, opt_state, state = trained
        rows, state = vocabulary.assign(state, words, at)
        table, opt_state = reset_rows(
            vocabulary.new_rows(state, rows.size),
            table,
            opt_state,
            optimizer=optimizer,
            key=jax.random.fold_in(jax.random.key(0), at),
            initializer=ones,
        )
        start = table

        def loss(table):
            pooled = jbag.embedding_bag(table, rows[:, None], mode="sum", sparse=True)
            return pooled.sum()

        updates, opt_state = optimizer.update(jbag.grad(loss)(table), opt_state, table)
        return (optax.apply_updates(table, updates), opt_state, state), (rows, start)

    trained = table, optimizer.init(table), vocabulary.init()
    with jax.numpy_dtype_promotion("standard"):
        for at in range(12):
            words = split_ids(np.arange(at * 3, at * 3 + 5))
            trained, (rows, start) = step(trained, words, at)
            new = np.array(vocabulary.new_rows(trained[2], 5))
            new = new[new < 9]
            assert len(new) == (5 if at == 0 else 3)
            assert (np.array(start)[new] == 1).all()
            # One step of Adagrad from a sum of zero.
            np.testing.assert_allclose(np.array(trained[0])[new], 0, atol=1e-5)
            accumulated = np.array(trained[1].states["sum_of_squares"])
            assert (accumulated[new] == 1).all()
            kept = np.setdiff1d(rows, new)
            assert (accumulated[kept] == 2).all() or at == 0


@pytest.mark.parametrize("name", ["rowwise_adagrad", "adam", "optax.adam"])
def test_a_large_table_is_reset_in_place(name):
    optimizer = OPTIMIZERS[name]
    reset = jax.jit(
        lambda table, state, rows, key: reset_rows(
            rows, table, state, optimizer=optimizer, key=key, initializer=normal
        ),
        donate_argnums=(0, 1),
    )
    table = jax.ShapeDtypeStruct((100_000, 64), jnp.float32)
    state = jax.eval_shape(optimizer.init, table)
    key = jax.random.key(0)
    rows = jax.ShapeDtypeStruct((4096,), jnp.int32)
    memory = reset.lower(table, state, rows, key).compile().memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((table, state)))
    assert memory.alias_size_in_bytes >= held - 64
    assert memory.temp_size_in_bytes < 4 << 20


def test_bad_arguments_raise():
    table = jnp.ones((4, 2))
    optimizer = jbag.optim.adam(0.1)
    options = {"key": jax.random.key(0), "initializer": normal}
    rows = jnp.array([1], jnp.int32)
    with pytest.raises(TypeError, match="together"):
        reset_rows(rows, table, optimizer.init(table), **options)
    with pytest.raises(TypeError, match="together"):
        reset_rows(rows, table, optimizer=optimizer, **options)
    with pytest.raises(ValueError, match="must be a state of"):
        reset_rows(rows, table, (), optimizer=optimizer, **options)
    wrong = optimizer.init(jnp.ones((5, 2)))
    with pytest.raises(ValueError, match="must be a state of"):
        reset_rows(rows, table, wrong, optimizer=optimizer, **options)
    with pytest.raises(ValueError, match="select a leaf"):
        reset_rows(rows, {"a": table}, **options)
    with pytest.raises(TypeError, match="`table` must be a matrix of"):
        reset_rows(rows, jnp.ones((4, 2), jnp.int32), **options)
    with pytest.raises(TypeError, match="PackedTable"):
        reset_rows(rows, jbag.pack(table, always=True), **options)
    flat = optax.GradientTransformation(lambda x: jnp.zeros(x.size), None)
    with pytest.raises(ValueError, match=r"must have the shape \[4, ...\]"):
        reset_rows(rows, table, flat.init(table), optimizer=flat, **options)

"""Rounding at random, of bfloat16 tables."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jbag
from jbag import optim


def drift(dtype, seed, implementation=None):
    """Take 200 steps of 1e-4 down from one with two tables; return them."""
    optimizer = optim.sgd(1e-4, stochastic_rounding=seed)
    ids, start = jnp.arange(8)[None], jnp.ones((10, 64), dtype)

    def loss(tables):
        options = {"mode": "sum", "sparse": True, "implementation": implementation}
        return sum(jbag.embedding_bag(t, ids, **options).sum() for t in tables)

    def step(carry, _):
        tables, state = carry
        updates, state = optimizer.update(jbag.grad(loss)(tables), state, tables)
        return (optax.apply_updates(tables, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=200)[0][0])
    return run(([start, start], optimizer.init([start, start])))


def test_rounding_at_random_is_right_on_average(implementation):
    expected = 1 - 200 * 1e-4
    np.testing.assert_array_equal(drift("bfloat16", None, implementation)[0], 1)
    tables = drift("bfloat16", 3, implementation)
    for table in tables:
        assert table.dtype == jnp.bfloat16
        np.testing.assert_array_equal(table[8:], 1)
        moved = np.asarray(table[:8], np.float64)
        # Each of the 512 numbers strays by 0.009, and their mean by 0.0004.
        assert abs(moved.mean() - expected) < 0.0016
        assert 0.006 < moved.std() < 0.012
    assert (tables[0] != tables[1]).any()
    for a, b in zip(tables, drift("bfloat16", 3, "xla"), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (tables[0] != drift("bfloat16", 4, "xla")[0]).any()


def test_rounding_at_random_leaves_other_dtypes():
    np.testing.assert_array_equal(drift("float32", 3)[0], drift("float32", None)[0])


def test_any_integer_is_a_seed():
    np.testing.assert_array_equal(
        drift("bfloat16", 2**40 + 3)[0], drift("bfloat16", 3)[0]
    )


def test_the_seed_may_be_injected():
    optimizer = optax.inject_hyperparams(optim.sgd)(0.1, stochastic_rounding=3)
    table = jnp.ones((5, 2), jnp.bfloat16)
    rows = jbag.RowSparse.from_rows([3], jnp.ones((1, 2)), num_embeddings=5)
    _, state = jax.jit(optimizer.update)(rows, optimizer.init(table), table)
    assert state.hyperparams["stochastic_rounding"] == 3

"""`renorm` against the oracle."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jbag


def make_table(dtype="float32"):
    return jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)) * 3, dtype)


def renormed(table, ids, max_norm, norm_type):
    out = np.asarray(table, np.float64).copy()
    for i in set(ids):
        out[i] = oracle.used_row(np.asarray(table, np.float64), i, max_norm, norm_type)
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, math.inf])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 4.0, 100.0])
def test_named_rows_are_scaled_down(max_norm, norm_type, dtype):
    table = make_table(dtype)
    ids = [0, 3, 3, 5, 0]
    out = jbag.renorm(table, ids, max_norm, norm_type)
    assert out.dtype == table.dtype
    oracle.assert_close(out, renormed(table, ids, max_norm, norm_type))
    np.testing.assert_array_equal(out[1], table[1])


def test_ids_come_in_every_form():
    table = make_table()
    expected = jbag.renorm(table, [0, 3, 5], 0.5)
    bags = jbag.Bags.from_lists([[0], [3, 5]], capacity=6)  # whose tail holds zeros
    without = jbag.renorm(table, jbag.Bags.from_lists([[3], [5]], capacity=6), 0.5)
    for ids in (np.array([[0, 3], [5, 5]]), jnp.array([5, 3, 0]), bags):
        np.testing.assert_array_equal(jbag.renorm(table, ids, 0.5), expected)
    np.testing.assert_array_equal(without[0], table[0])
    on_device = jax.jit(lambda b: jbag.renorm(table, b, 0.5))(bags)
    np.testing.assert_allclose(on_device, expected, rtol=1e-6)


def test_ids_that_are_no_rows():
    table = make_table()
    for ids in ([6], [-1], np.array([[0, 6]])):
        with pytest.raises(IndexError, match=r"`indices` must lie in \[0, 6\)"):
            jbag.renorm(table, ids, 0.5)
    with pytest.raises(TypeError, match="`indices` must hold integers"):
        jbag.renorm(table, [0.5], 0.5)
    unchanged = jbag.renorm(table, jnp.array([-1, 6, 99]), 0.5)
    np.testing.assert_array_equal(unchanged, table)


def test_64_bit_ids_never_wrap():
    table = make_table()
    bags = jbag.Bags(np.array([2**32 + 1]), jnp.array([0, 1]))
    np.testing.assert_array_equal(jbag.renorm(table, bags, 0.1), table)


def test_a_norm_must_be_given():
    with pytest.raises(TypeError, match="`max_norm` must be a number; got None"):
        jbag.renorm(make_table(), [0], None)


def test_the_scaling_is_a_constant_to_autodiff():
    table = make_table()
    scale = jbag.renorm(table, [0], 0.5)[0] / table[0]
    gradient = jax.grad(lambda t: jbag.renorm(t, [0], 0.5).sum())(table)
    np.testing.assert_allclose(gradient[0], scale, rtol=1e-5)
    np.testing.assert_array_equal(gradient[1:], 1)
    zero = jax.grad(lambda t: jbag.renorm(t, [0], 0.5).sum())(jnp.zeros((2, 3)))
    np.testing.assert_array_equal(zero, 1)


def test_empty_tables_and_ids():
    assert jbag.renorm(jnp.zeros((0, 3)), [], 1.0).shape == (0, 3)
    assert jbag.renorm(jnp.zeros((3, 0)), [1], 1.0).shape == (3, 0)

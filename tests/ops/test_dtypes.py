"""Each dtype of tables, weights and ids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from modes import TWO
from oracle import MODES
from pooling import WORKED_IDS, WORKED_OFFSETS, check, make_table, make_weights
from slow import every_kernel

import jbag


@pytest.mark.parametrize(
    ("dtype", "rectangular"),
    [("bfloat16", False), ("bfloat16", True), ("float16", False)],
)
def test_sums_of_16_bits_run_in_float32_both_ways(dtype, rectangular, implementation):
    table = jnp.ones((2, 3), dtype)
    ids, offsets = jnp.zeros(1000, int), jnp.array([0])
    if rectangular:
        ids, offsets = ids[None], None
    pool = lambda t: jbag.embedding_bag(
        t, ids, offsets, mode="sum", implementation=implementation
    )
    value, pullback = jax.vjp(pool, table)
    np.testing.assert_array_equal(np.asarray(value, float), 1000)
    (gradient,) = pullback(jnp.ones_like(value))
    np.testing.assert_array_equal(np.asarray(gradient, float), [[1000] * 3, [0] * 3])


@pytest.mark.parametrize("mode", ["max", "min"])
def test_gradients_of_16_bit_extrema_run_in_float32(mode, implementation):
    # A thousand bags, each won by row 0.
    pool = lambda t: jbag.embedding_bag(
        t, jnp.zeros((1000, 1), int), mode=mode, implementation=implementation
    ).sum(dtype=jnp.float32)
    gradient = jax.grad(pool)(jnp.ones((2, 3), "bfloat16"))
    np.testing.assert_array_equal(np.asarray(gradient[0], float), 1000)


def test_weight_gradients_of_16_bits_run_in_float32(implementation):
    table = jnp.ones((1, 1000), "bfloat16")
    pool = lambda w: jbag.embedding_bag(
        table, [[0]], mode="sum", weights=w, implementation=implementation
    ).sum(dtype=jnp.float32)
    gradient = jax.grad(pool)(jnp.ones((1, 1), "bfloat16"))
    assert float(gradient[0, 0]) == 1000


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_of_another_dtype_keep_the_dtype_of_the_table(dtype, implementation):
    table = make_table("bfloat16")
    weights = make_weights(10, dtype)
    options = {"modes": MODES if dtype == "bfloat16" else TWO}
    options["implementation"] = implementation
    check(table, WORKED_IDS, WORKED_OFFSETS, weights, **options)


@every_kernel
@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
)
def test_every_integer_dtype_names_rows(dtype, implementation):
    table = make_table()
    ids = np.asarray(WORKED_IDS, dtype)
    offsets = np.asarray([0, 4, 6], dtype)
    options = {"implementation": implementation}
    expected = jbag.embedding_bag(table, WORKED_IDS, [0, 4, 6], **options)
    np.testing.assert_array_equal(
        jbag.embedding_bag(table, ids, offsets, **options), expected
    )
    if np.dtype(dtype).itemsize < 8:
        on_device = jbag.embedding_bag(
            table, jnp.asarray(ids), jnp.asarray(offsets), **options
        )
        np.testing.assert_array_equal(on_device, expected)


@every_kernel
@pytest.mark.usefixtures("x64")
def test_64_bit_ids_never_wrap(implementation):
    table = make_table()
    ids = jnp.array([2**32 + 1, 1, 2])
    pool = lambda t: jbag.embedding_bag(
        t, ids, jnp.array([0, 1]), max_norm=100.0, implementation=implementation
    )
    out, pullback = jax.vjp(pool, table)
    np.testing.assert_array_equal(np.isnan(out).all(1), [True, False])
    (gradient,) = pullback(jnp.ones_like(out))
    np.testing.assert_array_equal(gradient[:3], [[0] * 3, [0.5] * 3, [0.5] * 3])
    np.testing.assert_array_equal(jbag.renorm(table, ids[:1], 0.0), table)
    unsigned = jbag.embedding_bag(
        table,
        ids[1:].astype(jnp.uint64),
        jnp.array([0]),
        implementation=implementation,
    )
    assert np.isfinite(unsigned).all()


@every_kernel
def test_unsigned_ids_never_wrap(implementation):
    ids = jnp.array([2**32 - 1, 1], jnp.uint32)
    out = jbag.embedding_bag(
        make_table(), ids, jnp.array([0, 1]), implementation=implementation
    )
    np.testing.assert_array_equal(np.isnan(out).all(1), [True, False])

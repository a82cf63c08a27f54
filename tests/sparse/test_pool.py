import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jbag
from jbag.sparse import _jaxpr_analysis

V, D = 12, 3
IDS = np.array([0, 1, 2, 3, 4, 5, 6, 0, 7, 8, 3, 3], np.int32)
OFFSETS = np.array([0, 4, 4, 6, 10], np.int32)  # an empty bag; two slots in no bag
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(V, D)).astype(np.float32)
WEIGHTS = RNG.uniform(0.5, 2, IDS.size).astype(np.float32)
COTANGENT = RNG.normal(size=(4, D)).astype(np.float32)


@pytest.mark.parametrize(
    ("weighted", "options"),
    [(False, {"max_norm": 1.0}), (True, {"padding_idx": 3})],
    ids=str,
)
def test_pool_and_its_pullback_equal_the_oracle(weighted, options, implementation):
    weights = WEIGHTS if weighted else None
    bags = oracle.slices(IDS, OFFSETS, weights)

    def pooled(table, mode):
        out, pullback = jbag.sparse.pool(
            table,
            IDS,
            OFFSETS,
            mode=mode,
            weights=weights,
            include_last_offset=True,
            implementation=implementation,
            **options,
        )
        rows = pullback(COTANGENT)
        assert isinstance(rows, jbag.RowSparse)
        return out, rows.todense()

    found = jax.jit(lambda t: {mode: pooled(t, mode) for mode in oracle.MODES})(TABLE)
    for mode, (out, to_table) in found.items():
        oracle.assert_close(out, oracle.forward(TABLE, bags, mode, **options))
        own, _ = oracle.gradients(TABLE, bags, COTANGENT, mode, **options)
        oracle.assert_close(to_table, own)


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_what_is_pooled_is_constant_in_the_table_and_not_in_the_weights(mode):
    bags = (IDS[:10].reshape(5, 2),)

    def loss(table, weights, sparse):
        if sparse:
            out, _ = jbag.sparse.pool(table, *bags, mode=mode, weights=weights)
        else:
            out = jbag.embedding_bag(table, *bags, mode=mode, weights=weights)
        return (out**2).sum()

    weights = WEIGHTS[:10].reshape(5, 2)
    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    to_table, to_weights = gradient(TABLE, weights, True)
    assert not np.asarray(to_table).any()
    oracle.assert_close(to_weights, gradient(TABLE, weights, False)[1])


def test_rows_are_summed_in_the_body_of_a_scan_and_after_it():
    batches = jnp.asarray(IDS.reshape(3, 2, 2))

    def step(table, ids):
        out, pullback = jbag.sparse.pool(table, ids, mode="sum")
        rows = pullback(2 * out)
        return table + rows * -0.1, rows

    def dense_step(table, ids):
        loss = lambda t: (jbag.embedding_bag(t, ids, mode="sum") ** 2).sum()
        gradient = jax.grad(loss)(table)
        return table - 0.1 * gradient, gradient

    table, rows = jax.jit(lambda t: jax.lax.scan(step, t, batches))(TABLE)
    expected, gradients = jax.jit(lambda t: jax.lax.scan(dense_step, t, batches))(TABLE)
    oracle.assert_close(table, expected)
    assert rows.batch_shape == (3,)
    sums = jax.jit(lambda rows: (rows.todense(), rows.sum().todense()))(rows)
    oracle.assert_close(sums[0], gradients)
    oracle.assert_close(sums[1], np.asarray(gradients).sum(0))
    with pytest.raises(ValueError, match=r"batch of RowSparse, of shape \(3,\)"):
        expected + rows


def test_a_rule_of_the_users_own_takes_the_pullback():
    @jax.custom_vjp
    def pooled(table, ids):
        return jbag.embedding_bag(table, ids)

    def forward(table, ids):
        return jbag.sparse.pool(table, ids)

    def backward(pullback, cotangent):
        return pullback(cotangent).todense(), None

    pooled.defvjp(forward, backward)
    ids = jnp.asarray(IDS[:10].reshape(5, 2))
    loss = lambda pool: lambda t: (pool(t, ids) ** 2).sum()
    found = jax.jit(jax.grad(loss(pooled)))(jnp.asarray(TABLE))
    expected = jax.jit(jax.grad(loss(jbag.embedding_bag)))(jnp.asarray(TABLE))
    oracle.assert_close(found, expected)


def test_several_axes_of_a_batch_are_summed_one_or_all():
    ids = jnp.asarray(IDS.reshape(2, 3, 1, 2))
    gradient = jbag.grad(
        lambda t, i: (jbag.embedding_bag(t, i, sparse=True) ** 2).sum()
    )
    rows = jax.jit(jax.vmap(jax.vmap(gradient, (None, 0)), (None, 0)))(TABLE, ids)
    assert rows.batch_shape == (2, 3)

    @jax.jit
    def sums(rows):
        return rows.todense(), [rows.sum(i).todense() for i in (None, 0, 1, -1)]

    dense, found = sums(rows)
    assert dense.shape == (2, 3, V, D)
    for actual, axis in zip(found, ((0, 1), 0, 1, 1), strict=True):
        oracle.assert_close(actual, np.asarray(dense).sum(axis))
    with pytest.raises(ValueError, match="`axis` must be one of the 2"):
        rows.sum(2)


def test_the_names_of_jaxs_primitives_are_still_theirs():
    def program(x):
        body = lambda c, y: (c, jax.lax.cond(y > 0, jnp.sin, jnp.cos, y))
        inner = jax.checkpoint(lambda x: jax.lax.scan(body, 0.0, x)[1])
        return jax.jit(inner)(jax.lax.stop_gradient(x))

    def names(jaxpr):
        for equation in jaxpr.eqns:
            yield equation.primitive.name
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from names(inner)

    found = set(names(jax.make_jaxpr(program)(jnp.ones(3)).jaxpr))
    known = _jaxpr_analysis
    assert {known.SCAN, known.COND, known.STOP_GRADIENT} <= found
    assert found & set(known.CALLS)
    assert found & set(known.CHECKPOINTS)


def test_sealed_weights_have_no_derivative():
    def loss(weights):
        rows = jbag.sparse.pool(TABLE, [[1, 2]], weights=weights)[1](jnp.ones((1, D)))
        return jax.jit(lambda rows: rows)(rows).todense().sum()

    with pytest.raises(TypeError, match="no derivative"):
        jax.grad(loss)(jnp.ones((1, 2)))

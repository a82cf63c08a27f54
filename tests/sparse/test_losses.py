"""Losses that use tables in different ways, beside their dense counterparts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from dense_counterpart import (
    BATCHES,
    IDS,
    SEQUENCE,
    D,
    V,
    assert_equal,
    count_rows,
    densify,
    differentiate,
    in_scan,
    is_rows,
    loss_of,
    pool,
    random_table,
    start,
)
from jax import lax

from jbag import optim

pytestmark = pytest.mark.standard_promotion


def aliased(params, ids, sparse):
    query = pool(params["query"], ids, sparse, mode="sum")
    doc = pool(params["doc"], ids[::-1], sparse)
    return (query * doc).sum()


def aliased_and_used_densely(params, ids, sparse):
    return (pool(params["query"], ids, sparse) ** 2).sum() + (params["doc"] ** 3).sum()


def several(params, ids, sparse):
    a = pool(params["query"], ids, sparse, mode="sum")
    b = pool(params["doc"], ids + 1, sparse, mode="max")
    return ((a * b + params["bias"]) ** 2).sum() + (pool(b, IDS % 2, False)).sum()


@pytest.mark.parametrize("loss", [aliased, aliased_and_used_densely, several])
@pytest.mark.parametrize("shared", [False, True])
def test_a_table_under_two_names_has_the_gradients_of_two_tables(loss, shared):
    def train(sparse):
        table = random_table()
        other = table if shared else random_table(1)
        params = {"query": table, "doc": other, "bias": jnp.ones(D)}
        optimizer, seen = optim.sgd(0.1), []
        both = jax.jit(differentiate(sparse)(loss_of(sparse, loss)))
        for ids in BATCHES:
            value, gradient = both(params, ids)
            updates, _ = optimizer.update(gradient, optimizer.init(params), params)
            params = optax.apply_updates(params, updates)
            seen.append((value, densify(gradient), params))
        return seen

    assert_equal(train(True), train(False))


def test_argnums_give_each_table_its_gradient():
    def loss(a, b, ids, sparse):
        return (pool(a, ids, sparse) * pool(b, ids, sparse, mode="sum")).sum()

    table = random_table()
    for argnums in (0, 1, (0, 1), (1, 0)):
        found, expected = (
            differentiate(s)(loss_of(s, loss), argnums)(table, table, IDS)
            for s in (True, False)
        )
        assert count_rows(found) == np.size(argnums)
        assert_equal(densify(found), expected)


def test_auxiliary_data_is_that_of_the_dense_loss():
    def loss(params, ids, sparse):
        pooled = pool(params["table"], ids, sparse)
        aux = {"pooled": pooled, "table": params["table"], "name": "x", "none": None}
        return (pooled**2).sum(), aux

    def both(sparse):
        both = differentiate(sparse)(loss_of(sparse, loss), has_aux=True)
        (value, aux), gradient = both(start(), IDS)
        assert aux.pop("name") == "x"
        return value, aux, densify(gradient)

    assert_equal(both(True), both(False))


def check(loss, *, rows=None, wrap=lambda f: f, table=None):
    """Compare with the dense gradient, which a table of the loss gets, sparse or not.

    `rows` says whether the gradient must be row-sparse; None leaves that open.
    """
    table = random_table() if table is None else table

    @wrap
    def both(table):
        found, expected = (
            differentiate(s)(functools.partial(loss, sparse=s))(table)
            for s in (True, False)
        )
        return found[1], densify(found), expected

    gradient, found, expected = both(table)
    assert_equal(found, expected)
    assert np.asarray(expected[1]).any()
    if rows is not None:
        assert is_rows(gradient) is rows


EAGER_AND_JIT = pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.jit], ids=["eager", "jit"]
)


@EAGER_AND_JIT
def test_a_checkpoint_in_a_checkpoint_has_the_dense_gradient(wrap):
    def loss(table, sparse):
        @jax.checkpoint
        def inner(table, ids):
            return jnp.sin(pool(table, ids, sparse))

        @jax.checkpoint
        def outer(table):
            return inner(table, IDS) * inner(table, IDS[::-1])

        return (outer(table) ** 2).sum() + inner(table, IDS).sum()

    check(loss, rows=True, wrap=wrap)


def test_deeper_checkpoints_and_jits_have_the_dense_gradient():
    def loss(table, sparse):
        function = lambda table: jnp.cos(pool(table, IDS, sparse, mode="max"))
        for wrap in (jax.checkpoint, jax.jit, jax.checkpoint, jax.checkpoint, jax.jit):
            function = wrap(lambda table, inner=function: inner(table) * 2)
        return function(table).sum()

    check(loss, rows=True)


@EAGER_AND_JIT
def test_what_is_written_to_a_ref_has_the_dense_gradient(wrap):
    def loss(table, sparse):
        ref = jax.new_ref(jnp.zeros(()))
        ref[...] += pool(table, [[1, 2]], sparse).sum()
        ref[...] += (table**2).sum()
        return ref[...]

    check(loss, wrap=wrap, table=jnp.ones((5, 2)))
    gradient = densify(differentiate(True)(loss)(jnp.ones((5, 2)), sparse=True)[1])
    oracle.assert_close(gradient[:, 0], [2, 2.5, 2.5, 2, 2])


def ref_of_pooled(table, sparse):
    ref = jax.new_ref(jnp.zeros((2, D)))
    ref[...] = pool(table, IDS, sparse)
    return (ref[...] ** 2).sum()


def ref_of_the_table(table, sparse):
    ref = jax.new_ref(jnp.zeros((V, D)))
    ref[...] = table
    return (pool(ref[...], IDS, sparse) ** 2).sum()


def ref_made_of_the_table(table, sparse):
    ref = jax.new_ref(table)
    return (pool(ref[...], IDS, sparse) ** 2).sum() + (ref[...] ** 2).sum()


def ref_beside(table, sparse):
    ref = jax.new_ref(jnp.ones(()))
    ref[...] *= 3.0
    return (pool(table, IDS, sparse) ** 2).sum() * ref[...]


def ref_in_a_jit(table, sparse):
    ref = jax.new_ref(jnp.zeros(()))

    @jax.jit
    def write(ref, table):
        ref[...] += (pool(table, IDS, sparse) ** 2).sum()

    write(ref, table)
    return ref[...]


@pytest.mark.parametrize(
    "loss",
    [
        ref_of_pooled,
        ref_of_the_table,
        ref_made_of_the_table,
        ref_beside,
        ref_in_a_jit,
    ],
)
def test_a_loss_with_a_ref_has_the_dense_gradient_or_raises(loss):
    expected = jax.value_and_grad(loss)(random_table(), sparse=False)
    try:
        found = differentiate(True)(loss)(random_table(), sparse=True)
    except (TypeError, ValueError, NotImplementedError):
        return
    assert_equal(densify(found), expected)


def in_scan_over_two_modes(table, sparse):
    def step(carry, ids):
        a, b = (pool(table, ids, sparse, mode=mode) for mode in ("max", "sum"))
        return jnp.tanh(carry + a), a * b

    carry, out = lax.scan(step, jnp.zeros((2, D)), SEQUENCE)
    return carry.sum() + out.sum()


def in_scan_and_beside(table, sparse):
    return in_scan(table, sparse) + (pool(table, IDS, sparse) ** 3).sum()


def in_nested_scan(table, sparse):
    def outer(total, batch):
        step = lambda total, ids: (total + (pool(table, ids, sparse) ** 2).sum(), None)
        return lax.scan(step, total, batch)[0], None

    return lax.scan(outer, 0.0, jnp.stack([SEQUENCE, SEQUENCE[::-1]]))[0]


def in_reverse_scan(table, sparse):
    step = lambda carry, ids: (carry * 0.5 + pool(table, ids, sparse), None)
    carry = lax.scan(step, jnp.ones((2, D)), SEQUENCE, reverse=True)[0]
    return (carry**2).sum()


def in_checkpointed_scan(table, sparse):
    @jax.checkpoint
    def step(carry, ids):
        return jnp.sin(carry + pool(table, ids, sparse)), None

    return lax.scan(step, jnp.ones((2, D)), SEQUENCE)[0].sum()


def in_map(table, sparse):
    return (lax.map(lambda ids: pool(table, ids, sparse), SEQUENCE) ** 2).sum()


def in_cond(table, sparse):
    yes = lambda table: (pool(table, IDS, sparse) ** 2).sum()
    no = lambda table: pool(table, IDS[:1], sparse, mode="sum").sum()
    return lax.cond(table[0, 0] > -9, yes, no, table * 1)


def in_cond_of_the_table(table, sparse):
    yes = lambda table: (pool(table, IDS, sparse) ** 2).sum()
    no = lambda table: pool(table, IDS[:1], sparse, mode="sum").sum()
    flag = lax.stop_gradient(table)[0, 0] > 9
    return lax.cond(flag, yes, no, table) + lax.cond(~flag, yes, no, table)


def in_one_branch(table, sparse):
    flag = IDS.sum() > 0
    yes = lambda: pool(table, IDS, sparse)
    return (lax.cond(flag, yes, lambda: jnp.ones((2, D))) ** 2).sum()


def in_switch(table, sparse):
    branches = [
        lambda ids, mode=mode: pool(table, ids, sparse, mode=mode)
        for mode in ("sum", "mean", "max")
    ]
    index = jnp.clip(IDS.sum() % 3, 0, 2)
    return (lax.switch(index, branches, IDS) ** 2).sum()


def in_fori_loop(table, sparse):
    def step(k, total):
        return total * 0.5 + pool(table, SEQUENCE[k], sparse)

    return (lax.fori_loop(0, 3, step, jnp.ones((2, D))) ** 2).sum()


def in_while_without_gradient(table, sparse):
    step = lambda x: (x[0] + 1, x[1] + pool(table, IDS, sparse).sum())
    loop = lambda: lax.while_loop(lambda x: x[0] < 3, step, (0, 0.0))[1]
    return (pool(table, IDS, sparse) ** 2).sum() + lax.stop_gradient(loop())


IN_BODIES = {
    in_scan: True,
    in_scan_over_two_modes: True,
    in_scan_and_beside: True,
    in_nested_scan: None,
    in_reverse_scan: True,
    in_checkpointed_scan: None,
    in_map: None,
    in_cond: None,  # pools what is computed of the table
    in_cond_of_the_table: True,
    in_one_branch: True,
    in_switch: None,
    in_fori_loop: None,
    in_while_without_gradient: None,
}


@pytest.mark.parametrize("loss", IN_BODIES, ids=lambda f: f.__name__)
def test_a_table_pooled_in_a_body_has_the_dense_gradient(loss):
    check(loss, rows=IN_BODIES[loss], wrap=jax.jit)


def test_a_table_pooled_in_a_scan_trains_as_a_dense_one():
    def train(sparse):
        optimizer, table = optim.adagrad(0.1), random_table()

        @jax.jit
        def step(table, state):
            value, gradient = differentiate(sparse)(loss_of(sparse, in_scan))(table)
            updates, state = optimizer.update(gradient, state, table)
            return optax.apply_updates(table, updates), state, value

        state, seen = optimizer.init(table), []
        for _ in range(3):
            table, state, value = step(table, state)
            seen.append((value, table, state))
        return seen

    assert_equal(train(True), train(False))

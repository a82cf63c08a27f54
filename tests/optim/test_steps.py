"""What stands around a step: train states, averages and accumulation."""

import jax
import jax.numpy as jnp
import optax
import pytest
from dense_counterpart import (
    BATCHES,
    assert_equal,
    densify,
    differentiate,
    is_rows,
    loss_of,
    start,
)
from flax.training.train_state import TrainState
from jax import lax

from jbag import optim

pytestmark = pytest.mark.standard_promotion


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_train_state_steps_as_with_dense_gradients(wrap):
    def train(sparse):
        state = TrainState.create(
            apply_fn=loss_of(sparse), params=start(), tx=optim.adagrad(0.1)
        )

        @wrap
        def step(state, ids):
            value, gradient = differentiate(sparse)(state.apply_fn)(state.params, ids)
            return state.apply_gradients(grads=gradient), value

        seen = []
        for ids in BATCHES:
            state, value = step(state, ids)
            seen.append((value, state.params, state.step, state.opt_state))
        return seen

    found = train(True)
    assert_equal(found, train(False))
    assert found[-1][2] == 3


def average_by_ema(ema, average, params):
    return ema.update(params, average)[1]


def average_by_increments(_, average, params):
    return optax.incremental_update(params, average, 0.1)


def average_every_second_step(_, average, params):
    return optax.periodic_update(params, average, jnp.array(2), 2)


@pytest.mark.parametrize(
    "average", [average_by_ema, average_by_increments, average_every_second_step]
)
def test_averages_of_parameters_are_those_of_dense_training(average):
    def train(sparse):
        optimizer, ema, params = optim.sgd(0.1), optax.ema(0.9), start()
        kept = ema.init(params) if average is average_by_ema else params

        @jax.jit
        def step(params, state, kept, ids):
            gradient = differentiate(sparse)(loss_of(sparse))(params, ids)[1]
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            return params, state, average(ema, kept, params)

        state, seen = optimizer.init(params), []
        for ids in BATCHES:
            params, state, kept = step(params, state, kept, ids)
            seen.append((params, kept))
        return seen

    assert_equal(train(True), train(False))


def by_accumulation(both, params, ids):
    return optim.accumulate_gradients(both, 3)(params, ids)


def by_sums(both, params, ids):
    found = [both(params, x) for x in ids]
    values, gradients = zip(*found, strict=True)
    total = {k: sum(g[k] for g in gradients) / 3 for k in params}
    return sum(values) / 3, total


def by_scan(both, params, ids):
    values, stacked = lax.scan(lambda _, x: (None, both(params, x)), None, ids)[1]
    total = {k: x.sum(axis=0) / 3 for k, x in stacked.items()}
    return values.mean(), total


def by_vmap(both, params, ids):
    values, stacked = jax.vmap(both, (None, 0))(params, ids)
    total = {k: x.sum(axis=0) / 3 for k, x in stacked.items()}
    return values.mean(), total


@pytest.mark.parametrize("accumulate", [by_accumulation, by_sums, by_scan, by_vmap])
def test_accumulated_gradients_train_as_dense_ones(accumulate):
    def train(sparse):
        optimizer, params = optim.sgd(0.1), start()

        @jax.jit
        def step(params, ids):
            both = differentiate(sparse)(loss_of(sparse))
            value, gradient = accumulate(both, params, ids)
            updates, _ = optimizer.update(gradient, optimizer.init(params), params)
            return optax.apply_updates(params, updates), value, gradient

        ids, seen = jnp.stack(BATCHES), []
        for _ in range(3):
            params, value, gradient = step(params, ids)
            assert is_rows(gradient["table"]) is sparse
            seen.append((value, densify(gradient), params))
        return seen

    assert_equal(train(True), train(False))

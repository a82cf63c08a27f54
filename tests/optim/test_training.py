"""Training with row-sparse gradients: accumulation, Flax's loops, checkpoints."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jbag
from jbag import optim

pytestmark = pytest.mark.standard_promotion
BAGS = jbag.Bags.from_lists([[0, 1, 2, 3], [4, 5], [6, 0, 7, 8]])


def squares(params, ids):
    pooled = jbag.embedding_bag(params["table"], ids, sparse=True)
    return ((pooled + params["bias"]) ** 2).sum()


@pytest.mark.parametrize("has_aux", [False, True])
def test_accumulated_gradients_are_those_of_the_mean_over_batches(has_aux):
    params = {
        "table": jax.random.normal(jax.random.key(0), (12, 8)),
        "bias": jnp.ones(8),
    }
    batches = jnp.asarray(np.random.default_rng(0).integers(0, 9, (3, 2, 4)))
    losses = jax.vmap(squares, in_axes=(None, 0))
    value, expected = jax.value_and_grad(lambda p: losses(p, batches).mean())(params)
    loss = lambda p, ids: (
        (squares(p, ids), {"ids": ids}) if has_aux else squares(p, ids)
    )
    both = jbag.value_and_grad(loss, has_aux=has_aux)
    got, gradient = jax.jit(optim.accumulate_gradients(both, 3))(params, batches)
    if has_aux:
        got, aux = got
        np.testing.assert_array_equal(aux["ids"], batches)
    oracle.assert_close(got, value)
    own = sum(both(params, ids)[1]["table"] for ids in batches) / 3
    for rows in (gradient["table"], own):
        assert isinstance(rows, jbag.RowSparse)
        oracle.assert_close(rows.todense(), expected["table"])
    oracle.assert_close(gradient["bias"], expected["bias"])


def cross_entropy(logits):
    answers = jnp.array([0, 1, 0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, answers).mean()


class Linen(nn.Module):
    sparse: bool

    @nn.compact
    def __call__(self, bags):
        return nn.Dense(2)(jbag.EmbeddingBag(12, 8, sparse=self.sparse)(bags))


def create(sparse, tx):
    model = Linen(sparse)
    params = model.init(jax.random.key(0), BAGS)["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def trained(state, differentiate, steps):
    @jax.jit
    def step(state):
        loss = lambda p: cross_entropy(state.apply_fn({"params": p}, BAGS))
        value, gradient = differentiate(loss)(state.params)
        return state.apply_gradients(grads=gradient), value

    losses = []
    for _ in range(steps):
        state, value = step(state)
        losses.append(float(value))
    return losses, state


def train_linen(sparse, tx):
    differentiate = (jbag if sparse else jax).value_and_grad
    losses, state = trained(create(sparse, tx), differentiate, steps=8)
    return losses, state.params


class NNX(nnx.Module):
    def __init__(self, sparse):
        self.bag = jbag.nnx.EmbeddingBag(12, 8, sparse=sparse, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(8, 2, rngs=nnx.Rngs(1))

    def __call__(self, bags):
        return self.head(self.bag(bags))


def train_nnx(sparse, tx):
    model = NNX(sparse)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    differentiate = jbag.value_and_grad if sparse else nnx.value_and_grad

    @nnx.jit
    def step(model, optimizer):
        value, gradient = differentiate(lambda m: cross_entropy(m(BAGS)))(model)
        optimizer.update(model, gradient)
        return value

    return [float(step(model, optimizer)) for _ in range(8)], model


def train_nnx_state(sparse, tx):
    graph, params = nnx.split(NNX(sparse))
    differentiate = (jbag if sparse else jax).value_and_grad

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        loss = lambda p: cross_entropy(nnx.merge(graph, p)(BAGS))
        value, gradient = differentiate(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(8):
        params, state, value = step(params, state)
        losses.append(float(value))
    return losses, params


@pytest.mark.parametrize("train", [train_linen, train_nnx, train_nnx_state])
def test_flax_trains_as_with_dense_gradients(train):
    options = {"initial_accumulator_value": 0.1, "eps": 0.0}
    losses, model = train(True, optim.adagrad(0.3, **options))
    expected, peer = train(False, optax.adagrad(0.3, **options))
    assert losses[-1] < losses[0] / 2
    oracle.assert_close(losses, expected, "float32")
    jax.tree.map(oracle.assert_close, jax.tree.leaves(model), jax.tree.leaves(peer))


def test_training_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    tables = lambda p: {k: "rows" if "Bag" in k else "rest" for k in p}
    parts = {"rows": optim.rowwise_adam(0.1), "rest": optax.adam(0.1)}
    tx = optax.chain(optim.clip_by_global_norm(1.0), optax.partition(parts, tables))
    losses, last = trained(create(True, tx), jbag.value_and_grad, steps=8)
    first, state = trained(create(True, tx), jbag.value_and_grad, steps=4)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", state)
    rest, end = trained(restored, jbag.value_and_grad, steps=4)
    assert first + rest == losses
    jax.tree.map(np.testing.assert_array_equal, end.params, last.params)
    jax.tree.map(np.testing.assert_array_equal, end.opt_state, last.opt_state)

"""Linen's modules beside their dense counterparts: values, gradients and state."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense_counterpart import (
    BATCHES,
    IDS,
    D,
    V,
    assert_equal,
    count_rows,
    densify,
    differentiate,
)
from slow import slow

import jbag
from jbag import optim

pytestmark = pytest.mark.standard_promotion


def several_bags(ids):
    """Return six bags, for statistics of a batch that aren't of two numbers."""
    return jnp.concatenate([ids, ids[:, ::-1] + 1, (ids * 2) % V])


def initialize(model):
    init = jax.jit(model.init)
    return dict(init(jax.random.key(0), several_bags(IDS)))


class Bag(nn.Module):
    """A bag and a layer, which has a state of its own."""

    sparse: bool
    train: bool = True

    @nn.compact
    def __call__(self, ids):
        pooled = jbag.EmbeddingBag(V, D, sparse=self.sparse)(ids)
        normed = nn.BatchNorm(use_running_average=False, momentum=0.9)(pooled)
        return nn.Dense(2)(normed + pooled)


class Wrapped(nn.Module):
    """A bag within one of Linen's transformations."""

    sparse: bool
    wrap: Any

    @nn.compact
    def __call__(self, ids):
        return self.wrap(Bag)(self.sparse, name="bag")(ids)


class Scanned(nn.Module):
    """A bag pooled in each step of a scan, with one table for all steps."""

    sparse: bool

    @nn.compact
    def __call__(self, ids):
        def body(bag, carry, ids):
            return carry + bag(ids).sum(), bag(ids)

        scan = nn.scan(
            body, variable_broadcast="params", split_rngs={"params": False}, in_axes=0
        )
        bag = jbag.EmbeddingBag(V, D, sparse=self.sparse, name="bag")
        total, pooled = scan(bag, jnp.zeros(()), ids[:, None])
        return nn.Dense(2)(pooled) + total


class Layers(nn.Module):
    """A bag beside layers that `nn.scan` stacks."""

    sparse: bool

    @nn.compact
    def __call__(self, ids):
        layers = nn.scan(
            lambda layer, x, _: (jnp.tanh(layer(x)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        pooled = jbag.EmbeddingBag(V, D, sparse=self.sparse)(ids)
        return layers(nn.Dense(D, name="layer"), pooled, None)[0]


class Towers(nn.Module):
    """A table for each tower."""

    sparse: bool

    @nn.compact
    def __call__(self, ids):
        lifted = nn.vmap(
            jbag.EmbeddingBag,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=2,
        )
        return nn.Dense(2)(lifted(V, D, sparse=self.sparse, name="towers")(ids))


class Batched(nn.Module):
    """One table, for a batch of batches."""

    sparse: bool

    @nn.compact
    def __call__(self, ids):
        lifted = nn.vmap(
            jbag.EmbeddingBag,
            variable_axes={"params": None},
            split_rngs={"params": False},
        )
        return nn.Dense(2)(lifted(V, D, sparse=self.sparse, name="bag")(ids[:, None]))


class Branches(nn.Module):
    """A bag pooled in one branch or, in another mode, in the other."""

    sparse: bool

    @nn.compact
    def __call__(self, ids):
        bag = jbag.EmbeddingBag(V, D, sparse=self.sparse, name="bag")
        if self.is_initializing():
            return nn.Dense(2)(bag(ids))
        yes, no = (lambda bag, x: bag(x)), (lambda bag, x: 2 * bag(x[:, :1]))
        return nn.Dense(2)(nn.cond(ids[0, 0] > 2, yes, no, bag, ids))


class Switched(nn.Module):
    """A layer in a branch, beside a bag."""

    sparse: bool

    @nn.compact
    def __call__(self, ids):
        pooled = jbag.EmbeddingBag(V, D, sparse=self.sparse)(ids)
        layer = nn.Dense(D)
        if self.is_initializing():
            return layer(pooled)
        yes, no = (lambda layer, x: layer(x)), (lambda _, x: x)
        return nn.cond(ids[0, 0] > 2, yes, no, layer, pooled)


LINEN = {
    "plain": Bag,
    "jit": functools.partial(Wrapped, wrap=nn.jit),
    "remat": functools.partial(Wrapped, wrap=nn.remat),
    "remat of remat": functools.partial(
        Wrapped, wrap=lambda module: nn.remat(nn.remat(module))
    ),
    "jit of remat": functools.partial(
        Wrapped, wrap=lambda module: nn.jit(nn.remat(module))
    ),
    "scan over batches": Scanned,
    "scan over layers": Layers,
    "vmap of tables": Towers,
    "vmap over batches": Batched,
    "cond": Branches,
    "cond beside": Switched,
}
# Where the table is pooled as it is, in the outermost program or what is inlined.
SPARSE = {"plain", "jit", "remat", "remat of remat", "jit of remat"}
SPARSE |= {"scan over layers", "vmap over batches", "cond beside"}
SPARSE |= {"scan over batches", "cond"}


def train_linen(make, sparse):
    """Return what three steps give, and how many gradients are row-sparse."""
    model, rows = make(sparse), []
    variables = initialize(model)
    params, state = variables.pop("params"), variables
    optimizer = optim.sgd(0.1)

    @jax.jit
    def step(params, state, ids):
        def loss(params):
            out = model.apply({"params": params, **state}, ids, mutable=[*state])
            out, changed = out if state else (out[0], {})
            return ((out - 1) ** 2).sum(), changed

        both = differentiate(sparse)(loss, has_aux=True)
        (value, changed), gradient = both(params)
        rows.append(count_rows(gradient))
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        params = optax.apply_updates(params, updates)
        return value, densify(gradient), params, changed

    seen = []
    for ids in BATCHES:
        *found, params, state = step(params, state, several_bags(ids))
        seen.append((*found, params, state))
    return seen, rows[0]


OTHERS = ("jit", "remat of remat", "jit of remat", "scan over layers", "cond beside")


@pytest.mark.parametrize(
    "name", [*(name for name in LINEN if name not in OTHERS), *slow(*OTHERS)]
)
def test_linen_trains_as_with_a_dense_table(name):
    found, rows = train_linen(LINEN[name], True)
    expected, _ = train_linen(LINEN[name], False)
    assert_equal(found, expected)
    if name in SPARSE:
        assert rows == 1
    for first, last in zip(
        *(jax.tree.leaves(found[k][3]) for k in (0, 2)), strict=True
    ):
        assert np.abs(first - last).max() > 1e-4  # the state is no constant


def test_gradients_over_all_variables_equal_the_dense_ones():
    def both(sparse):
        model = Bag(sparse)
        ids = several_bags(IDS)
        loss = lambda v: (model.apply(v, ids, mutable=["batch_stats"])[0] ** 2).sum()
        return densify(jax.jit(differentiate(sparse)(loss))(initialize(model)))

    assert_equal(both(True), both(False))


def test_dropout_draws_the_same_masks():
    class Dropped(nn.Module):
        sparse: bool

        @nn.compact
        def __call__(self, ids):
            pooled = jbag.EmbeddingBag(V, D, sparse=self.sparse)(ids)
            return nn.Dropout(0.5, deterministic=False)(nn.Dense(8)(pooled))

    def both(sparse):
        model, out = Dropped(sparse), []
        loss = lambda p, key: (model.apply(p, IDS, rngs={"dropout": key}) ** 2).sum()
        init, both = jax.jit(model.init), jax.jit(differentiate(sparse)(loss))
        params = init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, IDS)
        for step in range(3):
            out.append(densify(both(params, jax.random.key(step))))
        return out

    found = both(True)
    assert_equal(found, both(False))
    assert len({float(value) for value, _ in found}) == 3

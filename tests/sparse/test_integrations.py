"""Integrations beside their dense counterparts: values, gradients and state.

Each trains for three steps, once with a sparse table and `jbag.value_and_grad`, and
once with a dense table and `jax.value_and_grad`. NNX has its own tests.
"""

import functools
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax.training.train_state import TrainState
from jax import lax

import jbag
from jbag import optim

V, D = 12, 2
IDS = jnp.array([[1, 4, 4], [7, 1, 2]], jnp.int32)
BATCHES = [IDS, jnp.array([[3, 3, 8], [4, 9, 1]], jnp.int32), IDS + 2]


@pytest.fixture(autouse=True)
def strict_promotion():
    """Optax relies on JAX's default promotion."""


def is_rows(x):
    return isinstance(x, jbag.RowSparse)


def densify(tree):
    return jax.tree.map(
        lambda x: x.todense() if is_rows(x) else x, tree, is_leaf=is_rows
    )


def count_rows(tree):
    return sum(map(is_rows, jax.tree.leaves(tree, is_leaf=is_rows)))


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: oracle.assert_close(a, b, "float32"), found, expected)


def differentiate(sparse):
    """Return `value_and_grad`; whether a gradient is dense is told elsewhere."""
    if not sparse:
        return jax.value_and_grad
    return functools.partial(jbag.value_and_grad, allow_dense=True)


def random_table(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(V, D)), jnp.float32)


def pool(table, ids, sparse=True, **options):
    return jbag.embedding_bag(table, ids, sparse=sparse, **options)


# Linen's modules.


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


@pytest.mark.parametrize("name", LINEN)
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


# What stands around a step.


def squares(params, ids, sparse):
    pooled = pool(params["table"], ids, sparse) + params["bias"]
    return ((pooled - 1) ** 2).sum()


def start():
    return {"table": random_table(), "bias": jnp.ones(D)}


def loss_of(sparse, loss=squares):
    return functools.partial(loss, sparse=sparse)


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


# Losses, each given (params, ids, sparse), that differ in what they do with tables.


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
        both = differentiate(sparse)(loss_of(sparse, loss))
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
    found, expected = (
        wrap(differentiate(s)(functools.partial(loss, sparse=s)))(table)
        for s in (True, False)
    )
    assert_equal(densify(found), expected)
    assert np.asarray(expected[1]).any()
    if rows is not None:
        assert is_rows(found[1]) is rows


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


SEQUENCE = jnp.stack(BATCHES)


def in_scan(table, sparse):
    def step(carry, ids):
        pooled = pool(table, ids, sparse)
        return carry * 0.5 + pooled, (pooled**2).sum()

    carry, out = lax.scan(step, jnp.ones((2, D)), SEQUENCE)
    return (carry**2).sum() + out.sum()


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


# Whether a dense gradient is allowed.


def tied(table, sparse=True):
    pooled = pool(table, IDS, sparse)
    return ((pooled @ table.T) ** 2).sum()


def computed(table, sparse=True):
    return (pool(table * 2, IDS, sparse) ** 2).sum()


def untied(table, sparse=True):
    return (pool(table, IDS, sparse) ** 2).sum()


@pytest.mark.parametrize("loss", [tied, computed])
@pytest.mark.parametrize("make", [jbag.value_and_grad, jbag.grad])
def test_a_dense_gradient_of_a_sparse_table_is_told(loss, make):
    table, options = random_table(), {}
    with pytest.warns(jbag.DenseGradientWarning):
        found = make(loss)(table)
    with pytest.warns(jbag.DenseGradientWarning):
        make(loss, allow_dense=None)(table)
    expected = jax.value_and_grad(loss)(table, sparse=False)
    expected = expected if make is jbag.value_and_grad else expected[1]
    assert_equal(found, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(make(loss, allow_dense=True, **options)(table), expected)
    with pytest.raises(ValueError, match="dense"):
        make(loss, allow_dense=False)(table)


def test_a_dense_gradient_is_told_as_a_step_is_compiled():
    with pytest.warns(jbag.DenseGradientWarning):
        jax.jit(jbag.grad(tied))(random_table())
    with pytest.raises(ValueError, match="dense"):
        jax.jit(jbag.grad(tied, allow_dense=False))(random_table())


@pytest.mark.parametrize("allow_dense", [None, True, False])
def test_nothing_is_told_of_row_sparse_gradients_and_of_dense_tables(allow_dense):
    both = functools.partial(jbag.value_and_grad, allow_dense=allow_dense)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for loss in (untied, in_scan):
            value, gradient = both(functools.partial(loss, sparse=True))(random_table())
            assert is_rows(gradient)
            expected = jax.value_and_grad(functools.partial(loss, sparse=False))(
                random_table()
            )
            assert_equal((value, gradient.todense()), expected)
        for loss in (untied, tied, computed, in_scan):
            gradient = both(functools.partial(loss, sparse=False))(random_table())[1]
            assert isinstance(gradient, jax.Array)


def test_allow_dense_is_a_flag():
    with pytest.raises(TypeError, match="allow_dense"):
        jbag.value_and_grad(untied, allow_dense="yes")

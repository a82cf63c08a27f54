"""Gradients of NNX modules beside `nnx.value_and_grad` on the same dense model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from slow import slow

import jbag
from jbag import optim

pytestmark = pytest.mark.standard_promotion
IDS = jnp.array([[1, 2], [3, 4], [1, 5]])
BATCHES = jnp.stack([IDS, IDS + 1, IDS + 2])


def same(run, lib=jbag):
    """Check that `run`, of (namespace, sparse), returns what it returns for NNX.

    Return it. `jbag.value_and_grad` is `jbag.nnx.value_and_grad` for what it is given.
    """
    got, expected = run(lib, True), run(nnx, False)
    close = lambda x, y: oracle.assert_close(x, y, "float32")
    jax.tree.map(close, dense(got), dense(expected))
    return got


def is_rows(x):
    return isinstance(x, jbag.RowSparse)


def dense(tree):
    """Return NumPy's arrays: rows multiplied out, keys as numbers."""

    def convert(x):
        x = x.todense() if is_rows(x) else x
        is_key = jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(convert, tree, is_leaf=is_rows)


def make_bag(sparse, seed=0):
    return jbag.nnx.EmbeddingBag(12, 8, sparse=sparse, rngs=nnx.Rngs(seed))


class Count(nnx.Variable):
    """State of a type of its own."""


class Model(nnx.Module):
    def __init__(self, sparse, rngs=None):
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.bag = jbag.nnx.EmbeddingBag(12, 8, sparse=sparse, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 1, rngs=rngs)
        self.calls = Count(jnp.array(0))

    def __call__(self, ids):
        self.calls[...] += 1
        return self.head(self.norm(self.dropout(self.bag(ids))))


class Shared(nnx.Module):
    """A bag on two paths."""

    def __init__(self, sparse):
        self.query = make_bag(sparse)
        self.doc = self.query

    def __call__(self, ids):
        return self.query(ids).sum() + (self.doc(ids + 1) ** 2).sum()


def squares(model, ids):
    return (model(ids) ** 2).mean()


def pair(first, second):
    return first(IDS).sum() + (second(IDS + 1) ** 2).sum()


def plain(lib, sparse):
    model = Model(sparse)
    gradient = lib.value_and_grad(squares)(model, IDS)
    return gradient, nnx.state(model)


@pytest.mark.parametrize(
    ("jit", "has_aux"), [(nnx.jit, False), *slow((lambda f: f, True))]
)
def test_three_steps_move_parameters_and_state(jit, has_aux):
    def run(lib, sparse):
        model = Model(sparse)
        optimizer = nnx.Optimizer(model, optim.adagrad(0.1), wrt=nnx.Param)
        average = nnx.state(model, nnx.Param)

        def loss(model, ids):
            value = squares(model, ids)
            return (value, {"mean": model.norm.mean[...]}) if has_aux else value

        @jit
        def step(model, optimizer, ids):
            value, gradient = lib.value_and_grad(loss, has_aux=has_aux)(model, ids)
            optimizer.update(model, gradient)
            return value, gradient

        results = []
        for ids in BATCHES:
            results += [step(model, optimizer, ids), nnx.state(model)]
            results = jax.tree.map(lambda x: x, results)  # before they are changed
            new = nnx.state(model, nnx.Param)
            average = optax.incremental_update(new, average, 0.1)
        assert model.dropout.rngs.count[...] == model.calls[...] == 3
        assert (model.norm.mean[...] != 0).all()
        return results, average, nnx.state(optimizer)

    (first, *_), *_ = same(run, jbag.nnx if has_aux else jbag)
    assert is_rows(first[1]["bag"]["embedding"].get_value())


def scan(lib, sparse):
    model = Model(sparse)
    optimizer = nnx.Optimizer(model, optim.sgd(0.1), wrt=nnx.Param)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def steps(carry, ids):
        value, gradient = lib.value_and_grad(squares)(carry[0], ids)
        carry[1].update(carry[0], gradient)
        return carry, value

    return steps((model, optimizer), BATCHES)[1], nnx.state(model)


def vmap(lib, sparse):
    create = nnx.jit(nnx.vmap(lambda key: Model(sparse, nnx.Rngs(key))))
    models = create(jax.random.split(jax.random.key(0), 3))

    @nnx.jit
    @nnx.vmap
    def step(model, ids):
        value, gradient = lib.value_and_grad(squares)(model, ids)
        nnx.Optimizer(model, optim.sgd(0.1), wrt=nnx.Param).update(model, gradient)
        return value

    return step(models, BATCHES), step(models, BATCHES), nnx.state(models)


def remat(lib, sparse):
    model = Model(sparse)
    loss = nnx.remat(squares)
    return lib.value_and_grad(loss)(model, IDS), nnx.state(model)


def inner_jit(lib, sparse):
    model = Model(sparse)
    return lib.value_and_grad(nnx.jit(squares))(model, IDS), nnx.state(model)


def inner_scan(lib, sparse):
    model = Model(sparse)
    body = nnx.scan(lambda m, ids: (m, squares(m, ids)), out_axes=(nnx.Carry, 0))
    loss = lambda model, batches: body(model, batches)[1].sum()
    return lib.value_and_grad(loss)(model, BATCHES), nnx.state(model)


def inner_cond(lib, sparse):
    model = Model(sparse)
    other = lambda model, ids: model.bag(ids).sum()
    loss = lambda model, go: nnx.cond(go, squares, other, model, IDS)
    both = [lib.value_and_grad(loss)(model, jnp.array(go)) for go in (True, False)]
    return both, nnx.state(model)


def cond(lib, sparse):
    model = Model(sparse)
    optimizer = nnx.Optimizer(model, optim.sgd(0.1), wrt=nnx.Param)

    def train(model, optimizer):
        value, gradient = lib.value_and_grad(squares)(model, IDS)
        optimizer.update(model, gradient)
        return value

    rest = lambda model, optimizer: 0.0  # noqa: ARG005  (the branches are alike)
    step = nnx.jit(lambda go, *nodes: nnx.cond(go, train, rest, *nodes))
    values = [step(jnp.array(go), model, optimizer) for go in (True, False, True)]
    return values, nnx.state(model)


def inner_grad(lib, sparse):
    model = Model(sparse)

    def loss(model):
        gradient = nnx.grad(squares)(model, IDS)
        return squares(model, IDS) + (gradient["head"]["kernel"][...] ** 2).sum()

    return lib.value_and_grad(loss)(model), nnx.state(model)


@pytest.mark.parametrize(
    "run",
    [
        plain,
        scan,
        vmap,
        cond,
        *slow(remat, inner_jit, inner_scan, inner_cond, inner_grad),
    ],
)
def test_it_stands_in_flax_transformations(run):
    same(run)


@pytest.mark.parametrize(
    "argnums",
    [
        0,
        nnx.DiffState(0, nnx.Param),
        nnx.DiffState(0, nnx.PathContains("doc")),
        nnx.DiffState(0, nnx.PathContains("query")),
        nnx.DiffState(0, nnx.PathContains("embedding")),
    ],
)
def test_a_bag_on_two_paths_gets_its_gradient_once(argnums):
    loss = lambda model: model(IDS)
    same(lambda lib, sparse: lib.value_and_grad(loss, argnums=argnums)(Shared(sparse)))


@pytest.mark.parametrize("wrt", [nnx.Param, nnx.PathContains("doc"), nnx.Nothing()])
def test_a_bag_on_two_paths_is_moved_once(wrt):
    def run(lib, sparse):
        model = Shared(sparse)
        optimizer = nnx.Optimizer(model, optim.sgd(0.1), wrt=wrt)
        optimizer.update(model, lib.grad(lambda model: model(IDS))(model))
        assert model.query is model.doc
        return nnx.state(model)

    same(run)


@pytest.mark.parametrize(
    "argnums",
    [
        (0, 1),
        (1, 0),
        (nnx.DiffState(1, nnx.Param), 0),
        [nnx.DiffState(0, nnx.Param), nnx.DiffState(1, nnx.Param)],
    ],
)
def test_a_bag_in_two_arguments_gets_its_gradient_once(argnums):
    def run(lib, sparse):
        bag = make_bag(sparse)
        return lib.value_and_grad(pair, argnums=argnums)(bag, bag)

    _, gradients = same(run)
    assert sorted(map(len, gradients)) == [0, 1]


def test_several_modules_and_arrays_are_differentiated():
    def run(lib, sparse):
        models = {"a": make_bag(sparse), "b": [make_bag(sparse, seed=1), jnp.ones(8)]}
        loss = lambda models, scale, other: (
            ((models["a"](IDS) * models["b"][0](IDS)) @ models["b"][1] * scale).sum()
            + squares(other, IDS)
        )
        other = Model(sparse)
        both = lib.value_and_grad(loss, argnums=(0, 1, 2))
        return both(models, jnp.array(2.0), other), nnx.state(other)

    same(run)


def test_aliased_arrays_are_two_parameters():
    def run(lib, sparse):
        first, second = make_bag(sparse), make_bag(sparse, seed=1)
        second.embedding[...] = first.embedding[...]
        return lib.value_and_grad(pair, argnums=(0, 1))(first, second)

    same(run)


@pytest.mark.parametrize("argnums", [np.int64(0), np.int32(-2), (np.int64(0),)])
def test_positions_are_integers_of_any_kind(argnums):
    model = Model(True)
    _, gradient = jbag.value_and_grad(squares, argnums)(model, IDS)
    gradient = gradient[0] if isinstance(argnums, tuple) else gradient
    expected = nnx.grad(squares)(Model(False), IDS)
    jax.tree.map(oracle.assert_close, dense(gradient), dense(expected))
    loss = lambda table, ids: jbag.embedding_bag(table, ids, sparse=True).sum()
    rows = jbag.grad(loss, argnums)(jnp.ones((12, 8)), IDS)
    assert is_rows(rows[0] if isinstance(argnums, tuple) else rows)


def test_keywords_are_seen_with_what_they_share():
    def run(lib, sparse):
        bag, model = make_bag(sparse), Model(sparse)
        value = lib.value_and_grad(pair, argnums=(0, 1))(bag, second=bag)
        return value, lib.grad(squares)(ids=IDS, model=model), nnx.state(model)

    same(run)


def test_keyword_only_arguments_are_not_differentiated():
    def loss(table, *, model):
        return (table["bag"](IDS) * model(IDS)).sum()

    model, peer = Model(True), Model(False)
    got = jbag.value_and_grad(loss)({"bag": make_bag(True)}, model=model)
    positional = lambda table, model: loss(table, model=model)
    expected = nnx.value_and_grad(positional)({"bag": make_bag(False)}, peer)
    close = lambda x, y: oracle.assert_close(x, y, "float32")
    jax.tree.map(close, dense(got), dense(expected))
    jax.tree.map(close, dense(nnx.state(model)), dense(nnx.state(peer)))


def test_streams_of_random_numbers_go_on_beside_plain_parameters():
    def run(lib, sparse):
        params, rngs = {"table": jnp.ones((12, 8))}, nnx.Rngs(3)

        def loss(params, rngs):
            pooled = jbag.embedding_bag(params["table"], IDS, sparse=sparse)
            return (pooled * jax.random.normal(rngs.dropout(), pooled.shape)).sum()

        results = [lib.value_and_grad(loss)(params, rngs) for _ in range(2)]
        return results, nnx.state(rngs)

    same(run)


@pytest.mark.parametrize("kind", [nnx.Param, Count])
def test_a_bare_variable_is_differentiated(kind):
    def run(lib, sparse):
        loss = lambda table: jbag.embedding_bag(table[...], IDS, sparse=sparse).sum()
        return lib.value_and_grad(loss)(kind(jnp.ones((12, 8))))

    assert is_rows(same(run)[1].get_value())


def test_new_variables_and_changed_structure_are_kept():
    def loss(bag):
        if not hasattr(bag, "seen"):
            bag.seen = Count(jnp.zeros(()))
            bag.alias, bag.calls_in_python = bag.embedding, 0
        bag.seen[...] += 1
        bag.calls_in_python += 1
        return bag(IDS).sum()

    def run(lib, sparse):
        bag = make_bag(sparse)
        results = [lib.value_and_grad(loss)(bag) for _ in range(2)]
        assert bag.alias is bag.embedding
        return results, nnx.state(bag), bag.calls_in_python

    same(run)


def test_a_parameter_that_the_loss_writes_is_written():
    def loss(bag):
        value = bag(IDS).sum()
        bag.embedding[...] = bag.embedding[...] * 2
        return value

    def run(lib, sparse):
        bag = make_bag(sparse)
        return lib.value_and_grad(loss)(bag), nnx.state(bag)

    same(run)


def test_auxiliary_data_may_hold_modules():
    def loss(bag):
        return bag(IDS).sum(), (bag, nnx.Param(jnp.ones(2)), bag.embedding[...], None)

    def run(lib, sparse):
        bag = make_bag(sparse)
        gradient, (module, new, table, nothing) = lib.grad(loss, has_aux=True)(bag)
        assert module is bag
        assert nothing is None
        return gradient, new, table

    assert is_rows(same(run)[0]["embedding"].get_value())


def test_frozen_tables_have_no_gradient():
    def run(lib, sparse):
        model = Model(sparse)
        table = model.bag.embedding[...]
        model.bag = jbag.nnx.EmbeddingBag.from_pretrained(table, sparse=sparse)
        model.head.kernel = jbag.nnx.Frozen(model.head.kernel[...])
        gradient = lib.grad(squares)(model, IDS)
        assert "bag" not in gradient
        return gradient, nnx.state(model)

    same(run)


@pytest.mark.parametrize("of", [nnx.State, lambda x: lambda _: nnx.State(x)])
def test_labels_of_a_partition_are_a_state(of):
    def run(lib, sparse):
        model = nnx.Dict(model=Model(sparse))
        parts = {"rows": optim.rowwise_adagrad(0.1), "rest": optax.adam(0.1)}
        labels = {"model": {"bag": "rows", "head": "rest", "norm": "rest"}}
        optimizer = nnx.Optimizer(
            model, optax.partition(parts, of(labels)), wrt=nnx.Param
        )
        for ids in BATCHES:
            loss = lambda nodes, ids: squares(nodes["model"], ids)
            optimizer.update(model, lib.grad(loss)(model, ids))
        return nnx.state(model)

    same(run)


def test_a_state_is_a_plain_tree():
    graph, params = nnx.split(make_bag(True))
    loss = lambda params: nnx.merge(graph, params)(IDS).sum()
    gradient = jbag.grad(loss)(params)
    assert isinstance(gradient, nnx.State)
    assert is_rows(gradient["embedding"].get_value())


@pytest.mark.parametrize(
    ("loss", "options", "error", "message"),
    [
        (pair, {}, ValueError, "Inconsistent aliasing"),
        (pair, {"argnums": (0, 0)}, ValueError, "repeats the position 0"),
        (pair, {"argnums": (0, -2)}, ValueError, "repeats the position 0"),
        (pair, {"argnums": 2}, ValueError, "positions of the 2 positional"),
        (pair, {"argnums": nnx.DiffState(2, ...)}, ValueError, "positions of the 2"),
        (pair, {"argnums": 0.5}, TypeError, "must be positions or `nnx.DiffState`s"),
        (lambda a, _: a(IDS), {"argnums": (0, 1)}, TypeError, "scalar"),
        (lambda *_: (1.0, 2.0), {"argnums": (0, 1)}, TypeError, "scalar; got tuple"),
        (lambda *_: None, {"argnums": (0, 1)}, TypeError, "scalar; got NoneType"),
        (pair, {"argnums": (0, 1), "has_aux": True}, TypeError, "auxiliary data"),
        (make_bag(True).__call__, {}, ValueError, "bound method"),
        (functools.partial(make_bag(True).__call__), {}, ValueError, "bound method"),
        (3, {}, TypeError, "`loss` must be a function"),
    ],
)
def test_what_cannot_be_differentiated_raises(loss, options, error, message):
    bag = make_bag(True)
    with pytest.raises(error, match=message):
        jbag.nnx.value_and_grad(loss, **options)(bag, bag)


def test_state_outside_of_the_arguments_cannot_be_changed():
    model, bag = Model(True), make_bag(True)
    with pytest.raises(Exception, match="different trace level"):
        jbag.value_and_grad(lambda bag: bag(IDS).sum() * squares(model, IDS))(bag)

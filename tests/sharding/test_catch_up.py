"""Optimizers with `lazy=False` on tables over a mesh, against Optax on one device."""

import functools

import collection_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
from slow import slow

import jbag
from jbag import optim
from jbag.sharding import TableWise

pytestmark = pytest.mark.standard_promotion

STRATEGIES = {
    "row_wise": (P("x", None), None),
    "row_wise in rounds": (P("x", None), 1),
    "column_wise": (P(None, "x"), None),
    "data_parallel": (P(), None),
    "table_wise": (TableWise("x", lanes=4), None),
}
TABLES, FEATURES = cases.only("plain_mean", "padded_sum", "counted_max")
STEPS = 6
# By name: ours, and that of Optax.
OPTIMIZERS = {
    "adamw": (
        optim.adamw(0.1, eps=1e-3, lazy=False),
        optax.adamw(0.1, eps=1e-3),
    ),
    "momentum": (optim.sgd(0.1, 0.9, lazy=False), optax.sgd(0.1, 0.9)),
}


def make(strategy=None, mesh=None, sparse=True, packed=None):
    options = {"grid": 12, "sparse": sparse, "mesh": mesh, "packed": packed}
    if strategy is not None:
        spec, rows_per_round = STRATEGIES[strategy]
        options |= {"specs": {"embedding": spec}, "rows_per_round": rows_per_round}
    return jbag.EmbeddingBagCollection(TABLES, FEATURES, **options)


def batch_of(step, blocks=None):
    """Return the cases' bags; all rows in the first step, and few in the others."""

    def few(name, bags):
        size = TABLES[cases.CASES[name][0]].num_embeddings
        ids = bags if isinstance(bags, np.ndarray) else bags.indices
        kept = (ids >= 0) & (ids < size)
        ids = jnp.asarray(np.where(kept, ids if step == 0 else step % 2, ids))
        if isinstance(bags, np.ndarray):
            return ids
        return jbag.Bags(ids, bags.offsets, bags.weights)

    pack = cases.pack_on_host
    if blocks is not None:
        pack = functools.partial(cases.in_blocks_on_host, blocks=blocks)
    return {name: few(name, pack(name)) for name in FEATURES}


def loss(collection, params, batch):
    out = collection.apply({"params": params}, batch)
    return sum((jnp.nan_to_num(x) ** 2).mean() for x in out.values())


def train(collection, name, blocks=None):
    """Return the tables after some steps."""
    ours, theirs = OPTIMIZERS[name]
    sparse = collection.sparse
    optimizer = ours if sparse else theirs
    value = functools.partial(loss, collection)
    differentiate = (jbag if sparse else jax).grad

    @jax.jit
    def step(params, state, batch):
        if sparse:
            reads = differentiate(value)(params, batch)
            params, state = optim.catch_up(params, state, reads)
        gradient = differentiate(value)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = collection.import_tables({k: cases.values()[k] for k in TABLES})
    trained = params, optimizer.init(params)
    if collection.mesh is not None:
        trained = jax.device_put(trained, collection.shardings(trained))
    for k in range(STEPS):
        trained = step(*trained, batch_of(k, blocks))
    if sparse:
        steps = jax.tree.leaves(trained[1].steps)
        assert any((np.asarray(x) < STEPS).any() for x in steps)
        shardings = jax.tree.map(lambda x: x.sharding, trained)
        trained = jax.jit(optim.catch_up, out_shardings=shardings)(*trained)
    return collection.export_tables(jax.device_get(trained[0]))


@functools.cache
def on_one_device(name, sparse):
    return train(make(sparse=sparse), name)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_tables_on_one_device_equal_optax(name):
    jax.tree.map(close, on_one_device(name, True), on_one_device(name, False))


@pytest.mark.parametrize(
    ("strategy", "name", "kind"),
    [
        ("row_wise", "adamw", "explicit"),
        ("row_wise", "momentum", "auto"),
        ("column_wise", "adamw", "auto"),
        *slow(
            ("row_wise in rounds", "adamw", "auto"),
            ("row_wise in rounds", "momentum", "explicit"),
            ("column_wise", "momentum", "explicit"),
            ("table_wise", "adamw", "explicit"),
            ("table_wise", "momentum", "auto"),
            ("data_parallel", "adamw", "auto"),
            ("data_parallel", "momentum", "explicit"),
        ),
    ],
)
def test_tables_over_a_mesh_equal_optax(strategy, name, kind):
    collection = make(strategy, make_mesh(kind))
    trained = train(collection, name, 4)
    jax.tree.map(close, trained, on_one_device(name, False))


@pytest.mark.parametrize("kind", ["auto", *slow("explicit")])
def test_packed_tables_over_a_mesh_equal_optax(kind):
    trained = train(make("row_wise", make_mesh(kind), packed=True), "adamw", 4)
    jax.tree.map(close, trained, on_one_device("adamw", False))

"""Batches and tables that are cut along the Explicit axes of a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
from slow import slow

import jbag

V, D, B, L = 40, 8, 16, 4


@pytest.fixture
def mesh():
    mesh = make_mesh("explicit", (2, 2), ("x", "y"))
    with jax.set_mesh(mesh):
        yield mesh


def data():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(V, D)).astype(np.float32)
    ids = rng.integers(0, V, (B, L)).astype(np.int32)
    ids[3] = 7  # the padding
    weights = rng.uniform(0.5, 2, (B, L)).astype(np.float32)
    cotangent = rng.normal(size=(B, D)).astype(np.float32)
    return table, ids, weights, cotangent


# Of the table, of ids and weights [B, L] or [N], of offsets [B], and of what is pooled.
LAYOUTS = {
    "batch": (P(), P("x", None), None, P("x", None)),
    "batch along both axes": (P(), P(("x", "y"), None), None, P(("x", "y"), None)),
    "slots of a bag": (P(), P(None, "x"), None, P(None, None)),
    "columns": (P(None, "y"), P(), None, P(None, "y")),
    "batch and columns": (P(None, "y"), P("x", None), None, P("x", "y")),
    "flat": (P(), P("x"), P(), P(None, None)),
    "flat, offsets too": (P(), P("x"), P("x"), P(None, None)),
    "flat, columns": (P(None, "y"), P("x"), P(), P(None, "y")),
}


def place(mesh, layout):
    table, ids, weights, cotangent = data()
    of_table, of_slots, of_offsets, _ = LAYOUTS[layout]
    offsets = None
    if of_offsets is not None:
        ids, weights = ids.reshape(-1), weights.reshape(-1)
        offsets = np.arange(0, B * L, L, dtype=np.int32)
    arrays = (table, ids, offsets, weights, cotangent)
    specs = (of_table, of_slots, of_offsets, of_slots, P())
    return arrays, [
        None if x is None else jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(arrays, specs, strict=True)
    ]


def check(run, layout, mesh, jit):
    """Compare what a function of the arrays gives on a mesh and on one device."""
    plain, laid = place(mesh, layout)
    with jax.set_mesh(make_mesh(sizes=(1,))):
        wanted = jax.jit(run)(*plain)
    out = (jax.jit(run) if jit else run)(*laid)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("jit", "implementation"), [(False, None), (True, "xla")])
def test_values_lie_as_the_batch_and_the_columns(mesh, layout, jit, implementation):
    def run(table, ids, offsets, weights, _):
        options = {"mode": "sum", "weights": weights, "implementation": implementation}
        return jbag.embedding_bag(table, ids, offsets, **options)

    out = check(run, layout, mesh, jit)
    assert jax.typeof(out).sharding.spec == LAYOUTS[layout][3]


@pytest.mark.parametrize("layout", ["batch and columns", "flat"])
@pytest.mark.parametrize(
    ("mode", "weighted"),
    [("mean", True), ("max", True), *slow(("sqrtn", False), ("min", False))],
)
def test_options_and_gradients_are_those_of_one_device(mesh, layout, mode, weighted):
    def run(table, ids, offsets, weights, cotangent):
        def loss(table, weights):
            out = jbag.embedding_bag(
                table,
                ids,
                offsets,
                mode=mode,
                weights=weights if weighted else None,
                padding_idx=7,
                max_norm=2.0,
                scale_grad_by_freq=mode in ("sum", "mean"),
            )
            return (out * cotangent).sum()

        return jax.value_and_grad(loss, argnums=(0, 1))(table, weights)

    _, (gradient, _) = check(run, layout, mesh, jit=True)
    table = LAYOUTS[layout][0]
    assert jax.typeof(gradient).sharding.spec == P(*table, *[None] * (2 - len(table)))


@pytest.mark.parametrize("layout", ["batch", "batch and columns", "flat"])
@pytest.mark.parametrize("mode", ["mean", "max"])
def test_sparse_gradients_are_those_of_one_device(mesh, layout, mode):
    def run(table, ids, offsets, _, cotangent):
        def loss(table):
            out = jbag.embedding_bag(table, ids, offsets, mode=mode, sparse=True)
            return (out * cotangent).sum()

        value, rows = jbag.value_and_grad(loss)(table)
        assert isinstance(rows, jbag.RowSparse)
        return value, rows.todense()

    check(run, layout, mesh, jit=True)


def test_a_module_trains_on_a_batch_that_is_cut(mesh):
    table, ids, *_ = data()
    ids = jax.device_put(ids, NamedSharding(mesh, P("x", None)))
    table = jax.device_put(table, NamedSharding(mesh, P()))
    module = jbag.EmbeddingBag(V, D, sparse=True)
    optimizer = jbag.optim.adagrad(0.1)

    @jax.jit
    def step(table, ids):
        params = {"params": {"embedding": table}}
        gradient = jbag.grad(lambda p: (module.apply(p, ids) ** 2).sum())(params)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return params["params"]["embedding"] + updates["params"]["embedding"]

    moved = step(table, ids)
    with jax.set_mesh(make_mesh(sizes=(1,))):
        wanted = step(*map(np.asarray, (table, ids)))
    np.testing.assert_allclose(moved, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("of_table", "of_ids", "message"),
    [
        (
            P("x", None),
            P("x", None),
            r"not be sharded by rows .* got float32\[40@x,8\]",
        ),
        (P("x", None), P(), r"not be sharded by rows .* jbag\.sharding\.embedding_bag"),
        (P(None, "x"), P("x", None), r"other Explicit axes .* int32\[16@x,4\]"),
        (
            P(None, "x"),
            P(("y", "x"), None),
            r"other Explicit axes .* jax\.sharding\.reshard",
        ),
    ],
)
def test_what_can_not_be_pooled_says_what_to_do(mesh, jit, of_table, of_ids, message):
    table, ids, *_ = data()
    table = jax.device_put(table, NamedSharding(mesh, of_table))
    ids = jax.device_put(ids, NamedSharding(mesh, of_ids))
    pool = functools.partial(jbag.embedding_bag, mode="sum")
    with pytest.raises(ValueError, match=message):
        (jax.jit(pool) if jit else pool)(table, ids)


def test_a_table_of_rows_on_an_auto_mesh_is_pooled():
    mesh = make_mesh()
    table, ids, *_ = map(jnp.asarray, data())
    laid = jax.device_put(table, NamedSharding(mesh, P("x", None)))
    np.testing.assert_allclose(
        jbag.embedding_bag(laid, ids), jbag.embedding_bag(table, ids), rtol=1e-6
    )

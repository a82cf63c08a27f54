"""Rows that are stacked, or lie on the devices of a mapped axis."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense_counterpart import densify, is_rows
from jax import lax
from jax.sharding import PartitionSpec as P
from meshes import make_mesh, some_devices
from optax_walk import (
    PLACES,
    SGD,
    STACKED,
    D,
    V,
    check,
    each,
    equals,
    is_close,
    loss,
    loss_of,
    small_loss,
    stacked,
    start,
)
from slow import slow

import jbag
from jbag import optim

pytestmark = pytest.mark.standard_promotion
REDUCTIONS = {
    "sum": lambda g: jnp.sum(g, axis=0),
    "mean": lambda g: jnp.mean(g, axis=0),
    "sum of all": jnp.sum,
    "max": lambda g: jnp.max(g, axis=0),
    "first": lambda g: g[0],
    "last of the reverse": lambda g: g[::-1][-1],
    "cumsum": lambda g: jnp.cumsum(g, 0),
    "difference": lambda g: g[0] - g[1],
}


@pytest.mark.parametrize("kind", STACKED)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_reduction_of_stacked_rows_equals_the_dense_one_or_raises(name, kind):
    stacked(kind, False)
    check(lambda sparse: each(REDUCTIONS[name])(stacked(kind, sparse)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vmap", "scan"])
def test_stacked_rows_sum_to_one_and_are_multiplied_out(kind):
    rows, expected = stacked(kind, True), np.asarray(stacked(kind, False))
    one, every = jax.jit(lambda rows: (rows.sum(axis=0), rows.todense()))(rows)
    assert is_rows(one)
    assert one.shape == (V, D)
    assert every.shape == (2, V, D)
    assert equals((one.todense(), every), (expected.sum(0), expected))
    assert equals(densify(rows.sum(axis=0)), expected.sum(0))
    updates, _ = SGD.update(one, SGD.init(start()["table"]), start()["table"])
    moved = optax.apply_updates(start()["table"], updates)
    assert is_close(moved, start()["table"] - 0.1 * expected.sum(0))


@pytest.mark.parametrize("kind", STACKED)
@pytest.mark.parametrize("place", PLACES)
def test_an_optimizer_of_stacked_rows_equals_the_dense_one_or_raises(kind, place):
    optimizer = PLACES[place](optim.scale(0.5))
    tables = jnp.stack([start()["table"]] * 2)

    def step(params, sparse):
        gradient = stacked(kind, sparse)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    stacked(kind, False)
    check(functools.partial(step, tables))


def exchange(g):
    return lax.ppermute(g, "x", [(0, 1), (1, 0), (2, 3), (3, 2)])


COLLECTIVES = {
    "psum": lambda g: lax.psum(g, "x"),
    "pmean": lambda g: lax.pmean(g, "x"),
    "pmax": lambda g: lax.pmax(g, "x"),
    "pmin": lambda g: lax.pmin(g, "x"),
    "psum of each leaf": each(lambda g: lax.psum(g, "x")),
    "psum of halves": each(lambda g: lax.psum(g * 0.5, "x")),
    "psum_scatter": lambda g: lax.psum_scatter(g, "x", tiled=True),
    "all_gather": lambda g: lax.all_gather(g, "x"),
    "all_gather, then sum": lambda g: each(lambda g: g.sum(0))(lax.all_gather(g, "x")),
    "all_to_all": lambda g: lax.all_to_all(g, "x", 0, 0, tiled=True),
    "ppermute": exchange,
}
IDS = jnp.asarray(np.random.default_rng(1).integers(1, V, (4, 2, 3)), jnp.int32)


def under_shard_map(collective, sparse, checked=True, loss=small_loss):
    """Return what each device has of the collective of its gradient, stacked."""
    mesh = make_mesh()

    def local(params, ids):
        if checked:
            params = lax.pcast(params, "x", to="varying")
        local_loss = loss_of(sparse, loss)
        gradient = (jbag if sparse else jax).grad(local_loss)(params, ids[0])
        return jax.tree.map(lambda x: x[None], densify(collective(gradient)))

    specs = {"in_specs": (P(), P("x")), "out_specs": P("x"), "check_vma": checked}
    return jax.jit(jax.shard_map(local, mesh=mesh, **specs))(start(), IDS)


def under_vmap(collective, sparse, loss=small_loss):
    def local(ids):
        gradient = (jbag if sparse else jax).grad(loss_of(sparse, loss))(start(), ids)
        return densify(collective(gradient))

    return jax.jit(jax.vmap(local, axis_name="x"))(IDS)


def under_pmap(collective, sparse, loss=small_loss):
    def local(ids):
        gradient = (jbag if sparse else jax).grad(loss_of(sparse, loss))(start(), ids)
        return densify(collective(gradient))

    return jax.pmap(local, axis_name="x", devices=some_devices(4))(IDS)


def of_table(collective):
    """Return the collective for the gradient of the table alone."""
    return lambda gradient: collective(gradient["table"])


@pytest.mark.parametrize("name", COLLECTIVES)
@pytest.mark.parametrize("under", [under_shard_map, under_vmap])
def test_a_collective_equals_the_dense_one_or_raises(under, name):
    check(functools.partial(under, of_table(COLLECTIVES[name])))


@pytest.mark.parametrize("name", ["psum", *slow("pmean", "pmax")])
@pytest.mark.parametrize(
    "under", [under_pmap, functools.partial(under_shard_map, checked=False)]
)
def test_other_ways_to_map_an_axis_equal_the_dense_result_or_raise(under, name):
    check(functools.partial(under, of_table(COLLECTIVES[name])))


@pytest.mark.parametrize("name", ["psum", *slow("pmean")])
@pytest.mark.parametrize(
    "under",
    [
        under_shard_map,
        functools.partial(under_shard_map, checked=False),
        under_vmap,
        under_pmap,
    ],
    ids=["shard_map", "shard_map, unchecked", "vmap", "pmap"],
)
def test_rows_sum_over_a_mapped_axis_as_dense_gradients_do(under, name):
    expected = under(lambda g: getattr(lax, name)(g, "x"), False, loss=loss)
    total = lambda g: getattr(jbag.sparse, name)(g, "x")
    assert equals(under(total, True, loss=loss), expected)


def test_data_parallel_steps_equal_those_of_dense_gradients():
    mesh = make_mesh()

    def train(sparse):
        differentiate = (jbag if sparse else jax).value_and_grad
        total = jbag.sparse.pmean if sparse else lax.pmean

        def step(params, ids):
            value, gradient = differentiate(loss_of(sparse))(params, ids[0])
            gradient = total(gradient, "x")
            updates, _ = SGD.update(gradient, SGD.init(params), params)
            params = optax.apply_updates(params, updates)
            return params, lax.pmean(value, "x")[None]

        specs = {"in_specs": (P(), P("x")), "out_specs": (P(), P("x"))}
        step = jax.jit(jax.shard_map(step, mesh=mesh, check_vma=False, **specs))
        params, values = start(), []
        for ids in (IDS, IDS[::-1], (IDS + 1) % V):
            params, value = step(params, ids)
            values.append(value)
        return params, values

    assert equals(train(True), train(False))

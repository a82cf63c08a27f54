"""A function that maps over a `RowSparse` equals the dense result, or raises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
from optax_walk import (
    SGD,
    D,
    V,
    densify,
    each,
    gradients,
    is_close,
    outcome,
    start,
    trace_dense,
)
from slow import slow

import jbag
from jbag import optim

pytestmark = pytest.mark.standard_promotion
# Of two gradients; what each gives for arrays is what it must give for rows.
MAPS = {
    "twice": lambda a, _: each(lambda g: 2 * g)(a),
    "negative": lambda a, _: each(lambda g: -g)(a),
    "times a float": lambda a, _: each(lambda g: g * 0.1)(a),
    "times a number of its dtype": lambda a, _: each(
        lambda g: jnp.array(0.1, g.dtype) * g
    )(a),
    "times an array": lambda a, _: each(lambda g: g * jnp.float32(3))(a),
    "times a NumPy number": lambda a, _: each(lambda g: np.float32(3) * g)(a),
    "times a bool": lambda a, _: each(lambda g: g * True)(a),
    "divided": lambda a, _: each(lambda g: g / 2)(a),
    "divided by an integer": lambda a, _: each(lambda g: g // 1)(a),
    "add": lambda a, b: each(jnp.add)(a, b),
    "add itself": lambda a, _: each(jnp.add)(a, a),
    "subtract": lambda a, b: each(jnp.subtract)(a, b),
    "multiply": lambda a, b: each(jnp.multiply)(a, b),
    "maximum": lambda a, b: each(jnp.maximum)(a, b),
    "mean of two": lambda a, b: each(lambda x, y: (x + y) / 2)(a, b),
    "stacked, then summed": lambda a, b: each(lambda *x: jnp.stack(x).sum(0))(a, b),
    "sign": lambda a, _: each(jnp.sign)(a),
    "abs": lambda a, _: each(jnp.abs)(a),
    "clip": lambda a, _: each(lambda g: jnp.clip(g, -0.5, 0.5))(a),
    "square": lambda a, _: each(jnp.square)(a),
    "sqrt": lambda a, _: each(lambda g: jnp.sqrt(jnp.square(g)))(a),
    "power": lambda a, _: each(lambda g: g**2)(a),
    "mean": lambda a, _: each(jnp.mean)(a),
    "sum": lambda a, _: each(jnp.sum)(a),
    "max": lambda a, _: each(jnp.max)(a),
    "centred": lambda a, _: each(lambda g: g - g.mean())(a),
    "normalised": lambda a, _: each(lambda g: g / jnp.linalg.norm(g))(a),
    "astype": lambda a, _: each(lambda g: g.astype(jnp.float32))(a),
    "asarray": lambda a, _: each(lambda g: jnp.asarray(g, jnp.float32))(a),
    "astype integer": lambda a, _: each(lambda g: g.astype(jnp.int32))(a),
    "NumPy": lambda a, _: each(lambda g: 2 * np.asarray(g))(a),
    "zeros_like": lambda a, _: each(jnp.zeros_like)(a),
    "where, yes": lambda a, b: each(lambda x, y: jnp.where(True, x, y))(a, b),
    "where, no": lambda a, b: each(lambda x, y: jnp.where(False, x, y))(a, b),
    "where, zero": lambda a, _: each(lambda g: jnp.where(True, g, 0))(a),
    "where positive": lambda a, _: each(lambda g: jnp.where(g > 0, g, 0))(a),
    "nan_to_num": lambda a, _: each(jnp.nan_to_num)(a),
    "isfinite": lambda a, _: each(jnp.isfinite)(a),
    "round": lambda a, _: each(jnp.round)(a),
    "cond": lambda a, b: lax.cond(jnp.array(False), lambda: a, lambda: b),
    "stop_gradient": lambda a, _: lax.stop_gradient(a),
    "floating leaves doubled": lambda a, _: each(
        lambda g: 2 * g if jnp.issubdtype(g.dtype, jnp.floating) else g
    )(a),
    "floating leaves added": lambda a, b: each(
        lambda x, y: x + y if jnp.issubdtype(x.dtype, jnp.floating) else x
    )(a, b),
    "floating leaves averaged": lambda a, b: each(
        lambda x, y: 0.9 * x + 0.1 * y if jnp.issubdtype(x.dtype, jnp.floating) else y
    )(a, b),
    "noise": lambda a, _: each(
        lambda g: g + jax.random.normal(jax.random.key(0), g.shape)
    )(a),
    "tree.add": lambda a, b: optax.tree.add(a, b),
    "tree.add_scale": lambda a, b: optax.tree.add_scale(a, 0.5, b),
    "tree.sub": lambda a, b: optax.tree.sub(a, b),
    "tree.mul": lambda a, b: optax.tree.mul(a, b),
    "tree.scale": lambda a, _: optax.tree.scale(0.5, a),
    "tree.scale by an integer": lambda a, _: optax.tree.scale(2, a),
    "tree.where": lambda a, b: optax.tree.where(True, a, b),
    "tree.clip": lambda a, _: optax.tree.clip(a, -0.5, 0.5),
    "tree.cast": lambda a, _: optax.tree.cast(a, jnp.float32),
    "tree.norm": lambda a, _: optax.tree.norm(a),
    "tree.norm of order 1": lambda a, _: optax.tree.norm(a, ord=1),
    "tree.norm of order inf": lambda a, _: optax.tree.norm(a, ord=jnp.inf),
    "tree.sum": lambda a, _: optax.tree.sum(a),
    "tree.max": lambda a, _: optax.tree.max(a),
    "tree.vdot": lambda a, b: optax.tree.vdot(a, b),
    "tree.zeros_like": lambda a, _: optax.tree.zeros_like(a),
    "tree.update_moment": lambda a, b: optax.tree.update_moment(a, b, 0.9, 1),
    "tree.update_moment of order 2": lambda a, b: optax.tree.update_moment(
        a, b, 0.9, 2
    ),
    "global_norm": lambda a, _: optax.global_norm(a),
    "incremental_update": lambda a, b: optax.incremental_update(a, b, 0.1),
    "periodic_update": lambda a, b: optax.periodic_update(a, b, jnp.array(2), 2),
}


@functools.cache
def pairs():
    """Return two gradients in each form: as they are, and with distinct rows."""
    pooled = [gradient["table"] for _, gradient in gradients(True)]
    return {"pooled": pooled, "coalesced": [rows.coalesce() for rows in pooled]}


def map_case(function, form, wrap=lambda f: f):
    rows = pairs()[form]
    dense = densify(rows)  # outside of what is traced
    return lambda sparse: wrap(function)(*(rows if sparse else dense))


def check_map(function, form):
    assert outcome(map_case(function, form)) != "wrong"
    trace_dense(map_case(function, form))


in_each_form = pytest.mark.parametrize("form", ["pooled", *slow("coalesced")])


@in_each_form
@pytest.mark.parametrize("name", MAPS)
def test_a_map_over_rows_equals_the_dense_one_or_raises(name, form):
    check_map(MAPS[name], form)


def test_rows_filled_with_zeros_move_no_row():
    rows = optax.tree.zeros_like(pairs()["pooled"][0])
    assert not np.asarray(rows.todense()).any()
    assert rows.num_rows == 0


COMPILED_MAPS = [
    *("twice", "times a number of its dtype", "add", "subtract", "abs", "where, no"),
    *("mean of two", "stacked, then summed", "zeros_like", "global_norm", "tree.sub"),
]


@pytest.mark.parametrize("name", COMPILED_MAPS)
def test_a_compiled_map_over_rows_equals_the_dense_one_or_raises(name):
    assert outcome(map_case(MAPS[name], "pooled", jax.jit)) != "wrong"


# Functions of a leaf that move numbers, without arithmetic.
MOVES = {
    "first row": lambda g: g[0],
    "half of the rows": lambda g: g[: g.shape[0] // 2],
    "transpose": jnp.transpose,
    "ravel": jnp.ravel,
    "sort": lambda g: jnp.sort(g, 0),
    "tile": lambda g: jnp.tile(g, (2, 1)),
    "concatenate": lambda g: jnp.concatenate([g, g]),
}


@in_each_form
@pytest.mark.parametrize("name", MOVES)
def test_a_map_that_moves_numbers_equals_the_dense_one_or_raises(name, form):
    check_map(lambda a, _: each(MOVES[name])(a), form)


# Functions of a leaf that keep its shape, without arithmetic.
KEEP_SHAPES = {
    "flip": jnp.flip,
    "roll": lambda g: jnp.roll(g, 1),
    "roll of an axis": lambda g: jnp.roll(g, 1, 0),
    "set a row": lambda g: jnp.asarray(g).at[0].set(jnp.asarray(g)[1]),
    "ones_like": jnp.ones_like,
    "full_like": lambda g: jnp.full_like(g, 3),
    "permute": lambda g: jax.random.permutation(jax.random.key(0), g),
}


@in_each_form
@pytest.mark.parametrize("name", KEEP_SHAPES)
def test_a_map_that_keeps_shapes_equals_the_dense_one_or_raises(name, form):
    check_map(lambda a, _: each(KEEP_SHAPES[name])(a), form)


def floating_only(function):
    return each(lambda g: function(g) if jnp.issubdtype(g.dtype, jnp.floating) else g)


# Functions of the floating leaves, as a filter picks them.
FILTERED = {
    "clip": lambda g: jnp.clip(g, -0.5, 0.5),
    "sign": jnp.sign,
    "abs": jnp.abs,
    "square": jnp.square,
    "round": jnp.round,
    "sort": jnp.sort,
    "positive": lambda g: jnp.maximum(g, 0),
    "plus one": lambda g: g + 1,
    "normalised": lambda g: g / jnp.linalg.norm(g),
    "noise": lambda g: g + jax.random.normal(jax.random.key(0), g.shape),
    "flip": jnp.flip,
    "ones_like": jnp.ones_like,
    "tanh": jnp.tanh,
}


@in_each_form
@pytest.mark.parametrize("name", FILTERED)
def test_a_map_over_floating_leaves_equals_the_dense_one_or_raises(name, form):
    check_map(lambda a, _: floating_only(FILTERED[name])(a), form)


LINEAR = {
    "scale": lambda g: -0.001 * g,
    "zeros": jnp.zeros_like,
    "times zero": lambda g: 0.0 * g,
    "there and back": lambda g: g.astype(jnp.float16).astype(jnp.float32),
}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_map_over_floating_leaves_equals_the_dense_one(name, wrap):
    rows = pairs()["pooled"][0]
    function = LINEAR[name]
    found = wrap(floating_only(function))(rows).todense()
    np.testing.assert_allclose(found, function(rows.todense()), rtol=1e-3, atol=1e-3)


# Traced, the guard can't raise.
POISONS = {
    "flip": each(jnp.flip),
    "roll": each(lambda g: jnp.roll(g, 1)),
    **{f"{name}, filtered": floating_only(f) for name, f in FILTERED.items()},
}


def test_what_raises_gives_nan_where_it_is_compiled():
    rows = pairs()["pooled"][0]
    named = np.asarray(rows.todense()).any(1).sum()

    @jax.jit
    def changed(rows):
        return {name: function(rows).todense() for name, function in POISONS.items()}

    found = {name: np.isnan(x).any(1).sum() for name, x in changed(rows).items()}
    assert found == dict.fromkeys(POISONS, named)


LAYOUTS = ("ragged", "weighted", "maximum", "padded", "without bags", "rectangular")
LAYOUTS += ("coalesced", "a batch", "rows")


@functools.cache
def rows_of_every_layout(other=False):
    """Return rows whose terms hold each kind of array, by a name of it.

    The `other` ones have the same shapes, and differ in one array.
    """
    table, ids = start()["table"], jnp.array([3, 0, 3, 12, 5, 7])
    weights = jnp.array([0.5, 2.0, 0.0, 1.0, 3.0, 4.0 if other else 1.0])
    ragged = functools.partial(
        jbag.embedding_bag,
        offsets=jnp.array([0, 2, 3 if other else 2, 6]),
        include_last_offset=True,
        sparse=True,
    )
    pools = {
        "ragged": functools.partial(ragged, mode="mean"),
        "weighted": functools.partial(
            ragged, mode="sum", weights=weights, offsets=jnp.array([0, 2, 2, 6])
        ),
        "maximum": functools.partial(
            ragged, mode="max", offsets=jnp.array([0, 2, 2, 6])
        ),
        "padded": functools.partial(ragged, mode="sum", padding_idx=0),
        "without bags": functools.partial(
            ragged, mode="sum", offsets=jnp.zeros(1, int)
        ),
    }
    last = 11 if other else 12
    rows_of = lambda ids: jbag.grad(lambda t: pools["weighted"](t, ids).sum())(table)
    stacked = jax.vmap(
        jbag.grad(lambda t, ids: jbag.embedding_bag(t, ids, sparse=True).sum()),
        in_axes=(None, 0),
    )

    @jax.jit
    def make(table):
        rows = {
            name: jbag.grad(lambda t, pool=pool: pool(t, ids).sum())(
                -table if other and name == "maximum" else table
            )
            for name, pool in pools.items()
        }
        return rows | {
            "coalesced": rows_of(jnp.array([3, 0, 3, last, 5, 7])).coalesce(),
            "a batch": stacked(table, jnp.array([[[1, 2]], [[2, last]]])),
            "rows": jbag.RowSparse.from_rows([12, last], jnp.ones((2, D)), V),
        }

    rows = make(table) | {"rectangular": pairs()["pooled"][other]}
    return {name: rows[name] for name in LAYOUTS}


FILLED = {name: each(KEEP_SHAPES[name]) for name in ("ones_like", "full_like")} | {
    "full_like, below zero": each(lambda g: jnp.full_like(g, -3)),
}


@pytest.mark.parametrize("fill", FILLED.values(), ids=FILLED.keys())
def test_rows_that_a_compiled_function_fills_move_a_row_to_nan(fill):
    @jax.jit
    def changed(every):
        return {name: fill(rows).sum().todense() for name, rows in every.items()}

    found = {k: np.isnan(x).any() for k, x in changed(rows_of_every_layout()).items()}
    assert found == {name: name != "without bags" for name in LAYOUTS}


def add_floating(a, b):
    """Return a tree of the floating leaves' sums, and of the first one's others."""
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x, y: x + y if floating(x) else x, a, b)


def test_the_floating_leaves_of_two_gradients_have_no_sum():
    rows, others = rows_of_every_layout(), rows_of_every_layout(other=True)
    read = lambda a, b: add_floating(a, b).sum().todense()
    compiled = jax.jit(lambda a, b: {name: read(a[name], b[name]) for name in LAYOUTS})
    found = {name: np.isnan(x).any() for name, x in compiled(rows, others).items()}
    assert found == {name: name != "without bags" for name in LAYOUTS}
    for name in LAYOUTS:
        if name != "without bags":
            with pytest.raises(ValueError, match=r"isn't linear .* jbag\.optim"):
                read(rows[name], others[name])


def test_the_floating_leaves_of_gradients_with_the_same_slots_have_a_sum():
    every = rows_of_every_layout()
    read = lambda rows: add_floating(rows, floating_only(lambda g: 0.3 * g)(rows))

    @jax.jit
    def compiled(every):
        return {
            k: (read(x).sum().todense(), x.sum().todense()) for k, x in every.items()
        }

    found = compiled(every)
    for actual, total in found.values():
        assert is_close(actual, 1.3 * np.asarray(total))
    for name in ("ragged", "coalesced"):
        eager = read(every[name]).sum().todense()
        assert is_close(eager, found[name][0])


def test_the_floating_leaves_of_a_step_of_two_batches_have_no_sum():
    @jax.jit
    def gradient(ids):
        pooled = lambda t: jbag.embedding_bag(t, ids, sparse=True).sum()
        return jbag.grad(pooled)(start()["table"])

    first, second = gradient(jnp.array([[3, 4]])), gradient(jnp.array([[3, 5]]))
    changed = jax.jit(add_floating)(first, second)
    assert np.isnan(jax.jit(jbag.RowSparse.todense)(changed)).any()


def test_rows_that_stay_within_a_program_are_not_compared():
    def gradient(table, ids):
        pooled = lambda t: jbag.embedding_bag(t, ids, sparse=True).sum()
        return jax.tree.map(lambda x: x, jbag.grad(pooled)(table))

    def compiled(function, *operands):
        return jax.jit(function).lower(*operands).compile().as_text()

    table, ids = start()["table"], jnp.array([[3, 4]])
    a_constant_of_the_hash = str(0x9E3779B9)
    step = compiled(lambda *x: x[0] + gradient(*x), table, ids)
    assert a_constant_of_the_hash not in step
    assert a_constant_of_the_hash in compiled(gradient, table, ids)


MESH_SPECS = {
    "row_wise": P("x", None),
    "column_wise": P(None, "x"),
    "data_parallel": P(),
    "table_wise": jbag.sharding.TableWise("x", 4),
}


@pytest.mark.parametrize("spec", MESH_SPECS.values(), ids=MESH_SPECS.keys())
def test_rows_over_a_mesh_that_a_compiled_function_fills_move_a_row_to_nan(spec):
    collection = jbag.EmbeddingBagCollection(
        {"table": jbag.Table(V, 4)},
        {"ids": jbag.Feature("table")},
        specs={"embedding": spec},
        mesh=make_mesh(),
        sparse=True,
    )
    blocks = [[[1, 2], [3]], [[], [4, 4]], [[5], [6, 0]], [[0], []]]
    bags = [jbag.Bags.from_lists(lists, capacity=4) for lists in blocks]
    batch = {"ids": jax.tree.map(lambda *x: jnp.stack(x), *bags)}

    @jax.jit
    def gradient(key):
        variables = collection.init(key, batch)
        loss = lambda variables: collection.apply(variables, batch)["ids"].sum()
        return jbag.grad(loss)(variables)

    @jax.jit
    def fill(tree):
        return jax.tree.map(
            lambda rows: each(jnp.ones_like)(rows).todense(),
            tree,
            is_leaf=lambda x: isinstance(x, jbag.RowSparse),
        )

    (dense,) = jax.tree.leaves(fill(gradient(jax.random.key(0))))
    assert np.isnan(dense).any()


def test_steps_of_rows_that_a_compiled_function_changed_are_nan():
    def step(table, rows):
        updates, _ = SGD.update(floating_only(jnp.sign)(rows), SGD.init(table), table)
        return optax.apply_updates(table, updates)

    rows, table = pairs()["pooled"][0], start()["table"]
    with pytest.raises(ValueError, match=r"isn't linear .* jbag\.optim"):
        step(table, rows)
    assert np.isnan(jax.jit(step)(table, rows)).any()


def test_rows_pass_through_compiled_functions_with_checks_for_nan():
    rows = pairs()["pooled"][0]
    with jax.debug_nans(True), jax.debug_infs(True):
        assert is_close(jax.jit(lambda x: x)(rows).todense(), rows.todense())


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_zeroing_the_nans_of_rows_raises(wrap):
    values = jnp.array([[1.0, 1.0], [np.nan, 1.0], [2.0, 2.0]], jnp.float32)
    rows = jbag.RowSparse.from_rows([4, 4, 7], values, V)
    zero = optax.zero_nans()
    with pytest.raises(TypeError, match="float0"):
        wrap(zero.update)(rows, zero.init(start()["table"]))


def test_the_global_norm_of_rows_is_that_of_the_dense_gradient():
    for rows in pairs().values():
        assert is_close(optim.global_norm(rows), optax.tree.norm(densify(rows)))

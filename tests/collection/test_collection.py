"""Collections of tables on one device, in Linen and in NNX."""

import functools

import collection_cases as cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizer_oracle as formulas
import oracle
import pytest
from collection_cases import make, make_nnx
from flax import nnx
from jax.sharding import PartitionSpec as P

import jbag
from jbag import optim

SOME = cases.FEW


def shapes(collection, batch=None):
    """Return the parameters' shapes, in their boxes."""
    batch = cases.batch_of(collection.features) if batch is None else batch
    init = functools.partial(collection.init, jax.random.key(0), batch)
    return jax.eval_shape(init)["params"]


def test_values_and_gradients_are_those_of_the_oracle(implementation):
    options = {"sparse": True, "implementation": implementation}
    cases.check(make(*cases.only(*cases.SOME), **options))


@pytest.mark.slow
def test_values_and_gradients_of_many_features_are_those_of_the_oracle(implementation):
    options = {"sparse": True, "implementation": implementation}
    others = cases.only(*(name for name in cases.FEATURES if name not in cases.SOME))
    cases.check(make(*others, **options))


@pytest.mark.parametrize("options", [{"grid": 20}, {"specs": {"embedding": P()}}])
def test_dealt_rows_change_nothing_and_specs_need_no_mesh(options):
    cases.check(make(*cases.only("padded_sum", "flat_max"), sparse=True, **options))


@pytest.mark.parametrize("packed", [False, True])
def test_nnx_pools_and_differentiates_as_linen(packed):
    collection = make_nnx(sparse=True, packed=packed)
    collection.import_tables({k: cases.values()[k] for k in SOME[0]})
    batch, cotangents = cases.batch_of(SOME[1]), cases.cotangents(SOME[1])

    def loss(module):
        out = module(batch)
        return sum((out[k] * g).sum() for k, g in cotangents.items()), out

    @jax.jit
    def run(module):
        rows, out = jbag.grad(loss, has_aux=True)(module)
        dense, _ = jax.grad(loss, has_aux=True)(module)
        stacks = ("embedding_4", "embedding_8")
        return out, {k: getattr(rows, k).get_value().todense() for k in stacks}, dense

    out, rows, dense = run(collection)
    for name in SOME[1]:
        oracle.assert_close(out[name], cases.pooled(name))
    expected = cases.to_tables(SOME[1])
    for name, x in make().export_tables(rows).items():
        oracle.assert_close(x, expected[name])
    for name, x in dense.export_tables().items():
        oracle.assert_close(x, expected[name])
    for name, x in collection.export_tables().items():
        np.testing.assert_array_equal(x, cases.values()[name])


def test_a_packed_collection_trains_as_one_of_arrays():
    tables, features = SOME
    given = {k: cases.values()[k] for k in tables}
    batch = cases.batch_of(features)
    optimizer = jbag.optim.rowwise_adagrad(0.1)
    results = []
    for packed in (False, True):
        collection = make(sparse=True, grid=20, packed=packed)

        def loss(params, collection=collection):
            out = collection.apply({"params": params}, batch)
            return sum((jnp.nan_to_num(x) ** 2).sum() for x in out.values())

        @jax.jit
        def step(params, state, loss=loss):
            gradient = jbag.grad(loss)(params)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        params = collection.import_tables(given)
        initial = collection.init(jax.random.key(0), batch)["params"]
        assert jax.tree.structure(params) == jax.tree.structure(initial)
        is_packed = [isinstance(x, jbag.PackedTable) for x in params.values()]
        assert is_packed == [packed] * len(params)
        state = optimizer.init(params)
        for _ in range(2):
            params, state = step(params, state)
        squares = state.states["sum_of_squares"]
        results.append([collection.export_tables(x) for x in (params, squares)])
        # Each takes the parameters of the other.
        other = make(sparse=True, grid=20, packed=not packed)
        out, same = (x.apply({"params": params}, batch) for x in (collection, other))
        jax.tree.map(np.testing.assert_array_equal, out, same)
    for one, two in zip(*results, strict=True):
        jax.tree.map(oracle.assert_close, two, one)


def test_tables_of_one_group_width_and_dtype_share_a_parameter():
    half = jnp.bfloat16
    tables = {
        "a": jbag.Table(3, 4),
        "b": jbag.Table(5, 4),
        "c": jbag.Table(7, 8),
        "d": jbag.Table(2, 4, group="other"),
        "e": jbag.Table(9, 4, param_dtype=half),
        "f": jbag.Table(4, 8, group="halves", param_dtype=half),
    }
    features = {name: jbag.Feature(name) for name in tables}
    batch = dict.fromkeys(tables, jnp.zeros((2, 1), jnp.int32))
    expected = {
        "embedding_4_float32": ((8, 4), "float32"),
        "embedding_8": ((7, 8), "float32"),
        "other_4": ((2, 4), "float32"),
        "embedding_4_bfloat16": ((9, 4), "bfloat16"),
        "halves_8": ((4, 8), "bfloat16"),
    }
    collection = make(tables, features)
    found = shapes(collection, batch)
    assert {k: (x.shape, x.dtype.name) for k, x in found.items()} == expected
    module = nnx.eval_shape(lambda: make_nnx(tables, features))
    state = nnx.state(module, nnx.Param)
    assert {k: (x.shape, x.dtype.name) for k, x in state.items()} == expected
    for dtype, names in [
        (None, ["float32"] * 4 + ["bfloat16"] * 2),
        (half, ["bfloat16"] * 6),
    ]:
        pool = make(tables, features, dtype=dtype).apply
        out = jax.eval_shape(pool, {"params": found}, batch)
        assert [x.dtype.name for x in out.values()] == names


def test_a_group_is_dealt_by_the_grid():
    def rows(**options):
        return nn.unbox(shapes(make(**options)))["embedding_4"].shape[0]

    assert rows() == 47  # of 30 and 17
    assert rows(grid=20) == 60
    assert rows(specs={"embedding": P()}) == 20160


def test_features_lie_side_by_side_in_their_order():
    features = {k: SOME[1][k] for k in ("wide", "flat_max", "plain_mean")}
    tables = {k: SOME[0][k] for k in ("plain", "wide")}
    batch = dict(reversed(cases.batch_of(features).items()))
    collection = make(tables, features, concatenate=True)
    out = jax.jit(collection.apply)({"params": cases.start(collection)}, batch)
    expected = np.concatenate([cases.pooled(name) for name in features], axis=1)
    oracle.assert_close(out, expected)
    params = {"params": cases.start(collection)}
    pool = lambda *args: names.extend(make(tables, features).apply(*args))
    names = []
    jax.eval_shape(pool, params, batch)
    assert names == list(features)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_keyed_batch_equals_a_dict(weighted):
    kind = "weighted" if weighted else "ragged"
    names = [k for k in cases.CASES if cases.CASES[k][2] == kind][:6]
    tables, features = cases.only(*names)
    collection = make(tables, features)
    params = cases.start(collection)
    bags = [bag for name in names for bag in cases.lists(name)]
    keyed = cases.pack(names[0], 200, bags)
    pool = jax.jit(collection.apply)
    got = pool({"params": params}, keyed)
    for name in names:
        oracle.assert_close(got[name], cases.pooled(name))
    # A malformed bag, of the second feature, is NaN alone.
    at = cases.B + 3
    ends = keyed.offsets.at[at].set(-1)
    broken = jbag.Bags(keyed.indices, ends, keyed.weights)
    out = pool({"params": params}, broken)
    assert np.isnan(out[names[1]][2:4]).all()
    for name in names:
        keep = np.delete(np.arange(cases.B), [2, 3] if name == names[1] else [])
        oracle.assert_close(out[name][keep], cases.pooled(name)[keep])


ENDS = {
    "first": lambda ends, _: ends.at[0].set(1),
    "inside": lambda ends, _: ends.at[5].set(-2),
    "far inside": lambda ends, n: ends.at[4].set(n + 1),
    "last, past the end": lambda ends, n: ends.at[-1].set(n + 1),
    "last, below": lambda ends, _: ends.at[-1].set(0),
}


def test_a_malformed_bag_is_nan_and_receives_nothing_alone(implementation):
    # Three features are joined, of which the one in the middle is broken.
    features = {k: jbag.Feature("plain", "mean") for k in ("a", "b", "c")}
    options = {"sparse": True, "implementation": implementation}
    collection = make({"plain": cases.TABLES["plain"]}, features, **options)
    params = cases.start(collection)
    good = cases.pack("plain_mean")
    g = jnp.asarray(cases.cotangent("plain_mean"))

    def alone(table, bags):
        return jbag.embedding_bag(table, bags, mode="mean", implementation="xla")

    @jax.jit
    def run(params, bags):
        def loss(params, weights):
            middle = jbag.Bags(bags.indices, bags.offsets, weights)
            batch = {"a": good, "b": middle, "c": good}
            out = collection.apply({"params": params}, batch)
            return sum((x * g).sum() for x in out.values()), out

        args = params, bags.weights
        found = [
            grad(loss, argnums=(0, 1), has_aux=True)(*args)
            for grad in (jax.grad, jbag.grad)
        ]

        def pooled(table, weights):
            own = jbag.Bags(bags.indices, bags.offsets, weights)
            return alone(table, own), alone(table, good)

        values, pullback = jax.vjp(pooled, params["embedding_4"], bags.weights)
        (dense, out), (rows, _) = found
        todense = ({"embedding_4": rows[0]["embedding_4"].todense()}, rows[1])
        return out, [dense, todense], values, pullback((g, 2 * g))

    weights = jnp.nan_to_num(good.weights, nan=1.0)
    for break_ends in ENDS.values():
        ends = break_ends(good.offsets, cases.CAPACITY)
        out, found, (middle, others), expected = run(
            params, jbag.Bags(good.indices, ends, weights)
        )
        assert 0 < np.isnan(middle).any(1).sum() < cases.B
        oracle.assert_close(out["b"], middle)
        for name in ("a", "c"):
            oracle.assert_close(out[name], others)
        for to_tables, to_weights in found:
            oracle.assert_close(to_tables["embedding_4"], expected[0])
            oracle.assert_close(to_weights, expected[1])


def labels(params):
    return {k: "rows" if k.startswith("items") else "rest" for k in params}


def test_groups_are_trained_in_different_ways():
    tables = {
        "a": jbag.Table(11, 3, group="items"),
        "b": jbag.Table(6, 3, group="items"),
        "c": jbag.Table(8, 3),
    }
    features = {k: jbag.Feature(k, "sum") for k in tables}
    collection = make(tables, features, sparse=True, grid=4)
    rng = np.random.default_rng(0)
    rows = {k: rng.normal(size=(t.num_embeddings, 3)) for k, t in tables.items()}
    params = collection.import_tables(
        {k: x.astype(np.float32) for k, x in rows.items()}
    )
    optimizer = optax.partition(
        {
            "rows": optim.rowwise_adagrad(0.3, eps=1e-3),
            "rest": optim.sgd(0.2, weight_decay=0.1),
        },
        labels,
    )
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch, cotangents):
        def loss(params):
            out = collection.apply({"params": params}, batch)
            return sum((out[k] * g).sum() for k, g in cotangents.items())

        gradient = jbag.grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    totals = {k: np.zeros(len(x)) for k, x in rows.items()}
    with jax.numpy_dtype_promotion("standard"):  # on which Optax relies
        for t in range(1, 4):
            ids = {k: rng.integers(0, len(x), (4, 2)) for k, x in rows.items()}
            g = {k: rng.normal(size=(4, 3)).astype(np.float32) for k in rows}
            batch, cotangents = jax.tree.map(jnp.asarray, (ids, g))
            params, state = step(params, state, batch, cotangents)
            for name, w in rows.items():
                bags = [[(i, None) for i in bag] for bag in ids[name]]
                gradient, _ = oracle.gradients(w, bags, g[name], "sum")
                named = np.unique(ids[name])
                if name == "c":
                    args = (formulas.sgd, w, {}, named, gradient, 0.2, t)
                    formulas.move(*args, weight_decay=0.1)
                else:
                    kept = {"sum_of_squares": totals[name]}
                    args = (formulas.rowwise_adagrad, w, kept, named, gradient, 0.3, t)
                    formulas.move(*args, eps=1e-3)
    for name, x in collection.export_tables(params).items():
        oracle.assert_close(x, rows[name])
    # What an optimizer keeps of tables is exported like them.
    inner = state.inner_states["rows"].inner_state.states["sum_of_squares"]
    own = make({k: tables[k] for k in "ab"}, {k: features[k] for k in "ab"}, grid=4)
    for name, x in own.export_tables(inner).items():
        oracle.assert_close(x, totals[name])


@pytest.mark.parametrize("grid", [None, 20])
def test_tables_and_states_are_exported_and_imported(grid):
    collection = make(grid=grid)
    values = {k: cases.values()[k] for k in SOME[0]}
    params = collection.import_tables(values)
    for name, x in collection.export_tables({"params": params}["params"]).items():
        np.testing.assert_array_equal(x, values[name])
    state = optim.rowwise_adagrad(0.1, initial_accumulator_value=0.5).init(params)
    narrow = {
        k: np.arange(t.num_embeddings, dtype=np.float32) for k, t in SOME[0].items()
    }
    own = collection.import_tables(narrow)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(
        jnp.shape, state.states["sum_of_squares"]
    )
    for name, x in collection.export_tables(own).items():
        np.testing.assert_array_equal(x, narrow[name])
    # To another layout, by way of the tables.
    other = make(grid=7)
    moved = other.import_tables(collection.export_tables(params))
    for name, x in other.export_tables(moved).items():
        np.testing.assert_array_equal(x, values[name])


def constant(value):
    return lambda _, shape, dtype: jnp.full(shape, value, dtype)


@pytest.mark.parametrize("grid", [None, 20])
def test_each_table_starts_by_its_own_initializer(grid):
    tables = {
        "a": jbag.Table(2000, 16),
        "b": jbag.Table(2000, 16),
        "padded": jbag.Table(10, 16, padding_idx=-3, embedding_init=constant(2.0)),
    }
    features = {k: jbag.Feature(k) for k in tables}
    batch = dict.fromkeys(tables, jnp.zeros((1, 1), jnp.int32))
    collection = make(tables, features, grid=grid)
    init = jax.jit(lambda seed: collection.init(jax.random.key(seed), batch))
    found = [collection.export_tables(init(k)["params"]) for k in (0, 0, 1)]
    found.append(make_nnx(tables, features, grid=grid).export_tables())
    for rows in found:
        for name in "ab":
            assert abs(rows[name].std() * 4 - 1) < 0.02
            assert abs(rows[name].mean()) < 0.01
        assert not np.array_equal(rows["a"], rows["b"])
        expected = np.full((10, 16), 2.0)
        expected[7] = 0
        np.testing.assert_array_equal(rows["padded"], expected)
    jax.tree.map(np.testing.assert_array_equal, found[0], found[1])
    assert not np.array_equal(found[0]["a"], found[2]["a"])


def test_specs_are_metadata_of_the_parameters():
    specs = {"embedding": P("x", None), "whole": jbag.sharding.TableWise("y", lanes=2)}
    tables = {"a": jbag.Table(4, 2), "b": jbag.Table(3, 2, group="whole")}
    tables["c"] = jbag.Table(3, 2, group="none")
    features = {k: jbag.Feature(k) for k in tables}
    batch = dict.fromkeys(tables, jnp.zeros((1, 1), jnp.int32))
    variables = jax.eval_shape(
        make(tables, features, specs=specs, grid=4).init, jax.random.key(0), batch
    )
    assert variables["params"]["embedding_2"].names == ("x", None)
    assert nn.get_partition_spec(variables)["params"] == {
        "embedding_2": P("x", None),
        "whole_2": P("y", None),
        "none_2": P(),
    }


def test_no_raggedness_compiles_anew():
    collection, traced = make(), []

    @jax.jit
    def pool(params, batch):
        traced.append(batch)
        return collection.apply({"params": params}, batch)

    params, batch = cases.start(collection), cases.batch_of(SOME[1])
    pool(params, batch)
    own = batch["padded_sum"]
    shorter = jbag.Bags(own.indices, jnp.minimum(own.offsets, 4), own.weights)
    pool(params, batch | {"padded_sum": shorter})
    assert len(traced) == 1


def test_transformations_of_a_collection():
    tables, features = cases.only("plain_sqrtn", "padded_mean")
    collection = make(tables, features)
    params = {"params": cases.start(collection)}
    batches = [cases.batch_of(features)]
    batches.append({"plain_sqrtn": batches[0]["plain_sqrtn"]})
    # The second has the bags of one feature with ids reversed, within one shape.
    flipped = batches[0]["padded_mean"]
    flipped = jbag.Bags(flipped.indices[::-1], flipped.offsets)
    batches[1]["padded_mean"] = flipped
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *batches)
    apply = lambda batch: collection.apply(params, batch)

    def loss(params, batch):
        out = collection.apply(params, batch)
        return sum(jnp.where(jnp.isnan(x), 0, x**2).sum() for x in out.values())

    @jax.jit
    def run(stacked):
        one_by_one = [apply(jax.tree.map(lambda x, k=k: x[k], stacked)) for k in (0, 1)]
        mapped = jax.vmap(apply)(stacked)
        _, scanned = jax.lax.scan(lambda c, x: (c, apply(x)), None, stacked)
        first = jax.tree.map(lambda x: x[0], stacked)
        gradients = [jax.grad(f)(params, first) for f in (loss, jax.checkpoint(loss))]
        return one_by_one, mapped, scanned, gradients

    one_by_one, mapped, scanned, gradients = run(stacked)
    expected = jax.tree.map(lambda *xs: jnp.stack(xs), *one_by_one)
    jax.tree.map(oracle.assert_close, mapped, expected)
    jax.tree.map(oracle.assert_close, scanned, expected)
    jax.tree.map(oracle.assert_close, *gradients)


def test_half_tables_pool_in_float32(implementation):
    names = ["plain_sum", "plain_mean", "plain_sqrtn", "plain_max", "flat_mean"]
    table = jbag.Table(30, cases.D, param_dtype=jnp.bfloat16)
    options = {"sparse": True, "implementation": implementation}
    collection = make(
        {"plain": table}, {k: cases.FEATURES[k] for k in names}, **options
    )
    rows = cases.values()["plain"].astype(jnp.bfloat16)
    params = collection.import_tables({"plain": rows})
    cotangents = cases.cotangents(names)

    @jax.jit
    def run(params, batch):
        def loss(params):
            out = collection.apply({"params": params}, batch)
            wide = {k: x.astype(jnp.float32) for k, x in out.items()}
            return sum((wide[k] * g).sum() for k, g in cotangents.items()), out

        rows, out = jbag.grad(loss, has_aux=True)(params)
        dense, _ = jax.grad(loss, has_aux=True)(params)
        return out, rows["embedding_4"].todense(), dense["embedding_4"]

    out, *gradients = run(params, cases.batch_of(names))
    expected = 0
    for name in names:
        mode = cases.CASES[name][1]
        assert out[name].dtype == jnp.bfloat16
        pooled = oracle.forward(rows, cases.lists(name), mode)
        oracle.assert_close(out[name], pooled)
        g = cases.cotangent(name).astype(jnp.bfloat16)
        expected += oracle.gradients(rows, cases.lists(name), g, mode)[0]
    for found in gradients:
        assert found.dtype == jnp.bfloat16
        oracle.assert_close(
            np.asarray(found, np.float64) / 10, expected / 10, "bfloat16"
        )

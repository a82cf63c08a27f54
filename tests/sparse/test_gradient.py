import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P
from meshes import make_mesh

import jbag

V, D = 12, 3
IDS = np.array([0, 1, 2, 3, 4, 5, 6, 0, 7, 8, 3, 3], np.int32)
OFFSETS = np.array([0, 4, 4, 6, 10], np.int32)  # an empty bag; two slots in no bag
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(V, D)).astype(np.float32)
WEIGHTS = RNG.uniform(0.5, 2, IDS.size).astype(np.float32)
COTANGENT = RNG.normal(size=(4, D)).astype(np.float32)
bag = functools.partial(jbag.embedding_bag, sparse=True)


def pooled(table, ids=IDS, offsets=OFFSETS, **options):
    ids, offsets = jnp.asarray(ids), jnp.asarray(offsets)
    return bag(table, ids, offsets, include_last_offset=True, **options)


def check(loss, *args, sparse=True, **options):
    """Compare with the dense gradient that JAX takes; return the first one."""
    rows = functools.partial(jbag.value_and_grad, allow_dense=not sparse)

    @jax.jit
    def both(*args):
        value, gradient = rows(loss, **options)(*args)
        dense = jax.tree.map(densify, gradient, is_leaf=is_rows)
        return gradient, (value, dense), jax.value_and_grad(loss, **options)(*args)

    gradient, found, expected = both(*args)
    assert any(map(is_rows, jax.tree.leaves(gradient, is_leaf=is_rows))) is sparse
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(oracle.assert_close, found, expected)
    return gradient


def is_rows(x):
    return isinstance(x, jbag.RowSparse)


def densify(x):
    return x.todense() if is_rows(x) else x


@pytest.mark.parametrize(
    ("weighted", "options", "modes"),
    [
        (False, {"max_norm": 1.0}, ("sum", "mean", "max")),
        (True, {"padding_idx": 3}, ("mean", "sqrtn", "min")),
    ],
    ids=str,
)
def test_the_gradient_is_that_of_the_oracle(weighted, options, modes, implementation):
    ids = np.where(IDS == 8, 99, IDS)  # of no row: the last bag is NaN
    bags = oracle.slices(ids, OFFSETS, WEIGHTS if weighted else None)

    def gradient(params, mode):
        def loss(params):
            out = pooled(
                params["table"],
                ids,
                mode=mode,
                weights=params.get("weights"),
                implementation=implementation,
                **options,
            )
            return (out * COTANGENT).sum()

        found = jbag.grad(loss)(params)
        rows = found["table"]
        zeros = jnp.zeros((V, D))
        sums = rows.todense(), zeros + rows, zeros + rows.coalesce()
        return rows, rows.coalesce().indices, sums, found.get("weights")

    params = {"table": jnp.asarray(TABLE)}
    if weighted:
        params["weights"] = jnp.asarray(WEIGHTS)
    results = jax.jit(lambda p: {mode: gradient(p, mode) for mode in modes})
    for mode, (rows, distinct, sums, found) in results(params).items():
        to_table, to_weights = oracle.gradients(TABLE, bags, COTANGENT, mode, **options)
        assert is_rows(rows)
        assert rows.shape == (V, D)
        assert rows.dtype == jnp.float32
        assert set(np.asarray(distinct)) <= {0, 1, 2, 3, 4, 5, 6, 7, V}
        for dense in sums:
            oracle.assert_close(dense, to_table)
        if weighted:
            found = np.asarray(found)[: OFFSETS[-2]]
            oracle.assert_close(found, np.concatenate(to_weights[:-1]))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_frequencies_scale_the_rows(mode):
    check(lambda t: (pooled(t, mode=mode, scale_grad_by_freq=True) ** 2).sum(), TABLE)


def test_bags_may_share_a_table():
    def loss(params):
        a = pooled(params["table"], mode="sum")
        b = bag(params["table"], jnp.array([[1, 2], [2, 7]]), weights=params["weights"])
        c = pooled(params["table"], mode="max")
        return (a @ params["head"]).sum() + (b**2).sum() + (c**3).sum()

    params = {"table": TABLE, "weights": jnp.ones((2, 2)), "head": jnp.ones((D, 2))}
    gradient = check(loss, params)
    assert isinstance(gradient["head"], jax.Array)
    assert isinstance(gradient["weights"], jax.Array)
    assert len(gradient["table"].terms) == 3
    # All three kinds of layout in one.
    both = jax.jit(lambda t, rows: (t + rows, rows.todense()))
    added, dense = both(TABLE, gradient["table"])
    oracle.assert_close(added, TABLE + np.asarray(dense))


def test_weights_may_come_from_the_same_table():
    def loss(table):
        scores = bag(table, jnp.arange(10)[:, None], mode="sum").sum(1)
        return (pooled(table, IDS[:10], OFFSETS, weights=scores) ** 2).sum()

    check(loss, TABLE)


def test_tied_weights_get_the_full_gradient():
    check(lambda t: (pooled(t) @ t.T).sum() ** 2, TABLE, sparse=False)
    check(lambda t: (pooled(t) ** 2).sum() + t[3].sum(), TABLE, sparse=False)


def test_uses_without_a_derivative_leave_the_gradient_sparse():
    def loss(table):
        best = jnp.argmax(jax.lax.stop_gradient(table).sum(1))
        count = (table > 0).sum() + best
        return (pooled(table) ** 2).sum() * count.astype(table.dtype)

    check(loss, TABLE)


def test_two_tables_are_kept_apart():
    def loss(params):
        return (pooled(params["a"]) * pooled(params["b"], mode="sum")).sum()

    gradient = check(loss, {"a": TABLE, "b": TABLE * 2})
    assert is_rows(gradient["b"])


@pytest.mark.parametrize(
    "wrap",
    [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(jax.jit(f)))],
    ids=["jit", "checkpoint", "all"],
)
def test_calls_are_seen_through(wrap):
    inner = wrap(lambda t, w: jnp.sin(pooled(t, weights=w)))
    outer = wrap(lambda t: jnp.sin(pooled(t, mode="max")).sum())

    def loss(tables):
        twice = inner(tables["a"], WEIGHTS) ** 2 + inner(tables["a"], WEIGHTS * 2)
        return twice.sum() + outer(tables["b"])

    check(loss, {"a": TABLE, "b": TABLE})
    check(outer, TABLE)


@pytest.mark.parametrize(("mode", "ragged"), [("max", False), ("mean", True)])
def test_batches_under_vmap(mode, ragged):
    ids = jnp.stack([jnp.asarray(IDS), jnp.asarray(IDS[::-1])])
    offsets = jnp.asarray(OFFSETS)

    def loss(table):
        def one(ids):
            if not ragged:
                return bag(table, ids.reshape(3, 4), mode=mode, padding_idx=3)
            return pooled(table, ids, offsets, mode=mode, weights=WEIGHTS)

        return (jax.vmap(one)(ids) ** 2).sum()

    check(loss, TABLE)


def test_a_table_for_each_batch_has_an_array_as_gradient():
    tables = np.stack([TABLE, -TABLE])
    check(lambda t: (jax.vmap(pooled)(t) ** 2).sum(), tables, sparse=False)


def test_bags_are_found_in_loops_and_branches():
    def in_scan(table):
        step = lambda total, ids: (total + (bag(table, ids) ** 2).sum(), None)
        return jax.lax.scan(step, 0.0, jnp.arange(8).reshape(2, 2, 2))[0]

    def in_cond(table):
        loss = lambda t: (pooled(t) ** 2).sum()
        return jax.lax.cond(table[0, 0] > -9, loss, lambda _: 0.0, table)

    check(lambda t: in_scan(t["a"]) + in_cond(t["b"]), {"a": TABLE, "b": TABLE})
    check(lambda t: in_scan(t) + (pooled(t) ** 2).sum(), TABLE)


@pytest.mark.parametrize(
    ("mode", "first"), [("mean", True), ("mean", False), ("max", False)]
)
def test_the_bags_of_other_branches_name_no_row(mode, first):
    def loss(table):
        return jax.lax.cond(
            first,
            lambda t: (pooled(t, mode=mode, weights=WEIGHTS) ** 2).sum(),
            lambda t: (bag(t, jnp.array([[10, 11]]), mode=mode) ** 3).sum(),
            table,
        )

    rows = check(loss, TABLE).coalesce()
    named = set(np.asarray(rows.indices)) - {V}
    assert named <= (set(IDS[:10].tolist()) if first else {10, 11})


def test_elsewhere_the_gradient_is_an_array():
    check(lambda t: (pooled(t * 2) ** 2).sum(), TABLE, sparse=False)


def test_a_rule_of_the_users_own_stands():
    @jax.custom_jvp
    def doubled(table):
        return pooled(table).sum()

    @doubled.defjvp
    def rule(primals, tangents):
        return doubled(*primals), 2 * pooled(tangents[0]).sum()

    check(doubled, TABLE, sparse=False)


def test_a_derivative_within_the_loss_is_differentiated():
    def penalty(table):
        inner = lambda w: (pooled(table, weights=w) ** 2).sum()
        return (jax.grad(inner)(jnp.asarray(WEIGHTS)) ** 2).sum()

    check(penalty, TABLE, sparse=False)
    check(lambda t: penalty(t) + (pooled(t) ** 3).sum(), TABLE, sparse=False)


def test_derivatives_of_the_gradient():
    loss = lambda t: (pooled(t, mode="sum") ** 3).sum()
    total = lambda vg: lambda t: sum(jnp.sum(densify(x) ** 2) for x in vg(loss)(t))
    for transform in (jax.grad, lambda f: lambda t: jax.jvp(f, (t,), (t,))[1]):
        both = [transform(total(x)) for x in (jbag.value_and_grad, jax.value_and_grad)]
        found, expected = jax.jit(lambda t, both=both: [f(t) for f in both])(TABLE)
        oracle.assert_close(found / 1e3, expected / 1e3)


def test_arguments_are_chosen_as_in_jax():
    loss = lambda x, t, *, power: (pooled(t) ** power).sum() * x
    x = jnp.float32(2)
    one = jbag.grad(loss, argnums=1)(x, TABLE, power=2)
    (last,) = jbag.grad(loss, argnums=(-1,))(x, TABLE, power=2)
    to_x, rows = jbag.grad(loss, argnums=(0, 1))(x, TABLE, power=2)
    assert to_x.shape == ()
    for found in (one, last, rows):
        oracle.assert_close(found.todense(), one.todense())


def test_auxiliary_data_comes_with_the_value():
    def loss(table, scale):
        out = pooled(table)
        return (out**2).sum() * scale, {"pooled": out, "name": "bag", "none": None}

    (_, aux), gradient = jbag.value_and_grad(loss, has_aux=True)(TABLE, 2.0)
    assert (aux["name"], aux["none"]) == ("bag", None)
    oracle.assert_close(aux["pooled"], pooled(TABLE))
    alone, again = jbag.grad(loss, has_aux=True)(TABLE, 2.0)
    oracle.assert_close(alone.todense(), gradient.todense())
    assert again["name"] == "bag"


class Model(nn.Module):
    @nn.compact
    def __call__(self, bags):
        items = jbag.EmbeddingBag(V, D, mode="sum", sparse=True, name="items")
        return nn.Dense(1)(items(bags) + items(bags) ** 2)


def test_linen_variables():
    bags = jbag.Bags.from_offsets(IDS, OFFSETS, include_last_offset=True)
    variables = jax.jit(Model().init)(jax.random.key(0), bags)
    gradient = check(lambda v: (Model().apply(v, bags) ** 2).sum(), variables)
    assert is_rows(gradient["params"]["items"]["embedding"])
    assert isinstance(gradient["params"]["Dense_0"]["kernel"], jax.Array)


class NnxModel(nnx.Module):
    def __init__(self, rngs, dropout=0.0):
        self.items = jbag.nnx.EmbeddingBag(V, D, sparse=True, rngs=rngs)
        self.dense = nnx.Linear(D, 1, rngs=rngs)
        if dropout:
            self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, ids):
        x = self.items(ids)
        return self.dense(self.dropout(x) if hasattr(self, "dropout") else x)


def test_nnx_modules_and_states():
    model, ids = NnxModel(nnx.Rngs(0)), jnp.array([[1, 2], [2, 7]])
    loss = lambda model: (model(ids) ** 2).sum()
    gradient = nnx.jit(jbag.grad(loss))(model)
    assert is_rows(gradient["items"]["embedding"][...])
    graph, state = nnx.split(model)
    check(lambda state: loss(nnx.merge(graph, state)), state)


def test_what_is_not_floating_has_no_gradient():
    model, ids = NnxModel(nnx.Rngs(0), dropout=0.5), jnp.array([[1, 2], [2, 7]])
    graph, state = nnx.split(model)
    loss = lambda state: (nnx.merge(graph, state)(ids) ** 2).sum()
    gradient = jax.jit(jbag.grad(loss))(state)
    assert is_rows(gradient["items"]["embedding"].get_value())
    count = gradient["dropout"]["rngs"]["count"].get_value()
    assert count.dtype == jax.dtypes.float0


def test_bad_ids_on_the_host_are_found_all_the_same():
    with pytest.raises(IndexError, match=r"position \(0, 1\)"):
        jbag.grad(lambda t: bag(t, [[1, 99]]).sum())(TABLE)


def test_nothing_as_large_as_the_table_or_all_ids_is_made():
    V, B, L = 5000, 30, 20
    table, ids = jnp.ones((V, D)), jnp.zeros((B, L), jnp.int32)

    def step(table, ids):
        loss = lambda t: (bag(t, ids, weights=jnp.ones((B, L))) ** 2).sum()
        return jbag.value_and_grad(loss)(table)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in equation.outvars)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from sizes(inner)

    largest = max(sizes(jax.make_jaxpr(step)(table, ids).jaxpr))
    assert largest == B * L


@pytest.mark.parametrize("varying", [False, True])
def test_under_shard_map(varying):
    mesh = make_mesh(sizes=(2,))
    ids = jnp.arange(8).reshape(4, 2)
    loss = lambda table, ids: (bag(table, ids) ** 2).sum()

    def local(table, ids):
        if not varying:  # JAX adds up over the devices, and the rows with it
            return densify(jbag.grad(loss, allow_dense=True)(table, ids))
        rows = jbag.grad(loss)(jax.lax.pcast(table, "x", to="varying"), ids)
        assert is_rows(rows)
        return jax.lax.psum(rows.todense(), "x")

    specs = {"mesh": mesh, "in_specs": (P(), P("x")), "out_specs": P()}
    total = jax.shard_map(lambda t, i: jax.lax.psum(loss(t, i), "x"), **specs)

    @jax.jit
    def run(table, ids):
        within = jax.shard_map(local, **specs)(table, ids)
        around = jbag.grad(total, allow_dense=True)(table, ids)
        return [within, densify(around)]

    expected = jax.jit(jax.grad(loss))(TABLE, ids)
    for found in run(TABLE, ids):
        oracle.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sums_of_16_bit_tables_run_in_float32(dtype):
    ids = jnp.zeros((300, 1), jnp.int32)
    rows = jbag.grad(lambda t: bag(t, ids, mode="sum").sum())(jnp.ones((2, 2), dtype))
    assert rows.dtype == dtype
    assert rows.coalesce().values.dtype == jnp.float32
    assert rows.coalesce().values[0, 0] == 300
    assert rows.todense().dtype == dtype


def test_bad_arguments_are_errors():
    with pytest.raises(TypeError, match="`loss` must be a function"):
        jbag.value_and_grad(3)
    with pytest.raises(TypeError, match="`has_aux`"):
        jbag.value_and_grad(pooled, has_aux=1)
    with pytest.raises(ValueError, match="`argnums`"):
        jbag.grad(pooled, argnums=1)(TABLE)
    with pytest.raises(TypeError, match="scalar"):
        jbag.grad(pooled)(TABLE)
    with pytest.raises(TypeError, match="needs floating arrays"):
        jbag.grad(lambda x: x * 1.0)(3)
    with pytest.raises(TypeError, match="auxiliary"):
        jbag.grad(lambda t: pooled(t).sum(), has_aux=True)(TABLE)

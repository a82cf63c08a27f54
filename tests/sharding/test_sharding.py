"""Tables over a mesh: values, gradients, rounds and errors."""

import functools

import collection_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
from slow import slow

import jbag
from jbag.sharding import TableWise

STRATEGIES = {
    "row_wise": P("x", None),
    "column_wise": P(None, "x"),
    "data_parallel": P(),
    "table_wise": TableWise("x", lanes=12),
}
FEW = cases.only("plain_mean", "flat_mean", "padded_sum", "counted_max")


def make(tables, features, spec, mesh, **options):
    """Return a collection of which all groups lie in one way."""
    options = {"grid": 12, "sparse": True} | options
    return jbag.EmbeddingBagCollection(
        tables, features, specs={"embedding": spec}, mesh=mesh, **options
    )


# All of some features, or most of them, as strategies take long to compile.
FIRST = {
    "row_wise": cases.SOME,
    "data_parallel": cases.SOME,
    "column_wise": ("plain_sqrtn", "padded_sum", "counted_max", "flat_mean"),
    "table_wise": ("plain_sqrtn", "padded_sum", "normed_mean", "tied_min"),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_values_and_gradients_are_those_of_the_oracle(strategy):
    own = cases.only(*FIRST[strategy])
    cases.check(make(*own, STRATEGIES[strategy], make_mesh("auto")), 4)


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("row_wise", "auto"),
        *slow(
            ("row_wise", "explicit"),
            ("table_wise", "explicit"),
            ("data_parallel", "auto"),
            ("column_wise", "auto"),
        ),
    ],
)
def test_packed_tables_give_what_the_oracle_does(strategy, kind):
    own = cases.only(*FIRST[strategy])
    collection = make(*own, STRATEGIES[strategy], make_mesh(kind), packed=True)
    table = cases.start(collection)["embedding_4"]
    assert isinstance(table, jbag.PackedTable) == (strategy != "column_wise")
    cases.check(collection, 4)


# The other features, or every other one of them.
OTHERS = {
    strategy: [name for name in cases.FEATURES if name not in first]
    for strategy, first in FIRST.items()
}
EVERY = {
    "row_wise": OTHERS["row_wise"],
    "data_parallel": OTHERS["data_parallel"][::2],
    "column_wise": ["normed_mean", "tied_min", *OTHERS["column_wise"][1::2]],
    "table_wise": ["counted_max", "flat_mean", *OTHERS["table_wise"][::2]],
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_values_and_gradients_of_many_features_are_those_of_the_oracle(strategy):
    own = cases.only(*EVERY[strategy])
    cases.check(make(*own, STRATEGIES[strategy], make_mesh("auto")), 4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["column_wise", "data_parallel", "table_wise"])
def test_averages_alone_count_ids_of_no_row(strategy):
    # Of one launch alone, the gradient is one term, not divided yet.
    own = cases.only("padded_mean")
    cases.check(make(*own, STRATEGIES[strategy], make_mesh("auto")), 4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_explicit_meshes_and_the_reference_kernel(strategy):
    mesh = make_mesh("explicit")
    options = {"implementation": "xla"}
    cases.check(make(*FEW, STRATEGIES[strategy], mesh, **options), 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "kind", "size"),
    [("row_wise", "auto", 1), ("row_wise", "explicit", 3), ("table_wise", "auto", 3)],
)
def test_any_number_of_devices(strategy, kind, size):
    mesh, grid = make_mesh(kind, (size,)), jbag.sharding.Layout(1).grid
    cases.check(make(*FEW, STRATEGIES[strategy], mesh, grid=grid), size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "batch_axis", "kind", "blocks"),
    [
        (P(("x", "y"), None), None, "auto", 4),
        (P(None, ("y", "x")), None, "explicit", 4),
        (TableWise(("x", "y"), lanes=4), None, "explicit", 4),
        (P("x", None), None, "explicit", 2),
        (P(), "y", "auto", 2),
    ],
    ids=str,
)
def test_meshes_of_two_axes(spec, batch_axis, kind, blocks):
    mesh = make_mesh(kind, (2, 2), ("x", "y"))
    cases.check(make(*FEW, spec, mesh, batch_axis=batch_axis), blocks)


def place(ids, size, grid):
    """Return where a layout puts ids, from its description."""
    above = range(int(np.ceil(grid * 0.6180339887)), 2 * grid + 2)
    multiplier = next(m for m in above if np.gcd(m, grid) == 1)
    return ids % grid * multiplier % grid * -(-size // grid) + ids // grid


def expected_traffic(features, grid, rows_per_round, blocks=4):
    """Count, of one stack, what `Traffic` tells: rounds, requested, out_of_range."""
    tables, _ = cases.only(*features)
    sizes = {name: table.num_embeddings for name, table in tables.items()}
    bases = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    rows, out_of_range = [set() for _ in range(blocks)], np.zeros(blocks, int)
    for name in features:
        table = cases.CASES[name][0]
        for b, bag in enumerate(cases.lists(name)):
            block = b * blocks // cases.B
            for i, _ in bag:
                if 0 <= i < sizes[table] and i != cases.padding_of(table):
                    at = place(i + bases[table], sum(sizes.values()), grid)
                    rows[block].add(at)
                elif i != cases.padding_of(table):
                    out_of_range[block] += 1
    shard = grid * -(-sum(sizes.values()) // grid) // blocks

    def count(own, parts):
        """Return how many rows lie in each part of each shard."""
        own = np.array(sorted(own), int)
        part = own // shard * parts + own % shard // -(-shard // parts)
        return np.bincount(part, minlength=blocks * parts)

    rounds = 1
    while max(count(own, rounds).max() for own in rows) > rows_per_round:
        rounds *= 2
    return rounds, np.stack([count(own, 1) for own in rows]), out_of_range


@pytest.mark.parametrize(
    ("rows_per_round", "kind"),
    [
        (2, "explicit"),
        *slow((4, "auto")),
    ],
)
def test_more_rounds_change_nothing(rows_per_round, kind):
    collection = make(
        *FEW, STRATEGIES["row_wise"], make_mesh(kind), rows_per_round=rows_per_round
    )
    cases.check(collection, 4)
    batch = cases.batch_of(FEW[1], 4)
    (traffic,) = collection.traffic(batch).values()
    rounds, requested, out_of_range = expected_traffic(FEW[1], 12, rows_per_round)
    assert traffic.rounds == rounds
    assert rounds > 1
    np.testing.assert_array_equal(traffic.requested, requested)
    np.testing.assert_array_equal(traffic.distinct, requested.sum(1))
    np.testing.assert_array_equal(traffic.out_of_range, out_of_range)
    roomy = make(*FEW, STRATEGIES["row_wise"], make_mesh(kind))
    (traffic,) = roomy.traffic(batch).values()
    assert traffic.rounds == 1


def test_all_ids_may_be_of_one_owner():
    V, mesh = 64, make_mesh("auto")
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(V, 4)), jnp.float32)
    ids = rng.integers(17, 31, (8, 9))  # of the second of four owners
    ids[2] = 20
    g = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    bags = [[(i, None) for i in bag] for bag in ids]

    @functools.partial(jax.jit, static_argnums=2)
    def run(table, ids, rows_per_round):
        def loss(table):
            out = jbag.sharding.embedding_bag(
                table,
                ids,
                spec=P("x", None),
                mesh=mesh,
                rows_per_round=rows_per_round,
                sparse=True,
            )
            return (out * g).sum(), out

        rows, out = jbag.grad(loss, has_aux=True)(table)
        rows = rows.coalesce()
        return out, jax.grad(loss, has_aux=True)(table)[0], rows.todense(), rows.indices

    table = jax.device_put(table, jax.sharding.NamedSharding(mesh, P("x", None)))
    for rows_per_round in (1, 3, None):
        out, dense, rows, indices = run(table, jnp.asarray(ids), rows_per_round)
        oracle.assert_close(out, oracle.forward(table, bags, "mean"))
        gradient, _ = oracle.gradients(table, bags, g, "mean")
        oracle.assert_close(dense, gradient)
        oracle.assert_close(rows, gradient)
        indices = np.asarray(indices)
        np.testing.assert_array_equal(indices[indices < V], np.unique(ids))


def broken(bags):
    """Break the offsets of some bags of each block: the first, one inside, the last."""
    ends = np.array(bags.offsets)
    capacity = bags.indices.shape[-1]
    ends[..., 0] = 2 if ends.ndim == 1 else [2, 0, 0, 0]
    ends[..., 2] = -1 if ends.ndim == 1 else [ends[0, 2], 99, ends[2, 2], ends[3, 2]]
    ends[..., -1] = [ends[0, -1], ends[1, -1], capacity + 1, -3][: len(ends)]
    return jbag.Bags(bags.indices, jnp.asarray(ends), bags.weights)


@pytest.mark.parametrize(
    "strategy", ["row_wise", *slow("column_wise", "data_parallel", "table_wise")]
)
def test_a_malformed_bag_is_nan_alone(strategy):
    names = ["plain_mean", "padded_sum", "plain_max", "flat_mean", "counted_sqrtn"]
    tables, features = cases.only(*names)
    collection = make(tables, features, STRATEGIES[strategy], make_mesh("auto"))
    batch = cases.batch_of(names, 4)
    for name in names:
        if name != "flat_mean":
            batch[name] = broken(batch[name])
    got = jax.jit(functools.partial(cases.results, collection))(
        cases.start(collection), batch, cases.cotangents(names)
    )
    to_tables = dict.fromkeys(tables, 0)
    for name in names:
        table, mode, kind = cases.CASES[name]
        options = {"mode": mode, "padding_idx": tables[table].padding_idx}

        def pooled(rows, name=name, options=options):
            if name == "flat_mean":
                return jbag.embedding_bag(rows, batch[name], **options)
            blocks = [jax.tree.map(lambda x, p=p: x[p], batch[name]) for p in range(4)]
            return jnp.concatenate(
                [jbag.embedding_bag(rows, block, **options) for block in blocks]
            )

        @jax.jit
        def alone(rows, g, pooled=pooled):
            out, pullback = jax.vjp(pooled, rows)
            return out, pullback(g)[0]

        out, gradient = alone(cases.values()[table], cases.cotangent(name))
        oracle.assert_close(got["out"][name], out)
        if name != "counted_sqrtn":
            to_tables[table] += np.asarray(gradient)
    del to_tables["counted"]
    for kind in ("dense", "rows"):
        gradient = collection.export_tables(got[kind][0])
        for name, x in to_tables.items():
            oracle.assert_close(gradient[name], x)
        assert np.isfinite(gradient["counted"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, *slow(True)])
def test_one_table_by_itself_and_without_jit(packed):
    V, mesh, spec = 24, make_mesh("explicit"), P("x", None)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(V, 8)).astype(np.float32)
    g = jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)
    layout = jbag.sharding.Layout(V, grid=20)
    table = layout.to_physical(rows)
    table = jax.device_put(table, jax.sharding.NamedSharding(mesh, spec))
    if packed:
        table = jbag.pack(table, always=True, num_blocks=4)
        assert jax.typeof(table.lines).sharding.spec == spec
        assert jax.typeof(jbag.unpack(table)).sharding.spec == spec
    ids = rng.integers(0, V, (8, 5))
    options = {"mode": "sum", "padding_idx": -1, "sparse": True}
    pool = functools.partial(
        jbag.sharding.embedding_bag, spec=spec, layout=layout, **options
    )
    loss = lambda table: (pool(table, ids) * g).sum()
    with jax.set_mesh(mesh):  # which is where the function finds it
        out, gradient = pool(table, ids), jbag.grad(loss)(table)
        dense = jax.jit(jax.grad(loss))(table)
        invalid = ids.copy()
        invalid[2, 1] = V
        expected = r"`indices` must lie in \[0, 24\).*got 24 at position \(2, 1\)"
        with pytest.raises(IndexError, match=expected):
            pool(table, invalid)
    bags = [[(i, None) for i in bag] for bag in ids]
    oracle.assert_close(out, oracle.forward(rows, bags, "sum", padding_idx=V - 1))
    wanted, _ = oracle.gradients(rows, bags, g, "sum", padding_idx=V - 1)
    for found in (jbag.unpack(gradient).todense(), jbag.unpack(dense)):
        oracle.assert_close(layout.to_logical(np.asarray(found)), wanted)


@pytest.mark.parametrize("strategy", ["row_wise", *slow("table_wise", "data_parallel")])
def test_a_batch_of_no_ids_or_no_bags(strategy):
    tables, features = cases.only("plain_mean", "plain_max", "counted_sqrtn")
    collection = make(tables, features, STRATEGIES[strategy], make_mesh("auto"))
    params = cases.start(collection)

    @jax.jit
    def run(params, batch):
        def loss(params):
            out = collection.apply({"params": params}, batch)
            return sum(x.sum() for x in out.values()), out

        rows, out = jbag.grad(loss, has_aux=True)(params)
        dense, _ = jax.grad(loss, has_aux=True)(params)
        return out, [rows["embedding_4"].todense(), dense["embedding_4"]]

    # Of each size, a feature has bags of one length, and the others ragged ones.
    flat, weights = np.zeros((4, 0), np.int32), np.zeros((4, 0), np.float32)
    no_ids = jbag.Bags(flat, np.zeros((4, 4), np.int32), weights)
    no_bags = jbag.Bags(np.ones((4, 3), np.int32), np.zeros((4, 1), np.int32))
    for ragged, size, length in [(no_ids, 12, 0), (no_bags, 0, 3)]:
        rectangle = np.zeros((size, length), np.int32)
        batch = dict.fromkeys(features, ragged) | {"plain_mean": rectangle}
        out, gradients = run(params, jax.tree.map(jnp.asarray, batch))
        for x in out.values():
            assert x.shape == (size, cases.D)
            np.testing.assert_array_equal(x, 0)
        for x in gradients:
            np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_keyed_batch_gives_what_the_oracle_does(strategy):
    names = ["plain_sum", "plain_mean", "counted_sqrtn"]
    tables, features = cases.only(*names)
    mesh = make_mesh("auto")
    collection = make(tables, features, STRATEGIES[strategy], mesh, concatenate=True)
    params = {"params": cases.start(collection)}
    keyed = []
    for p in range(4):
        pairs = [
            cases.lists(name)[b] for name in names for b in range(3 * p, 3 * p + 3)
        ]
        keyed.append(cases.pack(names[0], 90, pairs))
    keyed = jax.tree.map(lambda *xs: jnp.asarray(np.stack(xs)), *keyed)
    if strategy == "table_wise":
        with pytest.raises(ValueError, match="take a dict of bags; got one keyed"):
            collection.apply(params, keyed)
        return
    expected = np.concatenate([cases.pooled(name) for name in names], axis=1)
    oracle.assert_close(jax.jit(collection.apply)(params, keyed), expected)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["row_wise", "column_wise", "table_wise"])
def test_derivatives_forwards_and_of_second_order(strategy):
    mesh, grid = make_mesh("auto"), 12
    tables, features = cases.only("plain_sqrtn", "padded_mean", "wide")
    tangents = {k: jnp.cos(cases.values()[k]) for k in tables}

    def derivatives(collection, batch):
        params = cases.start(collection)
        direction = collection.import_tables(tangents)

        def loss(params):
            out = collection.apply({"params": params}, batch)
            return sum(jnp.where(jnp.isnan(x), 0, x**3).sum() for x in out.values())

        def run(params, direction):
            forwards = jax.jvp(loss, (params,), (direction,))
            twice = jax.jvp(jax.grad(loss), (params,), (direction,))[1]
            along = lambda p: jax.jvp(loss, (p,), (direction,))[1]
            return forwards, [twice, jax.grad(along)(params)]

        forwards, second = jax.jit(run)(params, direction)
        return forwards, [collection.export_tables(x) for x in second]

    one = make(tables, features, P(), None, grid=grid)
    expected = derivatives(one, cases.batch_of(features))
    own = make(tables, features, STRATEGIES[strategy], mesh, grid=grid)
    batch = cases.batch_of(features, 4)
    scaled = lambda tree: jax.tree.map(lambda x: x / 100, tree)
    jax.tree.map(oracle.assert_close, *map(scaled, (derivatives(own, batch), expected)))


@pytest.mark.parametrize(
    "strategy", ["row_wise", *slow("column_wise", "data_parallel")]
)
def test_a_table_may_be_used_several_times(strategy):
    tables, features = cases.only("plain_mean", "padded_max")
    collection = make(tables, features, STRATEGIES[strategy], make_mesh("explicit"))
    params = cases.start(collection)
    batch = cases.batch_of(features, 4)
    again = {"plain_mean": batch["padded_max"], "padded_max": batch["plain_mean"]}

    def twice(params):
        out = [collection.apply({"params": params}, x) for x in (batch, again)]
        squares = jax.tree.map(lambda x: jnp.where(jnp.isnan(x), 0, x**2).sum(), out)
        return sum(jax.tree.leaves(squares))

    def tied(params):
        return twice(params) + jnp.sin(params["embedding_4"]).sum()

    @jax.jit
    def run(params):
        grads = (functools.partial(jbag.grad, allow_dense=True), jax.grad)
        both = lambda f: [g(f)(params)["embedding_4"] for g in grads]
        (rows, dense), full = both(twice), both(tied)
        rest = rows.coalesce()
        zeros = jnp.zeros_like(dense)
        together = rows + 2 * rows - rows / 2
        sums = [x.todense() for x in (rows, rest, together / 2.5, (rest + rest) / 2)]
        return rows, rest, [*sums, zeros + together / 2.5, zeros - -rest], dense, full

    rows, coalesced, sums, dense, full = run(params)
    for found in sums:
        oracle.assert_close(found, dense)
    assert isinstance(full[0], jax.Array)
    oracle.assert_close(*full)
    if strategy in ("row_wise", "data_parallel"):
        with pytest.raises(ValueError, match="coalesced or not; got several"):
            (rows + coalesced).todense()


TWO = {"a": jbag.Table(20, 6), "b": jbag.Table(9, 6, group="other")}
BOTH = {"first": jbag.Feature("a"), "second": jbag.Feature("b", "sum")}


def stack(*blocks):
    return jax.tree.map(lambda *xs: np.stack(xs), *map(jbag.Bags.from_lists, blocks))


def blocks_with(row):
    return stack([[1]], [[2]], [[row]], [[3]])


@pytest.mark.parametrize(
    ("specs", "options", "batch", "error", "message"),
    [
        (
            {"other": P("z", None)},
            {},
            None,
            ValueError,
            r"`spec` must name axes of the mesh, \('x',\); got .*'z'",
        ),
        (
            {"other": P("x", "x")},
            {},
            None,
            ValueError,
            "`spec` must shard rows or columns, not both",
        ),
        (
            {"other": P(None, None, "x")},
            {},
            None,
            ValueError,
            "`spec` must have at most two entries",
        ),
        (
            {"embedding": P(None, "x")},
            {},
            None,
            ValueError,
            "`embedding_dim` must be divisible by the 4 devices.*'embedding_6'; got 6",
        ),
        (
            {"embedding": P("x", None)},
            {"grid": 7},
            None,
            ValueError,
            "`grid`.* must be divisible by the 4 devices.*'embedding_6'.*grid=7",
        ),
        (
            {"other": TableWise("x", lanes=6)},
            {},
            None,
            ValueError,
            "must be (divisible by|a multiple of) the 4 devices.*num_lanes=6",
        ),
        (
            {"other": TableWise("x", lanes=0)},
            {},
            None,
            ValueError,
            "`lanes` must be at least 1; got 0",
        ),
        (
            {"other": P("x", None)},
            {"batch_axis": "y"},
            None,
            ValueError,
            r"`batch_axis` must name axes of the mesh, \('x',\); got 'y'",
        ),
        (
            {"other": P()},
            {"mesh": "x"},
            None,
            TypeError,
            "`mesh` must be a jax.sharding",
        ),
        (
            {"none": P()},
            {},
            None,
            ValueError,
            r"`specs` must name groups of tables, \['embedding', 'other'\]; got 'none'",
        ),
        (
            {"other": "x"},
            {},
            None,
            TypeError,
            "`specs` must hold a .* or a TableWise for each name; got 'x' at 'other'",
        ),
        (
            {"other": P("x", None)},
            {},
            {"second": blocks_with(9)},
            IndexError,
            r"In `batch\['second'\]`: In block 2: `indices` must lie in "
            r"\[0, 9\).*got 9",
        ),
        (
            {"other": P("x", None)},
            {},
            {"first": np.zeros((5, 2), np.int32)},
            ValueError,
            r"In `batch\['first'\]`: .*multiple of 4 rows; got shape \(5, 2\)",
        ),
        (
            {"other": P("x", None)},
            {},
            {"second": jbag.Bags.from_lists([[1], [2], [3], [4]])},
            ValueError,
            r"In `batch\['second'\]`: `bags` must be a stack of 4, a block for each",
        ),
        (
            {"other": P("x", None)},
            {},
            {"second": stack(*[[[1], [2]]] * 4)},
            ValueError,
            "as many bags of each feature; got {'first': 4, 'second': 8}",
        ),
    ],
)
def test_what_does_not_fit_a_mesh_is_named(specs, options, batch, error, message):
    options = {"mesh": make_mesh("auto")} | options
    collection = jbag.EmbeddingBagCollection(TWO, BOTH, specs=specs, **options)
    bags = {"first": blocks_with(1), "second": blocks_with(2)}
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: collection.init(jax.random.key(0), bags | (batch or {})))


def test_what_does_not_fit_one_table_is_named():
    mesh = make_mesh("auto")
    pool = functools.partial(
        jbag.sharding.embedding_bag, bags=np.zeros((4, 1), int), spec=P()
    )
    table = jnp.ones((8, 4))
    with pytest.raises(ValueError, match="`mesh` must be given, or set by"):
        pool(table)
    with pytest.raises(TypeError, match="`layout` must be a Layout or None; got 4"):
        pool(table, layout=4, mesh=mesh)
    with pytest.raises(ValueError, match=r"`mode` must be one of .* got None"):
        pool(table, mode=None, mesh=mesh)
    layout = jbag.sharding.Layout(9, grid=4)
    with pytest.raises(ValueError, match=r"the 12 rows of its layout; got.*\(8, 4\)"):
        pool(table, layout=layout, mesh=mesh)
    with pytest.raises(TypeError, match="for one table; got a TableWise"):
        pool(table, spec=TableWise("x", 4), mesh=mesh)
    with pytest.raises(TypeError, match=r"`specs` must hold a"):
        pool(table, spec="x", mesh=mesh)
    with pytest.raises(
        ValueError, match=r"`grid`.* must be divisible by the 4 devices"
    ):
        pool(jnp.ones((9, 4)), spec=P("x"), mesh=mesh)
    with pytest.raises(ValueError, match="`rows_per_round` must be at least 1; got 0"):
        pool(table, spec=P("x"), mesh=mesh, rows_per_round=0)
    with pytest.raises(ValueError, match=r"`bags` must be a stack of 4.*\(3,\)"):
        pool(table, bags=jbag.Bags.from_lists([[1, 2, 3]]), mesh=mesh)
    with pytest.raises(TypeError, match="`table` must be a matrix of"):
        pool(np.ones((4, 4), int), mesh=mesh)
    packed = jbag.pack(table, always=True, num_blocks=2)
    with pytest.raises(ValueError, match=r"multiple of the 4 devices.*; got 2"):
        pool(packed, spec=P("x"), mesh=mesh)
    with pytest.raises(ValueError, match="can't be sharded by columns"):
        pool(packed, spec=P(None, "x"), mesh=mesh)
    collection = jbag.EmbeddingBagCollection(TWO, BOTH)
    with pytest.raises(ValueError, match="`mesh` must be given, or set by"):
        collection.shardings({})


@pytest.mark.parametrize(
    ("strategy", "dtype", "ids_dtype"),
    [
        ("row_wise", "bfloat16", "int32"),
        *slow(
            ("column_wise", "bfloat16", "uint8"),
            ("table_wise", "float64", "int64"),
        ),
    ],
)
def test_other_dtypes(strategy, dtype, ids_dtype):
    names = ["plain_sqrtn", "plain_max", "flat_mean"]
    rows = cases.values()["plain"].astype(dtype)
    with jax.enable_x64(dtype == "float64"):
        tables = {"plain": jbag.Table(30, cases.D, param_dtype=dtype)}
        features = {name: cases.FEATURES[name] for name in names}
        collection = make(tables, features, STRATEGIES[strategy], make_mesh("auto"))
        params = collection.import_tables({"plain": jnp.asarray(rows)})
        params = jax.device_put(params, collection.shardings(params))
        is_ids = lambda x: jnp.issubdtype(x.dtype, jnp.integer)
        batch = jax.tree.map(
            lambda x: x.astype(ids_dtype) if is_ids(x) else x, cases.batch_of(names, 4)
        )
        cotangents = {k: x.astype(dtype) for k, x in cases.cotangents(names).items()}

        def loss(params):
            out = collection.apply({"params": params}, batch)
            return sum((out[k] * g).sum() for k, g in cotangents.items()), out

        @jax.jit
        def run(params):
            rows, out = jbag.grad(loss, has_aux=True)(params)
            dense, _ = jax.grad(loss, has_aux=True)(params)
            return out, rows["embedding_4"].todense(), dense["embedding_4"]

        out, *gradients = run(params)
        expected = 0
        for name, x in out.items():
            bags, mode = cases.lists(name), cases.CASES[name][1]
            assert x.dtype == dtype
            oracle.assert_close(x, oracle.forward(rows, bags, mode))
            expected += oracle.gradients(rows, bags, cotangents[name], mode)[0]
        for x in gradients:
            assert x.dtype == dtype
            x = collection.export_tables({"embedding_4": x})["plain"]
            # The largest numbers here have a few units in front of the point.
            oracle.assert_close(np.asarray(x, float) / 4, expected / 4, dtype)
        (traffic,) = (
            collection.traffic(batch).values() if strategy == "row_wise" else [()]
        )
        assert {x.dtype for x in traffic} <= {np.dtype("int32")}

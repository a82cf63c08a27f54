"""Unpooled features beside pooled ones, on one device and over meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
from slow import slow

import jbag
from jbag.sharding import TableWise

D, B, CAPACITY = 8, 8, 10
PADDING = 3
TABLES = {
    "padded": jbag.Table(40, D, padding_idx=PADDING),
    "plain": jbag.Table(20, D),
    "options": jbag.Table(12, D, max_norm=2.0, scale_grad_by_freq=True),
}
SIZES = {name: table.num_embeddings for name, table in TABLES.items()}
# The table of each feature, and whether it is pooled.
FEATURES = {
    "pooled": ("padded", True),
    "sequence": ("padded", False),
    "rectangle": ("padded", False),
    "sum": ("plain", True),
    "weighted": ("plain", False),
    "counted": ("options", False),
}


def feature(name):
    table, pooled = FEATURES[name]
    how = {"mode": "sum"} if pooled else {"pooling": None}
    return jbag.Feature(table, **how)


def make(names=tuple(FEATURES), **options):
    features = {name: feature(name) for name in names}
    used = {x.table for x in features.values()}
    tables = {name: table for name, table in TABLES.items() if name in used}
    return jbag.EmbeddingBagCollection(tables, features, **options)


def values():
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=(size, D)).astype(np.float32)
        for name, size in SIZES.items()
    }


def lists(name):
    """Return a feature's bags of (id, weight), with ids out of range and padding."""
    rng = np.random.default_rng(list(FEATURES).index(name))
    size = SIZES[FEATURES[name][0]]
    lengths = [3] * B if name == "rectangle" else rng.integers(0, 5, B)
    bags = [rng.integers(0, size, length).tolist() for length in lengths]
    bags[3] = [PADDING, 1, PADDING]
    bags[5] = [-1, size, 2]
    if name != "weighted":
        return [[(i, None) for i in bag] for bag in bags]
    return [[(i, float(w)) for i, w in zip(b, rng.normal(size=9))] for b in bags]  # noqa: B905  (weights to spare)


def batch_of(names, blocks=None):
    """Return the bags; their tails hold ids out of range."""
    out = {}
    for name in names:
        bags = lists(name)
        if name == "rectangle":
            out[name] = jnp.asarray([[i for i, _ in bag] for bag in bags], jnp.int32)
            continue
        each = np.array_split(np.arange(B), blocks or 1)
        own = [pack([bags[b] for b in block], name, blocks) for block in each]
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *own)
        out[name] = stacked if blocks else own[0]
    return out


def pack(bags, name, blocks):
    pairs = [pair for bag in bags for pair in bag]
    capacity = CAPACITY if blocks else 8 * CAPACITY
    ids, weights = np.full(capacity, 99), np.full(capacity, np.nan, np.float32)
    ids[: len(pairs)] = [i for i, _ in pairs]
    ends = np.cumsum([0, *map(len, bags)])
    if name == "weighted":
        weights[: len(pairs)] = [w for _, w in pairs]
    weights = jnp.asarray(weights) if name == "weighted" else None
    return jbag.Bags(jnp.asarray(ids, jnp.int32), jnp.asarray(ends, jnp.int32), weights)


def in_bags(out, bags):
    """Return the rows of the slots in bags, in order; others must be zero."""
    out = np.asarray(out)
    if not isinstance(bags, jbag.Bags):
        return out.reshape(-1, D)
    blocks = out.reshape(-1, bags.indices.shape[-1], D)
    ends = np.asarray(bags.offsets).reshape(len(blocks), -1)[:, -1]
    for block, end in zip(blocks, ends, strict=True):
        np.testing.assert_array_equal(block[end:], 0)
    return np.concatenate(
        [block[:end] for block, end in zip(blocks, ends, strict=True)]
    )


def options_of(table):
    own = TABLES[table]
    return {
        "padding_idx": own.padding_idx,
        "max_norm": own.max_norm,
        "norm_type": own.norm_type,
    }


def as_pooled(name):
    """Return a feature's bags as the oracle pools them: of one slot if unpooled."""
    bags = lists(name)
    return bags if FEATURES[name][1] else [[pair] for bag in bags for pair in bag]


def check(collection, blocks=None):
    """Compare values and gradients, dense and row-sparse, with the oracle's."""
    names = tuple(collection.features)
    params = collection.import_tables({k: values()[k] for k in collection.tables})
    if blocks:
        params = jax.device_put(params, collection.shardings(params))
    batch = batch_of(names, blocks)

    def loss(params):
        out = collection.apply({"params": params}, batch)
        return sum(jnp.sin(jnp.nan_to_num(x)).sum() for x in out.values()), out

    @jax.jit
    def run(params):
        dense, out = jax.grad(loss, has_aux=True)(params)
        rows, _ = jbag.grad(loss, has_aux=True)(params)
        return (
            out,
            dense,
            jax.tree.map(
                lambda x: x.todense() if isinstance(x, jbag.RowSparse) else x,
                jbag.unpack(rows),
                is_leaf=lambda x: isinstance(x, jbag.RowSparse),
            ),
        )

    out, dense, rows = run(params)
    expected = dict.fromkeys(collection.tables, 0)
    for name in names:
        table, pooled = FEATURES[name]
        own, wanted = as_pooled(name), options_of(table)
        rows_of = oracle.forward(values()[table], own, "sum", **wanted)
        found = np.asarray(out[name])
        if not pooled:
            bags = batch[name]
            shape = bags.indices.shape if isinstance(bags, jbag.Bags) else bags.shape
            assert found.shape == (*shape, D)
            found = in_bags(found, bags)
        oracle.assert_close(found, rows_of)
        slopes = np.where(np.isnan(rows_of), 0, np.cos(np.nan_to_num(rows_of)))
        freq = TABLES[table].scale_grad_by_freq
        expected[table] += oracle.gradients(
            values()[table], own, slopes, "sum", scale_grad_by_freq=freq, **wanted
        )[0]
    for gradient in (dense, rows):
        for name, x in collection.export_tables(gradient).items():
            oracle.assert_close(x, expected[name])
    return out


def test_rows_and_gradients_are_those_of_the_oracle(implementation):
    check(make(sparse=True, implementation=implementation))


@pytest.mark.parametrize("options", [{"packed": True}, {"grid": 20}])
def test_packed_and_dealt_tables_give_the_same(options):
    check(make(sparse=True, **options))


STRATEGIES = {
    "data_parallel": P(),
    "row_wise": P("x", None),
    "column_wise": P(None, "x"),
    "table_wise": TableWise("x", 4),
}


@pytest.mark.parametrize(
    ("kind", "strategy", "packed"),
    [
        ("auto", "row_wise", True),
        ("auto", "table_wise", False),
        ("explicit", "column_wise", False),
        *slow(("auto", "data_parallel", True), ("auto", "column_wise", False)),
        *slow(("explicit", "row_wise", False), ("explicit", "table_wise", True)),
    ],
)
def test_every_strategy_gives_what_the_oracle_gives(kind, strategy, packed):
    specs = {"embedding": STRATEGIES[strategy]}
    options = {"mesh": make_mesh(kind), "specs": specs, "packed": packed}
    out = check(make(sparse=True, **options), 4)
    for x in out.values():
        assert x.sharding.spec[:1] == ("x",)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_features_without_slots_have_no_rows(strategy):
    collection = make(
        ("rectangle", "sequence"),
        mesh=make_mesh(),
        specs={"embedding": STRATEGIES[strategy]},
    )
    params = collection.import_tables({"padded": values()["padded"]})
    params = jax.device_put(params, collection.shardings(params))
    batch = {
        "rectangle": jnp.zeros((B, 0), jnp.int32),
        "sequence": jbag.Bags(
            jnp.zeros((4, 0), jnp.int32), jnp.zeros((4, 3), jnp.int32)
        ),
    }
    out = jax.jit(collection.apply)({"params": params}, batch)
    assert out["rectangle"].shape == (B, 0, D)
    assert out["sequence"].shape == (4, 0, D)


def test_traffic_counts_the_rows_of_unpooled_features():
    mesh = make_mesh()
    collection = make(("rectangle",), mesh=mesh, specs={"embedding": P("x", None)})
    ids = np.arange(24, dtype=np.int32).reshape(8, 3) % 12 + 4
    traffic = collection.traffic({"rectangle": ids})
    np.testing.assert_array_equal(traffic["embedding_8"].distinct, [6] * 4)


@pytest.mark.parametrize("strategy", [None, "row_wise", *slow("column_wise")])
def test_keyed_bags_give_a_row_for_each_slot_of_all(strategy):
    names, blocks = ("pooled", "sequence", "counted"), 4 if strategy else None
    options = {}
    if strategy:
        options = {"mesh": make_mesh(), "specs": {"embedding": STRATEGIES[strategy]}}
    collection = make(names, **options)
    params = collection.import_tables({k: values()[k] for k in collection.tables})
    if strategy:
        params = jax.device_put(params, collection.shardings(params))
    separate = batch_of(names, blocks)
    each = np.array_split(np.arange(B), blocks or 1)
    keyed = [
        pack([lists(name)[b] for name in names for b in block], "", None)
        for block in each
    ]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *keyed)
    run = jax.jit(collection.apply)
    found = run({"params": params}, stacked if blocks else keyed[0])
    wanted = run({"params": params}, separate)
    np.testing.assert_array_equal(found["pooled"], wanted["pooled"])
    for name in names[1:]:
        rows = np.asarray(found[name]).reshape(len(each), -1, D)
        own = np.asarray(wanted[name]).reshape(len(each), -1, D)
        for block, one in enumerate(each):
            counts = [sum(len(lists(n)[b]) for b in one) for n in names]
            at = names.index(name)
            first, end = sum(counts[:at]), sum(counts[: at + 1])
            np.testing.assert_array_equal(
                rows[block, first:end], own[block, : counts[at]]
            )
            np.testing.assert_array_equal(rows[block, :first], 0)
            np.testing.assert_array_equal(rows[block, end:], 0)


def test_nnx_looks_up_as_linen():
    collection = make()
    params = collection.import_tables(values())
    module = jbag.nnx.EmbeddingBagCollection(
        TABLES, collection.features, rngs=nnx.Rngs(0)
    )
    module.import_tables(values())
    batch = batch_of(FEATURES)
    same = np.testing.assert_array_equal
    jax.tree.map(same, module(batch), collection.apply({"params": params}, batch))


def test_dtype_is_of_the_rows_too():
    collection = make(("sequence",), dtype=jnp.bfloat16)
    params = collection.import_tables({"padded": values()["padded"]})
    out = collection.apply({"params": params}, batch_of(("sequence",)))
    assert out["sequence"].dtype == jnp.bfloat16


def test_a_bag_with_malformed_offsets_is_nan():
    collection = make(("sequence",))
    params = collection.import_tables({"padded": values()["padded"]})
    bags = jbag.Bags(jnp.array([1, 2, 5, 4, 5]), jnp.array([0, 2, 1, 4]))
    out = collection.apply({"params": params}, {"sequence": bags})["sequence"]
    np.testing.assert_array_equal(np.isnan(out).all(1), [0, 0, 1, 1, 0])


def test_a_mode_has_no_place_in_an_unpooled_feature():
    with pytest.raises(ValueError, match="`mode` must not be given with `pooling`"):
        jbag.Feature("a", mode="mean", pooling=None)
    with pytest.raises(ValueError, match="`pooling` must be 'bag' or None; got 'sum'"):
        jbag.Feature("a", pooling="sum")
    assert jbag.Feature("a") == jbag.Feature("a", "mean")
    assert jbag.Feature("a", pooling=None).mode is None
    with pytest.raises(ValueError, match=r"`concatenate` must be False .*\['sequence'"):
        make(("pooled", "sequence"), concatenate=True).init(
            jax.random.key(0), batch_of(("pooled", "sequence"))
        )


def test_an_unknown_id_on_the_host_raises():
    collection = make(("rectangle",))
    with pytest.raises(IndexError, match=r"In `batch\['rectangle'\]`: .* got 40"):
        collection.init(jax.random.key(0), {"rectangle": np.full((2, 2), 40)})

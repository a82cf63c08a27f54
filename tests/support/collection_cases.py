"""A batch of all that a bag may be, for several tables, and what the oracle says of it.

What is expected is the oracle's alone; `check` compares what a collection makes of it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
from flax import nnx
from oracle import MODES

import jbag

D = 4
TABLES = {
    "plain": jbag.Table(30, D),
    "padded": jbag.Table(17, D, padding_idx=-2),
    "counted": jbag.Table(13, D, padding_idx=0, scale_grad_by_freq=True),
    "normed": jbag.Table(9, D, max_norm=1.0, norm_type=1.0),
    "tied": jbag.Table(8, D),  # whole numbers, and a NaN
    "wide": jbag.Table(11, 2 * D),
}
# By name: the table, the mode, and whether bags are weighted, or of one length.
CASES = {
    **{f"plain_{m}": ("plain", m, "weighted") for m in MODES},
    **{f"padded_{m}": ("padded", m, "ragged") for m in MODES},
    **{f"counted_{m}": ("counted", m, "weighted") for m in ("sqrtn", "max")},
    **{f"normed_{m}": ("normed", m, "weighted") for m in ("mean", "min")},
    **{f"flat_{m}": ("plain", m, "rectangle") for m in ("mean", "max")},
    "tied_max": ("tied", "max", "ragged"),
    "tied_min": ("tied", "min", "ragged"),
    "wide": ("wide", "sum", "weighted"),
    "again": ("wide", "mean", "ragged"),
}
FEATURES = {name: jbag.Feature(table, mode) for name, (table, mode, _) in CASES.items()}
# Every mode, every kind of table and of bags.
SOME = ("plain_sqrtn", "padded_sum", "counted_max", "normed_mean", "flat_mean")
SOME += ("tied_min",)
B = 12
CAPACITY = 40


def only(*names):
    """Return the tables and the features of some names."""
    features = {name: FEATURES[name] for name in names}
    used = {feature.table for feature in features.values()}
    return {name: table for name, table in TABLES.items() if name in used}, features


def padding_of(name):
    padding = TABLES[name].padding_idx
    return None if padding is None else padding % TABLES[name].num_embeddings


@functools.cache
def values():
    """Return each table's rows."""
    rng = np.random.default_rng(0)
    rows = {
        name: rng.normal(size=(table.num_embeddings, table.embedding_dim))
        for name, table in TABLES.items()
    }
    rows["tied"] = rng.integers(-1, 2, rows["tied"].shape).astype(float)
    rows["tied"][5, 1] = np.nan
    return {name: x.astype(np.float32) for name, x in rows.items()}


@functools.cache
def lists(name):
    """Return a feature's bags, each a list of (id, weight)."""
    table, _, kind = CASES[name]
    size, padding = TABLES[table].num_embeddings, padding_of(table)
    rng = np.random.default_rng(list(CASES).index(name))
    if kind == "rectangle":
        ids = rng.integers(0, size, (B, 3)).tolist()
        ids[7][1] = size
    else:
        ids = [rng.integers(0, size, n).tolist() for n in rng.integers(0, 5, B)]
        ids[0] = rng.integers(0, size, 11).tolist()
        ids[1], ids[4] = [], [2, 2, 3, 2]
        ids[5] = [1, size + 3, 1, -4]
        ids[6] = [3, 4]
        ids[9:] = [[], [], []]
        if padding is not None:
            ids[2], ids[7] = [padding] * 2, [1, padding, 3, padding]
    if kind != "weighted":
        return [[(i, None) for i in bag] for bag in ids]
    draw = lambda n: rng.uniform(0.5, 1.5, n).astype(np.float32).tolist()
    weights = [draw(len(bag)) for bag in ids]
    weights[6] = [1.0, -1.0]
    return [list(zip(*x, strict=True)) for x in zip(ids, weights, strict=True)]


def pack_on_host(name, capacity=CAPACITY, bags=None):
    """Return bags of NumPy's arrays, with ids and NaNs in slots of none."""
    bags = lists(name) if bags is None else bags
    table, _, kind = CASES[name]
    if kind == "rectangle":
        return np.array([[i for i, _ in bag] for bag in bags], np.int32)
    pairs = [pair for bag in bags for pair in bag]
    size = TABLES[table].num_embeddings
    ids = np.resize([1, size + 9, -7, 2], capacity).astype(np.int32)
    ids[: len(pairs)] = [i for i, _ in pairs]
    weights = np.full(capacity, np.nan, np.float32)
    weights[: len(pairs)] = [w for _, w in pairs]
    ends = np.cumsum([0] + [len(bag) for bag in bags]).astype(np.int32)
    return jbag.Bags(ids, ends, weights if kind == "weighted" else None)


def pack(name, capacity=CAPACITY, bags=None):
    """Return bags on a device."""
    return jax.tree.map(jnp.asarray, pack_on_host(name, capacity, bags))


def in_blocks_on_host(name, blocks, capacity=CAPACITY):
    """Return a stack of bags, a block for each device, of NumPy's arrays."""
    bags, own = lists(name), B // blocks
    if CASES[name][2] == "rectangle":
        return pack_on_host(name)
    each = [bags[p * own : (p + 1) * own] for p in range(blocks)]
    stack = [pack_on_host(name, capacity, block) for block in each]
    return jax.tree.map(lambda *xs: np.stack(xs), *stack)


def in_blocks(name, blocks, capacity=CAPACITY):
    """Return a stack of bags on a device."""
    return jax.tree.map(jnp.asarray, in_blocks_on_host(name, blocks, capacity))


def batch_of(features, blocks=None):
    """Return the bags of features, on one device or in blocks."""
    if blocks is None:
        return {name: pack(name) for name in features}
    return {name: in_blocks(name, blocks) for name in features}


@functools.cache
def cotangent(name):
    rng = np.random.default_rng(99 + list(CASES).index(name))
    shape = (B, TABLES[CASES[name][0]].embedding_dim)
    return rng.normal(size=shape).astype(np.float32)


def cotangents(features):
    return {name: jnp.asarray(cotangent(name)) for name in features}


@functools.cache
def pooled(name):
    """Return the feature's pooled bags."""
    table, mode, _ = CASES[name]
    return oracle.forward(values()[table], lists(name), mode, **_options(table))


@functools.cache
def _gradients(name):
    table, mode, _ = CASES[name]
    options = _options(table)
    options["scale_grad_by_freq"] = TABLES[table].scale_grad_by_freq
    args = values()[table], lists(name), cotangent(name), mode
    return oracle.gradients(*args, **options)


def _options(table):
    own = TABLES[table]
    return {
        "padding_idx": padding_of(table),
        "max_norm": own.max_norm,
        "norm_type": own.norm_type,
    }


def to_tables(features):
    """Return the gradient to each table, over all features."""
    out = {}
    for name in features:
        table = CASES[name][0]
        out[table] = out.get(table, 0) + _gradients(name)[0]
    return out


def named(features):
    """Return the rows of each table that some bag names, in order."""
    out = {}
    for name in features:
        table = CASES[name][0]
        ids = {i for bag in lists(name) for i, _ in bag} - {padding_of(table)}
        out.setdefault(table, set()).update(ids)
    sizes = {name: table.num_embeddings for name, table in TABLES.items()}
    return {t: sorted(i for i in ids if 0 <= i < sizes[t]) for t, ids in out.items()}


def to_weights(name):
    """Return the gradient to the weights of each bag, those of bags of NaN left out."""
    size = TABLES[CASES[name][0]].num_embeddings
    return [
        own
        for own, bag in zip(_gradients(name)[1], lists(name), strict=True)
        if all(0 <= i < size for i, _ in bag)
    ]


def by_bag(name, array):
    """Return what an array has for the slots of each bag, in the order of the bags."""
    array = np.asarray(array).reshape(-1, CAPACITY)
    bags = lists(name)
    own = B // len(array)
    size = TABLES[CASES[name][0]].num_embeddings
    out = []
    for p, block in enumerate(array):
        first = 0
        for bag in bags[p * own : (p + 1) * own]:
            if all(0 <= i < size for i, _ in bag):
                out.append(block[first : first + len(bag)])
            first += len(bag)
        np.testing.assert_array_equal(block[first:], 0)  # of slots in no bag
    return out


def with_weights(batch, weights):
    """Return the batch with other weights where it has some."""
    return {
        name: dataclasses.replace(bags, weights=weights[name])
        if name in weights
        else bags
        for name, bags in batch.items()
    }


def weights_of(batch):
    return {
        name: bags.weights
        for name, bags in batch.items()
        if isinstance(bags, jbag.Bags) and bags.weights is not None
    }


def start(collection):
    """Return the parameters that hold the cases' tables, where they lie."""
    params = collection.import_tables({k: values()[k] for k in collection.tables})
    if collection.mesh is None:
        return params
    return jax.device_put(params, collection.shardings(params))


def results(collection, params, batch, cotangents):
    """Return what is pooled, and the gradients, dense and as rows."""

    def loss(params, weights):
        out = collection.apply({"params": params}, with_weights(batch, weights))
        return sum((out[k] * g).sum() for k, g in cotangents.items()), out

    args = params, weights_of(batch)
    dense, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(*args)
    (update, weights_gradient), _ = jbag.grad(loss, argnums=(0, 1), has_aux=True)(*args)
    rows = jbag.unpack(update)
    coalesced = {k: x.coalesce() for k, x in rows.items()}
    return {
        "out": out,
        "dense": dense,
        "rows": ({k: x.todense() for k, x in rows.items()}, weights_gradient),
        "found": {
            k: (x.indices, x.values, rows[k].num_rows) for k, x in coalesced.items()
        },
        "added": optax.apply_updates(params, update),
    }


def check(collection, blocks=None):
    """Compare everything with the oracle: on one device, or with a block for each."""
    features, params = collection.features, start(collection)
    batch = batch_of(features, blocks)
    run = jax.jit(functools.partial(results, collection))
    # Taken to the host, where what follows is the same for every mesh.
    got = jax.device_get(run(params, batch, cotangents(features)))
    for name in features:
        oracle.assert_close(got["out"][name], pooled(name))
    expected = to_tables(features)
    for kind in ("dense", "rows"):
        params_gradient, weights_gradient = got[kind]
        for name, x in collection.export_tables(params_gradient).items():
            oracle.assert_close(x, expected[name])
        for name, x in weights_gradient.items():
            pairs = zip(by_bag(name, x), to_weights(name), strict=True)
            for own, wanted in pairs:
                oracle.assert_close(own, wanted)
    for name, x in collection.export_tables(got["added"]).items():
        oracle.assert_close(x, expected[name] + values()[name])
    for name, (indices, sums, count) in got["found"].items():
        indices, sums = np.asarray(indices), np.asarray(sums)
        size = params[name].shape[0]
        filled = indices < size
        assert len(set(indices[filled])) == filled.sum() == count
        scattered = np.zeros(params[name].shape, params[name].dtype)
        scattered[indices[filled]] = sums[filled]
        oracle.assert_close(scattered, got["rows"][0][name])
        np.testing.assert_array_equal(sums[~filled], 0)
    counts = sum(int(count) for *_, count in got["found"].values())
    assert counts == sum(map(len, named(features).values()))
    return got


FEW = only("plain_mean", "padded_sum", "flat_max", "wide")


def make(tables=FEW[0], features=FEW[1], **options):
    return jbag.EmbeddingBagCollection(tables, features, **options)


def make_nnx(tables=FEW[0], features=FEW[1], **options):
    options = {"rngs": nnx.Rngs(0)} | options
    return jbag.nnx.EmbeddingBagCollection(tables, features, **options)

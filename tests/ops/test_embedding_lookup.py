"""Lookups without pooling, against the oracle's bags of one id and against PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from meshes import make_mesh
from oracle import assert_close
from pooling import make_table
from slow import every_kernel

import jbag

V, D = 10, 3
PADDING = 4
IDS = np.array([[4, 1, 2, 4], [4, 0, 3, 1]], np.int32)
# A bag of padding and one that is empty; the tail holds an id out of range.
BAGS = jbag.Bags(
    np.array([4, 1, 2, 4, 4, 0, 99, 3], np.int32),
    np.array([0, 3, 3, 6], np.int32),
    np.array([1.5, -1, 2, 0.5, 1, 3, np.nan, np.nan], np.float32),
)
OPTIONS = [
    {},
    {"padding_idx": PADDING},
    {"padding_idx": PADDING - V, "scale_grad_by_freq": True},
    {"padding_idx": PADDING, "scale_grad_by_freq": True, "max_norm": 0.9},
    {"max_norm": 1.0, "norm_type": 1.0},
]


def singles(ids, weights=None):
    """Return a bag of one slot for each id, as the oracle takes bags."""
    flat = np.reshape(ids, -1).tolist()
    return oracle.slices(flat, range(len(flat) + 1), weights)


def cotangent_of(count, dtype="float32"):
    rng = np.random.default_rng(3)
    return jnp.asarray(rng.normal(size=(count, D)), dtype)


def meant(table, bags, cotangent, options):
    """Return the oracle's rows, and its gradients to table and weights.

    The row of padding is looked up, and gets no gradient.
    """
    options = dict(options)
    padding_idx = options.pop("padding_idx", None)
    freq = options.pop("scale_grad_by_freq", False)
    rows = oracle.forward(table, bags, "sum", **options)
    if padding_idx is not None:
        padding_idx %= len(table)
    to_table, _ = oracle.gradients(
        table, bags, cotangent, "sum", padding_idx, scale_grad_by_freq=freq, **options
    )
    _, to_weights = oracle.gradients(table, bags, cotangent, "sum", **options)
    return rows, to_table, to_weights


@functools.partial(jax.jit, static_argnames=("options", "sparse"))
def run(table, ids, weights, cotangent, options, sparse):
    """Return the rows, and the gradients to table and weights."""

    def loss(table, weights):
        given = (
            jbag.Bags(ids.indices, ids.offsets, weights) if weights is not None else ids
        )
        rows = jbag.embedding_lookup(table, given, sparse=sparse, **dict(options))
        return (rows.reshape(-1, D) * cotangent.astype(rows.dtype)).sum(), rows

    both = (jbag if sparse else jax).value_and_grad(loss, (0, 1), has_aux=True)
    if weights is None:
        both = (jbag if sparse else jax).value_and_grad(loss, (0,), has_aux=True)
    (_, rows), gradients = both(table, weights)
    to_table = jbag.unpack(gradients[0])
    if sparse:
        assert isinstance(to_table, jbag.RowSparse)
        to_table = to_table.todense()
    return rows, to_table, *gradients[1:]


@every_kernel
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_rows_and_gradients_are_those_of_the_oracle(options, packed, implementation):
    table, cotangent = make_table(features=D, rows=V), cotangent_of(IDS.size)
    rows, to_table, _ = meant(table, singles(IDS), cotangent, options)
    given = jbag.pack(table, always=True) if packed else table
    options = tuple({**options, "implementation": implementation}.items())
    for sparse in (False, True):
        found = run(given, jnp.asarray(IDS), None, cotangent, options, sparse)
        assert found[0].shape == (*IDS.shape, D)
        assert_close(found[0].reshape(-1, D), rows)
        assert_close(found[1], to_table)


@every_kernel
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_bags_give_a_row_for_each_slot(options, weighted, implementation):
    table, cotangent = make_table(features=D, rows=V), cotangent_of(BAGS.capacity)
    weights = BAGS.weights if weighted else None
    used = int(BAGS.offsets[-1])
    bags = singles(BAGS.indices[:used], None if weights is None else weights[:used])
    wanted = meant(table, bags, cotangent[:used], options)
    options = tuple({**options, "implementation": implementation}.items())
    ids = jax.tree.map(jnp.asarray, jbag.Bags(BAGS.indices, BAGS.offsets))
    for sparse in (False, True):
        found = run(table, ids, weights, cotangent, options, sparse)
        assert_close(found[0][:used], wanted[0])
        np.testing.assert_array_equal(found[0][used:], 0)
        assert_close(found[1], wanted[1])
        if weighted:
            assert_close(found[2][:used], np.concatenate(wanted[2]))
            np.testing.assert_array_equal(found[2][used:], 0)


@pytest.mark.parametrize("options", OPTIONS)
def test_lookups_equal_those_of_pytorch(options, implementation):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    table, cotangent = make_table(features=D, rows=V), cotangent_of(IDS.size)
    if options.get("scale_grad_by_freq"):
        # `max_norm` scales in place there, and the gradient of a leaf isn't defined.
        options = {k: x for k, x in options.items() if "norm" not in k}
    peer = torch.tensor(np.array(table))
    if "max_norm" not in options:
        peer.requires_grad_()
    rows = torch.nn.functional.embedding(torch.tensor(IDS), peer, **options)
    named = tuple({**options, "implementation": implementation}.items())
    found = run(table, jnp.asarray(IDS), None, cotangent, named, False)
    assert_close(found[0], rows.detach().numpy())
    if "max_norm" not in options:
        rows.backward(torch.tensor(np.reshape(cotangent, rows.shape)))
        assert_close(found[1], peer.grad.numpy())


def check_dtype(dtype, implementation):
    table, ids = make_table(dtype, V, D), np.full((64, 2), 3, np.int32)
    cotangent = cotangent_of(ids.size, dtype)
    rows, to_table, _ = meant(table, singles(ids), cotangent, {})
    options = (("implementation", implementation),)
    for sparse in (False, True):
        found = run(table, jnp.asarray(ids), None, cotangent, options, sparse)
        assert found[0].dtype == found[1].dtype == dtype
        assert_close(found[0].reshape(-1, D), rows)
        assert_close(found[1], to_table)


@every_kernel
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_dtypes_are_kept_and_summed_in_32_bits(dtype, implementation):
    check_dtype(dtype, implementation)


@pytest.mark.usefixtures("x64")
def test_float64_is_kept(implementation):
    check_dtype("float64", implementation)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (0, 3), (2, 1, 3)])
def test_ids_have_any_shape(shape, implementation):
    table = make_table(features=D, rows=V)
    ids = np.random.default_rng(0).integers(0, V, shape)
    look_up = functools.partial(
        jbag.embedding_lookup, padding_idx=2, implementation=implementation
    )
    for given in (ids, ids.tolist(), jnp.asarray(ids, jnp.int32)):
        if np.shape(given) == shape:  # a list of none has one axis
            np.testing.assert_array_equal(look_up(table, given), np.asarray(table)[ids])
    loss = lambda table: look_up(table, jnp.asarray(ids), sparse=True).sum()
    np.testing.assert_array_equal(
        jbag.grad(loss)(table).todense(), jax.grad(loss)(table)
    )


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int32"])
def test_ids_of_every_integer_dtype_are_taken(dtype):
    table = make_table(features=D, rows=V)
    found = jbag.embedding_lookup(table, jnp.asarray(IDS, dtype))
    np.testing.assert_array_equal(found, np.asarray(table)[IDS])


@every_kernel
@pytest.mark.parametrize("options", [{}, {"padding_idx": 0, "max_norm": 99.0}])
def test_unknown_ids_on_a_device_are_nan_and_give_no_gradient(options, implementation):
    table = make_table(features=D, rows=V)
    ids = jnp.array([-1, 1, V, -2, 2**31 - 1, -(2**31), 2], jnp.int32)
    for given in (ids, jbag.Bags(ids, jnp.array([0, 7]))):
        found = run(
            table,
            given,
            None,
            jnp.ones((7, D)),
            tuple({**options, "implementation": implementation}.items()),
            True,
        )
        known = np.isin(np.asarray(ids), [1, 2])
        np.testing.assert_array_equal(np.isnan(found[0]).all(1), ~known)
        assert_close(found[0][known], np.asarray(table)[[1, 2]])
        wanted = np.zeros((V, D))
        wanted[[1, 2]] = 1
        assert_close(found[1], wanted)


def test_bags_with_malformed_offsets_are_nan(implementation):
    table = make_table(features=D, rows=V)
    bags = jbag.Bags(jnp.array([1, 2, 3, 4, 5]), jnp.array([0, 2, 1, 4]))
    options = (("implementation", implementation),)
    rows, to_table = run(table, bags, None, jnp.ones((5, D)), options, True)
    np.testing.assert_array_equal(np.isnan(rows).any(1), [0, 0, 1, 1, 0])
    np.testing.assert_array_equal(rows[4], 0)
    wanted = np.zeros((V, D))
    wanted[[1, 2]] = 1
    np.testing.assert_array_equal(to_table, wanted)


def test_a_nan_of_padding_does_not_reach_the_table():
    table = make_table(features=D, rows=V)
    cotangent = np.ones((2, 4, D), np.float32)
    cotangent[IDS == PADDING] = np.nan

    def loss(table):
        rows = jbag.embedding_lookup(table, IDS, padding_idx=PADDING, sparse=True)
        return (rows * cotangent).sum()

    rows = jbag.grad(loss)(table)
    assert np.isfinite(rows.todense()).all()
    assert np.isfinite(jax.grad(loss)(table)).all()
    assert PADDING not in rows.coalesce().indices


@pytest.mark.parametrize("layout", ["array", "bags"])
def test_transformations_give_what_the_oracle_gives(layout, implementation):
    table, cotangent = make_table(features=D, rows=V), cotangent_of(8)
    options = {"padding_idx": PADDING, "implementation": implementation}
    batches = np.stack([IDS.reshape(-1), IDS.reshape(-1)[::-1], BAGS.indices])
    batches[2, 6] = 7
    if layout == "bags":
        used = 6
        make = lambda ids: jbag.Bags(ids, jnp.array([0, 3, 3, used]))
    else:
        used, make = 8, lambda ids: ids.reshape(2, 4)

    def loss(table, ids, sparse=False):
        rows = jbag.embedding_lookup(table, make(ids), sparse=sparse, **options)
        return (jnp.sin(rows).reshape(-1, D) * cotangent).sum()

    def wanted(ids):
        own = singles(ids[:used])
        rows = oracle.forward(table, own, "sum")
        slopes = np.cos(rows) * cotangent[:used]
        to_table, _ = oracle.gradients(table, own, slopes, "sum", PADDING)
        return (np.sin(rows) * cotangent[:used]).sum(), to_table

    values, gradients = map(np.stack, zip(*map(wanted, batches), strict=True))
    both = jax.value_and_grad(loss)
    found = {
        "vmap": jax.jit(jax.vmap(both, (None, 0)))(table, batches),
        "scan": jax.jit(
            lambda t, b: jax.lax.scan(lambda c, ids: (c, both(t, ids)), 0, b)[1]
        )(table, batches),
        "map of remat": jax.lax.map(
            lambda ids: jax.value_and_grad(jax.checkpoint(loss))(table, ids),
            jnp.asarray(batches),
        ),
        "vmap over tables": jax.vmap(both)(jnp.stack([table] * 3), batches),
    }
    for value, gradient in found.values():
        assert_close(value, values)
        assert_close(gradient, gradients)
    batched = lambda t: jax.vmap(loss, (None, 0, None))(t, batches, True).sum()
    rows = jbag.grad(batched)(table)
    assert isinstance(rows, jbag.RowSparse)
    assert_close(rows.todense(), gradients.sum(0))
    scanned = lambda t: jax.lax.map(
        lambda i: loss(t, i, True), jnp.asarray(batches)
    ).sum()
    rows = jax.jit(jbag.grad(scanned))(table)
    assert isinstance(rows, jbag.RowSparse)
    assert_close(rows.todense(), gradients.sum(0))
    plain = lambda t: jbag.embedding_lookup(
        t, make(jnp.asarray(batches[0])), implementation=implementation
    )
    check_grads(lambda t: jnp.sin(plain(t)), (table,), 2, atol=1e-2, rtol=1e-2)


def test_lookups_export_with_symbolic_shapes():
    table = make_table(features=D, rows=V)
    batch, slots = export.symbolic_shape("b, l")
    spec = jax.ShapeDtypeStruct((batch, slots), jnp.int32)
    look_up = jax.jit(lambda t, i: jbag.embedding_lookup(t, i, padding_idx=PADDING))
    exported = export.export(look_up)(table, spec)
    exported = export.deserialize(exported.serialize(vjp_order=1))
    np.testing.assert_array_equal(exported.call(table, IDS), np.asarray(table)[IDS])
    gradient = jax.grad(lambda t: exported.call(t, IDS).sum())(table)
    counts = np.bincount(IDS[IDS != PADDING], minlength=V)
    np.testing.assert_array_equal(gradient, np.repeat(counts[:, None], D, 1))


def test_lookups_run_under_shard_map():
    table, mesh = make_table(features=D, rows=V), make_mesh()
    ids = np.random.default_rng(0).integers(0, V, (8, 2))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("x")), out_specs=P())
    def total(table, ids):
        rows = jbag.embedding_lookup(table, ids, padding_idx=PADDING)
        return jax.lax.psum((rows**2).sum(), "x")

    value, gradient = jax.jit(jax.value_and_grad(total))(table, jnp.asarray(ids))
    rows = np.asarray(table, np.float64)[ids.reshape(-1)]
    assert_close(value, (rows**2).sum())
    wanted, _ = oracle.gradients(table, singles(ids), 2 * rows, "sum", PADDING)
    assert_close(gradient, wanted)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("of_table", "of_ids"),
    [
        (P(), P("x", None)),
        (P(), P(("x", "y"), None)),
        (P(), P(None, "x")),
        (P(), P("x", "y")),
        (P(None, "y"), P()),
        (P(None, "y"), P("x", None)),
    ],
)
def test_rows_lie_as_the_ids_and_the_columns(of_table, of_ids, jit):
    mesh = make_mesh("explicit", (2, 2), ("x", "y"))
    plain = np.random.default_rng(0).normal(size=(V, 4)).astype(np.float32)
    ids = np.random.default_rng(1).integers(0, V, (8, 4)).astype(np.int32)
    with jax.set_mesh(mesh):
        table = jax.device_put(plain, NamedSharding(mesh, of_table))
        laid = jax.device_put(ids, NamedSharding(mesh, of_ids))

        def loss(table, ids):
            rows = jbag.embedding_lookup(table, ids, padding_idx=PADDING, sparse=True)
            return (rows**2).sum(), rows

        def both(table, ids):
            dense = jax.grad(loss, has_aux=True)(table, ids)
            return *dense, jbag.grad(loss, has_aux=True)(table, ids)[0].todense()

        gradient, rows, sparse = (jax.jit(both) if jit else both)(table, laid)
        columns = (*of_table, None, None)[1]
        spec = P(*(*of_ids, None, None)[:2], columns)
        assert jax.typeof(rows).sharding.spec == spec
    np.testing.assert_array_equal(rows, plain[ids])
    wanted, _ = oracle.gradients(
        plain, singles(ids), 2 * plain[ids.reshape(-1)], "sum", PADDING
    )
    assert_close(gradient, wanted)
    assert_close(sparse, wanted)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((IDS + V,), {}, IndexError, r"`ids` must lie in \[0, 10\).* got 14 at .*0, 0"),
        (([[1, -1]],), {}, IndexError, r"`ids` .* got -1 at position \(0, 1\)"),
        ((V,), {}, IndexError, r"`ids` must lie in \[0, 10\)"),
        (([1.5],), {}, TypeError, "`ids` must hold integers; got float64"),
        ((None,), {}, TypeError, "`ids` must hold integers"),
        (([[1], [1, 2]],), {}, ValueError, "`ids` must be an array of integers"),
        (([1],), {"padding_idx": V}, ValueError, "`padding_idx` must be in"),
        (([1],), {"max_norm": -1}, ValueError, "`max_norm` must be at least 0"),
        (([1],), {"sparse": 1}, TypeError, "`sparse` must be True or False"),
        (([1],), {"scale_grad_by_freq": 1}, TypeError, "`scale_grad_by_freq` must be"),
        (([1],), {"implementation": "c"}, ValueError, "`implementation` must be None"),
        ((jbag.Bags.from_lists([[V]]),), {}, IndexError, "`indices` must lie in"),
    ],
)
def test_bad_arguments_raise(args, options, error, message):
    with pytest.raises(error, match=message):
        jbag.embedding_lookup(make_table(features=D, rows=V), *args, **options)


def test_a_table_in_the_place_of_ids_raises():
    with pytest.raises(TypeError, match="are the arguments in PyTorch's order"):
        jbag.embedding_lookup(IDS, make_table())


def test_bags_that_differ_by_device_run_under_shard_map():
    table, mesh = make_table(features=D, rows=V), make_mesh()
    ids, ends = jnp.array([3, 1, 2]), jnp.arange(4)

    def look_up(end):
        bags = jbag.Bags(ids, jnp.append(jnp.zeros_like(end), end))
        return jbag.embedding_lookup(table, bags)[None]

    spread = jax.shard_map(look_up, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    for end, rows in zip(ends, jax.jit(spread)(ends), strict=True):
        wanted = np.where(np.arange(3)[:, None] < end, np.asarray(table)[ids], 0)
        np.testing.assert_array_equal(rows, wanted)


@pytest.mark.parametrize("dtypes", [("int64", "int32"), ("int32", "int64")])
@pytest.mark.usefixtures("x64")
def test_bags_of_two_integer_dtypes_are_taken(dtypes):
    table = make_table(features=D, rows=V)
    ids, offsets = jnp.array([3, -(2**31), 9], dtypes[0]), jnp.array([0, 2], dtypes[1])
    rows = jbag.embedding_lookup(table, jbag.Bags(ids, offsets), padding_idx=9)
    np.testing.assert_array_equal(np.isnan(rows).all(1), [False, True, False])
    np.testing.assert_array_equal(rows[2], 0)

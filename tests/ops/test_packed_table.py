"""Packed tables give what tables give: values, gradients, optimizers, checkpoints."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, serialization
from meshes import make_mesh
from oracle import MODES, assert_close
from pooling import WORKED_IDS, check, make_table, make_weights

import jbag
from jbag.ops import _packed_table
from jbag.ops._packing import Packing

# A row or several a line; lines of 128, 256, 384 and 640 numbers.
WIDTHS = (1, 3, 10, 64, 65, 80, 100, 129, 300)
OFFSETS = np.array([0, 4, 6, 6, 10])


def packed(table, **options):
    return jbag.pack(table, always=True, **options)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_near(actual, expected):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5), actual, expected
    )


def test_padding_of_lines_is_little():
    for width in range(1, 700):
        packing = Packing(1000, width)
        used = packing.rows_per_line * width
        assert packing.width % 128 == 0
        assert used <= packing.width <= 1.3 * used


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_read_and_set_in_lines(width, blocks):
    table = make_table(rows=20, features=width)
    lines = packed(table, num_blocks=blocks)
    assert lines.shape == table.shape
    assert_equal(lines.unpack(), table)
    ids = jnp.array([0, 1, 3, 4, 7, 13, 14, 19, 20, 20])
    rows = make_table(rows=ids.size, features=width, seed=1)
    actual = lines.packing.unpack(lines.packing.put(lines.lines, ids, rows))
    assert_equal(actual, table.at[ids].set(rows, mode="drop"))


@pytest.mark.parametrize("blocks", [1, 2])
def test_long_tables_are_packed_in_parts(blocks):
    table = make_table(rows=70_000, features=10)
    lines = packed(table, num_blocks=blocks)
    assert_equal(lines.unpack(), table)
    ids = jnp.array([[0, 16_319], [16_320, 34_999], [35_000, 69_999]])
    expected = jbag.embedding_bag(table, ids)
    assert_near(jbag.embedding_bag(lines, ids), expected)
    gradient = jax.grad(lambda table: (packed(table).lines ** 2).sum())(table)
    assert_near(gradient, 2 * table)


@pytest.mark.parametrize("width", [1, 10, 100])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_gradients_equal_the_oracle(width, dtype, weighted):
    table = make_table(dtype, features=width)
    weights = make_weights(10, dtype) if weighted else None
    check(table, WORKED_IDS, OFFSETS, weights, packed=True, padding_idx=3)


@pytest.mark.parametrize("implementation", ["xla", "xla_gpu", "cpu", "tensorcore"])
def test_every_kernel_takes_a_packed_table(implementation, require):
    require(implementation)
    ids = np.array([[1, 2, 2], [9, 0, 0]])
    options = {"implementation": implementation, "max_norm": 0.7}
    table, weights = make_table(features=10), make_weights((2, 3))
    check(table, ids, None, weights, packed=True, **options)
    check(table, ids, None, packed=True, scale_grad_by_freq=True)


@pytest.mark.parametrize("shape", [(0, 2), (2, 0), (0, 0)])
def test_batches_without_bags_or_slots_pool_to_zero(shape):
    lines, ids = packed(make_table(rows=14)), jnp.zeros(shape, jnp.int32)
    for mode in ("sum", "mean", "max"):
        pool = lambda lines, mode=mode: jbag.embedding_bag(lines, ids, mode=mode)
        out, pullback = jax.vjp(pool, lines)
        assert_equal(out, np.zeros((shape[0], 3)))
        (gradient,) = pullback(out)
        assert not gradient.lines.any()


def test_ids_out_of_range_and_padding_lanes_are_never_read():
    table = make_table(rows=13, features=10).at[5].set(jnp.nan)
    lines = packed(table)
    for mode in ("sum", "mean", "max"):
        pool = functools.partial(jbag.embedding_bag, mode=mode)
        ids = jnp.array([[4, 6], [13, 2], [-1, 2], [12, 5]])
        out = pool(lines, ids)
        assert np.isfinite(out[0]).all()
        assert np.isnan(out[1:]).all()
        assert_near(out, pool(table, ids))
        infinite = jnp.array([[jnp.inf, 1.0]] * 4)
        assert_near(
            pool(lines, ids, weights=infinite), pool(table, ids, weights=infinite)
        )


@pytest.mark.parametrize("mode", MODES)
def test_weights_of_slots_that_do_not_win_or_are_in_no_bag_reach_no_row(mode):
    table = make_table(rows=13, features=10)
    ids = jnp.array([1, 2, 3, 4, 3, 13])
    weights = jnp.array([1.0, jnp.inf, -2.0, 3.0, jnp.nan, jnp.nan])

    def loss(table, weights):
        bags = jbag.Bags(ids, jnp.array([0, 2, 4]), weights)
        return jnp.sin(jbag.embedding_bag(table, bags, mode=mode)).sum()

    expected = jax.grad(loss, argnums=(0, 1))(table, weights)
    actual = jax.grad(loss, argnums=(0, 1))(packed(table), weights)
    assert_near(jbag.unpack(actual), expected)
    assert np.isfinite(expected[0][3:]).all()
    assert not expected[1][4:].any()


def loss_of(bags, **options):
    def loss(params):
        return (jbag.embedding_bag(params["table"], bags, **options) ** 2).sum()

    return loss


@pytest.mark.parametrize(
    "optimizer",
    [
        jbag.optim.sgd(0.1),
        jbag.optim.sgd(0.1, momentum=0.9),
        jbag.optim.adagrad(0.1, weight_decay=0.1),
        jbag.optim.rowwise_adagrad(0.1),
        jbag.optim.adam(0.1),
        jbag.optim.ftrl(0.1),
    ],
)
@pytest.mark.parametrize("mode", ["mean", "max"])
def test_steps_equal_those_of_the_table(optimizer, mode):
    bags = jbag.Bags.from_lists([[1, 2, 2], [], [13, 0, 12], [2]], capacity=9)
    loss = loss_of(bags, mode=mode, sparse=True)

    @jax.jit
    def step(params, state):
        value, gradient = jbag.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    results = []
    for table in (make_table(rows=14), packed(make_table(rows=14))):
        params = {"table": table}
        state = optimizer.init(params)
        for _ in range(3):
            params, state, value = step(params, state)
        results.append(jbag.unpack((params, state, value)))
    assert_near(results[1], results[0])
    params, state, _ = results[0]
    assert jax.tree.structure(results[1][1]) == jax.tree.structure(state)


def test_an_update_that_is_not_applied_in_place_is_the_same():
    table = make_table(rows=14)
    bags = jbag.Bags.from_lists([[1, 2, 2], [13]])
    optimizer = optax.chain(
        jbag.optim.clip_by_global_norm(0.1), jbag.optim.adagrad(0.1)
    )
    results = []
    for params in ({"table": table}, {"table": packed(table)}):
        gradient = jbag.grad(loss_of(bags, sparse=True))(params)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        (rows,) = jax.tree.leaves(updates, is_leaf=lambda x: hasattr(x, "todense"))
        results.append(rows.todense())
        changed = optax.apply_updates(params, jax.tree.map(lambda x: x, updates))
        results.append(jbag.unpack(changed)["table"])
    assert_near(results[2], results[0])
    assert_near(results[3], results[1])


@pytest.mark.standard_promotion
def test_optax_takes_dense_gradients_of_lines():
    bags = jbag.Bags.from_lists([[1, 2, 2], [13]])
    optimizer = optax.adamw(0.1)
    results = []
    for params in (
        {"table": make_table(rows=14)},
        {"table": packed(make_table(rows=14))},
    ):
        state = optimizer.init(params)
        for _ in range(2):
            gradient = jax.grad(loss_of(bags))(params)
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        results.append(jbag.unpack(params))
    assert_near(results[1], results[0])


def test_renorm_scales_rows_in_lines():
    table = 9 * make_table(rows=14)
    ids = [3, 13, 3, 0]
    expected = jbag.renorm(table, ids, 1.0)
    assert_near(jbag.renorm(packed(table), ids, 1.0).unpack(), expected)


def test_pooling_with_a_pullback_adds_to_lines():
    table, bags = make_table(rows=14), jbag.Bags.from_lists([[1, 2, 2], [13]])
    pooled, pullback = jbag.sparse.pool(packed(table), bags)
    expected, dense = jbag.sparse.pool(table, bags)
    assert_near(pooled, expected)
    lines = packed(table)
    added = jbag.PackedTable(lines.lines + pullback(pooled), lines.packing)
    assert_near(added.unpack(), table + dense(expected))


def test_vmap_maps_over_bags_and_over_packed_tables():
    tables = jnp.stack([make_table(rows=14), make_table(rows=14, seed=3)])
    ids = jnp.array([[[1, 2], [3, 13]], [[0, 0], [5, 6]]])
    lines = jax.vmap(packed)(tables)
    pool = jbag.embedding_bag
    over_bags = jax.vmap(pool, in_axes=(None, 0))
    assert_near(over_bags(packed(tables[0]), ids), over_bags(tables[0], ids))
    assert_near(jax.vmap(pool)(lines, ids), jax.vmap(pool)(tables, ids))


def test_a_checkpoint_is_that_of_the_table():
    bag = functools.partial(jbag.EmbeddingBag, 50, 10, padding_idx=0)
    bags = jbag.Bags.from_lists([[1, 2, 3], [4, 5]])
    optimizer = jbag.optim.rowwise_adagrad(0.1)
    states = []
    for module in (bag(), bag(packed=True)):
        params = module.init(jax.random.key(0), bags)
        states.append((params, optimizer.init(params)))
    plain, lines = states
    assert isinstance(lines[0]["params"]["embedding"], jbag.PackedTable)
    assert_equal(jbag.unpack(lines), plain)
    assert_equal(jbag.pack_like(plain, like=lines), lines)
    # Flax writes and reads tables.
    saved = serialization.to_bytes(lines)
    assert saved == serialization.to_bytes(plain)
    assert_equal(serialization.from_bytes(lines, saved), lines)
    # Each module takes the parameters of the other.
    for module in (bag(), bag(packed=True)):
        for params, _ in states:
            assert_near(module.apply(params, bags), bag().apply(plain[0], bags))


def test_a_restored_table_must_have_its_shape():
    like = {"table": packed(make_table(rows=14))}
    with pytest.raises(ValueError, match=r"must be \(14, 3\); got \(13, 3\)"):
        jbag.pack_like({"table": make_table(rows=13)}, like)


def test_partitioning_metadata_boxes_a_packed_table():
    init = nn.with_partitioning(nn.initializers.normal(), ("x", None))
    bag = jbag.EmbeddingBag(50, 10, packed=True, embedding_init=init)
    variables = bag.init(jax.random.key(0), [[1, 2]])
    box = variables["params"]["embedding"]
    assert isinstance(box, nn.Partitioned)
    assert isinstance(box.value, jbag.PackedTable)
    assert bag.apply(variables, [[1, 2]]).shape == (1, 10)


def test_modules_pack_by_themselves_on_tpus(monkeypatch):
    on_tpus = []
    monkeypatch.setattr(_packed_table, "_on_tpu", lambda _: bool(on_tpus))
    boxed = nn.with_partitioning(nn.initializers.normal(), ("x", None))
    metadata = {"embedding_metadata": {"tag": 1}}

    def makes():
        linen = [
            jbag.EmbeddingBag(50, 10, **options).init(jax.random.key(0), [[1]])
            for options in ({}, {"packed": False}, {"embedding_init": boxed})
        ]
        variables = [
            jbag.nnx.EmbeddingBag(50, 10, rngs=nnx.Rngs(0), **options).embedding
            for options in ({}, {"packed": False}, metadata)
        ]
        collection = jbag.EmbeddingBagCollection(
            {"a": jbag.Table(50, 10)}, {"f": jbag.Feature("a")}
        )
        packs = lambda tree: [
            _packed_table.packs(x)
            for x in jax.tree.leaves(tree, is_leaf=_packed_table.packs)
        ]
        batch = {"f": np.array([[1]])}
        return [
            *map(packs, [*linen, *variables]),
            packs(collection.init(jax.random.key(0), batch)),
        ]

    assert makes() == [[False]] * 7
    on_tpus.append(True)
    assert makes() == [[True], [False], [False]] * 2 + [[True]]


def test_arrays_of_a_packed_table_are_the_table():
    table = make_table(rows=14)
    assert_equal(np.asarray(packed(table)), table)
    assert_equal(jnp.asarray(packed(table)), table)


@pytest.mark.parametrize("blocks", [1, 4])
def test_a_table_is_packed_where_a_mesh_is_set(blocks):
    table = make_table(rows=20, features=3)
    with jax.set_mesh(make_mesh("explicit")):
        lines = packed(table, num_blocks=blocks)
        assert_equal(jbag.unpack(lines), table)
        state = jbag.optim.ftrl(0.1).init(lines)
        assert state.states["z"].shape == table.shape


def test_nothing_is_packed_without_need():
    table = make_table(rows=14)
    assert jbag.pack(table) is table  # on a CPU
    wide = make_table(features=256)
    assert packed(wide) is wide
    lines = packed(table)
    assert packed(lines) is lines


def test_bad_packed_tables_are_errors():
    with pytest.raises(ValueError, match="multiple of `num_blocks`"):
        packed(make_table(rows=14), num_blocks=4)
    with pytest.raises(TypeError, match="`always`"):
        jbag.pack(make_table(), always=1.5)
    with pytest.raises(ValueError, match="`num_blocks`"):
        packed(make_table(rows=14), num_blocks=0)
    lines = packed(make_table(rows=14))
    rows = jbag.grad(loss_of([[1]], sparse=True))({"table": lines})["table"].lines
    with pytest.raises(ValueError, match="Shapes must be equal"):
        jnp.zeros((14, 128)) + rows
    wrong = jbag.PackedTable(lines.lines[:, :3], lines.packing)
    with pytest.raises(ValueError, match=r"`table.lines` must have shape \(2, 128\)"):
        jbag.embedding_bag(wrong, [[1]])
    with pytest.raises(IndexError, match="14"):
        jbag.embedding_bag(lines, [[14]])
    with pytest.raises(TypeError, match="returns the array"):
        lines[0]
    with pytest.raises(TypeError, match="`packed`"):
        jbag.EmbeddingBag(5, 3, packed="yes").init(jax.random.key(0), [[1]])


def test_a_program_with_a_packed_table_is_exported():
    lines = packed(make_table(rows=14))
    ids = jnp.array([[1, 13]])
    exported = jax.export.export(jax.jit(jbag.embedding_bag), platforms=["cpu", "tpu"])
    program = jax.export.deserialize(exported(lines, ids).serialize())
    assert_close(program.call(lines, ids), make_table(rows=14)[ids].mean(1))

"""A table of transformations: each must agree with the function itself.

The modes stand side by side in one function, which compiles once for all of them.
"""

import functools
import itertools
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from meshes import make_mesh, some_devices
from oracle import MODES

import jbag
from jbag.ops import _primitive, _segment_max, _spmm
from jbag.ops.kernels import KERNELS

IDS = jnp.array([4, 1, 2, 4, 4, 0, 3, 1, 2], jnp.int32)
OFFSETS = jnp.array([0, 3, 3, 7], jnp.int32)  # and two tail slots

LAYOUTS = ("ragged", "rectangular")


def make_table(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def every_mode(*bags, modes=MODES, **options):
    """Pool in every mode: [B, D, modes]."""
    pool = functools.partial(jbag.embedding_bag, *bags, **options)
    return jnp.stack([pool(mode=mode) for mode in modes], -1)


def make_pool(layout="ragged", **options):
    """Return a function of table, weights and ids."""

    def pool(table, weights, ids=IDS):
        if layout == "rectangular":
            ids, offsets = ids[:8].reshape(2, 4), None
            weights = weights[:8].reshape(2, 4)
        else:
            offsets = OFFSETS
        return every_mode(
            table,
            ids,
            offsets,
            weights=weights,
            include_last_offset=layout == "ragged",
            **options,
        )

    return pool


def close(actual, expected):
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def grad_and_jvp_to_second_order(pool, table, weights):
    # Against finite differences, in 64 bits.
    with jax.enable_x64(True):
        args = table.astype(jnp.float64), weights.astype(jnp.float64)
        loss = jax.jit(lambda *args: jnp.sin(pool(*args)))
        check_grads(loss, args, order=2, modes=("fwd", "rev"), rtol=1e-4, atol=1e-4)


def disable_jit(pool, table, weights):
    expected = pool(table, weights)
    with jax.disable_jit():
        close(pool(table, weights), expected)


def compiled(pairs):
    """Compare the pairs that a function returns, as one program computes them."""

    @functools.wraps(pairs)
    def transformation(pool, table, weights):
        program = jax.jit(functools.partial(pairs, pool))
        for actual, expected in program(table, weights):
            close(actual, expected)

    return transformation


def jit(pool, table, weights):
    close(jax.jit(pool)(table, weights), pool(table, weights))


@compiled
def jacobians_agree(pool, table, weights):
    forward = jax.jacfwd(pool, (0, 1))(table, weights)
    reverse = jax.jacrev(pool, (0, 1))(table, weights)
    return [(forward, reverse)]


@compiled
def hessian_is_symmetric_and_agrees(pool, table, weights):
    loss = lambda t, w: jnp.sin(pool(t, w)).sum((0, 1))  # one for each mode
    first = jax.hessian(loss, (0, 1))(table, weights)
    second = jax.jacrev(jax.jacfwd(loss, (0, 1)), (0, 1))(table, weights)
    cross = jnp.transpose(first[1][0], (0, 2, 3, 1))
    return [(first, second), (first[0][1], cross)]


@compiled
def vmap_over_tables(pool, table, weights):
    tables = jnp.stack([table, table * 2, -table], axis=1)
    expected = jnp.stack([pool(tables[:, k], weights) for k in range(3)])
    return [(jax.vmap(pool, in_axes=(1, None))(tables, weights), expected)]


@compiled
def vmap_over_batches(pool, table, weights):
    ids = jnp.stack([IDS, IDS[::-1], (IDS + 1) % 5])
    many = jnp.stack([weights, weights * 2, weights + 1])
    each = [pool(table, many[k], ids[k]) for k in range(3)]
    shared = jax.vmap(pool, in_axes=(None, None, 0))(table, weights, ids)
    return [
        (jax.vmap(pool, in_axes=(None, 0, 0))(table, many, ids), jnp.stack(each)),
        (shared[1], pool(table, weights, ids[1])),
    ]


@compiled
def vmap_over_everything_twice(pool, table, weights):
    tables = jnp.stack([table, table * 2])
    ids = jnp.stack([IDS, IDS[::-1], (IDS + 1) % 5])
    inner = jax.vmap(pool, in_axes=(None, None, 0))
    both = jax.vmap(inner, in_axes=(0, None, None))(tables, weights, ids)
    return [(both[1, 2], pool(tables[1], weights, ids[2]))]


@compiled
def grad_of_vmap_and_vmap_of_grad(pool, table, weights):
    ids = jnp.stack([IDS, IDS[::-1], (IDS + 1) % 5])
    loss = lambda t, w, i: jnp.sin(pool(t, w, i)).sum((0, 1))  # one for each mode
    gradient = jax.jacrev(loss, (0, 1))
    each = [gradient(table, weights, ids[k]) for k in range(3)]
    of_grad = jax.vmap(gradient, in_axes=(None, None, 0))(table, weights, ids)
    total = lambda t, w: jax.vmap(loss, in_axes=(None, None, 0))(t, w, ids).sum(0)
    return [
        (of_grad, jax.tree.map(lambda *xs: jnp.stack(xs), *each)),
        (
            jax.jacrev(total, (0, 1))(table, weights),
            jax.tree.map(lambda *x: sum(x), *each),
        ),
    ]


@compiled
def scan(pool, table, weights):
    ids = jnp.stack([IDS, IDS[::-1], (IDS + 1) % 5])

    def loss(table, weights):
        step = lambda total, i: (total + jnp.sin(pool(table, weights, i)), None)
        return jax.lax.scan(step, jnp.zeros_like(pool(table, weights)), ids)[0].sum()

    def unrolled(table, weights):
        return sum(jnp.sin(pool(table, weights, i)).sum() for i in ids)

    results = [jax.value_and_grad(f, (0, 1)) for f in (loss, unrolled)]
    return [tuple(f(table, weights) for f in results)]


@compiled
def remat(pool, table, weights):
    loss = lambda t, w: jnp.sin(pool(t, w)).sum()
    checkpointed = jax.grad(jax.checkpoint(loss), (0, 1))(table, weights)
    return [(checkpointed, jax.grad(loss, (0, 1))(table, weights))]


TRANSFORMATIONS = [
    jit,
    grad_and_jvp_to_second_order,
    jacobians_agree,
    hessian_is_symmetric_and_agrees,
    vmap_over_tables,
    vmap_over_batches,
    vmap_over_everything_twice,
    grad_of_vmap_and_vmap_of_grad,
    scan,
    remat,
    disable_jit,
]


# Bags of one length run the same rules as ragged ones, but under `vmap`.
BATCHED = (vmap_over_tables, vmap_over_batches, vmap_over_everything_twice)
# The kernels share these rules.
LARGE = (grad_and_jvp_to_second_order, jacobians_agree, hessian_is_symmetric_and_agrees)
LARGE += (grad_of_vmap_and_vmap_of_grad,)


def is_slow(transformation, layout, implementation):
    if layout == "rectangular" and transformation not in BATCHED:
        return True
    return implementation == "xla" and transformation in LARGE


CASES = [
    pytest.param(*case, marks=[pytest.mark.slow] if is_slow(*case) else [])
    for case in itertools.product(TRANSFORMATIONS, LAYOUTS, KERNELS)
]


@pytest.mark.parametrize(
    ("transformation", "layout", "implementation"), CASES, indirect=["implementation"]
)
def test_transformation(transformation, layout, implementation):
    pool = make_pool(layout, implementation=implementation)
    weights = jnp.linspace(0.5, 1.5, 9, dtype=jnp.float32)
    transformation(pool, make_table(5, 3), weights)


def test_jvp_and_vjp_agree_under_every_option(implementation):
    options = {"padding_idx": 0, "max_norm": 1.0, "scale_grad_by_freq": True}
    pool = make_pool(implementation=implementation, **options)
    table, weights = make_table(5, 3), jnp.linspace(0.5, 1.5, 9, dtype=jnp.float32)
    moved = make_table(5, 3, seed=1), make_table(9, seed=2)
    cotangent = make_table(3, 3, seed=3)

    @jax.jit
    def products(table, weights):
        _, tangent = jax.jvp(pool, (table, weights), moved)
        forward = jnp.einsum("bdm,bd->m", tangent, cotangent)
        along = lambda t, w: jnp.einsum("bdm,bd->m", pool(t, w), cotangent)
        back = jax.jacrev(along, (0, 1))(table, weights)
        return forward, sum(
            (b * m).reshape(len(MODES), -1).sum(1)
            for m, b in zip(moved, back, strict=True)
        )

    close(*products(table, weights))
    loss = lambda t: jnp.sin(pool(t, weights)).sum((0, 1))
    assert np.isfinite(jax.jit(jax.hessian(loss))(table)).all()


def test_vmap_keeps_malformed_and_unknown_apart(implementation):
    ids = jnp.array([[0, 1, 2, 3], [0, 99, 2, 3], [0, 1, 2, -1]])
    offsets = jnp.array([[0, 1, 4], [0, 2, 4], [0, 9, 4]])
    table = make_table(5, 3)
    pool = lambda i, o, t: every_mode(
        t, i, o, include_last_offset=True, implementation=implementation
    )

    @jax.jit
    def alone(ids, offsets):
        value, pullback = jax.vjp(lambda t: pool(ids, offsets, t), table)
        return value, pullback(jnp.ones_like(value))[0]

    each, gradients = zip(*map(alone, ids, offsets), strict=True)
    out = jax.jit(jax.vmap(pool, in_axes=(0, 0, None)))(ids, offsets, table)
    np.testing.assert_allclose(out, jnp.stack(each), rtol=1e-6)

    # The same, each batch with a table of its own: ids must not reach a neighbour's.
    @jax.jit
    def own(tables):
        value, pullback = jax.vjp(lambda t: jax.vmap(pool)(ids, offsets, t), tables)
        return value, pullback(jnp.ones_like(value))[0]

    out, gradient = own(jnp.stack([table, table, table]))
    np.testing.assert_allclose(out, jnp.stack(each), rtol=1e-6)
    np.testing.assert_allclose(gradient, jnp.stack(gradients), rtol=1e-6)


def test_vmap_with_tail_slots_and_padding(implementation):
    lists = [[[1, 2], []], [[3], [4, 0, 0, 1]], [[], []]]
    batches = [jbag.Bags.from_lists(x, capacity=7) for x in lists]
    stacked = jax.tree.map(lambda *x: jnp.stack(list(map(jnp.asarray, x))), *batches)
    table = make_table(5, 3)
    pool = lambda b: every_mode(table, b, padding_idx=0, implementation=implementation)
    out = jax.jit(jax.vmap(pool))(stacked)
    each = list(map(jax.jit(pool), batches))
    np.testing.assert_allclose(out, jnp.stack(each), rtol=1e-6)


def test_vmap_counts_frequencies_within_each_batch(implementation):
    ids = jnp.array([[[1, 1], [2, 3]], [[1, 2], [2, 2]]])
    table = make_table(5, 3)
    pool = lambda t, i: every_mode(
        t, i, scale_grad_by_freq=True, implementation=implementation
    ).sum((0, 1))
    gradient = jax.jacrev(pool)
    each = jnp.stack([jax.jit(gradient)(table, i) for i in ids])
    close(jax.jit(jax.vmap(gradient, in_axes=(None, 0)))(table, ids), each)


@pytest.mark.parametrize("mode", MODES)
def test_vmap_over_nothing_gives_nothing(mode, implementation):
    table = make_table(5, 3)
    options = {"mode": mode, "implementation": implementation}
    pool = lambda i: jbag.embedding_bag(table, i, **options)
    assert jax.vmap(pool)(jnp.zeros((0, 4, 2), int)).shape == (0, 4, 3)
    ragged = lambda i, o: jbag.embedding_bag(table, i, o, **options)
    empty = jnp.zeros((0, 6), int), jnp.zeros((0, 2), int)
    assert jax.vmap(ragged)(*empty).shape == (0, 2, 3)


def test_vmap_over_more_rows_than_ids_can_name_runs_one_by_one(implementation):
    # 2^16 tables of 2^16 rows: a joint row number doesn't fit in 32 bits.
    tables = jax.ShapeDtypeStruct((2**16, 2**16, 1), jnp.float32)
    ids = jax.ShapeDtypeStruct((2**16, 2, 2), jnp.int32)
    pool = jax.vmap(
        lambda t, i: jbag.embedding_bag(t, i, mode="sum", implementation=implementation)
    )
    assert jax.eval_shape(pool, tables, ids).shape == (2**16, 2, 1)
    assert "scan" in str(jax.make_jaxpr(pool)(tables, ids))


@pytest.mark.parametrize("pad_id", [None, 4])
@pytest.mark.parametrize(
    ("primitive", "outputs", "options"),
    [
        (
            _spmm.spmm_p,
            ("bags",),
            {"average": "mean", "dtype": jnp.dtype("float32")},
        ),
        (_segment_max.extremum_p, ("bags", "winners"), {"largest": True}),
    ],
)
def test_batches_run_one_by_one_give_the_same(
    primitive, outputs, options, pad_id, implementation
):
    operands = make_table(3, 5, 2), jnp.arange(12).reshape(3, 2, 2) % 5
    options = {"pad_id": pad_id, "implementation": implementation, **options}
    joint = _primitive._batch(
        primitive, ("rows",), outputs, operands, (0, 0), **options
    )
    single = _primitive._map(primitive, operands, (0, 0), **options)
    chex.assert_trees_all_close(joint, single)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_shard_map_over_bags_equals_one_device(kind, implementation):
    mesh = make_mesh(kind)
    table, weights = make_table(10, 3), make_table(8, 3, seed=1) + 2
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 10, (8, 3)), jnp.int32)

    def pool(table, ids, weights):
        return every_mode(table, ids, weights=weights, implementation=implementation)

    def loss(pool, table, weights):
        return jnp.sin(pool(table, ids, weights)).sum()

    one = jax.jit(jax.value_and_grad(lambda t, w: loss(pool, t, w), (0, 1)))
    close_to = one(table, weights)
    with jax.set_mesh(mesh):
        split = jax.sharding.NamedSharding(mesh, P("x"))
        whole = jax.sharding.NamedSharding(mesh, P())
        ids, weights = jax.device_put((ids, weights), split)
        table = jax.device_put(table, whole)
        sharded = jax.shard_map(pool, in_specs=(P(), P("x"), P("x")), out_specs=P("x"))
        both = jax.jit(jax.value_and_grad(lambda t, w: loss(sharded, t, w), (0, 1)))
        close(jax.device_get(both(table, weights)), jax.device_get(close_to))


def test_shard_map_over_ragged_blocks_and_columns(implementation):
    mesh = jax.make_mesh((2, 2), ("x", "y"), devices=some_devices(4))
    lists = [[[1, 2], [3]], [[], [4, 0, 0]]]
    blocks = [jbag.Bags.from_lists(x, capacity=4) for x in lists]
    bags = jax.tree.map(
        lambda *x: jnp.concatenate([jnp.asarray(y) for y in x]), *blocks
    )
    table = make_table(5, 4)
    pool = lambda t, b: every_mode(t, b, implementation=implementation)
    expected = jnp.concatenate([jax.jit(pool)(table, b) for b in blocks])
    with jax.set_mesh(mesh):
        split = jax.sharding.NamedSharding(mesh, P("x"))
        columns = jax.sharding.NamedSharding(mesh, P(None, "y"))
        sharded = jax.shard_map(
            pool, in_specs=(P(None, "y"), P("x")), out_specs=P("x", "y")
        )
        out = jax.jit(sharded)(
            jax.device_put(table, columns), jax.device_put(bags, split)
        )
    close(jax.device_get(out), jax.device_get(expected))


def test_jit_partitions_a_sharded_batch(implementation):
    mesh = make_mesh()
    table = make_table(8, 3)
    ids = jnp.arange(24, dtype=jnp.int32).reshape(8, 3) % 8
    pool = lambda t, i: every_mode(t, i, implementation=implementation)
    gradient = jax.grad(lambda t, i: jnp.sin(pool(t, i)).sum())
    expected = jax.jit(gradient)(table, ids)
    for spec in (P(), P("x", None)):
        rows = jax.device_put(table, jax.sharding.NamedSharding(mesh, spec))
        split = jax.device_put(ids, jax.sharding.NamedSharding(mesh, P("x")))
        close(jax.device_get(jax.jit(gradient)(rows, split)), jax.device_get(expected))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_for_every_platform_from_one_machine(layout):
    pool = make_pool(layout)
    both = jax.jit(jax.value_and_grad(lambda t, w, i: pool(t, w, i).sum(), (0, 1)))
    args = make_table(5, 3), jnp.ones(9), IDS
    exported = export.export(both, platforms=("cpu", "cuda", "tpu"))(*args)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    # What runs anywhere calls nothing that only jbag brings.
    assert "custom_call @jbag" not in exported.mlir_module()
    restored = export.deserialize(bytearray(exported.serialize()))
    if jax.default_backend() in ("cpu", "tpu"):
        close(restored.call(*args), both(*args))


def test_export_for_the_own_platform_alone_is_portable_too():
    pool = jax.jit(make_pool())
    exported = export.export(pool)(make_table(5, 3), jnp.ones(9))
    assert "custom_call @jbag" not in exported.mlir_module()


def export_named(function, implementation):
    """Export to where the kernel runs, vouching for its custom calls."""
    kernel = KERNELS[implementation]
    calls = () if kernel.portable else kernel.operations.OPERATIONS
    return export.export(
        function,
        platforms=kernel.platforms or ("cpu", "cuda", "tpu"),
        disabled_checks=[
            export.DisabledSafetyCheck.custom_call(f"jbag_{implementation}_{name}")
            for name in calls
        ],
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_of_a_named_kernel_keeps_it(layout, implementation):
    pool = make_pool(layout, implementation=implementation)
    both = jax.jit(jax.value_and_grad(lambda t, w: pool(t, w).sum(), (0, 1)))
    args = make_table(5, 3), jnp.linspace(0.5, 1.5, 9, dtype=jnp.float32)
    exported = export_named(both, implementation)(*args)
    calls = f"custom_call @jbag_{implementation}_" in exported.mlir_module()
    assert calls is not KERNELS[implementation].portable
    restored = export.deserialize(bytearray(exported.serialize()))
    if jax.default_backend() in restored.platforms:
        close(restored.call(*args), both(*args))


@pytest.mark.parametrize("differentiated", [False, True])
def test_export_of_the_cpu_kernel_must_be_vouched_for(differentiated, require):
    require("cpu")
    pool = make_pool(modes=["sum"], implementation="cpu")
    if differentiated:
        pool = jax.grad(lambda t, w, pool=pool: jnp.sin(pool(t, w)).sum(), (0, 1))
    args = make_table(5, 3), jnp.ones(9)
    with pytest.raises(ValueError, match=r"(?s)custom calls.*@jbag_cpu_") as error:
        export.export(jax.jit(pool))(*args)
    for name in ("spmm_transpose", "sddmm"):
        assert (f"@jbag_cpu_{name}" in str(error.value)) is differentiated


def test_export_with_symbolic_batch_sizes(implementation):
    ends, slots = export.symbolic_shape("e, n", constraints=["e >= 2", "n >= 1"])
    options = {"implementation": implementation}
    pool = jax.jit(
        lambda t, i, o: jnp.append(
            every_mode(t, i, o, include_last_offset=True, **options),
            jax.vmap(lambda t: every_mode(t, i, o, **options))(t[None])[0],
        )
    )
    exported = export_named(pool, implementation)(
        jax.ShapeDtypeStruct((5, 3), jnp.float32),
        jax.ShapeDtypeStruct((slots,), jnp.int32),
        jax.ShapeDtypeStruct((ends,), jnp.int32),
    )
    if jax.default_backend() in ("cpu", "tpu"):
        table = make_table(5, 3)
        for ids, offsets in ((IDS, OFFSETS), (IDS[:4], jnp.array([0, 4]))):
            close(exported.call(table, ids, offsets), pool(table, ids, offsets))


def test_a_stream_of_ragged_batches_compiles_once(implementation):
    table = make_table(50, 3)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(table, bags):
        pool = lambda t: jbag.embedding_bag(t, bags, implementation=implementation)
        return jax.value_and_grad(lambda t: jnp.sin(pool(t)).sum())(table)

    rng = np.random.default_rng(0)
    for _ in range(20):
        lists = [rng.integers(0, 50, n).tolist() for n in rng.integers(0, 9, 16)]
        step(table, jbag.Bags.from_lists(lists, capacity=128, num_bags=16))
    assert step._cache_size() == 1


def test_bucketed_capacities_meet_few_shapes(implementation):
    table = make_table(50, 3)
    pool = jax.jit(lambda t, b: jbag.embedding_bag(t, b, implementation=implementation))
    rng = np.random.default_rng(0)
    for _ in range(60):
        lists = [rng.integers(0, 50, n).tolist() for n in rng.integers(0, 60, 16)]
        capacity = jbag.bucket(sum(map(len, lists)))
        pool(table, jbag.Bags.from_lists(lists, capacity=capacity))
    assert pool._cache_size() <= 8


@pytest.mark.slow
def test_no_program_is_kept_after_clear_caches():
    # In a process of its own: clearing would have the other tests compile again.
    check = """
import gc, jax, jax.numpy as jnp, jbag

def programs():
    gc.collect()
    return len(jax.devices()[0].client.live_executables())

def loss(table, ids, sparse):
    return jbag.embedding_bag(table, ids, sparse=sparse).sum()

for size in range(2, 5):
    table, ids = jnp.ones((size, 3)), jnp.zeros((size, 2), jnp.int32)
    before = programs()
    jbag.embedding_bag(table, ids)
    assert programs() == before + 1, (before, programs())
    jbag.value_and_grad(loss)(table, ids, True)
    jax.grad(loss)(table, ids, False)
    with jax.disable_jit():
        jax.grad(loss)(table, ids, False)
jax.clear_caches()
assert programs() == 0, programs()
"""
    subprocess.run([sys.executable, "-c", check], check=True)


class TestVariants(chex.TestCase):
    @chex.variants(
        with_jit=True, without_jit=True, with_device=True, without_device=True
    )
    def test_variants_agree(self):
        table = make_table(5, 3)
        bags = jbag.Bags.from_lists([[0, 1], [2]], capacity=4)
        out = self.variant(lambda t, b: jbag.embedding_bag(t, b, mode="sum"))(
            table, bags
        )
        close(out, jnp.stack([table[0] + table[1], table[2]]))

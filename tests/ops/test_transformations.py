"""A table of transformations: each must give what the oracle gives.

Modes stand side by side in one function, which compiles once for all of them: one that
divides and one that doesn't, and one that picks a slot. The others have their rules.
"""

import functools
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import export
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from meshes import make_mesh, some_devices
from oracle import MODES
from slow import every_kernel, slow

import jbag
from jbag.ops import _extremum, _primitive, _spmm
from jbag.ops.kernels import KERNELS

IDS = jnp.array([4, 1, 2, 4, 4, 0, 3, 1, 2], jnp.int32)
OFFSETS = jnp.array([0, 3, 3, 7], jnp.int32)  # and two tail slots
WEIGHTS = np.linspace(0.5, 1.5, 9, dtype=np.float32)
# Batches of ids.
BATCHES = np.stack([IDS, np.asarray(IDS)[::-1], (np.asarray(IDS) + 1) % 5])

LAYOUTS = ("ragged", "rectangular")
SOME = ("sum", "mean", "max")


def make_table(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def some_modes(*bags, modes=SOME, **options):
    """Pool in some modes: [B, D, modes]."""
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
        return some_modes(
            table,
            ids,
            offsets,
            weights=weights,
            include_last_offset=layout == "ragged",
            **options,
        )

    return pool


def pool_and_pullback(table, bags, **options):
    """Return the oracle's [B, D, modes], and the function from its cotangent.

    That returns the gradients to the table, and to the weights of all bags; `options`
    may hold `padding_idx` and `scale_grad_by_freq`.
    """
    forward = {k: x for k, x in options.items() if k == "padding_idx"}
    pooled = [oracle.forward(table, bags, mode, **forward) for mode in SOME]

    def pullback(cotangent):
        found = [
            oracle.gradients(table, bags, cotangent[..., k], mode, **options)
            for k, mode in enumerate(SOME)
        ]
        to_weights = sum(np.concatenate([np.zeros(0), *own]) for _, own in found)
        return sum(to_table for to_table, _ in found), to_weights

    return np.stack(pooled, -1), pullback


def by_oracle(layout, table, weights, ids=IDS):
    """Return what the oracle makes of a pool that `make_pool` returns."""
    ends = OFFSETS if layout == "ragged" else [0, 4, 8]
    bags = oracle.slices(np.asarray(ids).tolist(), ends, weights)
    pooled, pullback = pool_and_pullback(table, bags)

    def of_every_slot(cotangent):
        to_table, to_weights = pullback(cotangent)
        return to_table, np.pad(to_weights, (0, len(ids) - len(to_weights)))

    return pooled, of_every_slot


def sines(meant, *args):
    """Return the oracle's sum of sines, and its gradients."""
    pooled, pullback = meant(*args)
    return np.sin(pooled).sum(), pullback(np.cos(pooled))


def close(actual, expected):
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def grad_and_jvp_to_second_order(pool, _, table, weights):
    # Against finite differences, in 64 bits.
    with jax.enable_x64(True):
        args = table.astype(np.float64), weights.astype(np.float64)
        loss = jax.jit(lambda *args: jnp.sin(pool(*args)))
        check_grads(loss, args, order=2, modes=("fwd", "rev"), rtol=1e-4, atol=1e-4)


def eager_and_jit(pool, meant, table, weights):
    for wrap in (lambda f: f, jax.jit):
        close(wrap(pool)(jnp.asarray(table), weights), meant(table, weights)[0])


def disable_jit(pool, meant, table, weights):
    with jax.disable_jit():
        found = pool(jnp.asarray(table), jnp.asarray(weights))
    close(found, meant(table, weights)[0])


def jacobians(pool, meant, table, weights):
    both = jax.jit(
        lambda *args: [f(pool, (0, 1))(*args) for f in (jax.jacfwd, jax.jacrev)]
    )
    pooled, pullback = meant(table, weights)
    for found in both(table, weights):
        for position in np.ndindex(pooled.shape):
            cotangent = np.zeros(pooled.shape)
            cotangent[position] = 1
            close(
                [x[position] for x in map(np.asarray, found)], list(pullback(cotangent))
            )


def hessian_is_symmetric_and_agrees(pool, _, table, weights):
    loss = lambda t, w: jnp.sin(pool(t, w)).sum((0, 1))  # one for each mode

    @jax.jit
    def both(table, weights):
        first = jax.hessian(loss, (0, 1))(table, weights)
        return first, jax.jacrev(jax.jacfwd(loss, (0, 1)), (0, 1))(table, weights)

    first, second = both(table, weights)
    close(first, second)
    close(first[0][1], np.transpose(first[1][0], (0, 2, 3, 1)))


def vmap_over_tables(pool, meant, table, weights):
    tables = np.stack([table, table * 2, -table], axis=1)
    found = jax.jit(jax.vmap(pool, in_axes=(1, None)))(tables, weights)
    close(found, np.stack([meant(tables[:, k], weights)[0] for k in range(3)]))


def vmap_over_batches(pool, meant, table, weights):
    many = np.stack([weights, weights * 2, weights + 1])

    @jax.jit
    def both(table, weights, many, ids):
        own = jax.vmap(pool, in_axes=(None, 0, 0))(table, many, ids)
        return own, jax.vmap(pool, in_axes=(None, None, 0))(table, weights, ids)

    own, shared = both(table, weights, many, BATCHES)
    for k, ids in enumerate(BATCHES):
        close(own[k], meant(table, many[k], ids)[0])
        close(shared[k], meant(table, weights, ids)[0])


def vmap_over_everything_twice(pool, meant, table, weights):
    tables = np.stack([table, table * 2])
    inner = jax.vmap(pool, in_axes=(None, None, 0))
    both = jax.jit(jax.vmap(inner, in_axes=(0, None, None)))(tables, weights, BATCHES)
    for t, k in np.ndindex(2, 3):
        close(both[t, k], meant(tables[t], weights, BATCHES[k])[0])


def grad_of_vmap_and_vmap_of_grad(pool, meant, table, weights):
    loss = lambda t, w, i: jnp.sin(pool(t, w, i)).sum()

    @jax.jit
    def both(table, weights, ids):
        total = lambda t, w: jax.vmap(loss, in_axes=(None, None, 0))(t, w, ids).sum()
        gradient = jax.grad(loss, (0, 1))
        of_grad = jax.vmap(gradient, in_axes=(None, None, 0))(table, weights, ids)
        return jax.grad(total, (0, 1))(table, weights), of_grad

    of_vmap, of_grad = both(table, weights, BATCHES)
    each = [sines(meant, table, weights, ids)[1] for ids in BATCHES]
    close(of_grad, tuple(map(np.stack, zip(*each, strict=True))))
    close(of_vmap, tuple(map(sum, zip(*each, strict=True))))


def scan(pool, meant, table, weights):
    def loss(table, weights, ids):
        step = lambda total, i: (total + jnp.sin(pool(table, weights, i)).sum(), None)
        return jax.lax.scan(step, 0.0, ids)[0]

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(
        table, weights, BATCHES
    )
    each = [sines(meant, table, weights, ids) for ids in BATCHES]
    close(value, sum(x for x, _ in each))
    close(gradients, tuple(map(sum, zip(*(x for _, x in each), strict=True))))


def remat(pool, meant, table, weights):
    loss = jax.checkpoint(lambda t, w: jnp.sin(pool(t, w)).sum())
    found = jax.jit(jax.value_and_grad(loss, (0, 1)))(table, weights)
    close(found, sines(meant, table, weights))


# Their rules are those of the layout; the others know nothing of it.
BATCHED = (vmap_over_tables, vmap_over_batches, vmap_over_everything_twice)
# The kernels share these rules.
LARGE = (grad_and_jvp_to_second_order, hessian_is_symmetric_and_agrees, jacobians)
LARGE += (grad_of_vmap_and_vmap_of_grad,)
RAGGED = (*BATCHED, eager_and_jit, disable_jit, scan, remat)
CASES = [
    *((f, "ragged", name) for f in RAGGED for name in ("cpu", "xla")),
    *((f, "rectangular", name) for f in BATCHED for name in ("cpu", "xla")),
    *slow(*((f, "ragged", name) for f in RAGGED for name in ("cuda", "xla_gpu"))),
    *slow(*((f, "ragged", "tensorcore") for f in BATCHED)),
    *((f, "ragged", "cpu") for f in LARGE),
    *slow(*((f, "ragged", "xla") for f in LARGE)),
    *slow(*((f, "rectangular", "cpu") for f in (LARGE[0], LARGE[-1]))),
]


@pytest.mark.parametrize(
    ("transformation", "layout", "implementation"), CASES, indirect=["implementation"]
)
def test_transformation(transformation, layout, implementation):
    # Finite differences are of every mode.
    modes = MODES if transformation is grad_and_jvp_to_second_order else SOME
    pool = make_pool(layout, implementation=implementation, modes=modes)
    meant = functools.partial(by_oracle, layout)
    transformation(pool, meant, make_table(5, 3), WEIGHTS)


def test_jvp_and_vjp_agree_under_every_option(implementation):
    options = {"padding_idx": 0, "max_norm": 1.0, "scale_grad_by_freq": True}
    pool = make_pool(implementation=implementation, **options)
    moved = make_table(5, 3, seed=1), make_table(9, seed=2)
    cotangent = make_table(3, 3, len(SOME), seed=3)

    @jax.jit
    def products(*args):
        _, tangent = jax.jvp(pool, args, moved)
        back = jax.vjp(pool, *args)[1](cotangent)
        gradient = jax.grad(lambda *args: jnp.sin(pool(*args)).sum(), (0, 1))
        return tangent, back, jax.jvp(gradient, args, moved)[1]

    tangent, back, second = products(make_table(5, 3), WEIGHTS)
    forward = np.sum(np.asarray(tangent) * cotangent)
    close(forward, sum(np.sum(m * b) for m, b in zip(moved, back, strict=True)))
    assert all(np.isfinite(x).all() for x in second)


@every_kernel
def test_vmap_keeps_malformed_and_unknown_apart(implementation):
    ids = np.array([[0, 1, 2, 3], [0, 99, 2, 3], [0, 1, 2, -1]])
    offsets = np.array([[0, 1, 4], [0, 2, 4], [0, 9, 4]])
    table = make_table(5, 3)
    pool = lambda i, o, t: some_modes(
        t, i, o, include_last_offset=True, implementation=implementation
    )

    @jax.jit
    def run(ids, offsets, tables):
        shared = jax.vmap(pool, in_axes=(0, 0, None))(ids, offsets, tables[0])
        # Each batch with a table of its own: ids must not reach a neighbour's.
        own, pullback = jax.vjp(lambda t: jax.vmap(pool)(ids, offsets, t), tables)
        return shared, own, pullback(jnp.ones_like(own))[0]

    shared, own, gradient = run(ids, offsets, np.stack([table] * 3))
    for k in range(3):
        # Of the last, both bags are malformed: NaN, and without a gradient.
        ends = offsets[k] if k < 2 else [0, 0, 0]
        value, pullback = pool_and_pullback(table, oracle.slices(ids[k].tolist(), ends))
        value = value if k < 2 else np.full_like(value, np.nan)
        close(shared[k], value)
        close(own[k], value)
        close(gradient[k], pullback(np.ones_like(value))[0])


@every_kernel
def test_vmap_with_tail_slots_and_padding(implementation):
    lists = [[[1, 2], []], [[3], [4, 0, 0, 1]], [[], []]]
    batches = [jbag.Bags.from_lists(x, capacity=7) for x in lists]
    stacked = jax.tree.map(lambda *x: np.stack(x), *batches)
    table = make_table(5, 3)
    pool = lambda b: some_modes(table, b, padding_idx=0, implementation=implementation)
    out = jax.jit(jax.vmap(pool))(stacked)
    for found, batch in zip(out, lists, strict=True):
        bags = [[(i, None) for i in bag] for bag in batch]
        close(found, pool_and_pullback(table, bags, padding_idx=0)[0])


def test_vmap_counts_frequencies_within_each_batch(implementation):
    ids = np.array([[[1, 1], [2, 3]], [[1, 2], [2, 2]]])
    table = make_table(5, 3)
    pool = lambda t, i: some_modes(
        t, i, scale_grad_by_freq=True, implementation=implementation
    ).sum()
    found = jax.jit(jax.vmap(jax.grad(pool), in_axes=(None, 0)))(table, ids)
    for own, batch in zip(found, ids, strict=True):
        bags = [[(i, None) for i in bag] for bag in batch]
        value, pullback = pool_and_pullback(table, bags, scale_grad_by_freq=True)
        close(own, pullback(np.ones_like(value))[0])


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
        (_extremum.extremum_p, ("bags", "winners"), {"largest": True}),
    ],
)
def test_batches_run_one_by_one_give_the_same(
    primitive, outputs, options, pad_id, implementation
):
    operands = make_table(3, 5, 2), np.arange(12, dtype=np.int32).reshape(3, 2, 2) % 5
    options = {"pad_id": pad_id, "implementation": implementation, **options}

    @jax.jit
    def both(*operands):
        args = operands, (0, 0)
        joint = _primitive._batch(primitive, ("rows",), outputs, *args, **options)
        return joint, _primitive._map(primitive, *args, **options)

    chex.assert_trees_all_close(*both(*operands))


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_shard_map_over_bags_equals_one_device(kind, implementation):
    mesh = make_mesh(kind)
    table, weights = make_table(10, 3), make_table(8, 3, seed=1) + 2
    ids = np.random.default_rng(0).integers(0, 10, (8, 3)).astype(np.int32)
    bags = oracle.slices(ids.reshape(-1).tolist(), range(0, 25, 3), weights.reshape(-1))
    value, (to_table, to_weights) = sines(pool_and_pullback, table, bags)
    expected = value, (to_table, to_weights.reshape(8, 3))

    def pool(table, ids, weights):
        return some_modes(table, ids, weights=weights, implementation=implementation)

    with jax.set_mesh(mesh):
        split = jax.sharding.NamedSharding(mesh, P("x"))
        whole = jax.sharding.NamedSharding(mesh, P())
        ids, weights = jax.device_put((ids, weights), split)
        table = jax.device_put(table, whole)
        sharded = jax.shard_map(pool, in_specs=(P(), P("x"), P("x")), out_specs=P("x"))
        loss = lambda table, weights: jnp.sin(sharded(table, ids, weights)).sum()
        both = jax.jit(jax.value_and_grad(loss, (0, 1)))
        close(jax.device_get(both(table, weights)), expected)


def test_shard_map_over_ragged_blocks_and_columns(implementation):
    mesh = jax.make_mesh((2, 2), ("x", "y"), devices=some_devices(4))
    lists = [[[1, 2], [3]], [[], [4, 0, 0]]]
    blocks = [jbag.Bags.from_lists(x, capacity=4) for x in lists]
    bags = jax.tree.map(lambda *x: np.concatenate(x), *blocks)
    table = make_table(5, 4)
    pool = lambda t, b: some_modes(t, b, implementation=implementation)
    pairs = [[(i, None) for i in bag] for block in lists for bag in block]
    with jax.set_mesh(mesh):
        split = jax.sharding.NamedSharding(mesh, P("x"))
        columns = jax.sharding.NamedSharding(mesh, P(None, "y"))
        sharded = jax.shard_map(
            pool, in_specs=(P(None, "y"), P("x")), out_specs=P("x", "y")
        )
        out = jax.jit(sharded)(
            jax.device_put(table, columns), jax.device_put(bags, split)
        )
    close(jax.device_get(out), pool_and_pullback(table, pairs)[0])


def test_jit_partitions_a_sharded_batch(implementation):
    mesh = make_mesh()
    table = make_table(8, 3)
    ids = np.arange(24, dtype=np.int32).reshape(8, 3) % 8
    pool = lambda t, i: some_modes(t, i, implementation=implementation)
    gradient = jax.grad(lambda t, i: jnp.sin(pool(t, i)).sum())
    bags = [[(i, None) for i in bag] for bag in ids]
    _, (expected, _) = sines(pool_and_pullback, table, bags)
    for spec in (P(), P("x", None)):
        rows = jax.device_put(table, jax.sharding.NamedSharding(mesh, spec))
        split = jax.device_put(ids, jax.sharding.NamedSharding(mesh, P("x")))
        close(jax.device_get(jax.jit(gradient)(rows, split)), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_for_every_platform_from_one_machine(layout):
    pool = make_pool(layout)
    loss = lambda t, w, i: jnp.sin(pool(t, w, i)).sum()
    both = jax.jit(jax.value_and_grad(loss, (0, 1)))
    args = make_table(5, 3), WEIGHTS, IDS
    exported = export.export(both, platforms=("cpu", "cuda", "tpu"))(*args)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    # What runs anywhere calls nothing that only jbag brings.
    assert "custom_call @jbag" not in exported.mlir_module()
    restored = export.deserialize(bytearray(exported.serialize()))
    if jax.default_backend() in ("cpu", "tpu"):
        close(restored.call(*args), sines(functools.partial(by_oracle, layout), *args))


def test_export_for_the_own_platform_alone_is_portable_too():
    pool = jax.jit(make_pool())
    exported = export.export(pool)(make_table(5, 3), WEIGHTS)
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
    loss = lambda t, w: jnp.sin(pool(t, w)).sum()
    both = jax.jit(jax.value_and_grad(loss, (0, 1)))
    args = make_table(5, 3), WEIGHTS
    exported = export_named(both, implementation)(*args)
    calls = f"custom_call @jbag_{implementation}_" in exported.mlir_module()
    assert calls is not KERNELS[implementation].portable
    restored = export.deserialize(bytearray(exported.serialize()))
    if jax.default_backend() in restored.platforms:
        close(restored.call(*args), sines(functools.partial(by_oracle, layout), *args))


@pytest.mark.parametrize("differentiated", [False, True])
def test_export_of_the_cpu_kernel_must_be_vouched_for(differentiated, require):
    require("cpu")
    pool = make_pool(modes=["sum"], implementation="cpu")
    if differentiated:
        pool = jax.grad(lambda t, w, pool=pool: jnp.sin(pool(t, w)).sum(), (0, 1))
    args = make_table(5, 3), WEIGHTS
    with pytest.raises(ValueError, match=r"(?s)custom calls.*@jbag_cpu_") as error:
        export.export(jax.jit(pool))(*args)
    for name in ("spmm_transpose", "sddmm"):
        assert (f"@jbag_cpu_{name}" in str(error.value)) is differentiated


def test_export_with_symbolic_batch_sizes(implementation):
    ends, slots = export.symbolic_shape("e, n", constraints=["e >= 2", "n >= 1"])
    options = {"implementation": implementation}
    pool = jax.jit(
        lambda t, i, o: jnp.append(
            some_modes(t, i, o, include_last_offset=True, **options),
            jax.vmap(lambda t: some_modes(t, i, o, **options))(t[None])[0],
        )
    )
    exported = export_named(pool, implementation)(
        jax.ShapeDtypeStruct((5, 3), jnp.float32),
        jax.ShapeDtypeStruct((slots,), jnp.int32),
        jax.ShapeDtypeStruct((ends,), jnp.int32),
    )
    if jax.default_backend() in ("cpu", "tpu"):
        table = make_table(5, 3)
        for ids, ends in ((IDS, [0, 3, 3, 7]), (IDS[:4], [0, 4])):
            found = exported.call(table, ids, np.array(ends, np.int32))
            bags = oracle.slices(ids.tolist(), ends)
            ragged = pool_and_pullback(table, bags)[0]
            # Without the last offset, a bag more, of the rest.
            rest = [(i, None) for i in ids[ends[-1] :].tolist()]
            whole = pool_and_pullback(table, [*bags, rest])[0]
            close(found, np.append(ragged, whole))


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
        close(out, np.stack([table[0] + table[1], table[2]]))

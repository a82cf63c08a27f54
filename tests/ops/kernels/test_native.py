"""What the kernels in C++ and CUDA have of their own: vectors, sorting, rounding.

What they share with the other kernels is tested beside them.
"""

import functools
import itertools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec as P
from meshes import some_devices
from modes import every_mode
from oracle import assert_close
from slow import slow

import jbag
from jbag.ops import _extremum, _row_updates, _spmm

DTYPES = ("float32", "float64", "bfloat16", "float16")

# Below, at and past the vectors of every instruction set, and a tile of eight.
WIDTHS = (1, 7, 16, 33, 129, 300)
WIDTHS += tuple(slow(2, 3, 8, 10, 15, 17, 31, 64, 100, 127, 128, 144, 513, 1030))


@pytest.fixture(params=["cpu", *slow("cuda")])
def native(request, require):
    """The kernels in C++ and CUDA by name."""
    require(request.param)
    return request.param


@pytest.fixture
def _cpu_kernel(require):
    require("cpu")


def offsets_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)])


@functools.partial(jax.jit, static_argnames="implementation")
def operations(table, weights, ids, offsets, cotangent, implementation):
    """Return the results of the four operations, by what they are."""
    options = {"pad_id": None, "implementation": implementation}
    pool = lambda t, w: _spmm.spmm(t, ids, offsets, w, **options)
    value, pullback = jax.vjp(pool, table, weights)
    to_table, to_weights = pullback(cotangent)
    results = {"sum": value, "to_table": to_table, "to_weights": to_weights}
    bags = (ids, weights) if offsets is None else (ids, offsets, weights)
    for mode in ("max", "min"):
        results[mode], results[f"slots of {mode}"] = _extremum.extremum_p.bind(
            table, *bags, largest=mode == "max", **options
        )
    return results


def check_every_mode(table, weights, ids, offsets, cotangent, native):
    """Compare every mode with the oracle."""
    results = every_mode(
        table,
        weights,
        jnp.asarray(ids),
        jnp.asarray(offsets),
        cotangent,
        include_last_offset=True,
        implementation=native,
    )
    bags = oracle.slices(ids, offsets, weights)
    for mode, (value, to_table, to_weights) in results.items():
        assert_close(value, oracle.forward(table, bags, mode))
        meant_table, meant_weights = oracle.gradients(table, bags, cotangent, mode)
        assert_close(to_table, meant_table)
        if weights is not None:
            flat = np.zeros(len(ids))
            flat[: offsets[-1]] = np.concatenate(meant_weights)
            assert_close(to_weights, flat)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.usefixtures("x64")
def test_every_width_in_every_dtype_equals_the_oracle(width, native):
    rng = np.random.default_rng(width)
    # At the widest, 70 slots are three blocks; the last two lie in no bag.
    offsets, flat = offsets_of([3, 0, 70, 1, 9]), rng.integers(0, 6, 85)
    columns = np.arange(width)
    for dtype in DTYPES:
        table = jnp.asarray(rng.normal(size=(6, width)), dtype)
        sums = "float64" if dtype == "float64" else "float32"
        weights = jnp.asarray(rng.normal(size=85), sums)
        cotangent = jnp.asarray(rng.normal(size=(5, width)), sums)
        bags = oracle.slices(flat, offsets, weights)
        meant = {mode: oracle.forward(table, bags, mode) for mode in ("max", "min")}
        meant["sum"] = oracle.forward(table, bags, "sum")
        gradients = oracle.gradients(table, bags, cotangent, "sum")
        meant["to_table"] = gradients[0]
        meant["to_weights"] = np.concatenate([*gradients[1], [0, 0]])
        terms = np.asarray(table, float)[flat] * np.asarray(weights, float)[:, None]
        types = [("int32", "int64"), ("int64", "int32")][width % 2]
        ids, ends = map(jnp.asarray, (flat, offsets), types)
        results = operations(table, weights, ids, ends, cotangent, native)
        assert results["sum"].dtype == results["max"].dtype == sums
        assert results["to_table"].dtype == dtype
        results = jax.tree.map(np.asarray, results)
        for name, expected in meant.items():
            assert_close(results[name], expected)
        for mode in ("max", "min"):
            slots = results[f"slots of {mode}"]
            np.testing.assert_array_equal(slots[1], 85)
            for bag in (0, 2, 3, 4):
                assert_close(results[mode][bag], terms[slots[bag], columns])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("x64")
def test_every_mode_in_every_dtype_equals_the_oracle(dtype, native):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(9, 37)), dtype)
    weights = jnp.asarray(rng.uniform(0.5, 1.5, 17), dtype)
    cotangent = jnp.asarray(rng.normal(size=(5, 37)), dtype)
    offsets = offsets_of([3, 0, 1, 9, 2])
    check_every_mode(table, weights, rng.integers(0, 9, 17), offsets, cotangent, native)


def eighths(rng, shape, dtype="float32"):
    """Return numbers whose products add up exactly, so that no slot can hide."""
    return jnp.asarray(
        rng.integers(1, 9, shape) * rng.choice([-1, 1], shape) / 8, dtype
    )


@pytest.mark.parametrize("weighted", [True, *slow(False)])
def test_one_huge_bag_among_many_small_equals_the_oracle(weighted, native):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 4, 300)
    lengths[120] = 20_000
    offsets = offsets_of(lengths)
    ids = rng.integers(0, 1000, offsets[-1] + 7)
    weights = jnp.abs(eighths(rng, ids.shape)) if weighted else None
    # A slot's share in the gradient of a mean must not vanish.
    cotangent = eighths(rng, (300, 20)).at[120].mul(1024)
    table = eighths(rng, (1000, 20))
    check_every_mode(table, weights, ids, offsets, cotangent, native)


@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        ("float32", 20),
        ("float32", 1030),
        ("float64", 20),
        ("bfloat16", 1030),
        ("bfloat16", 20),
        ("float16", 1030),
    ],
)
@pytest.mark.usefixtures("x64")
def test_a_row_that_20000_slots_name_gets_the_gradient_of_all(dtype, width, native):
    rng = np.random.default_rng(0)
    lengths = rng.multinomial(20_100, np.ones(500) / 500)
    ids = np.full(20_100, 3)
    ids[rng.choice(20_100, 100, replace=False)] = rng.integers(0, 9, 100)
    sums = "float64" if dtype == "float64" else "float32"
    weights = eighths(rng, ids.shape, sums)
    cotangent = eighths(rng, (500, width), sums)
    to_table = _spmm.spmm_transpose(
        cotangent,
        jnp.asarray(ids),
        jnp.asarray(offsets_of(lengths)),
        weights,
        num_embeddings=9,
        dtype=jnp.dtype(dtype),
        pad_id=None,
        implementation=native,
    )
    slots = np.repeat(np.asarray(cotangent, float), lengths, axis=0)
    slots *= np.asarray(weights, float)[:, None]
    expected = np.stack([slots[ids == v].sum(0) for v in range(9)])
    np.testing.assert_array_equal(to_table, jnp.asarray(expected, dtype))


# Prints the number of XLA's threads, and a digest of the results' bytes.
CHILD = """
import hashlib, pathlib
import jax, jax.numpy as jnp, numpy as np
import jbag

rng = np.random.default_rng(0)
lengths = rng.poisson(8, 4000)
lengths[1234] = 30_000
ends = np.concatenate([[0], np.cumsum(lengths)])
ids = jnp.asarray(rng.zipf(1.2, ends[-1]) % 5000, jnp.int32)
ends = jnp.asarray(ends, jnp.int32)
weights = jnp.asarray(rng.normal(size=ids.size), jnp.float32)
digest = hashlib.sha256()
for dtype in ("float32", "bfloat16"):
    table = rng.normal(size=(5000, 48)).astype(np.float32)
    table[1] = 1e-39  # subnormal, which threads might flush to zero or not
    table = jnp.asarray(table).astype(dtype)
    for mode in ("sum", "max"):
        pool = lambda t, w: jbag.embedding_bag(
            t, ids, ends, mode=mode, weights=w, include_last_offset=True,
            implementation="cpu",
        )
        run = jax.jit(lambda t, w: (lambda y, back: (y, back(jnp.sin(y))))(
            *jax.vjp(pool, t, w)))
        first = [np.asarray(x).tobytes() for x in jax.tree.leaves(run(table, weights))]
        for _ in range(3):
            again = run(table, weights)
            assert first == [np.asarray(x).tobytes() for x in jax.tree.leaves(again)]
        for x in first:
            digest.update(x)
names = [x.read_text() for x in pathlib.Path("/proc/self/task").glob("*/comm")]
print(sum("XLAEigen" in name for name in names), digest.hexdigest())
"""


@pytest.mark.slow
@pytest.mark.usefixtures("_cpu_kernel")
def test_results_are_the_same_bits_for_any_number_of_threads():
    digests = set()
    for threads in (1, 2, max(4, os.cpu_count())):
        # The size of the pool that XLA's CPU client makes.
        env = os.environ | {"NPROC": str(threads), "JAX_PLATFORMS": "cpu"}
        child = subprocess.run(
            [sys.executable, "-c", CHILD],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert child.returncode == 0, child.stderr
        seen, digest = child.stdout.split()
        if pathlib.Path("/proc/self/task").is_dir():
            assert int(seen) == threads
        digests.add(digest)
    assert len(digests) == 1


@pytest.mark.slow
def test_a_batch_of_nothing_is_the_same_as_in_xla(native):
    rng = np.random.default_rng(0)
    batches = []
    for rows, slots, bags, width in itertools.product((0, 3), (0, 4), (0, 2), (0, 5)):
        dtype = rng.choice(["float32", "bfloat16"])
        table = jnp.asarray(rng.normal(size=(rows, width)), dtype)
        cotangent = jnp.asarray(rng.normal(size=(bags, width)), jnp.float32)
        ids = jnp.asarray(rng.integers(0, 3, slots), jnp.int32)
        layouts = [(ids, jnp.asarray([0, slots // 2, slots][: bags + 1], jnp.int32))]
        if bags or not slots:
            layouts.append((ids.reshape(bags, slots // 2 if bags else 3), None))
        for shaped, offsets in layouts:
            weights = jnp.asarray(rng.normal(size=shaped.shape), jnp.float32)
            batches.append((table, weights, shaped, offsets, cotangent))

    @functools.partial(jax.jit, static_argnums=1)
    def all_results(batches, implementation):
        return [operations(*batch, implementation) for batch in batches]

    actual, expected = (all_results(batches, name) for name in (native, "xla"))
    types = lambda results: jax.tree.map(lambda x: (x.shape, x.dtype), results)
    assert types(actual) == types(expected)
    for results, meant in zip(actual, expected, strict=True):
        for name, result in results.items():
            # Slots are exact.
            dtype = "float64" if "slots" in name else result.dtype
            assert_close(result, meant[name], dtype)


NO_PADDING = {}
PADDING = {"padding_idx": 3}
EVERYTHING = PADDING | {"max_norm": 1.5, "scale_grad_by_freq": True}


def hostile_ids(rng, slots, dtype, rows):
    limits = np.iinfo(dtype)
    out_of_range = [limits.min, limits.max, -1, -2, -3, rows, rows + 1, 2**31 - 1]
    if limits.bits == 64:
        out_of_range += [2**31, 2**32, 2**32 + 1, -(2**31) - 1, -(2**32)]
    out_of_range = np.array(
        [*out_of_range, *rng.integers(limits.min, limits.max, 4, dtype)]
    )
    known = rng.random(slots) < rng.choice([0.3, 0.8, 0.95])
    return np.where(
        known, rng.integers(0, rows, slots), rng.choice(out_of_range, slots)
    ).astype(dtype)


def hostile_offsets(rng, ends, slots, dtype):
    limits = np.iinfo(dtype)
    good = np.sort(rng.integers(0, slots + 1, ends))
    good[0] = 0
    one_off, swapped = good.copy(), good.copy()
    one_off[rng.integers(ends)] = rng.choice([-1, slots + 1, limits.min, limits.max])
    swapped[1:] = rng.permutation(good[1:])
    return rng.choice(
        [
            good,
            one_off,
            swapped,
            good[::-1],
            good + rng.choice([-1, 1]),
            -good,
            good * 3,
            rng.integers(-5, slots + 6, ends),
            rng.integers(limits.min, limits.max, ends, dtype),
            np.full(ends, rng.choice([0, -1, slots, slots + 1])),
        ]
    ).astype(dtype)


@pytest.mark.parametrize("pad_id", [None, 1, -1, 2**32 + 1])
@pytest.mark.usefixtures("x64")
def test_64_bit_ids_never_wrap_to_rows_or_to_padding(pad_id, native):
    # A bag each; those whose low halves are a row's, row 1 and -1 among them.
    wrapping = np.array(
        [
            (high << 32) + low
            for high in (1, -1, 2**30, -(2**31))
            for low in (0, 1, 2, 2**32 - 1)
        ]
    )
    ids = np.tile([0, 2, 1, 7, 2, 0, 1], (len(wrapping), 3))  # vectors, and a rest
    ids[:, [3, 10, 17]] = wrapping[:, None]
    rows = jnp.asarray(np.random.default_rng(0).integers(-9, 9, (3, 2)), jnp.float32)
    cotangent = jnp.ones((len(ids), 2), jnp.float32)
    named = {}
    for implementation in (native, "xla"):
        options = {"pad_id": pad_id, "implementation": implementation}
        bags = (jnp.asarray(ids), None, None)
        pooled = _spmm.spmm(rows, *bags, **options)
        dots = _spmm.sddmm(rows, cotangent, *bags[:2], **options)
        unique = _row_updates.coalesce(cotangent, *bags, num_embeddings=3, **options)
        named[implementation] = [pooled, dots, *unique]
    for actual, expected in zip(*named.values(), strict=True):
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)
    pooled, *_, indices, _ = named[native]
    assert indices.dtype == jnp.int64
    np.testing.assert_array_equal(np.isnan(pooled[:, 0]), wrapping != pad_id)


@pytest.mark.parametrize(
    ("dtype", "rectangular", "options"),
    [
        ("int32", False, EVERYTHING),
        ("int64", True, PADDING),
        *slow(("int64", False, NO_PADDING)),
    ],
)
@pytest.mark.usefixtures("x64")
def test_hostile_data_gives_the_same_as_in_xla(dtype, rectangular, options, native):
    rng = np.random.default_rng(0)
    rows, slots, bags, width = 7, 24, 6, 5
    for _ in range(60):
        table = jnp.asarray(rng.normal(size=(rows, width)), jnp.float32)
        weights = jnp.asarray(rng.normal(size=slots), jnp.float32)
        cotangent = jnp.asarray(rng.normal(size=(bags, width)), jnp.float32)
        ids = jnp.asarray(hostile_ids(rng, slots, dtype, rows))
        offsets = jnp.asarray(hostile_offsets(rng, bags + 1, slots, dtype))
        if rectangular:
            ids, weights = ids.reshape(bags, -1), weights.reshape(bags, -1)
            offsets = None
        operands = (table, weights, ids, offsets, cotangent)
        shared = {"include_last_offset": not rectangular, **options}
        actual = every_mode(*operands, implementation=native, **shared)
        expected = every_mode(*operands, implementation="xla", **shared)
        # NaNs must stand where they stand.
        jax.tree.map(assert_close, actual, expected)


@pytest.mark.parametrize("mode", ["sum", "max"])
@pytest.mark.usefixtures("_cpu_kernel")
def test_the_compiled_program_of_each_shard_calls_the_kernel(mode):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(10, 3)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, 10, (8, 3)), jnp.int32)
    pool = lambda t, i: jbag.embedding_bag(t, i, mode=mode)

    def gradient(pool):
        return jax.jit(jax.grad(lambda t, i: jnp.sin(pool(t, i)).sum()))

    forward = "jbag_cpu_spmm" if mode == "sum" else "jbag_cpu_extremum"
    expected = pool(table, ids), gradient(pool)(table, ids)
    mesh = jax.make_mesh((4,), ("x",), devices=some_devices(4))
    with jax.set_mesh(mesh):
        split, whole = (jax.NamedSharding(mesh, spec) for spec in (P("x"), P()))
        operands = jax.device_put(table, whole), jax.device_put(ids, split)
        sharded = jax.shard_map(pool, in_specs=(P(), P("x")), out_specs=P("x"))
        for function, result in zip(
            (jax.jit(sharded), gradient(sharded)), expected, strict=True
        ):
            compiled = function.lower(*operands).compile()
            text = compiled.as_text()
            (call,) = (x for x in text.splitlines() if f'target="{forward}"' in x)
            # Of its own two bags alone.
            assert "f32[2,3]" in call
            assert_close(jax.device_get(compiled(*operands)), jax.device_get(result))


@pytest.mark.usefixtures("_cpu_kernel")
def test_under_jit_the_compiled_program_calls_the_kernel():
    table, ids = jnp.ones((10, 3)), jnp.zeros((8, 3), int)
    pool = lambda t, w: jbag.embedding_bag(t, ids, mode="sum", weights=w)
    loss = lambda t, w: pool(t, w).sum()
    for function, names in (
        (pool, ["spmm"]),
        (jax.grad(loss, (0, 1)), ["spmm_transpose", "sddmm"]),
    ):
        text = jax.jit(function).lower(table, jnp.ones((8, 3))).compile().as_text()
        for name in names:
            assert f'custom_call_target="jbag_cpu_{name}"' in text


@pytest.mark.parametrize(
    ("mode", "rectangular"),
    [
        ("sum", False),
        ("sum", True),
        ("mean", False),
        ("sqrtn", True),
        ("max", False),
        ("min", True),
    ],
)
def test_no_array_of_slots_by_features_is_ever_made(mode, rectangular, native):
    bags, length, width = 100, 500, 128
    shape = (bags, length) if rectangular else (bags * length,)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    weights = jax.ShapeDtypeStruct(shape, jnp.float32)
    table = jax.ShapeDtypeStruct((50, width), jnp.float32)

    def scratch(differentiated, implementation):
        def pool(table, weights, ids):
            offsets = None if rectangular else length * jnp.arange(bags)
            return jbag.embedding_bag(
                table,
                ids,
                offsets,
                mode=mode,
                weights=weights,
                implementation=implementation,
            )

        function = pool
        if differentiated:
            function = jax.grad(lambda *args: jnp.sin(pool(*args)).sum(), (0, 1))
        compiled = jax.jit(function).lower(table, weights, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    rows_of_slots = 4 * bags * length * width
    assert scratch(False, native) < rows_of_slots / 20
    # CUDA's holds partial sums of pieces and the arrays that XLA sorts, too.
    assert scratch(True, native) < rows_of_slots / (20 if native == "cpu" else 10)
    if mode == "sum":
        # The measure sees it where there is one.
        assert scratch(True, "xla") >= rows_of_slots


# Vectors of every size, and the overlapping ones of 24 and 31.
VECTORS = (1, 2, 4, 8, 16, 24, 31)


def check_bits(actual, expected, exact):
    """Compare bit for bit, but NaN to NaN and zero to zero.

    XLA's threads flush float32's subnormals to zero, which are the `exact` numbers
    below its smallest normal: what is zero there needn't be what NumPy makes of them.
    A sum starts at +0, so that -0 becomes that.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    bits = f"uint{8 * actual.dtype.itemsize}"
    flushed = (np.abs(exact) < np.finfo(np.float32).tiny) & (actual == 0)
    same = actual.view(bits) == expected.view(bits)
    both_nan = np.isnan(actual) & np.isnan(expected)
    wrong = np.nonzero(~(same | both_nan | flushed))
    assert not wrong[0].size, (exact[wrong][:5], actual[wrong][:5], expected[wrong][:5])


@pytest.mark.parametrize("width", VECTORS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_16_bit_number_is_read_exactly(dtype, width, native):
    numbers = np.arange(2**16, dtype=np.uint16)
    numbers = np.resize(numbers, (-(-(2**16) // width), width))
    table = numbers.view(jnp.dtype(dtype))
    out = _spmm.spmm(
        jnp.asarray(table),
        jnp.arange(len(table), dtype=jnp.int32)[:, None],
        None,
        None,
        pad_id=None,
        implementation=native,
    )
    wide = table.astype(np.float32)
    check_bits(out, wide, wide)


def float32_samples(rng, dtype):
    """Return numbers at random, and those about which `dtype` rounds up or down."""
    step = 1 << (16 if dtype == "bfloat16" else 13)  # of its last bit
    anything = rng.integers(0, 2**32, 2**17, dtype=np.uint32)
    ties = [
        (anything & ~np.uint32(step - 1)) + np.uint32(step // 2 + d) for d in (-1, 0, 1)
    ]
    info = jnp.finfo(dtype)
    smallest, largest = float(info.smallest_subnormal), float(info.max)
    subnormal = smallest * rng.uniform(0, float(info.tiny) / smallest, 2**16)
    small_ties = smallest / 2 * np.arange(2**13)
    overflow = np.minimum(largest * rng.uniform(0.99, 1.01, 2**14), 3.4e38)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, largest, smallest, -smallest]
    values = np.concatenate([subnormal, small_ties, overflow, special])
    values = np.concatenate([values, -values]).astype(np.float32)
    return np.concatenate([anything, *ties, values.view(np.uint32)]).view(np.float32)


@pytest.mark.parametrize("width", VECTORS)
@pytest.mark.parametrize("dtype", ["bfloat16", *slow("float16")])
def test_gradients_are_rounded_as_jax_rounds(dtype, width, native):
    samples = float32_samples(np.random.default_rng(0), dtype)
    cotangent = np.resize(samples, (-(-samples.size // width), width))
    out = _spmm.spmm_transpose(
        jnp.asarray(cotangent),
        jnp.arange(len(cotangent), dtype=jnp.int32)[:, None],
        None,
        None,
        num_embeddings=len(cotangent),
        dtype=jnp.dtype(dtype),
        pad_id=None,
        implementation=native,
    )
    check_bits(out, jnp.asarray(cotangent).astype(dtype), cotangent)


@functools.partial(
    jax.jit, donate_argnums=0, keep_unused=True, static_argnames="native"
)
def transposed_in_place(used, ids, offsets, cotangent, native):
    """Return the transposed product, in the memory of `used`."""
    return _spmm.spmm_transpose(
        cotangent,
        ids,
        offsets,
        None,
        num_embeddings=used.shape[0],
        dtype=used.dtype,
        pad_id=None,
        implementation=native,
    )


@pytest.mark.parametrize(
    ("num_slots", "dtype"),
    [
        (0, jnp.float32),
        (300, jnp.bfloat16),
        (200_000, jnp.float32),
        (200_000, jnp.bfloat16),
    ],
)
def test_a_large_result_is_zero_where_no_slot_is_in_new_memory_and_in_used(
    dtype, num_slots, native
):
    # 16 or 32 MiB: the system clears new memory, and the kernel what was used.
    rng = np.random.default_rng(num_slots)
    num_embeddings, num_bags = 1 << 17, 64
    cotangent = rng.integers(-2, 3, (num_bags, 64)).astype(np.float32)
    ids = rng.integers(0, num_embeddings, num_slots).astype(np.int32)
    ids[: num_slots // 3] %= 1000  # leaves long gaps, and gives long runs
    offsets = np.linspace(0, num_slots, num_bags + 1).astype(np.int32)
    expected = np.zeros((num_embeddings, 64), np.float32)
    np.add.at(expected, ids, np.repeat(cotangent, np.diff(offsets), axis=0))
    ids, offsets, cotangent = map(jnp.asarray, (ids, offsets, cotangent))
    used = jnp.full(expected.shape, jnp.nan, dtype)
    address = used.unsafe_buffer_pointer()
    for _ in range(3):
        used = transposed_in_place(used, ids, offsets, cotangent, native)
        assert used.unsafe_buffer_pointer() == address
        np.testing.assert_array_equal(used, expected)
    table = jnp.zeros(expected.shape, dtype)
    for _ in range(3):
        value, pullback = jax.vjp(
            lambda table: _spmm.spmm(
                table, ids, offsets, None, pad_id=None, implementation=native
            ),
            table,
        )
        new = pullback(cotangent.astype(value.dtype))[0]
        np.testing.assert_array_equal(new, expected)
        new.delete()


@pytest.mark.parametrize("layout", ["ragged", "rectangular"])
@pytest.mark.parametrize("dtype", ["bfloat16", *slow("float16")])
def test_averages_are_rounded_as_the_reference_rounds_them(dtype, layout, native):
    rng = np.random.default_rng(5)
    table = jnp.asarray(rng.normal(size=(9, 70)), dtype)
    if layout == "ragged":
        offsets = jnp.asarray(offsets_of([0, 1, 7, 4000, 0, 30, 5]), jnp.int32)
        ids, bags = rng.integers(0, 9, 4047), 7
        ids[1:8] = 3  # a bag of nothing but empty slots, or of one row
    else:
        offsets, ids, bags = None, rng.integers(0, 9, (11, 13)), 11
        ids[4] = 3
    ids = jnp.asarray(ids, jnp.int32)
    weights = jnp.asarray(rng.normal(size=ids.shape), jnp.float32)
    cotangent = jnp.asarray(rng.normal(size=(bags, 70)), dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, table, weights, cotangent):
        def results(average, pad_id):
            pool = lambda table, weights: _spmm.spmm(
                table,
                ids,
                offsets,
                weights,
                average=average,
                dtype=jnp.dtype(dtype),
                pad_id=pad_id,
                implementation=implementation,
            )
            value, pullback = jax.vjp(pool, table, weights)
            moved = jax.jvp(pool, (table, weights), (table, weights))
            return [value, *pullback(cotangent), *moved]

        cases = [(None, 3), ("mean", None), ("mean", 3), ("sqrtn", None)]
        return [results(*case) for case in cases]

    found = [run(name, table, weights, cotangent) for name in (native, "xla")]
    for ours, reference in zip(*map(jax.tree.leaves, found), strict=True):
        assert ours.dtype == reference.dtype
        assert_close(ours, np.asarray(reference, np.float64), ours.dtype)
    assert {results[0].dtype for results in found[0]} == {jnp.dtype(dtype)}

"""The kernel for SparseCores: its schedule, on a model of them, and its programs."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import sparse_core
import sparsecore_programs
from oracle import MODES, assert_close
from slow import slow
from tpu_programs import without_tpu_compiler

import jbag
from jbag.ops import kernels
from jbag.ops.kernels import (
    KERNELS,
    sparsecore,
    sparsecore_gather_add,
    xla,
)
from jbag.ops.kernels.sparsecore_chunks import (
    MEMORY_LIMIT,
    Lines,
    lines_of,
    packed_lines,
    plan_for,
)

V = 50


@pytest.fixture(scope="module", params=[16, *slow(128)])
def model(request):
    """Run the kernel on a CPU, on the model, in chunks of few or many slots."""
    plan_for = sparsecore.plan_for
    on_cpu = dataclasses.replace(KERNELS["sparsecore"], platforms=("cpu",))
    with pytest.MonkeyPatch.context() as patch:
        sparse_core.install(patch)
        patch.setattr(
            sparsecore,
            "plan_for",
            lambda *x: dataclasses.replace(plan_for(*x), chunk=request.param),
        )
        patch.setattr(kernels, "KERNELS", KERNELS | {"sparsecore": on_cpu})
        jax.clear_caches()
        yield
    jax.clear_caches()


def random_bags(rng, layout, num_slots=300):
    """Return ids, offsets [B + 1] or None, and weights; some ids are out of range."""
    if layout == "rectangular":
        ids = rng.integers(0, V, (num_slots // 6, 6))
        offsets = None
    else:
        ids = rng.integers(0, V, num_slots)
        # Empty bags, one that spans several chunks, and slots of no bag.
        ends = np.sort(rng.integers(0, num_slots // 2, 30))
        offsets = np.concatenate([[0], ends, [num_slots - 25], [num_slots - 20]])
    ids.reshape(-1)[[7, 290]] = [V, -3]
    return ids.astype(np.int32), offsets, rng.normal(size=ids.shape).astype(np.float32)


def lists_of(ids, offsets, weights):
    if offsets is None:
        offsets = np.arange(len(ids) + 1) * ids.shape[1]
    return oracle.slices(
        ids.reshape(-1), offsets, None if weights is None else weights.reshape(-1)
    )


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layout", ["rectangular", "ragged"])
@pytest.mark.parametrize("mode", MODES)
def test_bags_pool_to_the_oracle(mode, layout, weighted):
    rng = np.random.default_rng(0)
    ids, offsets, weights = random_bags(rng, layout)
    if mode in ("mean", "sqrtn"):
        weights = np.abs(weights)
    weights = weights if weighted else None
    table = rng.normal(size=(V, 40)).astype(np.float32)
    table[3] = np.nan
    bags = lists_of(ids, offsets, weights)
    cotangent = rng.normal(size=(len(bags), 40)).astype(np.float32)

    def pool(table, weights):
        return jbag.embedding_bag(
            table,
            jnp.asarray(ids),
            None if offsets is None else jnp.asarray(offsets, jnp.int32),
            mode=mode,
            weights=weights,
            padding_idx=3,
            include_last_offset=offsets is not None,
            implementation="sparsecore",
        )

    out, pullback = jax.vjp(pool, table, weights)
    assert_close(out, oracle.forward(table, bags, mode, padding_idx=3))
    to_table, _ = pullback(jnp.asarray(cotangent))
    expected, _ = oracle.gradients(table, bags, cotangent, mode, padding_idx=3)
    assert_close(to_table, expected)


def rows_of(lines):
    """Return the rows [V, width] that lines hold."""
    rows = lines.array.reshape(-1, lines.array.shape[1] // lines.rows_per_line)
    return np.asarray(rows, np.float32)[: lines.num_rows, : lines.width]


LINES = {
    "whole": lambda x: lines_of(x((V, 128), jnp.float32)),
    "several_tiles": lambda x: lines_of(x((V, 384), jnp.float32)),
    "padded_to_tiles": lambda x: lines_of(x((V, 130), jnp.float32)),
    "narrow": lambda x: lines_of(x((V, 5), jnp.float32)),
    "16_bits": lambda x: lines_of(x((V, 256), jnp.bfloat16)),
    "16_bits_narrow_odd": lambda x: lines_of(x((V - 1, 5), jnp.bfloat16)),
    "packed": lambda x: packed_lines(x((V // 4 + 1, 128), jnp.float32), V, 32),
    "packed_wide": lambda x: packed_lines(x((V // 2, 384), jnp.float32), V, 192),
    "packed_16_bits": lambda x: packed_lines(x((26, 128), jnp.bfloat16), V, 64),
}


@pytest.fixture(params=LINES)
def lines(request):
    rng = np.random.default_rng(1)

    def random(shape, dtype):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return LINES[request.param](random)


@pytest.mark.usefixtures("model")
def test_lines_hold_the_rows_that_are_summed(lines):
    rng = np.random.default_rng(2)
    ids = jnp.asarray(rng.integers(-1, lines.num_rows + 1, (40, 5)), jnp.int32)
    kept = jnp.asarray(rng.random((40, 5)) < 0.8)
    rows = rows_of(lines)
    expected = np.stack(
        [
            sum(
                (
                    rows[i] if 0 <= i < lines.num_rows else np.nan
                    for i in own[is_kept].tolist()
                ),
                np.zeros(lines.width),
            )
            for own, is_kept in zip(np.asarray(ids), np.asarray(kept), strict=True)
        ]
    )
    bags = jnp.repeat(jnp.arange(40, dtype=jnp.int32), 5)
    operands = (ids.reshape(-1), bags, kept.reshape(-1), None, jnp.ones(40, bool))
    sums = sparsecore._sum_segments(lines, *operands)
    assert_close(sums[:, : lines.width], expected)
    if sparsecore_gather_add.takes(lines):
        assert_close(sparsecore._sum_rows(lines, ids, kept), expected)


def operations_agree(operation, *operands, **options):
    """Compare an operation with the reference's."""
    actual = getattr(sparsecore, operation)(*operands, **options)
    expected = getattr(xla, operation)(*operands, **options)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        check = assert_close if a.dtype.kind == "f" else np.testing.assert_array_equal
        check(a, b)


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("width", "dtype"),
    [
        (32, "float32"),
        (48, "float32"),
        (112, "float32"),
        (64, "bfloat16"),
        (10, "float32"),
    ],
)
def test_packed_tables_are_read_as_arrays_are(width, dtype):
    rng = np.random.default_rng(3)
    table = jnp.asarray(rng.normal(size=(V, width)), dtype)
    packed = jbag.pack(table, always=True)
    ids = jnp.asarray(rng.integers(-1, V + 1, (6, 7)), jnp.int32)
    options = {"pad_id": 3}
    for coefficients in (None, jnp.asarray(rng.normal(size=ids.shape), jnp.float32)):
        bags = ids, None, coefficients
        sums = {"average": "mean", "dtype": jnp.dtype("float32")} | options
        out = sparsecore.spmm(packed, *bags, **sums)
        assert_close(out, xla.spmm(table, *bags, **sums))
        for largest in (False, True):
            extremum = options | {"largest": largest}
            values, slots = sparsecore.extremum(packed, *bags, **extremum)
            expected, winners = xla.extremum(table, *bags, **extremum)
            assert_close(values, expected)
            np.testing.assert_array_equal(slots, winners)


# Offsets of bags in 70 slots; the last three are malformed.
OFFSETS = {
    "no_bags": [0],
    "all_empty": [0, 0, 0, 0],
    "one_huge_bag": [0, 70],
    "tail": [0, 3, 3, 40, 60],
    "decreasing": [0, 30, 20, 50],
    "not_from_zero": [4, 30, 70],
    "too_large": [0, 10, 75],
}


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    "offsets",
    [
        *("no_bags", "one_huge_bag", "tail", "too_large"),
        *slow("all_empty", "decreasing", "not_from_zero"),
    ],
)
def test_ragged_operations_are_those_of_the_reference(offsets):
    rng = np.random.default_rng(3)
    table = jnp.asarray(rng.integers(-3, 4, (V, 8)), jnp.float32)
    table = table.at[0].set(jnp.nan).at[1].set(-jnp.inf)
    ids = jnp.asarray(rng.integers(-2, V + 2, 70), jnp.int32)
    offsets = jnp.asarray(OFFSETS[offsets], jnp.int32)
    coefficients = jnp.asarray(rng.integers(-2, 3, 70), jnp.float32)
    cotangent = jnp.asarray(rng.normal(size=(offsets.size - 1, 8)), jnp.float32)
    dtype = jnp.dtype("float32")
    for scale in (None, coefficients):
        bags = (ids, offsets, scale)
        for average in (None, "mean"):
            operations_agree(
                "spmm", table, *bags, pad_id=2, average=average, dtype=dtype
            )
        for largest in (False, True):
            operations_agree("extremum", table, *bags, pad_id=2, largest=largest)
        rows = {"pad_id": 2, "num_embeddings": V}
        operations_agree("spmm_transpose", cotangent, *bags, **rows, dtype=dtype)
        operations_agree("coalesce", cotangent, *bags, **rows, max_unique_ids=60)
        states = (jnp.ones((V, 8)),)
        update = (
            jnp.ones((V, 8)),
            states,
            jnp.array([0.1, 0.0, 1e-6]),
            None,
            cotangent,
        )
        operations_agree("update_rows", *update, *bags, pad_id=2, rule="adagrad")


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (3, 33)])
def test_extrema_of_rectangular_bags_are_those_of_the_reference(shape):
    rng = np.random.default_rng(4)
    table = jnp.asarray(rng.integers(-2, 2, (V, 8)), jnp.bfloat16).at[7].set(jnp.nan)
    ids = jnp.asarray(rng.integers(0, V, shape), jnp.int32)
    for largest in (False, True):
        bags = (ids, None, None)
        operations_agree("extremum", table, *bags, pad_id=2, largest=largest)
    table = table.at[:].set(-jnp.inf)
    operations_agree("extremum", table, ids, None, None, pad_id=2, largest=True)


@pytest.mark.usefixtures("model", "x64")
def test_64_bit_ids_do_not_wrap():
    table = jnp.ones((V, 8), jnp.float32)
    ids = jnp.asarray([[1, 2, 1], [2**32 + 1, 4, 5]], jnp.int64)
    cotangent = jnp.ones((2, 8), jnp.float32)
    bags = (ids, None, None)
    dtype = jnp.dtype("float32")
    operations_agree("spmm", table, *bags, pad_id=2, average=None, dtype=dtype)
    operations_agree("extremum", table, *bags, pad_id=2, largest=True)
    rows = {"pad_id": 2, "num_embeddings": V, "max_unique_ids": 6}
    operations_agree("coalesce", cotangent, *bags, **rows)


@pytest.mark.usefixtures("model")
def test_16_bit_tables_accumulate_in_float32():
    table = jnp.full((4, 8), 1 + 2**-7, jnp.bfloat16)
    ids = jnp.zeros((1, 300), jnp.int32)
    pool = functools.partial(sparsecore.spmm, table, ids, None, None, pad_id=None)
    out = pool(average=None, dtype=jnp.dtype("float32"))
    np.testing.assert_array_equal(out, np.full((1, 8), 300 * (1 + 2**-7)))


@pytest.fixture
def no_model(monkeypatch):
    """The table of kernels without the model."""
    monkeypatch.setattr(kernels, "KERNELS", KERNELS)


@pytest.mark.usefixtures("no_model", "x64")
def test_other_dtypes_are_an_error():
    ids = jnp.zeros((3, 2), jnp.int32)
    for dtype in (jnp.float64, jnp.float16):
        pool = lambda t: jbag.embedding_bag(t, ids, implementation="sparsecore")
        exported = jax.export.export(jax.jit(pool), platforms=("tpu",))
        with pytest.raises(TypeError, match="takes tables of float32 and bfloat16"):
            exported(jnp.ones((4, 2), dtype))


@pytest.mark.usefixtures("no_model")
def test_a_platform_without_sparse_cores_is_an_error():
    with pytest.raises(ValueError, match=r"runs on \('tpu',\), not on cpu"):
        jbag.embedding_bag(jnp.ones((3, 2)), [[0, 1]], implementation="sparsecore")


def lines_of_shape(shape, dtype, width):
    """Return lines whose array is not made."""
    made = []

    def trace(array):
        made.append(Lines(array, shape[0], width, shape[1] // width))

    jax.eval_shape(trace, jax.ShapeDtypeStruct(shape, dtype))
    return made.pop()


@pytest.mark.parametrize("reduction", ["sum", "max", "min"])
@pytest.mark.parametrize(
    ("line_width", "width"),
    [(16, 16), (112, 112), (128, 128), (2**20, 2**20), (128, 64), (1024, 512)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_subcore_holds_little_whatever_the_sizes(line_width, width, dtype, reduction):
    # No size of the batch enters.
    lines = lines_of_shape((2**31 - 1, line_width), dtype, width)
    plan = plan_for(lines, reduction)
    assert plan.memory() <= MEMORY_LIMIT
    assert plan.out_width >= width
    assert plan.gathered * plan.passes == line_width
    words = plan.chunk * (5 + plan.gathered)
    words += (plan.chunk + 1) * plan.accumulated * (1 if reduction == "sum" else 2)
    assert plan.memory() == 4 * words
    assert sparsecore_gather_add.memory(lines) <= MEMORY_LIMIT


def test_lines_that_no_subcore_holds_are_an_error():
    lines = lines_of_shape((8, 2**16), jnp.float32, 2**15)
    with pytest.raises(ValueError, match="takes lines of several rows up to"):
        plan_for(lines, "sum")


PROGRAM = pathlib.Path(sparsecore_programs.__file__)


SOME_PROGRAMS = (
    "rectangular_float32_128_sum",
    "ragged_float32_128_weighted",
    "ragged_float32_128_max",
    "rectangular_float32_64_packed",
    "ragged_bfloat16_64_packed",
    "rectangular_float32_100_packed",
)


def compile_programs(topology, *names):
    """Run the program that compiles for a TPU."""
    if importlib.util.find_spec("libtpu") is None:
        without_tpu_compiler()
    command = [sys.executable, PROGRAM, topology, *names]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("topology", "programs"),
    [
        ("v6e:2x2", SOME_PROGRAMS),
        *(
            pytest.param(topology, (), marks=pytest.mark.slow)
            for topology in ("v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
        ),
    ],
)
def test_programs_compile_and_copy_no_table_of_whole_lines(topology, programs):
    done = compile_programs(topology, *programs)
    assert done.returncode == 0, done.stderr
    for name, program in json.loads(done.stdout.splitlines()[-1]).items():
        _, dtype, width, kind = name.split("_")
        assert program["kernels"], name
        table = sparsecore_programs.V * int(width) * jnp.dtype(dtype).itemsize
        # The dense gradient is a result, unless it is summed over devices.
        if kind == "packed" or (int(width) >= 128 and kind != "sharded"):
            assert program["temporary_bytes"] < 0.25 * table, name


def test_a_tpu_without_sparse_cores_is_an_error():
    done = compile_programs("v5e:2x2", "ragged_float32_128_sum")
    assert done.returncode == 1
    message = "'sparsecore' needs a TPU with SparseCores (v5p, v6e or later); got v5e"
    assert message in done.stderr

"""What the CUDA kernel has of its own: pieces, chunks, compilation, machine code.

What it shares with the other kernels is tested beside them.
"""

import ctypes
import functools
import importlib.resources
import itertools
import os
import subprocess
import sys

import cuda_code
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_programs import without_gpu_compiler
from oracle import assert_close
from slow import slow

import jbag
from jbag.ops import _row_updates
from jbag.ops.kernels import cuda
from jbag.ops.kernels.update_rules import RULES as RULES_BY_NAME

ARCHITECTURES = ("sm_90", *slow("sm_75", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120"))
TYPES = {
    "float": "float",
    "double": "double",
    "jbag::cuda::BFloat16": "float",
    "jbag::cuda::Half": "float",
}
WIDTHS = {"float": 4, "double": 2, "jbag::cuda::BFloat16": 8, "jbag::cuda::Half": 8}
RULES = ["".join(map(str.capitalize, name.split("_"))) for name in RULES_BY_NAME]


def kernels():
    """Return the instances with the widest vectors: those that gather rows, others."""
    gathering, others = [], []
    for table, sums in TYPES.items():
        width = WIDTHS[table]
        for ids in ("int", "long long"):
            rows = f"{table}, {width}, {ids}"
            gathering += [
                f"SumPieces<{rows}>",
                f"SumBags<{rows}, {table}>",
                f"ExtremumOfPieces<{rows}, true>",
                f"ExtremumOfBags<{rows}, false>",
                f"Dots<{rows}>",
            ]
        if sums != table:
            gathering.append(f"SumBags<{table}, {width}, int, {sums}>")
            gathering.append(f"SumBags<{sums}, {WIDTHS[sums]}, int, {table}>")
        gathering += [
            f"UpdateRows<{table}, {WIDTHS[sums]}, jbag::cuda::{rule}, false>"
            for rule in RULES
        ]
    gathering.append("UpdateRows<jbag::cuda::BFloat16, 4, jbag::cuda::Adam, true>")
    for integer in ("int", "long long"):
        others += [
            f"CheckBounds<{integer}>",
            f"RepairBounds<{integer}>",
            f"SlotKeys<{integer}>",
            f"WriteSegments<{integer}>",
        ]
    others += ["CountSegments", "AccumulateCounts"]
    return [[f"jbag::cuda::{name}" for name in names] for names in (gathering, others)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code_has_no_spills_and_eight_loads_in_flight(architecture, tmp_path):
    nvrtc = cuda_code.nvidia_file("*/lib/libnvrtc.so.*")
    nvdisasm = cuda_code.nvidia_file("*/bin/nvdisasm")
    library = importlib.resources.files("jbag") / "ops/kernels/libjbag_cuda.so"
    if nvrtc is None or nvdisasm is None:
        without_gpu_compiler()
    if not library.is_file():
        pytest.skip("jbag is not installed")
    read_source = ctypes.CDLL(str(library)).jbag_cuda_source
    read_source.restype = ctypes.c_char_p
    gathering, others = kernels()
    cubin, log, symbols = cuda_code.compile_kernels(
        nvrtc, read_source(), gathering + others, architecture
    )
    path = tmp_path / "jbag.cubin"
    path.write_bytes(cubin)
    codes = cuda_code.read_code(nvdisasm, path, log, symbols)
    assert {name: code for name, code in codes.items() if code.spills} == {}
    few = {name: codes[name] for name in gathering if codes[name].loads_in_flight < 8}
    assert few == {}


# XLA has no initialize stage on a CPU. Handlers that call those of both stages, and
# print how many modules each stage of each operation has loaded.
CHILD = """
import ctypes, dataclasses, functools, importlib.resources, os
import jax, jax.numpy as jnp
import jbag
from jbag import optim
from jbag.ops import kernels
from jbag.ops.kernels import cuda

stand_in = os.environ["JBAG_CUDA_STAND_IN"]
assert cuda.load(stand_in, stand_in, platform="cpu") is None
kernels.KERNELS["cuda"] = dataclasses.replace(
    kernels.KERNELS["cuda"], platforms=("cpu",), missing=None
)
modules = ctypes.CDLL(stand_in).jbag_cuda_stand_in_modules
package = importlib.resources.files("jbag") / "ops" / "kernels"
library = ctypes.CDLL(str(package / "libjbag_cuda.so"))
Handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t))
EXTENSION, STAGE, INITIALIZE = 1, 4, 2  # of XLA_FFI_CallFrame; its stages

def staged(name):
    execute = Handler((f"jbag_cuda_{name}", library))
    initialize = Handler((f"jbag_cuda_{name}_initialize", library))

    @Handler
    def both(frame):
        if frame[EXTENSION]:  # XLA reads the handler's metadata
            return execute(frame)
        stage, counts = frame[STAGE], [modules()]
        frame[STAGE] = INITIALIZE
        error = initialize(frame)
        frame[STAGE] = stage
        counts.append(modules())
        error = error or execute(frame)
        counts.append(modules())
        print(name, counts[1] - counts[0], counts[2] - counts[1])
        return error

    return both

handlers = {name: staged(name) for name in cuda.OPERATIONS}
for name, handler in handlers.items():
    jax.ffi.register_ffi_target(f"staged_{name}", jax.ffi.pycapsule(handler))
call = jax.ffi.ffi_call
jax.ffi.ffi_call = lambda name, *args, **options: call(
    name.replace("jbag_cuda", "staged"), *args, **options
)
ids = jnp.zeros(600, jnp.int32)
offsets = jnp.array([0, 500, 600], jnp.int32)
pool = functools.partial(
    jbag.embedding_bag, indices=ids, offsets=offsets, include_last_offset=True,
    implementation="cuda",
)
table = jnp.ones((5, 3))
for mode in ("mean", "max"):
    loss = lambda t, w: jnp.sin(pool(t, weights=w, mode=mode)).sum()
    jax.block_until_ready(jax.jit(jax.grad(loss, (0, 1)))(table, jnp.ones(600)))
options = {"pad_id": None, "implementation": "cuda"}
bags = jnp.ones((2, 3)), ids, offsets, None
jax.block_until_ready(
    jbag.ops._row_updates.coalesce(*bags, num_embeddings=5, **options)
)
jax.block_until_ready(
    jbag.ops._row_updates.update_rows(
        table, [table], [0.1, 0.1, 0.1], None, *bags, rule="adagrad", **options
    )
)
"""


@pytest.mark.usefixtures("_cuda_kernel")
def test_the_initialize_stage_loads_all_that_the_execute_stage_needs():
    if "JBAG_CUDA_STAND_IN" not in os.environ:
        pytest.skip("the stand-in counts what is loaded")
    child = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    lines = [line.split() for line in child.stdout.splitlines()]
    assert {name for name, *_ in lines} == set(cuda.OPERATIONS)
    assert {executed for *_, executed in lines} == {"0"}
    assert sum(int(loaded) for _, loaded, _ in lines) > 4


@pytest.fixture
def _cuda_kernel(require):
    require("cuda")


@pytest.mark.usefixtures("_cuda_kernel")
def test_a_missing_library_is_a_reason():
    missing = cuda.load("/nonexistent/libcuda.so.1", "libnvrtc.so.13", "cpu")
    assert missing.startswith("/nonexistent/libcuda.so.1: cannot open")


@pytest.mark.usefixtures("_cuda_kernel")
@pytest.mark.parametrize("length", [255, 256, 257, 511, 512, 513, 1024])
@pytest.mark.parametrize("start", [0, 1, 255, 256])
def test_bags_are_cut_in_pieces_wherever_they_start(start, length):
    # Bags before, of the length, and after; then slots in no bag.
    offsets = np.cumsum([0, start, length, 300, 0, 3]).astype(np.int32)
    rng = np.random.default_rng(length)
    ids = rng.integers(0, 9, offsets[-1] + 5).astype(np.int32)
    table = rng.integers(-4, 5, (9, 4)).astype(np.float32)
    bags = [ids[a:b] for a, b in itertools.pairwise(offsets)]
    pool = functools.partial(
        jbag.embedding_bag,
        indices=ids,
        offsets=offsets,
        include_last_offset=True,
        implementation="cuda",
    )
    sums, pullback = jax.vjp(lambda t: pool(t, mode="sum"), jnp.asarray(table))
    np.testing.assert_array_equal(sums, [table[bag].sum(0) for bag in bags])
    means = [table[bag].sum(0) / np.float32(max(len(bag), 1)) for bag in bags]
    np.testing.assert_array_equal(pool(table, mode="mean"), means)
    least = [table[bag].min(0, initial=9) if len(bag) else np.zeros(4) for bag in bags]
    np.testing.assert_array_equal(pool(table, mode="min"), least)
    cotangent = rng.integers(-4, 5, sums.shape).astype(np.float32)
    expected = np.zeros_like(table)
    flat = np.repeat(cotangent, np.diff(offsets), axis=0)
    np.add.at(expected, ids[: offsets[-1]], flat)
    np.testing.assert_array_equal(pullback(jnp.asarray(cotangent))[0], expected)


@pytest.mark.usefixtures("_cuda_kernel")
@pytest.mark.parametrize("num_slots", [1, 1023, 1024, 1025, 40_000])
@pytest.mark.parametrize("num_embeddings", [3, 2000, 100_000])
def test_segments_are_found_in_chunks_of_sorted_keys(num_slots, num_embeddings):
    rng = np.random.default_rng(num_slots)
    ids = rng.integers(-1, num_embeddings + 1, num_slots).astype(np.int32)
    cotangent = rng.integers(-4, 5, (num_slots, 2)).astype(np.float32)
    indices, sums = _row_updates.coalesce(
        jnp.asarray(cotangent),
        jnp.asarray(ids)[:, None],
        None,
        None,
        num_embeddings=num_embeddings,
        pad_id=None,
        implementation="cuda",
    )
    kept = (ids >= 0) & (ids < num_embeddings)
    expected = np.full(min(num_slots, num_embeddings), num_embeddings)
    unique, inverse = np.unique(ids[kept], return_inverse=True)
    expected[: len(unique)] = unique
    np.testing.assert_array_equal(indices, expected)
    expected = np.zeros((len(expected), 2))
    np.add.at(expected, inverse, cotangent[kept])
    np.testing.assert_array_equal(sums, expected)


@pytest.mark.usefixtures("_cuda_kernel", "x64")
@pytest.mark.parametrize("rule", RULES_BY_NAME)
@pytest.mark.parametrize(
    ("dtype", "width"),
    [("float32", 4), ("bfloat16", 260), *slow(("float64", 130), ("float16", 1))],
)
def test_rows_of_many_slots_move_as_in_xla(rule, dtype, width):
    # Beyond 32 vectors a group of threads takes several turns.
    rng = np.random.default_rng(0)
    sums = jnp.dtype("float64" if dtype == "float64" else "float32")
    kind = RULES_BY_NAME[rule]
    ids = rng.integers(0, 50, 3000)
    ids[::3] = 7
    numbers = lambda *shape: jnp.asarray(rng.uniform(0.1, 1, shape), sums)
    states = [numbers(50, width) for _ in kind.per_element]
    states += [numbers(50) for _ in kind.per_row]
    table, cotangent = numbers(50, width).astype(dtype), numbers(300, width) - 0.5
    scalars = [0.01 * (i + 1) for i in range(len(kind.scalars))]
    seed = jnp.array([3, 4], jnp.uint32) if dtype == "bfloat16" else None
    bags = jnp.asarray(ids.reshape(300, 10)), None, numbers(300, 10)
    results = [
        _row_updates.update_rows(
            table,
            states,
            scalars,
            seed,
            cotangent,
            *bags,
            rule=rule,
            pad_id=None,
            implementation=implementation,
        )
        for implementation in ("cuda", "xla")
    ]
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, actual.dtype)

import dataclasses
import gc
import importlib.metadata
import itertools
import os
import pathlib

import jax
import pytest
from slow import slow

# Where there are CPUs alone: less than half the time to compile, which is most of what
# tests take. What XLA makes of a program at its best is held by the tests with
# `optimized`. The C++ kernel is the same either way. Elsewhere the portable kernel is
# tested as users have it.
only_cpus = os.environ.get("JAX_PLATFORMS") == "cpu"
if only_cpus or not importlib.metadata.entry_points(group="jax_plugins"):
    quickly = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": "true",
        "xla_cpu_parallel_codegen_split_count": "1",
    }
    if jax.__version_info__ < (0, 11):  # later ones don't know it
        quickly["xla_cpu_use_fusion_emitters"] = "false"
    flags = " ".join(f"--{name}={value}" for name, value in quickly.items())
    os.environ.setdefault("XLA_FLAGS", flags)

# Before any device is asked for: meshes need several.
if "JAX_NUM_CPU_DEVICES" not in os.environ:
    jax.config.update("jax_num_cpu_devices", 4)
# GPUs and TPUs multiply matrices in fewer bits than float32 has, unless told otherwise.
jax.config.update("jax_default_matmul_precision", "highest")

# A program that is lowered needn't name the lines that it comes from.
jax.config.update("jax_traceback_in_locations_limit", 0)

from jax.experimental.pallas import tpu as pltpu  # noqa: E402  (as the next)

from jbag.ops.kernels import KERNELS, cuda  # noqa: E402  (the devices come first)

# The CUDA kernel runs on a CPU by the library that `csrc/README.md` tells how to build.
if stand_in := os.environ.get("JBAG_CUDA_STAND_IN"):
    KERNELS["cuda"] = dataclasses.replace(
        KERNELS["cuda"],
        platforms=("cpu",),
        missing=cuda.load(stand_in, stand_in, platform="cpu"),
    )

# The TensorCore's kernel runs on a CPU by the interpreter of `interpret=True`. That of
# TPUs has effects, which nothing may have in the rule that lowers a primitive.
if jax.default_backend() == "cpu":
    KERNELS["tensorcore"] = dataclasses.replace(
        KERNELS["tensorcore"], platforms=("cpu",)
    )
    pltpu.set_tpu_interpret_mode(True)


def pytest_collection_finish():
    """Collect garbage rarely: to look for it in all that is compiled takes long."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(params=["cpu", "xla", *slow("cuda", "xla_gpu")])
def implementation(request, require):
    """Every kernel by name; those for GPUs are slow where they run on a CPU.

    The kernel for TPUs, which is interpreted, runs in tests marked `every_kernel`.
    """
    require(request.param)
    return request.param


@pytest.fixture
def require():
    """Skip the test unless a kernel is here; in CI, where it must be, fail."""

    def require(implementation):
        kernel = KERNELS[implementation]
        if kernel.missing is not None:
            required = os.environ.get(f"JBAG_REQUIRE_{implementation.upper()}_KERNEL")
            (pytest.fail if required == "1" else pytest.skip)(kernel.missing)
        # Lowering rules name the platform; a backend of CUDA calls itself "gpu".
        backend = jax.default_backend()
        platform = "cuda" if backend == "gpu" else backend
        if not kernel.runs_on(platform):
            pytest.skip(f"runs on {kernel.platforms}, not on {platform}")

    return require


_tests_run = itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs():
    """Release compiled programs by the memory maps they keep, of 65530 on Linux.

    A program keeps some fifty maps on CPU. Past the limit XLA's compiler dies of a
    segmentation fault.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if next(_tests_run) % 10 == 0 and maps.exists():
        with maps.open("rb") as lines:
            if sum(1 for _ in lines) > 30_000:
                jax.clear_caches()


@pytest.fixture(autouse=True)
def promotion(request):
    """No dtype changes by itself, but where a test is marked `standard_promotion`."""
    standard = request.node.get_closest_marker("standard_promotion")
    with jax.numpy_dtype_promotion("standard" if standard else "strict"):
        yield


@pytest.fixture
def x64():
    """64-bit numbers."""
    with jax.enable_x64(True):
        yield

import importlib.metadata
import itertools
import os

import jax
import pytest

# Where there are CPUs alone: less than half the time to compile, which is most of what
# tests take. What XLA makes of a program at its best is held by the tests with
# `optimized`. The C++ kernel is the same either way. Elsewhere the portable kernel is
# tested as users have it.
if not importlib.metadata.entry_points(group="jax_plugins"):
    quickly = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": "true",
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

from jbag.ops.kernels import KERNELS  # noqa: E402  (the devices come first)


@pytest.fixture(params=KERNELS)
def implementation(request, require):
    """Every kernel by name."""
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
        if not kernel.runs_on(jax.default_backend()):
            pytest.skip(f"runs on {kernel.platforms}, not on {jax.default_backend()}")

    return require


_tests_run = itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs():
    """Let go of compiled programs now and then.

    Each keeps some fifty memory maps on CPU, and Linux grants a process 65530: past
    that, XLA's compiler dies of a segmentation fault.
    """
    yield
    if next(_tests_run) % 100 == 0:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def strict_promotion():
    """No dtype changes unasked."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def x64():
    """64-bit numbers."""
    with jax.enable_x64(True):
        yield

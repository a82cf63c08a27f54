import jax
import pytest

# Before any device is asked for: shard_map needs several.
jax.config.update("jax_num_cpu_devices", 4)

from jbag._kernels import KERNELS  # noqa: E402  (the devices come first)


@pytest.fixture(params=KERNELS)
def implementation(request):
    """Every kernel by name."""
    return request.param


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

"""Large arrays moved to huge pages: the same values in other memory."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from meshes import make_mesh

import jbag
from jbag.ops.kernels import KERNELS, cpu, huge_pages

LARGE = (1 << 15, 64)  # 8 MiB of float32


def huge_kib(address):
    """The KiB of huge pages in the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        if inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    return 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.bool])
def test_values_and_dtypes_stay(dtype):
    x = jnp.arange(1 << 22, dtype=jnp.int32).astype(dtype)
    moved = jbag.to_huge_pages(x)
    assert moved.dtype == x.dtype
    np.testing.assert_array_equal(moved, x)


def test_every_large_array_of_a_tree_moves_and_the_rest_stays():
    if KERNELS["cpu"].missing:
        pytest.skip(KERNELS["cpu"].missing)
    large, small = jnp.ones(LARGE), jnp.ones(3)
    host, key = np.ones(LARGE), jax.random.split(jax.random.key(0), 1 << 20)
    tree = {"large": large, "rest": [small, host, key, None, 1.5]}
    moved = jbag.to_huge_pages(tree)
    assert moved["large"] is not large
    for x, y in zip(tree["rest"], moved["rest"], strict=True):
        assert x is y


def test_traced_arrays_stay_and_so_do_all_without_the_kernel(monkeypatch):
    x = jnp.ones(LARGE)
    assert "ffi_call" not in str(jax.make_jaxpr(jbag.to_huge_pages)(x))
    monkeypatch.setitem(huge_pages.KERNELS, "cpu", _missing())
    assert jbag.to_huge_pages(x) is x


def _missing():
    kernel = KERNELS["cpu"]
    return type(kernel)(cpu, platforms=("cpu",), missing="no compiler was found")


def test_a_sharded_array_keeps_its_sharding():
    mesh = make_mesh(sizes=(2,))
    for spec in (PartitionSpec("x"), PartitionSpec()):
        sharding = NamedSharding(mesh, spec)
        x = jax.device_put(jnp.arange(float(1 << 21)).reshape(LARGE), sharding)
        moved = jbag.to_huge_pages(x)
        assert moved.sharding == sharding
        np.testing.assert_array_equal(moved, x)


def test_a_donated_table_keeps_its_huge_pages():
    if KERNELS["cpu"].missing:
        pytest.skip(KERNELS["cpu"].missing)
    if sys.platform != "linux":
        pytest.skip("huge pages are asked for on Linux alone")
    numpys = np.ones(1 << 24, np.float32)
    if huge_kib(numpys.ctypes.data + (1 << 22)) == 0:
        pytest.skip("the system grants no huge pages, not to NumPy either")
    table = jbag.to_huge_pages(jnp.ones((1 << 18, 64)))  # 64 MiB, a mapping of its own
    address = table.unsafe_buffer_pointer()
    granted = huge_kib(address + (1 << 22))
    assert granted >= 32 << 10
    add = jax.jit(lambda table, rows: table.at[rows].add(1.0), donate_argnums=0)
    for step in range(3):
        table = add(table, jnp.arange(step, 1 << 18, 7))
        assert table.unsafe_buffer_pointer() == address
    assert huge_kib(address + (1 << 22)) >= granted - 2048

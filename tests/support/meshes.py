"""Meshes of the devices that there are: on the host four, or of GPUs or TPUs."""

import math

import jax
import pytest

TYPES = {
    "auto": jax.sharding.AxisType.Auto,
    "explicit": jax.sharding.AxisType.Explicit,
}


def some_devices(count):
    """Return the first `count` devices; skip the test where there are fewer."""
    found = jax.devices()
    if len(found) < count:
        pytest.skip(f"needs {count} devices, of {len(found)} here")
    return found[:count]


def make_mesh(kind="auto", sizes=(4,), names=("x",)):
    """Return a mesh whose axes are all of a kind."""
    devices = some_devices(math.prod(sizes))
    types = (TYPES[kind],) * len(sizes)
    return jax.make_mesh(sizes, names, axis_types=types, devices=devices)

"""Parameters of slow cases, and of tests of every kernel."""

import pytest


def slow(*values):
    """Return parameters whose tests are slow: `[first, *slow(second, third)]`.

    A tuple holds the values of several names.
    """
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow
        )
        for value in values
    ]


# The kernels of the fixture `implementation`, and one that takes seconds a test.
every_kernel = pytest.mark.parametrize(
    "implementation",
    ["cpu", "xla", *slow("cuda", "tensorcore", "xla_gpu")],
    indirect=True,
)

"""Parameters of slow cases."""

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

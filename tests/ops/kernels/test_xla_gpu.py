"""What XLA's compiler for GPUs makes of jbag's programs, on a machine without a GPU."""

import importlib.util
import itertools
import json
import pathlib
import subprocess
import sys

import gpu_programs
import jax
import numpy as np
import pytest
from gpu_programs import B, D, V

from jbag.ops.kernels import segment_reductions

PROGRAM = pathlib.Path(gpu_programs.__file__)


@pytest.fixture(scope="module", params=gpu_programs.GPUS)
def compiled(request):
    """Figures of every program, for a GPU."""
    for package in ("jax_cuda13_plugin", "nvidia"):
        if importlib.util.find_spec(package) is None:
            gpu_programs.without_gpu_compiler()
    command = [sys.executable, PROGRAM, request.param]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def bytes_of_rows(name):
    """Return the bytes of a float32 array with a row for each slot."""
    length = int(name.split("_")[2])
    return 4 * B * length * D


def test_nothing_compares_and_swaps(compiled):
    found = {name: program["compare_and_swap"] for name, program in compiled.items()}
    assert not any(found.values()), found


def test_a_forward_pass_has_no_array_of_slots_and_features(compiled):
    limits = {"ragged": 0.5, "rectangular": 0.25}
    for name, program in compiled.items():
        layout = name.split("_")[0]
        if name.endswith(("_sum", "_weighted", "_max")):
            limit = limits[layout] * bytes_of_rows(name)
            assert program["temporary_bytes"] < limit, name


def test_rectangular_bags_of_any_length_are_one_loop_over_rows(compiled):
    for name, program in compiled.items():
        if name.startswith("rectangular") and name.endswith("_sum"):
            # Two, or three if the ids are compared with V beforehand.
            assert program["kernels"] <= 3, name
            assert program["temporary_bytes"] < 0.02 * bytes_of_rows(name), name


def test_gradients_and_steps_need_a_few_times_their_rows(compiled):
    # N + U rows, and the dense gradient is a result.
    limits = {
        "sum_gradient": 0.5,
        "weighted_gradient": 0.5,
        "max_gradient": 1,
        "coalesce": 0.5,
        "step_sgd": 1,
        "step_rowwise_adagrad": 1.25,
        "step_adam": 2,
    }
    for name, program in compiled.items():
        kind = name.split("_", 3)[3]
        if kind in limits:
            limit = limits[kind] * 2 * bytes_of_rows(name)
            assert program["temporary_bytes"] < limit, name
            assert program["temporary_bytes"] < 4 * V * D, name


def test_segment_ids_are_not_computed_for_each_row(compiled):
    # A thread loads 16 rows, their ids and weights for 4 outputs, and some bounds.
    for name, program in compiled.items():
        arrays = 3 if "weighted" in name else 2
        assert program["most_loads"] <= 16 * arrays * 4 + 32, name


def test_launches_are_few(compiled):
    for name, program in compiled.items():
        is_forward = name.endswith(("_sum", "_weighted", "_max"))
        assert program["kernels"] <= (40 if is_forward else 90), name


@pytest.mark.parametrize("lengths", ["mixed", "one", "many", "short"])
def test_segments_of_any_lengths_equal_numpy(lengths):
    """Every branch: first slots, pieces, and the tree over pieces of long bags."""
    rng = np.random.default_rng(0)
    sizes = {
        "mixed": [0, 1, 16, 17, 33, 0, 300, 2000, 5, 0, 700],
        "one": [0, 6000, 0],
        "many": [1] * 3000,
        "short": [3] * 70,
    }[lengths]
    bounds = np.cumsum([0, *sizes]).astype(np.int32)
    capacity = int(bounds[-1]) + 7
    values = rng.integers(-8, 8, (capacity, 3)).astype(np.float32)

    @jax.jit
    def sums(values, bounds):
        return segment_reductions.reduce_segments(
            lambda slots: (values[slots],), bounds, capacity, segment_reductions.SUM
        )[0]

    expected = [values[a:b].sum(0) for a, b in itertools.pairwise(bounds)]
    np.testing.assert_array_equal(sums(values, bounds), np.stack(expected))

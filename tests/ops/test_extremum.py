"""The two ways to the elements of winning slots: by elements, and by slots on GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import assert_close

import jbag
from jbag.ops import _extremum


@pytest.mark.parametrize("layout", ["ragged", "rectangular"])
@pytest.mark.parametrize("scaled", [False, True])
def test_elements_by_slots_equal_those_of_the_table(layout, scaled):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(7, 3)).astype(np.float32)
    ids = np.array([1, 6, 1, 0, 4, 9, -3, 1], np.int32)
    # One row wins in several bags, an id out of range wins, and a bag has no winner.
    slots = np.array([[0, 2, 1], [2, 4, 3], [5, 7, 6], [8, 8, 8]], np.int32)
    scale = rng.normal(size=8).astype(np.float32) if scaled else None
    if layout == "rectangular":
        ids = ids.reshape(4, 2)
        scale = scale if scale is None else scale.reshape(4, 2)

    expected = np.zeros((4, 3))
    gradient = np.zeros((7, 3))
    of_scale = np.zeros(8)
    cotangent = rng.normal(size=(4, 3)).astype(np.float32)
    for bag, column in np.ndindex(4, 3):
        slot = slots[bag, column]
        if slot == 8:
            continue
        row, factor = ids.reshape(-1)[slot], 1 if scale is None else scale.flat[slot]
        known = 0 <= row < 7
        element = table[row, column] if known else np.nan
        expected[bag, column] = factor * element
        of_scale[slot] += cotangent[bag, column] * element
        if known:
            gradient[row, column] += cotangent[bag, column] * factor

    def both(table, scale):
        return [
            by(table, jnp.asarray(ids), jnp.asarray(slots), scale)
            for by in (_extremum._winning_by_slots, _extremum._winning_elements)
        ]

    values, pullback = jax.vjp(jax.jit(both), jnp.asarray(table), scale)
    for index, value in enumerate(values):
        assert_close(value, expected, "float32")
        cotangents = [jnp.zeros_like(value), jnp.zeros_like(value)]
        cotangents[index] = jnp.asarray(cotangent)
        to_table, to_scale = pullback(cotangents)
        assert_close(to_table, gradient, "float32")
        if scaled:
            assert_close(to_scale.reshape(-1), of_scale, "float32")


@pytest.mark.parametrize("layout", ["ragged", "rectangular"])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_nan_wins_in_rows_of_any_width(implementation, layout, mode):
    # XLA reduces wide rows by other instructions than narrow ones.
    for width in (5, 112, 300):
        table = np.random.default_rng(0).normal(size=(9, width)).astype(np.float32)
        table[3, width // 2] = np.nan
        ids = jnp.array([[1, 2, 3, 4], [5, 9, 6, 7], [-1, 8, 8, 8], [8, 7, 6, 5]])
        offsets = None
        if layout == "ragged":
            ids, offsets = ids.reshape(-1), jnp.array([0, 4, 8, 12])
        options = {"mode": mode, "implementation": implementation}
        out = np.array(jbag.embedding_bag(table, ids, offsets, **options))
        assert np.flatnonzero(np.isnan(out[0])).tolist() == [width // 2]
        assert np.isnan(out[1:3]).all()
        assert np.isfinite(out[3]).all()

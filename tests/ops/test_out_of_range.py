"""Unknown ids and malformed offsets on a device make their bags NaN, and no others."""

import itertools

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from modes import every_mode
from oracle import assert_close
from pooling import make_table, make_weights
from slow import every_kernel, slow

import jbag


@pytest.mark.parametrize(
    ("rectangular", "weighted"), [(False, False), (True, True), *slow((False, True))]
)
def test_an_unknown_id_on_a_device_makes_its_bag_nan(
    rectangular, weighted, implementation
):
    table = make_table()
    weights = make_weights(6) if weighted else None
    offsets = jnp.array([0, 2, 4])
    if rectangular:
        offsets = None
        weights = None if weights is None else weights.reshape(3, 2)
    for invalid in (-1, -10, 10, 11, 2**31 - 1, -(2**31)):
        ids = np.array([0, 1, invalid, 3, 4, 5], np.int32)
        results = every_mode(
            table,
            weights,
            jnp.asarray(ids.reshape(3, 2) if rectangular else ids),
            offsets,
            jnp.ones((3, 3)),
            scale_grad_by_freq=True,
            max_norm=100.0,
            implementation=implementation,
        )
        for value, gradient, to_weights in results.values():
            np.testing.assert_array_equal(np.isnan(value).all(1), [False, True, False])
            np.testing.assert_array_equal(np.isnan(value).any(1), [False, True, False])
            assert np.isfinite(gradient).all()
            if weighted:
                to_weights = np.asarray(to_weights).reshape(3, 2)
                assert np.isnan(to_weights[1, 0])
                assert np.isfinite(to_weights[[0, 2]]).all()
            np.testing.assert_array_equal(np.asarray(gradient)[[2, 6, 7, 8, 9]], 0)


@every_kernel
@pytest.mark.parametrize("mode", ["mean", "sqrtn"])
def test_an_unknown_id_is_nan_even_at_zero_weight(mode, implementation):
    out = jbag.embedding_bag(
        make_table(),
        jnp.array([[99, 1], [1, 2]]),
        mode=mode,
        weights=jnp.zeros((2, 2)),
        implementation=implementation,
    )
    assert np.isnan(out[0]).all()
    np.testing.assert_array_equal(out[1], 0)


# Offsets, and which of their bags are malformed.
MALFORMED = [
    ([0, 4, 2, 6], [False, True, True]),
    ([0, 3, 5, 2], [False, False, True]),
    ([0, 3, 5, -1], [False, False, True]),
    ([1, 4, 5, 6], [True, False, False]),
    ([0, 4, 5, 7], [False, False, True]),
    ([0, 4, -3, 6], [False, True, True]),
    ([0, 5, 3, 3], [False, True, True]),
    ([-1, -1, -1, -1], [True, True, True]),
    ([0, 2**31 - 1, -(2**31), 6], [True, True, True]),
]


@every_kernel
@pytest.mark.parametrize("weighted", [False, True])
def test_malformed_offsets_on_a_device_make_their_bags_nan(weighted, implementation):
    table = make_table()
    weights = make_weights(6) if weighted else None
    flat = [None] * 6 if weights is None else np.asarray(weights, np.float64)
    for offsets, malformed in MALFORMED:
        results = every_mode(
            table,
            weights,
            jnp.arange(6),
            jnp.array(offsets),
            jnp.ones((3, 3)),
            include_last_offset=True,
            implementation=implementation,
        )
        # Those that are well formed are what they are alone.
        bags = [
            [] if bad else [(i, flat[i]) for i in range(*bounds)]
            for bounds, bad in zip(itertools.pairwise(offsets), malformed, strict=True)
        ]
        for mode, (value, gradient, _) in results.items():
            expected = oracle.forward(table, bags, mode)
            assert_close(np.nan_to_num(value), np.nan_to_num(expected))
            np.testing.assert_array_equal(np.isnan(value).all(1), malformed)
            np.testing.assert_array_equal(np.isnan(value).any(1), malformed)
            assert np.isfinite(gradient).all()

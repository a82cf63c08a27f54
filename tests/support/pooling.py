"""Tables and weights at random, and a check of every mode by the oracle."""

import jax.numpy as jnp
import numpy as np
import oracle
from modes import every_mode
from oracle import assert_close

import jbag

WORKED_IDS = [0, 1, 2, 3, 4, 5, 6, 0, 7, 8]
WORKED_OFFSETS = [0, 4, 6, 10]


def make_table(dtype="float32", rows=10, features=3, seed=0):
    table = np.random.default_rng(seed).normal(size=(rows, features))
    return jnp.asarray(table, dtype)


def make_weights(size, dtype="float32", seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=size) + 0.3, dtype)


def check(table, ids, offsets, weights=None, packed=False, **options):
    """Compare every mode's value and gradients with the oracle, also of lines."""
    padding_idx = options.get("padding_idx")
    if padding_idx is not None:
        padding_idx %= len(table)
    meant = {
        k: options[k] for k in ("max_norm", "norm_type") if options.get(k) is not None
    }
    shape = np.shape(ids)
    flat = np.asarray(ids, np.int32).reshape(-1)
    ends = np.arange(shape[0] + 1) * shape[-1] if offsets is None else offsets
    flat_weights = None if weights is None else np.asarray(weights).reshape(-1)
    bags = oracle.slices(flat.tolist(), ends, flat_weights)
    cotangent = np.random.default_rng(2).normal(size=(len(bags), table.shape[1]))
    cotangent = jnp.asarray(cotangent, table.dtype)
    results = every_mode(
        jbag.pack(table, always=True) if packed else table,
        weights,
        jnp.asarray(flat.reshape(shape)),
        None if offsets is None else jnp.asarray(offsets),
        cotangent,
        include_last_offset=offsets is not None,
        **options,
    )
    freq = {"scale_grad_by_freq": options.get("scale_grad_by_freq", False)}
    for mode, (actual, to_table, to_weights) in jbag.unpack(results).items():
        assert actual.dtype == to_table.dtype == table.dtype
        assert_close(actual, oracle.forward(table, bags, mode, padding_idx, **meant))
        meant_table, meant_weights = oracle.gradients(
            table, bags, cotangent, mode, padding_idx, **meant, **freq
        )
        assert_close(to_table, meant_table)
        if weights is not None:
            assert to_weights.dtype == weights.dtype
            expected = np.zeros(flat.size)
            expected[: ends[-1]] = np.concatenate([np.zeros(0), *meant_weights])
            assert_close(to_weights, expected.reshape(shape))

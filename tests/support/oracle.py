"""The embedding bag in NumPy, one bag at a time, in float64. Imports nothing of jbag.

Bags are lists of (id, weight) pairs; what is in no bag isn't here at all.
"""

import itertools

import numpy as np

# How far results in each dtype may be from the oracle: relative and absolute.
TOLERANCES = {
    "float64": {"rtol": 1e-12, "atol": 1e-12},
    "float32": {"rtol": 2e-5, "atol": 2e-5},
    "bfloat16": {"rtol": 1e-2, "atol": 1e-2},
    "float16": {"rtol": 2e-3, "atol": 2e-3},
}

MODES = ("sum", "mean", "sqrtn", "max", "min")


def assert_close(actual, expected, dtype=None):
    dtype = np.asarray(actual).dtype.name if dtype is None else np.dtype(dtype).name
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), np.asarray(expected), **TOLERANCES[dtype]
    )


def slices(ids, offsets, weights=None):
    """Split flat ids by offsets [B + 1] into bags of pairs."""
    weights = [None] * len(ids) if weights is None else np.asarray(weights, np.float64)
    return [
        list(zip(ids[a:b], weights[a:b], strict=True))
        for a, b in itertools.pairwise(offsets)
    ]


def row_norm(row, norm_type):
    if np.isinf(norm_type):
        return np.abs(row).max()
    return (np.abs(row) ** norm_type).sum() ** (1 / norm_type)


def used_row(table, i, max_norm=None, norm_type=2.0):
    """Return the row, or NaN where there is none, scaled down to max_norm."""
    if not 0 <= i < len(table):
        return np.full(table.shape[1], np.nan)
    norm = 0.0 if max_norm is None else row_norm(table[i], norm_type)
    return table[i] * (max_norm / (norm + 1e-7) if norm > (max_norm or 0) else 1.0)


def forward(table, bags, mode, padding_idx=None, max_norm=None, norm_type=2.0):
    table = np.asarray(table, np.float64)
    out = np.zeros((len(bags), table.shape[1]))
    for b, bag in enumerate(bags):
        bag = [(i, w) for i, w in bag if i != padding_idx]
        rows = [used_row(table, i, max_norm, norm_type) for i, _ in bag]
        weights = np.array([1.0 if w is None else w for _, w in bag])
        if not bag:
            continue
        terms = np.stack([w * e for w, e in zip(weights, rows, strict=True)])
        if mode in ("max", "min"):
            # np.max and np.min let a NaN win.
            out[b] = terms.max(0) if mode == "max" else terms.min(0)
            continue
        scale = denominator(weights, mode)
        unknown = any(not 0 <= i < len(table) for i, _ in bag)
        out[b] = terms.sum(0) / scale if scale else (np.nan if unknown else 0.0)
    return out


def denominator(weights, mode):
    return {
        "sum": 1.0,
        "mean": weights.sum(),
        "sqrtn": np.sqrt((weights**2).sum()),
    }[mode]


def gradients(
    table,
    bags,
    cotangent,
    mode,
    padding_idx=None,
    max_norm=None,
    norm_type=2.0,
    scale_grad_by_freq=False,
):
    """Return the gradient to the table, and to the weights as lists by bag."""
    table = np.asarray(table, np.float64)
    cotangent = np.asarray(cotangent, np.float64)
    counts = np.zeros(len(table))
    for bag in bags:
        for i, _ in bag:
            if 0 <= i < len(table) and i != padding_idx:
                counts[i] += 1
    to_table = np.zeros_like(table)
    to_weights = []
    for bag, g in zip(bags, cotangent, strict=True):
        kept = [k for k, (i, _) in enumerate(bag) if i != padding_idx]
        own = np.zeros(len(bag))
        to_weights.append(own)
        if not kept:
            continue
        ids = [bag[k][0] for k in kept]
        weights = np.array([1.0 if bag[k][1] is None else bag[k][1] for k in kept])
        rows = np.stack([used_row(table, i, max_norm, norm_type) for i in ids])
        if mode in ("max", "min"):
            terms = weights[:, None] * rows
            for d in range(table.shape[1]):
                k = int((terms.argmax if mode == "max" else terms.argmin)(0)[d])
                own[kept[k]] += g[d] * rows[k, d]
                if 0 <= ids[k] < len(table):
                    freq = counts[ids[k]] if scale_grad_by_freq else 1.0
                    to_table[ids[k], d] += weights[k] * g[d] / freq
            continue
        scale = denominator(weights, mode)
        if scale == 0:
            continue
        own[kept] = rows @ g / scale
        if mode != "sum":
            total = (weights[:, None] * rows).sum(0)
            slope = 1.0 if mode == "mean" else weights / scale
            own[kept] -= total @ g * slope / scale**2
        for i, w in zip(ids, weights, strict=True):
            if 0 <= i < len(table):
                freq = counts[i] if scale_grad_by_freq else 1.0
                to_table[i] += w * g / scale / freq
    return to_table, to_weights

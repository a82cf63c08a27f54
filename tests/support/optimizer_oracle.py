"""Optimizers in NumPy, in float64, as their papers have them. Imports nothing of jbag.

Each takes rows w [U, D], their gradient g, what it keeps of them by name (and changes),
the learning rate and t, the number of this step from 1; it returns what is added to w.
"""

import numpy as np


def sgd(_w, g, _kept, rate, _t):
    return -rate * g


def momentum(_w, g, kept, rate, _t, momentum, dampening=0.0, nesterov=False):
    kept["trace"] = momentum * kept["trace"] + (1 - dampening) * g
    return -rate * (g + momentum * kept["trace"] if nesterov else kept["trace"])


def adagrad(_w, g, kept, rate, _t, eps):
    kept["sum_of_squares"] = kept["sum_of_squares"] + g**2
    return -rate * g / (np.sqrt(kept["sum_of_squares"]) + eps)


def rowwise_adagrad(_w, g, kept, rate, _t, eps):
    kept["sum_of_squares"] = kept["sum_of_squares"] + (g**2).mean(-1)
    return -rate * g / (np.sqrt(kept["sum_of_squares"]) + eps)[:, None]


def adam(_w, g, kept, rate, t, b1, b2, eps):
    kept["mu"] = b1 * kept["mu"] + (1 - b1) * g
    kept["nu"] = b2 * kept["nu"] + (1 - b2) * g**2
    rate = rate * np.sqrt(1 - b2**t) / (1 - b1**t)
    return -rate * kept["mu"] / (np.sqrt(kept["nu"]) + eps)


def rowwise_adam(_w, g, kept, rate, t, b1, b2, eps):
    mu = (1 - b1) * g
    if b1:
        mu = kept["mu"] = b1 * kept["mu"] + mu
    kept["nu"] = b2 * kept["nu"] + (1 - b2) * (g**2).mean(-1)
    rate = rate * np.sqrt(1 - b2**t) / (1 - b1**t)
    return -rate * mu / (np.sqrt(kept["nu"]) + eps)[:, None]


def ftrl(w, g, kept, rate, _t, l1, l2, beta):
    root = np.sqrt(kept["n"])
    kept["n"] = kept["n"] + g**2
    z = kept["z"] / rate + g - (np.sqrt(kept["n"]) - root) / rate * w
    kept["z"] = rate * z
    curve = (beta + np.sqrt(kept["n"])) / rate + l2
    return np.where(np.abs(z) <= l1, 0, -(z - np.sign(z) * l1) / curve) - w


def ftrl_start(w, rate, n, l1, l2, beta):
    return {
        "z": -w * (beta + np.sqrt(n) + rate * l2) - np.sign(w) * rate * l1,
        "n": np.full_like(w, n),
    }


def move(rule, table, kept, rows, gradient, rate, t, weight_decay=0.0, **numbers):
    """Move some rows of a table [V, D], and what is kept of them, in place."""
    own = {name: x[rows] for name, x in kept.items()}
    w = table[rows]
    table[rows] += rule(w, gradient[rows], own, rate, t, **numbers)
    table[rows] -= rate * weight_decay * w
    for name, x in own.items():
        kept[name][rows] = x

r"""What rows miss while no gradient names them: tables of coefficients by step.

A row that is current since step s misses, at each later step j with its learning rate
:math:`\eta_j` and weight decay :math:`\lambda`,

.. math:: w \leftarrow (1 - \eta_j \lambda) w - \eta_j u_j

where u_j is what the optimizer makes of a zero gradient. The sum of these moves is
linear in w and the trace of momentum. For Adam it is

.. math:: \sum_j a_j \frac{m_s}{\sqrt{v_s} + \epsilon e^{x_j}}, \qquad
    e^{x_j} = \sqrt{(1 - \beta_2^j) / \beta_2^{j - s}}

with coefficients a_j that don't depend on the row. Gauss quadrature of three nodes
gives the sum, from the first moments of the measure that has the weight a_j at x_j.

The tables are arrays [R], R a power of two; index s mod R is for the rows that are
current since step s. Each step of the optimizer changes every entry, so learning rates
and other numbers may change from step to step.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jbag.ops._packed_table import packs
from jbag.ops._row_gather import accumulation_dtype
from jbag.ops.kernels.update_rules import CATCH_UP_RULES, STEP_PERIOD

Missed = dict[str, Float[Array, "..."]]

_MOMENTS = ("mean", "variance", "third", "fourth", "fifth")
# The entries at the step of the row: nothing is missed yet.
_FIRST = {"row": 1.0, "trace": 1.0, "mu": 1.0, "nu": 1.0}

_MIN_STEPS, _MAX_STEPS, _ROWS_PER_STEP = 2**10, 2**14, 2**8


def init_missed(rule: str, params: Any) -> Missed:
    """Return the tables before the first step."""
    leaves = jax.tree.leaves(params, is_leaf=packs)
    rows = [
        x.packing.num_embeddings if packs(x) else (*jnp.shape(x), 1)[0] for x in leaves
    ]
    dtypes = [accumulation_dtype(jnp.asarray(x).dtype) for x in jax.tree.leaves(leaves)]
    dtype = jnp.result_type(jnp.float32, *dtypes)
    # As many as let a sweep of all rows read few of them in each step.
    least = max(-(-max(rows, default=1) // _ROWS_PER_STEP), 1)
    size = min(max(2 ** math.ceil(math.log2(least)), _MIN_STEPS), _MAX_STEPS)
    names: tuple[str, ...] = ("row",)
    if rule == "momentum":
        names = ("row", "trace", "move")
    elif "adam" in rule:
        names = ("row", "mu", "nu", "moves", *_MOMENTS)
    missed = {name: jnp.full(size, _FIRST.get(name, 0.0), dtype) for name in names}
    return missed | ({"eps": jnp.zeros((), dtype)} if "adam" in rule else {})


def extend(missed: Missed, count: Int[Array, ""], numbers: dict[str, Array]) -> Missed:
    """Add a step to what every row has missed.

    Args:
      missed: the tables.
      count: the number of completed steps, with this one.
      numbers: the learning rate `rate`, `decay`, and the constants of the rule.
    """
    rate, decay = numbers["rate"], numbers["decay"]
    new = {"row": missed["row"] - decay * missed["row"]}
    if "trace" in missed:
        new["trace"] = numbers["momentum"] * missed["trace"]
        new["move"] = missed["move"] - decay * missed["move"]
        new["move"] += rate * numbers["trace_to_step"] * new["trace"]
    if "mu" in missed:
        new |= _extend_adam(missed, count, numbers)
    size = missed["row"].shape[0]
    is_now = jnp.arange(size) == count % size
    new = {k: jnp.where(is_now, _FIRST.get(k, 0.0), x) for k, x in new.items()}
    return new | ({"eps": numbers["eps"]} if "eps" in missed else {})


def _extend_adam(
    missed: Missed, count: Int[Array, ""], numbers: dict[str, Array]
) -> Missed:
    rate, decay, b1, b2 = (numbers[k] for k in ("rate", "decay", "b1", "b2"))
    steps = count.astype(rate.dtype)
    mu, nu = b1 * missed["mu"], b2 * missed["nu"]
    # The moves of a row whose first moment has vanished are none.
    tiny = jnp.finfo(rate.dtype).tiny ** 0.5
    alive = mu > tiny
    corrected = bias_correction(b2, steps) / jnp.maximum(nu, tiny**2)
    weight = rate * mu / bias_correction(b1, steps) * jnp.sqrt(corrected)
    weight = jnp.where(alive, weight, 0)
    x = jnp.where(alive, jnp.log(corrected) / 2, missed["mean"])

    # Moments about the mean, which moves (Pébay, 2008).
    before = missed["moves"] - decay * missed["moves"]
    moves = before + weight
    share = jnp.where(moves == 0, 0, weight / jnp.where(moves == 0, 1, moves))
    rest = 1 - share
    distance = x - missed["mean"]
    h, g = -share * distance, rest * distance
    c2, c3, c4, c5 = (missed[k] for k in _MOMENTS[1:])
    shifted = {
        "variance": c2 + h**2,
        "third": c3 + 3 * c2 * h + h**3,
        "fourth": c4 + 4 * c3 * h + 6 * c2 * h**2 + h**4,
        "fifth": c5 + 5 * c4 * h + 10 * c3 * h**2 + 10 * c2 * h**3 + h**5,
    }
    new = {
        k: rest * c + share * g**n for n, (k, c) in enumerate(shifted.items(), start=2)
    }
    mean = missed["mean"] + share * distance
    return new | {"mu": mu, "nu": nu, "moves": moves, "mean": mean}


def catch_up_rule(states: dict[str, Any]) -> str:
    """Return the rule of `CATCH_UP_RULES` for an optimizer with these states."""
    if "trace" in states:
        return "catch_up_momentum"
    if "mu" not in states:
        return "catch_up"
    mu, nu = (jnp.ndim((*jax.tree.leaves(states[k]), 0)[0]) for k in ("mu", "nu"))
    return "catch_up_adam" if mu == nu else "catch_up_rowwise_adam"


def catch_up_scalars(
    missed: Missed, count: Int[Array, ""], rule: str, dtype: Any
) -> Float[Array, " H"]:
    """Return the scalars of a rule of `CATCH_UP_RULES`."""
    columns = dict(missed)
    if "moves" in missed:
        columns |= _quadrature(missed)
    rows = [columns[name] for name in CATCH_UP_RULES[rule].scalars[1:]]
    now = (count % STEP_PERIOD).astype(dtype)[None]
    return jnp.concatenate([now, *(x.astype(dtype) for x in rows)])


def _quadrature(missed: Missed) -> dict[str, Array]:
    """Return weights and values of epsilon of the Gauss quadrature with three nodes.

    The nodes are the eigenvalues of the Jacobi matrix, about the mean.
    """
    total, mean, c2, c3, c4, c5 = (missed[k] for k in ("moves", *_MOMENTS))
    spread = jnp.sqrt(c2)
    safe = jnp.where(spread == 0, 1, spread)
    s3, s4, s5 = c3 / safe**3, c4 / safe**4, c5 / safe**5
    # In units of the spread: diagonal (0, s3, alpha), squares beside it (1, beta).
    beta = s4 - 1 - s3**2
    # Of two points, or one, beta is zero but for rounding.
    three = beta > 1e-3
    divisor = jnp.where(three, beta, 1)
    alpha = (s5 - 2 * s3 * s4 + s3**3) / divisor
    alpha, beta = jnp.where(three, alpha, 0), jnp.where(three, beta, 0)
    middle = (s3 + alpha) / 3
    diagonal = (-middle, s3 - middle, alpha - middle)
    scale = jnp.sqrt((sum(x * x for x in diagonal) + 2 * (1 + beta)) / 6)
    d1, d2, d3 = (x / scale for x in diagonal)
    determinant = d1 * (d2 * d3 - beta / scale**2) - d3 / scale**2
    angle = jnp.arccos(jnp.clip(determinant / 2, -1, 1)) / 3
    y3 = [middle + 2 * scale * jnp.cos(angle + 2 * math.pi * k / 3) for k in range(3)]
    # Two nodes, and one without weight.
    half = s3 / 2
    root = jnp.sqrt(half**2 + 1)
    y2 = [half - root, half + root, half]
    y = [jnp.where(three, a, b) for a, b in zip(y3, y2, strict=True)]
    weights2: list[Any] = [(root + half) / (2 * root), (root - half) / (2 * root), 0.0]
    out = {}
    for k in range(3):
        a, b, c = y[k], y[k - 1], y[k - 2]
        product = jnp.where(three, (a - b) * (a - c), 1)
        share = jnp.where(three, (1 + b * c) / product, weights2[k])
        out[f"weight{k}"] = total * share
        out[f"eps{k}"] = missed["eps"] * jnp.exp(mean + spread * a)
    return out


def bias_correction(b: Array, steps: Array) -> Array:
    """Return 1 - b ** steps, without cancellation for b close to 1."""
    return -jnp.expm1(steps * jnp.log1p(b - 1))

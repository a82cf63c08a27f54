"""How rows of a table move, given their gradients: the rules by name.

A rule is a function of the rows w, the gradient's rows g, the rows of the state, and
numbers that hold for all rows. It returns what is added to w, and the new state. Rows
are indexed by all axes but the last; w, g and the wide states are alike in shape, the
narrow states lack the last axis. All are in the accumulation dtype.

In each, `decay` draws the rows to zero by themselves: w += delta - decay w.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

Rows = Float[Array, "*rows D"]
States = tuple[Array, ...]
Step = tuple[Rows, States]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule: `scalars` are its numbers in order, `wide` and `narrow` its states."""

    step: Callable[..., Step]
    scalars: tuple[str, ...]
    wide: tuple[str, ...] = ()
    narrow: tuple[str, ...] = ()

    @property
    def states(self) -> tuple[str, ...]:
        """The names of the states in order, the wide ones first."""
        return self.wide + self.narrow


def step(
    rule: str,
    rows: Rows,
    gradient: Rows,
    states: Sequence[Array],
    scalars: Shaped[Array, " H"],
    mean_square: Array | None = None,
) -> Step:
    """Return what the rule adds to the rows, and their new state.

    Rules with a narrow state read the gradient's mean square, of each row, which is
    given where the rows aren't whole.
    """
    options = {}
    if RULES[rule].narrow:
        options["square"] = (
            _mean_square(gradient) if mean_square is None else mean_square
        )
    return RULES[rule].step(rows, gradient, *states, *scalars, **options)


def _sgd(w: Rows, g: Rows, rate: Array, decay: Array) -> Step:
    return _decayed(-rate * g, w, decay), ()


def _momentum(
    w: Rows,
    g: Rows,
    m: Rows,
    rate: Array,
    decay: Array,
    momentum: Array,
    fresh: Array,
    direct: Array,
    through: Array,
) -> Step:
    m = momentum * m + fresh * g
    return _decayed(-rate * (direct * g + through * m), w, decay), (m,)


def _adagrad(
    w: Rows, g: Rows, total: Rows, rate: Array, decay: Array, eps: Array
) -> Step:
    total = total + g * g
    return _decayed(-rate * _ratio(g, jnp.sqrt(total) + eps), w, decay), (total,)


def _rowwise_adagrad(
    w: Rows,
    g: Rows,
    total: Array,
    rate: Array,
    decay: Array,
    eps: Array,
    *,
    square: Array,
) -> Step:
    total = total + square
    divisor = (jnp.sqrt(total) + eps)[..., None]
    return _decayed(-rate * _ratio(g, divisor), w, decay), (total,)


def _adam(
    w: Rows,
    g: Rows,
    m: Rows,
    v: Rows,
    rate: Array,
    decay: Array,
    eps: Array,
    b1: Array,
    b2: Array,
) -> Step:
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * (g * g)
    return _decayed(-rate * _ratio(m, jnp.sqrt(v) + eps), w, decay), (m, v)


def _rowwise_adam(
    w: Rows,
    g: Rows,
    m: Rows,
    v: Array,
    rate: Array,
    decay: Array,
    eps: Array,
    b1: Array,
    b2: Array,
    *,
    square: Array,
) -> Step:
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * square
    divisor = (jnp.sqrt(v) + eps)[..., None]
    return _decayed(-rate * _ratio(m, divisor), w, decay), (m, v)


def _rowwise_rmsprop(
    w: Rows,
    g: Rows,
    v: Array,
    rate: Array,
    decay: Array,
    eps: Array,
    b2: Array,
    *,
    square: Array,
) -> Step:
    v = b2 * v + (1 - b2) * square
    divisor = (jnp.sqrt(v) + eps)[..., None]
    return _decayed(-rate * _ratio(g, divisor), w, decay), (v,)


def _ftrl(
    w: Rows,
    g: Rows,
    z: Rows,
    n: Rows,
    rate: Array,
    beta: Array,
    l1: Array,
    l2: Array,
) -> Step:
    grown = n + g * g
    z = z + rate * g - (jnp.sqrt(grown) - jnp.sqrt(n)) * w
    kept = jnp.sign(z) * jnp.maximum(jnp.abs(z) - rate * l1, 0)
    return -_ratio(kept, beta + jnp.sqrt(grown) + rate * l2) - w, (z, grown)


def _decayed(delta: Rows, w: Rows, decay: Array) -> Rows:
    # Without a decay, what isn't finite in a row stays what it is.
    return delta - jnp.where(decay == 0, 0, decay * w)


def _ratio(a: Rows, b: Float[Array, "*rows #D"]) -> Rows:
    """Divide; by zero, as where a row had no gradient yet, nothing moves."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def _mean_square(g: Rows) -> Array:
    return (g * g).sum(-1) / max(g.shape[-1], 1)


_COMMON = ("rate", "decay")

RULES: dict[str, Rule] = {
    "sgd": Rule(_sgd, _COMMON),
    "momentum": Rule(
        _momentum, (*_COMMON, "momentum", "fresh", "direct", "through"), wide=("m",)
    ),
    "adagrad": Rule(_adagrad, (*_COMMON, "eps"), wide=("total",)),
    "rowwise_adagrad": Rule(_rowwise_adagrad, (*_COMMON, "eps"), narrow=("total",)),
    "adam": Rule(_adam, (*_COMMON, "eps", "b1", "b2"), wide=("m", "v")),
    "rowwise_adam": Rule(
        _rowwise_adam, (*_COMMON, "eps", "b1", "b2"), wide=("m",), narrow=("v",)
    ),
    "rowwise_rmsprop": Rule(_rowwise_rmsprop, (*_COMMON, "eps", "b2"), narrow=("v",)),
    "ftrl": Rule(_ftrl, ("rate", "beta", "l1", "l2"), wide=("z", "n")),
}

"""The update rules of the fused optimizers.

A rule is a function (w, g, *states, *scalars) -> (delta, new states): w are rows of the
table, g rows of the gradient, delta is added to w. w, g and states per element have the
shape [..., D], states per row [...]. All have the accumulation dtype.

`decay` is the decoupled weight decay: delta includes -decay * w.

To add a rule, with `csrc/` for `jbag/csrc/`:

1. This file: its function, and its `Rule` in `RULES`.
2. `csrc/kernels/kernels.h`: its name in `enum class Rule`, and its line in `kRules`.
3. `csrc/kernels/rules.h`: its struct, with the scalars in the order of `Rule.scalars`.
4. `csrc/kernels/row_updates.h`: its case in `MoverOf`.
5. `csrc/fuzz/fuzz_updates.cc`: its formula in `Moved`, and in `MovedRow` if it has a
   state per row.
6. `csrc/cuda/device/updates.cuh`: its struct, like that of 3. The name follows from
   the rule's: `rowwise_adam` is `RowwiseAdam`.
7. `jbag/optim/_optimizers.py`: the optimizer, exported by `jbag/optim/__init__.py`.
   `_scalars` in `_rule_optimizer.py` computes the scalars that change with the step.
8. `tests/support/optimizer_oracle.py`: its formula. `tests/optim/test_optim.py`: its
   entry in `CASES`.

Optimizers that aren't lazy use two more kinds of rules, which `rule_of` returns. Both
have the state `steps` [V], int32: the number of steps that a row has been through,
modulo `STEP_PERIOD`. The first of their scalars is the number of completed steps.

- "checked_" and the name of a rule: the rule, for rows that are current. `steps` grows
  by one. A row that isn't current becomes NaN.
- `CATCH_UP_RULES` make rows current, as if their gradient had been zero in the steps
  that they missed. Their other scalars are an array [H, R] by rows: column s mod R has
  the H numbers of a row that is current since step s. R is a power of two. A row that
  missed R steps or more becomes NaN. They read no gradient. `jbag/optim/_missed_steps`
  computes the array.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jbag.ops._row_gather import take

Rows = Float[Array, "*rows D"]
States = tuple[Array, ...]
Step = tuple[Rows, States]


@dataclasses.dataclass(frozen=True)
class Rule:
    """An update rule.

    Attributes:
      step: the function.
      scalars: the names of its scalars, in order.
      per_element: the names of its states of shape [V, D].
      per_row: the names of its states of shape [V].
      reads_rows: whether the function reads w for more than the weight decay.
      reads_squares: whether the function has the argument `square`, the mean square of
        each row of the gradient.
      catches_up: whether it is one of `CATCH_UP_RULES`.
    """

    step: Callable[..., Step]
    scalars: tuple[str, ...]
    per_element: tuple[str, ...] = ()
    per_row: tuple[str, ...] = ()
    reads_rows: bool = False
    reads_squares: bool = False
    catches_up: bool = False

    @property
    def states(self) -> tuple[str, ...]:
        """The names of the states in order, those per element first."""
        return self.per_element + self.per_row


def step(
    rule: str,
    rows: Rows,
    gradient: Rows,
    states: Sequence[Array],
    scalars: Shaped[Array, " H"],
    mean_square: Array | None = None,
) -> Step:
    """Apply a rule; return (delta, new states).

    Row-wise rules read the mean square of each row of the gradient. Pass `mean_square`
    if the rows are sharded by columns.
    """
    kind = rule_of(rule)
    if kind.catches_up:
        return kind.step(rows, *states, *_missed(kind, states[-1], scalars))
    options = {}
    if kind.reads_squares:
        options["square"] = (
            _mean_square(gradient) if mean_square is None else mean_square
        )
    return kind.step(rows, gradient, *states, *scalars, **options)


def _sgd(w: Rows, g: Rows, rate: Array, decay: Array) -> Step:
    return _decayed(-rate * g, w, decay), ()


def _momentum(
    w: Rows,
    g: Rows,
    trace: Rows,
    rate: Array,
    decay: Array,
    momentum: Array,
    gradient_to_trace: Array,
    gradient_to_step: Array,
    trace_to_step: Array,
) -> Step:
    trace = momentum * trace + gradient_to_trace * g
    step = gradient_to_step * g + trace_to_step * trace
    return _decayed(-rate * step, w, decay), (trace,)


def _adagrad(
    w: Rows, g: Rows, sum_of_squares: Rows, rate: Array, decay: Array, eps: Array
) -> Step:
    sum_of_squares = sum_of_squares + g * g
    step = _ratio(g, jnp.sqrt(sum_of_squares) + eps)
    return _decayed(-rate * step, w, decay), (sum_of_squares,)


def _rowwise_adagrad(
    w: Rows,
    g: Rows,
    sum_of_squares: Array,
    rate: Array,
    decay: Array,
    eps: Array,
    *,
    square: Array,
) -> Step:
    sum_of_squares = sum_of_squares + square
    divisor = (jnp.sqrt(sum_of_squares) + eps)[..., None]
    return _decayed(-rate * _ratio(g, divisor), w, decay), (sum_of_squares,)


def _adam(
    w: Rows,
    g: Rows,
    mu: Rows,
    nu: Rows,
    rate: Array,
    decay: Array,
    eps: Array,
    b1: Array,
    b2: Array,
) -> Step:
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * (g * g)
    return _decayed(-rate * _ratio(mu, jnp.sqrt(nu) + eps), w, decay), (mu, nu)


def _rowwise_adam(
    w: Rows,
    g: Rows,
    mu: Rows,
    nu: Array,
    rate: Array,
    decay: Array,
    eps: Array,
    b1: Array,
    b2: Array,
    *,
    square: Array,
) -> Step:
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * square
    divisor = (jnp.sqrt(nu) + eps)[..., None]
    return _decayed(-rate * _ratio(mu, divisor), w, decay), (mu, nu)


def _rowwise_rmsprop(
    w: Rows,
    g: Rows,
    nu: Array,
    rate: Array,
    decay: Array,
    eps: Array,
    b2: Array,
    *,
    square: Array,
) -> Step:
    nu = b2 * nu + (1 - b2) * square
    divisor = (jnp.sqrt(nu) + eps)[..., None]
    return _decayed(-rate * _ratio(g, divisor), w, decay), (nu,)


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
    new_n = n + g * g
    z = z + rate * g - (jnp.sqrt(new_n) - jnp.sqrt(n)) * w
    shrunk = jnp.sign(z) * jnp.maximum(jnp.abs(z) - rate * l1, 0)
    return -_ratio(shrunk, beta + jnp.sqrt(new_n) + rate * l2) - w, (z, new_n)


def _decayed(delta: Rows, w: Rows, decay: Array) -> Rows:
    # 0 * w is NaN where w isn't finite.
    return delta - jnp.where(decay == 0, 0, decay * w)


def _ratio(a: Rows, b: Float[Array, "*rows #D"]) -> Rows:
    """Divide; return zero where b is zero, as in a row without a gradient so far."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def _mean_square(g: Rows) -> Array:
    return (g * g).sum(-1) / max(g.shape[-1], 1)


_COMMON = ("rate", "decay")
_MOMENTUM_WEIGHTS = ("gradient_to_trace", "gradient_to_step", "trace_to_step")

RULES: dict[str, Rule] = {
    "sgd": Rule(_sgd, _COMMON),
    "momentum": Rule(
        _momentum,
        (*_COMMON, "momentum", *_MOMENTUM_WEIGHTS),
        per_element=("trace",),
    ),
    "adagrad": Rule(_adagrad, (*_COMMON, "eps"), per_element=("sum_of_squares",)),
    "rowwise_adagrad": Rule(
        _rowwise_adagrad,
        (*_COMMON, "eps"),
        per_row=("sum_of_squares",),
        reads_squares=True,
    ),
    "adam": Rule(_adam, (*_COMMON, "eps", "b1", "b2"), per_element=("mu", "nu")),
    "rowwise_adam": Rule(
        _rowwise_adam,
        (*_COMMON, "eps", "b1", "b2"),
        per_element=("mu",),
        per_row=("nu",),
        reads_squares=True,
    ),
    "rowwise_rmsprop": Rule(
        _rowwise_rmsprop,
        (*_COMMON, "eps", "b2"),
        per_row=("nu",),
        reads_squares=True,
    ),
    "ftrl": Rule(
        _ftrl,
        ("rate", "beta", "l1", "l2"),
        per_element=("z", "n"),
        reads_rows=True,
    ),
}

STEP_PERIOD = 2**24  # float32 has the integers below it


def _checked(rule: Rule) -> Rule:
    """Return the rule for rows that are current."""

    def step(w: Rows, g: Rows, *operands: Array, **options: Array) -> Step:
        states = operands[: len(rule.states)]
        steps, count, *scalars = operands[len(rule.states) :]
        now = count.astype(jnp.int32)
        g = jnp.where((steps == now)[..., None], g, jnp.nan)
        delta, after = rule.step(w, g, *states, *scalars, **options)
        return delta, (*after, jnp.full_like(steps, (now + 1) % STEP_PERIOD))

    return dataclasses.replace(
        rule,
        step=step,
        scalars=("count", *rule.scalars),
        per_row=(*rule.per_row, "steps"),
    )


def _missed(rule: Rule, steps: Int[Array, "*rows"], scalars: Array) -> list[Array]:
    """Return the number of steps, and what each row missed: [*rows, 1] each."""
    now = scalars[0].astype(jnp.int32)
    table = scalars[1:].reshape(len(rule.scalars) - 1, -1)
    num_columns = table.shape[1]
    lag = (now - steps) & (STEP_PERIOD - 1)
    columns = [take(row, steps & (num_columns - 1), 0) for row in table]
    known = lag < num_columns
    return [now, *(jnp.where(known, x, jnp.nan)[..., None] for x in columns)]


def _catch_up(w: Rows, steps: Array, now: Array, row: Array) -> Step:
    return _shrunk(w, row), (jnp.full_like(steps, now),)


def _catch_up_momentum(
    w: Rows,
    trace: Rows,
    steps: Array,
    now: Array,
    row: Array,
    decay: Array,
    move: Array,
) -> Step:
    delta = _shrunk(w, row) - move * trace
    return delta, (decay * trace, jnp.full_like(steps, now))


def _catch_up_adam(
    w: Rows, mu: Rows, nu: Rows, steps: Array, now: Array, row: Array, *moments: Array
) -> Step:
    mu_decay, nu_decay, *nodes = moments
    delta = _shrunk(w, row) - _moves(mu, jnp.sqrt(nu), nodes)
    return delta, (mu_decay * mu, nu_decay * nu, jnp.full_like(steps, now))


def _catch_up_rowwise_adam(
    w: Rows, mu: Rows, nu: Array, steps: Array, now: Array, row: Array, *moments: Array
) -> Step:
    mu_decay, nu_decay, *nodes = moments
    delta = _shrunk(w, row) - _moves(mu, jnp.sqrt(nu)[..., None], nodes)
    new_nu = nu_decay[..., 0] * nu
    return delta, (mu_decay * mu, new_nu, jnp.full_like(steps, now))


def _shrunk(w: Rows, row: Array) -> Rows:
    # 0 * w is NaN where w isn't finite.
    return jnp.where(row == 1, 0, (row - 1) * w)


def _moves(mu: Rows, root: Array, nodes: Sequence[Array]) -> Rows:
    """Return the sum of the moves of Adam, by quadrature; see `missed_steps`."""
    half = len(nodes) // 2
    pairs = zip(nodes[:half], nodes[half:], strict=True)
    return sum((_ratio(a * mu, root + x) for a, x in pairs), jnp.zeros_like(mu))


NUM_NODES = 3
_NODES = tuple(f"{x}{k}" for x in ("weight", "eps") for k in range(NUM_NODES))
_MISSED_BY_ADAM = ("count", "row", "mu", "nu", *_NODES)

# The name of the column for the table is "row", of those for states theirs.
CATCH_UP_RULES: dict[str, Rule] = {
    "catch_up": Rule(_catch_up, ("count", "row"), per_row=("steps",), catches_up=True),
    "catch_up_momentum": Rule(
        _catch_up_momentum,
        ("count", "row", "trace", "move"),
        per_element=("trace",),
        per_row=("steps",),
        catches_up=True,
    ),
    "catch_up_adam": Rule(
        _catch_up_adam,
        _MISSED_BY_ADAM,
        per_element=("mu", "nu"),
        per_row=("steps",),
        catches_up=True,
    ),
    "catch_up_rowwise_adam": Rule(
        _catch_up_rowwise_adam,
        _MISSED_BY_ADAM,
        per_element=("mu",),
        per_row=("nu", "steps"),
        catches_up=True,
    ),
}


def rule_of(name: str) -> Rule:
    """Return the rule of a name: of `RULES`, checked, or of `CATCH_UP_RULES`."""
    if name in RULES:
        return RULES[name]
    if name in CATCH_UP_RULES:
        return CATCH_UP_RULES[name]
    return _checked(RULES[name.removeprefix("checked_")])

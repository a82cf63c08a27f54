"""Optimizers whose step costs what the batch touches, in Optax's form.

Each is an `optax.GradientTransformation` over trees in which some leaves are
`RowSparse`, as `jbag.value_and_grad` gives them. Of a table with such a gradient, only
the rows that the batch names move, and only their state; everything else is updated as
Optax would, by the same formula. `optax.apply_updates`, `optax.chain`,
`optax.partition`, Flax's `TrainState` and `nnx.Optimizer` work as they are::

    optimizer = optax.partition(
        {"tables": jbag.optim.rowwise_adagrad(0.05), "rest": optax.adam(1e-3)}, labels
    )

In a jitted step whose parameters and state are donated, tables and their state are
updated in place. For that, `update` makes the new rows already where it is given the
parameters, and `optax.apply_updates` takes them over; let nothing come between the two,
or it costs a copy of the table.

Optax's own transformations of gradients raise a TypeError where they meet rows:
`scale`, `scale_by_schedule`, `scale_by_learning_rate`, `clip_by_global_norm`,
`add_decayed_weights` and `apply_if_finite` are here, too.

Rows that a batch doesn't name don't move at all: momentum and weight decay reach a row
only when it is named. With "lazy" in their description, optimizers differ in that from
their dense counterparts.

Wherever `learning_rate` stands, it is a number, a traced scalar, or a schedule: a
function of the number of steps taken. `weight_decay` is decoupled, as in `optax.adamw`:
a row that moves also moves by -learning_rate * weight_decay * row; what is added to the
gradient instead is `add_decayed_weights`. `stochastic_rounding`, an integer seed, has
bfloat16 tables rounded up or down at random, so that steps much smaller than a row's
numbers aren't lost; the same seed gives the same table.
"""

from __future__ import annotations

import jax.export
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jbag.optim._accumulation import accumulate_gradients as accumulate_gradients
from jbag.optim._rule_optimizer import Rate, is_zero, optimizer_from_rule, rate_at
from jbag.optim._rule_optimizer import RowState as RowState
from jbag.optim._transforms import add_decayed_weights as add_decayed_weights
from jbag.optim._transforms import apply_if_finite as apply_if_finite
from jbag.optim._transforms import clip_by_global_norm as clip_by_global_norm
from jbag.optim._transforms import clip_by_row_norm as clip_by_row_norm
from jbag.optim._transforms import global_norm as global_norm
from jbag.optim._transforms import scale as scale
from jbag.optim._transforms import scale_by_learning_rate as scale_by_learning_rate
from jbag.optim._transforms import scale_by_schedule as scale_by_schedule

jax.export.register_namedtuple_serialization(
    RowState, serialized_name="jbag.optim.RowState"
)


def sgd(
    learning_rate: Rate,
    momentum: float = 0.0,
    *,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    stochastic_rounding: int | None = None,
) -> optax.GradientTransformation:
    r"""Descend the gradient: :math:`w \leftarrow w - \eta g`.

    It is `torch.optim.SGD` and `optax.sgd`. With momentum it is lazy: the velocity
    :math:`m \leftarrow \mu m + (1 - \tau) g` takes V rows, and decays, and moves a row,
    only in the steps that name the row. (PyTorch doesn't damp the first step.)

    Args:
      learning_rate: :math:`\eta`.
      momentum: :math:`\mu`; 0 keeps no velocity.
      dampening: :math:`\tau`.
      nesterov: move by :math:`g + \mu m`, not by m.
      weight_decay: see the module.
      stochastic_rounding: see the module.

    Example:
      >>> optimizer = jbag.optim.sgd(0.5)
      >>> table = jnp.ones((5, 2))
      >>> rows = jbag.RowSparse.from_rows([3], jnp.ones((1, 2)), num_embeddings=5)
      >>> updates, state = optimizer.update(rows, optimizer.init(table), table)
      >>> optax.apply_updates(table, updates)[:, 0]
      Array([1. , 1. , 1. , 0.5, 1. ], dtype=float32)
    """
    if is_zero(momentum):
        return optimizer_from_rule(
            "sgd", learning_rate, {}, weight_decay, stochastic_rounding
        )
    if isinstance(dampening, int | float) and not dampening <= 1:
        raise ValueError(f"`dampening` must be at most 1; got {dampening}.")
    numbers = {
        "momentum": momentum,
        "gradient_to_trace": 1 - dampening,
        "gradient_to_step": 1.0 if nesterov else 0.0,
        "trace_to_step": momentum if nesterov else 1.0,
    }
    return optimizer_from_rule(
        "momentum", learning_rate, numbers, weight_decay, stochastic_rounding
    )


def adagrad(
    learning_rate: Rate,
    *,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    stochastic_rounding: int | None = None,
) -> optax.GradientTransformation:
    r"""Divide by the root of all squared gradients so far, number by number.

    .. math:: s \leftarrow s + g^2, \qquad
        w \leftarrow w - \eta g / (\sqrt s + \epsilon)

    It is `torch.optim.Adagrad`, and, as a row without gradient stays, not lazy.
    `optax.adagrad` has :math:`\sqrt{s + \epsilon}`, and starts from 0.1.

    Args:
      learning_rate: :math:`\eta`.
      initial_accumulator_value: what s starts from.
      eps: :math:`\epsilon`.
      weight_decay: see the module.
      stochastic_rounding: see the module.

    References:
      Duchi et al., Adaptive Subgradient Methods for Online Learning and Stochastic
      Optimization, 2011.

    Example:
      >>> state = jbag.optim.adagrad(0.5).init(jnp.ones((5, 2)))
      >>> state.states["sum_of_squares"].shape
      (5, 2)
    """
    return optimizer_from_rule(
        "adagrad",
        learning_rate,
        {"eps": eps},
        weight_decay,
        stochastic_rounding,
        initial={"sum_of_squares": initial_accumulator_value},
    )


def rowwise_adagrad(
    learning_rate: Rate,
    *,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    stochastic_rounding: int | None = None,
) -> optax.GradientTransformation:
    r"""Adagrad with one accumulator a row, of the mean of the row's squares.

    .. math:: s \leftarrow s + \mathrm{mean}(g^2), \qquad
        w \leftarrow w - \eta g / (\sqrt s + \epsilon)

    Its state is V numbers. The arguments are those of `adagrad`.

    References:
      Naumov et al., Deep Learning Recommendation Model for Personalization and
      Recommendation Systems, 2019. FBGEMM, `EXACT_ROWWISE_ADAGRAD`.

    Example:
      >>> state = jbag.optim.rowwise_adagrad(0.5).init(jnp.ones((5, 2)))
      >>> state.states["sum_of_squares"].shape
      (5,)
    """
    return optimizer_from_rule(
        "rowwise_adagrad",
        learning_rate,
        {"eps": eps},
        weight_decay,
        stochastic_rounding,
        initial={"sum_of_squares": initial_accumulator_value},
    )


def adam(
    learning_rate: Rate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    stochastic_rounding: int | None = None,
) -> optax.GradientTransformation:
    r"""Adam, lazily: the moments of a row move only in steps that name it.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad
        w \leftarrow w - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
        \frac{m}{\sqrt v + \epsilon}

    with t the number of steps taken, whichever rows they named. It is
    `torch.optim.SparseAdam`; `optax.adam` adds :math:`\epsilon` to the root of the
    corrected v, and moves every row in every step.

    Args:
      learning_rate: :math:`\eta`.
      b1: :math:`\beta_1`.
      b2: :math:`\beta_2`.
      eps: :math:`\epsilon`.
      weight_decay: see the module.
      stochastic_rounding: see the module.

    References:
      Kingma and Ba, Adam: A Method for Stochastic Optimization, 2014.

    Example:
      >>> schedule = optax.linear_schedule(0.01, 0.0, transition_steps=1000)
      >>> optimizer = jbag.optim.adam(schedule, weight_decay=0.1)
    """
    numbers = {"eps": eps, "b1": b1, "b2": b2}
    return optimizer_from_rule(
        "adam", learning_rate, numbers, weight_decay, stochastic_rounding
    )


def rowwise_adam(
    learning_rate: Rate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    stochastic_rounding: int | None = None,
) -> optax.GradientTransformation:
    r"""`adam`, lazily, with one second moment a row: of the mean of the row's squares.

    The first moment takes V rows, unless `b1` is 0: then there is none, and the state
    is V numbers. The arguments are those of `adam`.

    References:
      FBGEMM, `PARTIAL_ROWWISE_ADAM`.

    Example:
      >>> state = jbag.optim.rowwise_adam(0.01, b1=0).init(jnp.ones((5, 2)))
      >>> {name: x.shape for name, x in state.states.items()}
      {'nu': (5,)}
    """
    numbers = {"eps": eps, "b1": b1, "b2": b2}
    rule = "rowwise_rmsprop" if is_zero(b1) else "rowwise_adam"
    return optimizer_from_rule(
        rule, learning_rate, numbers, weight_decay, stochastic_rounding
    )


def ftrl(
    learning_rate: Rate,
    *,
    l1: float = 0.0,
    l2: float = 0.0,
    beta: float = 0.0,
    initial_accumulator_value: float = 0.1,
    stochastic_rounding: int | None = None,
) -> optax.GradientTransformation:
    r"""Follow the regularised leader, proximally: Adagrad that makes numbers zero.

    .. math:: n' = n + g^2, \qquad z' = z + \eta g - (\sqrt{n'} - \sqrt n) w, \qquad
        w' = \begin{cases} 0 & |z'| \le \eta \lambda_1 \\
        -\dfrac{z' - \mathrm{sgn}(z') \eta \lambda_1}
        {\beta + \sqrt{n'} + \eta \lambda_2} & \text{otherwise} \end{cases}

    z starts where w' would be the parameter's first value, so that without
    :math:`\lambda_1`, :math:`\lambda_2` and :math:`\beta` it is `adagrad`. This z is
    :math:`\eta` times the one of the paper, so that the learning rate may change.

    Args:
      learning_rate: :math:`\eta`.
      l1: :math:`\lambda_1`, at least 0.
      l2: :math:`\lambda_2`, at least 0.
      beta: :math:`\beta`, at least 0.
      initial_accumulator_value: what n starts from.
      stochastic_rounding: see the module.

    References:
      McMahan et al., Ad Click Prediction: a View from the Trenches, 2013.

    Example:
      >>> optimizer = jbag.optim.ftrl(0.1, l1=1e-4)
    """

    def first_z(w: Array) -> Array:
        rate = rate_at(learning_rate, jnp.zeros((), jnp.int32), w.dtype)
        root = jnp.sqrt(jnp.asarray(initial_accumulator_value, w.dtype))
        return -w * (beta + root + rate * l2) - jnp.sign(w) * rate * l1

    return optimizer_from_rule(
        "ftrl",
        learning_rate,
        {"beta": beta, "l1": l1, "l2": l2},
        0.0,
        stochastic_rounding,
        initial={"z": first_z, "n": initial_accumulator_value},
    )

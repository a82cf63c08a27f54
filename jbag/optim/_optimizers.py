"""The optimizers: an alias of `optimizer_from_rule` each.

The docstring of `jbag.optim` describes the arguments that they share.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jaxtyping import Array

from jbag.optim._rule_optimizer import Rate, is_zero, optimizer_from_rule, rate_at


def sgd(
    learning_rate: Rate,
    momentum: float = 0.0,
    *,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    lazy: bool = True,
    stochastic_rounding: int | None = None,
) -> optax.GradientTransformation:
    r"""Return stochastic gradient descent, with optional momentum.

    .. math:: m \leftarrow \mu m + (1 - \tau) g, \qquad w \leftarrow w - \eta m

    It is `torch.optim.SGD` and `optax.sgd`, and lazy by default. The momentum m is a
    state of shape [V, D]; without momentum, m is g. PyTorch does not dampen the first
    step.

    Args:
      learning_rate: :math:`\eta`; see `jbag.optim`.
      momentum: :math:`\mu`; 0 keeps no state.
      dampening: :math:`\tau`, at most 1.
      nesterov: whether to use :math:`g + \mu m` in place of m in the update of w.
      weight_decay: see `jbag.optim`.
      lazy: see `jbag.optim`.
      stochastic_rounding: see `jbag.optim`.

    Returns:
      The optimizer.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is out of range.

    References:
      Sutskever et al., On the Importance of Initialization and Momentum in Deep
      Learning, 2013.

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
            "sgd", learning_rate, {}, weight_decay, stochastic_rounding, lazy=lazy
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
        "momentum",
        learning_rate,
        numbers,
        weight_decay,
        stochastic_rounding,
        lazy=lazy,
    )


def adagrad(
    learning_rate: Rate,
    *,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    lazy: bool = True,
    stochastic_rounding: int | None = None,
) -> optax.GradientTransformation:
    r"""Return Adagrad: divide by the root of the sum of squared gradients.

    .. math:: s \leftarrow s + g^2, \qquad
        w \leftarrow w - \eta g / (\sqrt s + \epsilon)

    It is `torch.optim.Adagrad`. It is not lazy, as a zero gradient changes nothing.
    `optax.adagrad` divides by :math:`\sqrt{s + \epsilon}` and initializes s to 0.1.

    Args:
      learning_rate: :math:`\eta`; see `jbag.optim`.
      initial_accumulator_value: the initial s, at least 0.
      eps: :math:`\epsilon`, at least 0.
      weight_decay: see `jbag.optim`.
      lazy: see `jbag.optim`.
      stochastic_rounding: see `jbag.optim`.

    Returns:
      The optimizer. Its state has the shape of the table, [V, D].

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is out of range.

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
        lazy=lazy,
    )


def rowwise_adagrad(
    learning_rate: Rate,
    *,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    lazy: bool = True,
    stochastic_rounding: int | None = None,
) -> optax.GradientTransformation:
    r"""Return row-wise Adagrad: one accumulator per row, of the mean squared gradient.

    .. math:: s \leftarrow s + \mathrm{mean}(g^2), \qquad
        w \leftarrow w - \eta g / (\sqrt s + \epsilon)

    Args:
      learning_rate: :math:`\eta`; see `jbag.optim`.
      initial_accumulator_value: the initial s, at least 0.
      eps: :math:`\epsilon`, at least 0.
      weight_decay: see `jbag.optim`.
      lazy: see `jbag.optim`.
      stochastic_rounding: see `jbag.optim`.

    Returns:
      The optimizer. Its state has one number per row, [V].

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is out of range.

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
        lazy=lazy,
    )


def adam(
    learning_rate: Rate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    lazy: bool = True,
    stochastic_rounding: int | None = None,
) -> optax.GradientTransformation:
    r"""Return Adam, lazy by default: a step updates the rows in the batch.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad
        w \leftarrow w - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
        \frac{m}{\sqrt v + \epsilon}

    where t is the number of steps of the optimizer, not of the row. It is
    `torch.optim.SparseAdam`. With `lazy=False` it is `optax.adamw`, which adds
    :math:`\epsilon` to the root of the bias-corrected v.

    Args:
      learning_rate: :math:`\eta`; see `jbag.optim`.
      b1: :math:`\beta_1`, in [0, 1).
      b2: :math:`\beta_2`, in [0, 1); with `lazy=False` at least :math:`\beta_1^2`.
      eps: :math:`\epsilon`, at least 0.
      weight_decay: see `jbag.optim`.
      lazy: see `jbag.optim`.
      stochastic_rounding: see `jbag.optim`.

    Returns:
      The optimizer. Its states m and v have the shape of the table, [V, D].

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is out of range.

    References:
      Kingma and Ba, Adam: A Method for Stochastic Optimization, 2014.

    Example:
      >>> schedule = optax.linear_schedule(0.01, 0.0, transition_steps=1000)
      >>> optimizer = jbag.optim.adam(schedule, weight_decay=0.1)
    """
    numbers = {"eps": eps, "b1": b1, "b2": b2}
    return optimizer_from_rule(
        "adam", learning_rate, numbers, weight_decay, stochastic_rounding, lazy=lazy
    )


def adamw(
    learning_rate: Rate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 1e-4,
    lazy: bool = True,
    stochastic_rounding: int | None = None,
) -> optax.GradientTransformation:
    r"""Return `adam` with weight decay.

    Args:
      learning_rate: :math:`\eta`; see `jbag.optim`.
      b1: :math:`\beta_1`, in [0, 1).
      b2: :math:`\beta_2`, in [0, 1); with `lazy=False` at least :math:`\beta_1^2`.
      eps: :math:`\epsilon`, at least 0.
      weight_decay: see `jbag.optim`.
      lazy: see `jbag.optim`.
      stochastic_rounding: see `jbag.optim`.

    Returns:
      The optimizer.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is out of range.

    References:
      Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019.

    Example:
      >>> optimizer = jbag.optim.adamw(0.01, lazy=False)
    """
    return adam(
        learning_rate,
        b1,
        b2,
        eps,
        weight_decay=weight_decay,
        lazy=lazy,
        stochastic_rounding=stochastic_rounding,
    )


def rowwise_adam(
    learning_rate: Rate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    lazy: bool = True,
    stochastic_rounding: int | None = None,
) -> optax.GradientTransformation:
    r"""Return row-wise Adam, lazy by default: one second moment per row.

    It is `adam` with :math:`v \leftarrow \beta_2 v + (1 - \beta_2) \mathrm{mean}(g^2)`.

    Args:
      learning_rate: :math:`\eta`; see `jbag.optim`.
      b1: :math:`\beta_1`, in [0, 1); 0 keeps no first moment.
      b2: :math:`\beta_2`, in [0, 1); with `lazy=False` at least :math:`\beta_1^2`.
      eps: :math:`\epsilon`, at least 0.
      weight_decay: see `jbag.optim`.
      lazy: see `jbag.optim`.
      stochastic_rounding: see `jbag.optim`.

    Returns:
      The optimizer. Its states have the shapes [V, D] for m and [V] for v.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is out of range.

    References:
      FBGEMM, `PARTIAL_ROWWISE_ADAM`.

    Example:
      >>> state = jbag.optim.rowwise_adam(0.01, b1=0).init(jnp.ones((5, 2)))
      >>> {name: x.shape for name, x in state.states.items()}
      {'nu': (5,)}
    """
    numbers = {"eps": eps, "b1": b1, "b2": b2}
    rule = "rowwise_rmsprop" if is_zero(b1) and lazy else "rowwise_adam"
    return optimizer_from_rule(
        rule, learning_rate, numbers, weight_decay, stochastic_rounding, lazy=lazy
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
    r"""Return FTRL-Proximal: Adagrad with L1 and L2 regularization.

    .. math:: n' = n + g^2, \qquad z' = z + \eta g - (\sqrt{n'} - \sqrt n) w, \qquad
        w' = \begin{cases} 0 & |z'| \le \eta \lambda_1 \\
        -\dfrac{z' - \mathrm{sgn}(z') \eta \lambda_1}
        {\beta + \sqrt{n'} + \eta \lambda_2} & \text{otherwise} \end{cases}

    The initial z gives w' the initial value of the parameter. With :math:`\lambda_1`,
    :math:`\lambda_2` and :math:`\beta` zero, it is `adagrad`. z is :math:`\eta` times
    the z of the paper, which allows schedules.

    Args:
      learning_rate: :math:`\eta`; see `jbag.optim`.
      l1: :math:`\lambda_1`, at least 0.
      l2: :math:`\lambda_2`, at least 0.
      beta: :math:`\beta`, at least 0.
      initial_accumulator_value: the initial n, at least 0.
      stochastic_rounding: see `jbag.optim`.

    Returns:
      The optimizer. Its states z and n have the shape of the table, [V, D].

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is out of range.

    References:
      McMahan et al., Ad Click Prediction: a View from the Trenches, 2013.

    Example:
      >>> state = jbag.optim.ftrl(0.1, l1=1e-4).init(jnp.ones((5, 2)))
      >>> sorted(state.states)
      ['n', 'z']
    """

    def initial_z(w: Array) -> Array:
        rate = rate_at(learning_rate, jnp.zeros((), jnp.int32), w.dtype)
        root = jnp.sqrt(jnp.asarray(initial_accumulator_value, w.dtype))
        return -w * (beta + root + rate * l2) - jnp.sign(w) * rate * l1

    return optimizer_from_rule(
        "ftrl",
        learning_rate,
        {"beta": beta, "l1": l1, "l2": l2},
        0.0,
        stochastic_rounding,
        initial={"z": initial_z, "n": initial_accumulator_value},
    )

"""Fused optimizers for row-sparse gradients, as Optax transformations.

Each optimizer is an `optax.GradientTransformation` over trees of arrays and
`RowSparse` leaves, as `jbag.value_and_grad` returns them. A step updates only the rows
of a table whose ids are in the batch, and their state. Dense leaves are updated by the
same formula. `optax.apply_updates`, `optax.chain`, `optax.partition`, Flax's
`TrainState` and `nnx.Optimizer` work unchanged::

    optimizer = optax.partition(
        {"tables": jbag.optim.rowwise_adagrad(0.05), "rest": optax.adam(1e-3)}, labels
    )

A jitted step with donated parameters and state updates tables in place: `update` with
`params` computes the new table, and `optax.apply_updates` returns it. A transformation
of the updates between these two calls costs a copy of the table.

Optax's transformations of gradients raise a TypeError for `RowSparse` leaves. Use
`scale`, `scale_by_schedule`, `scale_by_learning_rate`, `clip_by_global_norm`,
`add_decayed_weights` and `apply_if_finite` of this module.

Lazy optimizers apply momentum, moments and weight decay to a row only in the steps
whose batch has its id; their dense counterparts do so in every step. Optimizers with
`lazy=False` are equal to their dense counterparts: `catch_up` applies the steps that a
row has missed before it is read.

Shared arguments:

- `learning_rate` is a number, a traced scalar, or a schedule: a function of the number
  of completed steps.
- `weight_decay` is decoupled, as in `optax.adamw`: it adds -learning_rate *
  weight_decay * row to each updated row. See `add_decayed_weights` for L2
  regularization.
- `lazy` is whether rows miss the steps whose batch doesn't have their ids. With False,
  the state is a `CatchUpState`; a table's row that a step updates, and that `catch_up`
  has not brought to the last step, becomes NaN.
- `stochastic_rounding` is an integer seed, or None. With a seed, bfloat16 tables round
  stochastically, so that updates below half a unit in the last place aren't lost. Equal
  seeds give equal tables.
"""

from jbag.optim._accumulation import accumulate_gradients
from jbag.optim._catch_up import catch_up
from jbag.optim._optimizers import (
    adagrad,
    adam,
    adamw,
    ftrl,
    rowwise_adagrad,
    rowwise_adam,
    sgd,
)
from jbag.optim._rule_optimizer import CatchUpState, RowState
from jbag.optim._rule_optimizer import Rate as Rate
from jbag.optim._transforms import (
    add_decayed_weights,
    apply_if_finite,
    clip_by_global_norm,
    clip_by_row_norm,
    global_norm,
    scale,
    scale_by_learning_rate,
    scale_by_schedule,
)

__all__ = [
    "CatchUpState",
    "RowState",
    "accumulate_gradients",
    "adagrad",
    "adam",
    "adamw",
    "add_decayed_weights",
    "apply_if_finite",
    "catch_up",
    "clip_by_global_norm",
    "clip_by_row_norm",
    "ftrl",
    "global_norm",
    "rowwise_adagrad",
    "rowwise_adam",
    "scale",
    "scale_by_learning_rate",
    "scale_by_schedule",
    "sgd",
]

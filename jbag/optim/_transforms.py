"""Transformations of gradients and updates with `RowSparse` leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jbag.ops._row_gather import accumulation_dtype
from jbag.optim._rule_optimizer import check_at_least_zero
from jbag.sparse._row_sparse import RowSparse, is_rows


def scale(step_size: float | Array) -> optax.GradientTransformation:
    """Multiply updates by a number: `optax.scale` with `RowSparse` leaves.

    Args:
      step_size: the number.

    Returns:
      The transformation.

    Example:
      >>> half = jbag.optim.scale(0.5)
      >>> rows = jbag.RowSparse.from_rows([3], jnp.ones((1, 2)), num_embeddings=5)
      >>> half.update(rows, half.init(None))[0].values
      Array([[0.5, 0.5]], dtype=float32)
    """
    return optax.stateless(lambda updates, _: _scaled(updates, step_size))


def scale_by_schedule(
    step_size_fn: Callable[[Int[Array, ""]], Any],
) -> optax.GradientTransformation:
    """Multiply updates by a schedule: `optax.scale_by_schedule` with `RowSparse`.

    Args:
      step_size_fn: a function of the number of completed steps.

    Returns:
      The transformation.

    Example:
      >>> warmup = jbag.optim.scale_by_schedule(lambda step: (step + 1) / 100)
      >>> optimizer = optax.chain(warmup, jbag.optim.sgd(0.1))
    """

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        count = optax.safe_increment(state.count)
        updates = _scaled(updates, step_size_fn(state.count))
        return updates, optax.ScaleByScheduleState(count)

    def init(params: Any) -> Any:
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    return optax.GradientTransformation(init, update)


def scale_by_learning_rate(
    learning_rate: float | Array | Callable[[Int[Array, ""]], Any],
    *,
    flip_sign: bool = True,
) -> optax.GradientTransformation:
    """Multiply updates by the negative learning rate.

    It is `optax.scale_by_learning_rate` with `RowSparse` leaves. The optimizers of
    `jbag.optim` include their learning rate.

    Args:
      learning_rate: a number or a schedule.
      flip_sign: whether to negate it.

    Returns:
      The transformation.

    Example:
      >>> descend = jbag.optim.scale_by_learning_rate(0.5)
      >>> rows = jbag.RowSparse.from_rows([3], jnp.ones((1, 2)), num_embeddings=5)
      >>> descend.update(rows, descend.init(None))[0].values
      Array([[-0.5, -0.5]], dtype=float32)
    """
    sign = -1 if flip_sign else 1
    if callable(learning_rate):
        schedule = learning_rate
        return scale_by_schedule(lambda count: sign * schedule(count))
    return scale(sign * learning_rate)


def apply_if_finite(
    inner: optax.GradientTransformation, max_consecutive_errors: int
) -> optax.GradientTransformation:
    """Skip the steps of an optimizer in which a gradient isn't finite.

    It is `optax.apply_if_finite` with `RowSparse` leaves. It computes both outcomes, so
    tables are not updated in place.

    Args:
      inner: the optimizer.
      max_consecutive_errors: the number of consecutive steps to skip; later ones are
        applied.

    Returns:
      The transformation, with the state of `optax.apply_if_finite`.

    Example:
      >>> optimizer = jbag.optim.apply_if_finite(jbag.optim.sgd(0.1), 3)
    """

    def update_plain(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        updates, state = extended.update(updates, state, params, **extra)
        # A skipped update is zeros of the gradients' structure: return that structure.
        return map_rows(lambda rows: rows.with_values(rows.values), updates), state

    extended = optax.with_extra_args_support(inner)
    plain = optax.GradientTransformationExtraArgs(inner.init, update_plain)
    outer = optax.apply_if_finite(plain, max_consecutive_errors)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        updates = map_rows(RowSparse.coalesce, updates)
        return outer.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(outer.init, update)


def map_rows(function: Callable[..., Any], updates: Any) -> Any:
    """Apply a function to the `RowSparse` leaves of a tree."""
    return jax.tree.map(
        lambda x: function(x) if is_rows(x) else x, updates, is_leaf=is_rows
    )


def _scaled(updates: Any, number: Any) -> Any:
    """Multiply each leaf, in its own dtype."""
    return jax.tree.map(
        lambda x: x * (number if is_rows(x) else jnp.asarray(number, x.dtype)),
        updates,
        is_leaf=is_rows,
    )


def add_decayed_weights(weight_decay: float) -> optax.GradientTransformation:
    r"""Add L2 regularization to gradients: :math:`g \leftarrow g + \lambda w`.

    Only the rows of a `RowSparse` gradient are regularized. In `optax.chain`, put it
    before the optimizer. `update` requires `params`.

    Args:
      weight_decay: :math:`\lambda`, at least 0.

    Returns:
      The transformation.

    Raises:
      TypeError: `weight_decay` is not a number.
      ValueError: `weight_decay` is negative; in `update`, `params` is None.

    Example:
      >>> decay = jbag.optim.add_decayed_weights(0.5)
      >>> rows = jbag.RowSparse.from_rows([3], jnp.ones((1, 2)), num_embeddings=5)
      >>> decay.update(rows, decay.init(None), jnp.ones((5, 2)))[0].values
      Array([[1.5, 1.5]], dtype=float32)
    """
    check_at_least_zero(weight_decay=weight_decay)

    def add(gradient: Any, parameter: Array) -> Any:
        if not isinstance(gradient, RowSparse):
            return gradient + weight_decay * parameter
        gradient = gradient.coalesce()
        rows = gradient.rows_of(parameter).astype(gradient.values.dtype)
        return gradient.with_values(gradient.values + weight_decay * rows)

    def update(updates: Any, params: Any) -> Any:
        if params is None:
            raise ValueError("`params` must be given to `update`; got None.")
        return jax.tree.map(add, updates, params, is_leaf=is_rows)

    return optax.stateless(update)


def clip_by_row_norm(max_norm: float) -> optax.GradientTransformation:
    r"""Scale each row of `RowSparse` gradients down to a maximum norm.

    .. math:: g_v \leftarrow g_v \min(1, m / \|g_v\|_2)

    where m is `max_norm`. Dense gradients don't change.

    Args:
      max_norm: the largest norm of a row, at least 0.

    Returns:
      The transformation.

    Raises:
      TypeError: `max_norm` is not a number.
      ValueError: `max_norm` is negative.

    Example:
      >>> clip = jbag.optim.clip_by_row_norm(1.0)
      >>> rows = jbag.RowSparse.from_rows([3], jnp.array([[3.0, 4.0]]), 5)
      >>> clip.update(rows, clip.init(None))[0].values.round(3)
      Array([[0.6, 0.8]], dtype=float32)
    """
    check_at_least_zero(max_norm=max_norm)

    def clip(gradient: Any) -> Any:
        if not isinstance(gradient, RowSparse):
            return gradient
        gradient = gradient.coalesce()
        norms = jnp.sqrt(jnp.square(gradient.values).sum(-1))
        return gradient.scale_rows(_norm_scale(norms, max_norm))

    return optax.stateless(
        lambda updates, _: jax.tree.map(clip, updates, is_leaf=is_rows)
    )


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    r"""Scale all gradients down to a maximum global norm.

    .. math:: g \leftarrow g \min(1, m / \|g\|_2)

    where m is `max_norm`. It is `optax.clip_by_global_norm` with `RowSparse` leaves.

    Args:
      max_norm: the largest `global_norm`, at least 0.

    Returns:
      The transformation.

    Raises:
      TypeError: `max_norm` is not a number.
      ValueError: `max_norm` is negative.

    References:
      Pascanu et al., On the Difficulty of Training Recurrent Neural Networks, 2012.

    Example:
      >>> optimizer = optax.chain(
      ...     jbag.optim.clip_by_global_norm(1.0), jbag.optim.adagrad(0.1)
      ... )
    """
    check_at_least_zero(max_norm=max_norm)

    def clip(updates: Any, _: Any) -> Any:
        updates = map_rows(RowSparse.coalesce, updates)
        return _scaled(updates, _norm_scale(global_norm(updates), max_norm))

    return optax.stateless(clip)


def global_norm(updates: Any) -> Float[Array, ""]:
    r"""Return the Euclidean norm of a tree with `RowSparse` leaves.

    .. math:: \|g\|_2 = \sqrt{\sum_k g_k^2}

    Args:
      updates: a tree of arrays and `RowSparse`.

    Returns:
      A scalar.

    Example:
      >>> rows = jbag.RowSparse.from_rows([1, 1], jnp.ones((2, 1)), num_embeddings=9)
      >>> jbag.optim.global_norm({"table": rows, "bias": jnp.zeros(3)})
      Array(2., dtype=float32)
    """
    squares = [
        jnp.square((x.coalesce().values if is_rows(x) else x).astype(dtype)).sum()
        for x in jax.tree.leaves(updates, is_leaf=is_rows)
        for dtype in [accumulation_dtype(jnp.dtype(x.dtype))]
    ]
    if not squares:
        return jnp.zeros(())
    norm_dtype = jnp.result_type(*(x.dtype for x in squares))
    return jnp.sqrt(sum(x.astype(norm_dtype) for x in squares))


def _norm_scale(norm: Array, max_norm: Any) -> Array:
    """Return the factor that scales a norm down to `max_norm`."""
    largest = jnp.asarray(max_norm, norm.dtype)
    return jnp.where(norm > largest, largest / norm, 1)

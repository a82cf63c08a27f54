"""What is done to gradients before an optimizer takes them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jbag._kernels.xla import accumulation_dtype
from jbag._rows import RowSparse, is_rows
from jbag._rowwise import check_at_least_zero


def add_decayed_weights(weight_decay: float) -> optax.GradientTransformation:
    """Add weight_decay * parameter to the gradient: L2 regularisation.

    Of a table with a row-sparse gradient, to the rows that the batch names. It stands
    before an optimizer, in `optax.chain`, and needs the parameters.

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
            raise ValueError("`params` must be given, to be decayed; got None.")
        return jax.tree.map(add, updates, params, is_leaf=is_rows)

    return optax.stateless(update)


def clip_by_row_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale each row of a row-sparse gradient down to a norm; leave other gradients.

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
        return gradient.scale_rows(_down_to(norms, max_norm))

    return optax.stateless(
        lambda updates, _: jax.tree.map(clip, updates, is_leaf=is_rows)
    )


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale all gradients down to a norm over all of them, `global_norm`.

    It is `optax.clip_by_global_norm` for trees in which some leaves are `RowSparse`.

    Example:
      >>> optimizer = optax.chain(
      ...     jbag.optim.clip_by_global_norm(1.0), jbag.optim.adagrad(0.1)
      ... )
    """
    check_at_least_zero(max_norm=max_norm)

    def clip(updates: Any, _: Any) -> Any:
        updates = jax.tree.map(
            lambda x: x.coalesce() if is_rows(x) else x, updates, is_leaf=is_rows
        )
        scale = _down_to(global_norm(updates), max_norm)
        return jax.tree.map(
            lambda x: x * scale if is_rows(x) else x * scale.astype(x.dtype),
            updates,
            is_leaf=is_rows,
        )

    return optax.stateless(clip)


def global_norm(updates: Any) -> Float[Array, ""]:
    """Return the root of the sum of all squares, over row-sparse and dense leaves.

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
    wide = jnp.result_type(*(x.dtype for x in squares))
    return jnp.sqrt(sum(x.astype(wide) for x in squares))


def _down_to(norm: Array, max_norm: Any) -> Array:
    """Return what scales the norm down to the largest allowed."""
    largest = jnp.asarray(max_norm, norm.dtype)
    return jnp.where(norm > largest, largest / norm, 1)

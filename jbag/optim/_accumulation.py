"""Gradient accumulation over several batches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jbag._validation import check_integer
from jbag.sparse._row_sparse import is_rows


def accumulate_gradients(
    value_and_grad: Callable[..., Any], steps: int
) -> Callable[..., Any]:
    r"""Return a function that averages values and gradients over several batches.

    .. math:: g = \frac{1}{K} \sum_{k=1}^K g_k

    where K is `steps`. It scans over the batches, with the memory of one batch. The
    gradient of a table has the rows of all batches.

    Args:
      value_and_grad: a function of the parameters and the arrays of a batch that
        returns (value, gradient), as `jbag.value_and_grad(loss)` does. With
        `has_aux`, the auxiliary data is stacked.
      steps: the number of batches, at least 1.

    Returns:
      A function of the parameters and the arrays of the batches that returns (value,
      gradient). Every array of the batches has a leading axis of size `steps`.

    Raises:
      TypeError: `steps` is not an integer.
      ValueError: `steps` is below 1.

    Example:
      >>> def loss(table, ids):
      ...     return jbag.embedding_bag(table, ids, mode="sum", sparse=True).sum()
      >>> both = jbag.optim.accumulate_gradients(jbag.value_and_grad(loss), steps=2)
      >>> value, rows = both(jnp.ones((9, 1)), jnp.array([[[1, 2]], [[2, 3]]]))
      >>> rows.coalesce().values[:, 0]
      Array([0.5, 1. , 0.5, 0. ], dtype=float32)
    """
    check_integer("steps", steps, low=1)

    def accumulated(params: Any, *batches: Any) -> Any:
        def body(total: list[Array] | None, batch: Any) -> Any:
            value, gradient = value_and_grad(params, *batch)
            leaves, tree = jax.tree.flatten(gradient, is_leaf=is_rows)
            rows = [x for x in leaves if is_rows(x)]
            dense = [x for x in leaves if not is_rows(x)]
            if total is not None:
                dense = [a + b for a, b in zip(total, dense, strict=True)]
            structure[:] = [tree, [is_rows(x) for x in leaves]]
            return dense, (value, rows)

        structure: list[Any] = []  # set by tracing
        first = jax.tree.map(lambda x: x[0], batches)
        shapes, _ = jax.eval_shape(functools.partial(body, None), first)
        zeros = [jnp.zeros(x.shape, x.dtype) for x in shapes]
        dense, (values, stacked) = jax.lax.scan(body, zeros, batches, length=steps)
        tree, sparse = structure
        rows = [x.sum() for x in stacked]
        sums = {True: iter(rows), False: iter(dense)}
        gradient = jax.tree.unflatten(tree, [next(sums[x]) / steps for x in sparse])
        if isinstance(values, tuple):
            return (values[0].mean(), values[1]), gradient
        return values.mean(), gradient

    return accumulated

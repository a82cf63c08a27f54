"""`renorm`, and the scale of rows under `max_norm`."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Shaped

from jbag._validation import (
    Integers,
    check_ids,
    check_integers,
    on_host,
    to_index_dtype,
)
from jbag.ops._packed_table import AnyTable, PackedTable, check_stored, take_rows
from jbag.ops._row_gather import accumulation_dtype
from jbag.ragged._bags import Bags

# PyTorch adds this to the norm that it divides by.
_EPSILON = 1e-7


def renorm(
    table: ArrayLike | PackedTable,
    indices: Integers | Bags,
    max_norm: Any,
    norm_type: float = 2.0,
) -> AnyTable:
    r"""Scale the rows at `indices` down to a maximum norm.

    .. math:: e_v \leftarrow e_v \cdot \frac{m}{\|e_v\|_p + 10^{-7}}
        \quad \text{if } \|e_v\|_p > m

    where m is `max_norm`. Other rows do not change. `torch.nn.EmbeddingBag` with
    `max_norm` does this in place; here it is a pure function. The scale is a constant
    to autodiff.

    Args:
      table: [V, D], floating, or a `PackedTable`.
      indices: ids of the rows to scale, of any shape, or a `Bags`, whose tail slots are
        ignored. On a device, ids outside [0, V) are ignored.
      max_norm: the largest norm, at least 0.
      norm_type: p of the p-norm, above 0; `math.inf` is the maximum norm.

    Returns:
      The table, [V, D] or packed, of the dtype of `table`.

    Raises:
      IndexError: an id on the host is outside [0, V).
      TypeError: `table` is not floating, `indices` are not integers, or `max_norm` or
        `norm_type` is not a number.
      ValueError: `max_norm` is negative, or `norm_type` is not above 0.

    References:
      PyTorch, `torch.embedding_renorm_`.

    Example:
      >>> table = jax.numpy.array([[3.0, 4.0], [30.0, 40.0]])
      >>> jbag.renorm(table, [0], max_norm=1.0)[0].round(3)
      Array([0.6, 0.8], dtype=float32)
    """
    table = check_stored(table)
    if max_norm is None:
        raise TypeError("`max_norm` must be a number; got None.")
    max_norm, norm_type = check_norm(max_norm, norm_type)
    num_embeddings = table.shape[0]
    if isinstance(indices, Bags):
        segments = indices.segment_ids
        counted = (segments >= 0) & (segments < indices.num_bags)
        ids = check_integers("indices", indices.indices)
        if on_host(ids) and on_host(counted):
            check_ids(ids, num_embeddings, counted)
        ids = jnp.where(counted, to_index_dtype(ids), -1)
    else:
        ids = check_integers("indices", indices)
        if on_host(ids):
            check_ids(ids, num_embeddings)
        ids = to_index_dtype(ids)
    return _renorm(table, ids, max_norm, norm_type)


@functools.partial(jax.jit, static_argnames="norm_type")
def _renorm(
    table: AnyTable,
    ids: Int[Array, "..."],
    max_norm: Shaped[Array, ""],
    norm_type: float,
) -> AnyTable:
    num_embeddings = table.shape[0]
    ids = jnp.where(ids < 0, num_embeddings, jnp.minimum(ids, num_embeddings))
    ids = ids.reshape(-1)
    if isinstance(table, PackedTable):
        ids = jnp.unique(ids, size=ids.size, fill_value=num_embeddings)
    scale = row_scale(table, ids, max_norm, norm_type)[:, None]
    rows = take_rows(table, ids, 0).astype(scale.dtype)
    scaled = (rows * scale).astype(table.dtype)
    if isinstance(table, PackedTable):
        lines = table.packing.put(table.lines, ids, scaled)
        return dataclasses.replace(table, lines=lines)
    return table.at[ids].set(scaled, mode="drop")


def row_scale(
    table: AnyTable,
    ids: Int[Array, "*slots"],
    max_norm: Shaped[Array, ""],
    norm_type: float,
    columns: Any = None,
) -> Float[Array, "*slots"]:
    """Return the factor that scales each slot's row down to `max_norm`.

    It is a constant to autodiff, and 1 for an id outside [0, V). `columns` is the mesh
    axis that shards the columns of the table.
    """
    dtype = accumulation_dtype(table.dtype)
    rows = take_rows(jax.lax.stop_gradient(table), ids, 0)
    magnitudes = jnp.abs(rows.astype(dtype))

    def sum_features(x: Array) -> Array:
        partial = x.sum(-1)
        return partial if columns is None else jax.lax.psum(partial, columns)

    if norm_type == 2:
        norms = jnp.sqrt(sum_features(magnitudes * magnitudes))
    elif math.isinf(norm_type):
        norms = magnitudes.max(-1, initial=0)
        norms = norms if columns is None else jax.lax.pmax(norms, columns)
    else:
        norms = sum_features(magnitudes**norm_type) ** (1 / norm_type)
    largest = jax.lax.stop_gradient(max_norm).astype(dtype)
    scale = jnp.where(norms > largest, largest / (norms + _EPSILON), 1)
    # A negative `max_norm` on a device can't raise: the output is NaN.
    return jnp.where(largest >= 0, scale, jnp.nan)


def check_norm(max_norm: Any, norm_type: Any) -> tuple[jax.Array | None, float]:
    """Return `max_norm` as a scalar array, or None, and `norm_type` as a float."""
    if isinstance(norm_type, bool) or not isinstance(norm_type, numbers.Real):
        raise TypeError(f"`norm_type` must be a number; got {norm_type!r}.")
    if not float(norm_type) > 0:
        raise ValueError(f"`norm_type` must be above 0; got {norm_type}.")
    if max_norm is None:
        return None, float(norm_type)
    if isinstance(max_norm, np.ndarray | jax.Array):
        if max_norm.dtype.kind not in "fiu" and max_norm.dtype != jnp.bfloat16:
            raise TypeError(f"`max_norm` must be a number; got {max_norm.dtype}.")
        if max_norm.ndim != 0:
            raise ValueError(
                f"`max_norm` must be one number; got shape {max_norm.shape}."
            )
    elif isinstance(max_norm, bool) or not isinstance(max_norm, numbers.Real):
        raise TypeError(f"`max_norm` must be a number; got {max_norm!r}.")
    if on_host(max_norm) and not max_norm >= 0:
        raise ValueError(f"`max_norm` must be at least 0; got {max_norm}.")
    return jnp.asarray(max_norm), float(norm_type)

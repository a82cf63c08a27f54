"""Arrays that are cut along Explicit axes of a mesh, and how what is pooled lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jbag._validation import is_sharded


def pooled_sharding(
    table: Array, ids: Array, offsets: Array | None, weights: Array | None
) -> NamedSharding | None:
    """Return how what is pooled lies; None where nothing is cut along Explicit axes.

    Bags of ids [B, L] lie as their ids, and columns as the table's.

    Raises:
      ValueError: the table is cut by rows, or its columns and the bags along one axis.
    """
    operands = [x for x in (table, ids, offsets, weights) if x is not None]
    meshes = [jax.typeof(x).sharding.mesh for x in operands if is_sharded(x)]
    if not meshes:
        return None
    rows, columns = jax.typeof(table).sharding.spec
    batch = jax.typeof(ids).sharding.spec[0] if offsets is None else None
    advice = "Use jbag.sharding.embedding_bag, or jax.sharding.reshard it."
    if rows is not None:
        raise ValueError(
            "`table` must not be cut by rows along Explicit axes of a mesh; "
            f"got {jax.typeof(table)}. {advice}"
        )
    if _names(batch) & _names(columns):
        raise ValueError(
            "`table` must be cut along other Explicit axes than `indices`; "
            f"got {jax.typeof(table)} and {jax.typeof(ids)}. {advice}"
        )
    return NamedSharding(meshes[0], P(batch, columns))


def partitioned(
    function: Callable[..., Any], sharding: NamedSharding | None
) -> Callable[..., Any]:
    """Return a function that the compiler partitions, and whose results lie so."""
    if sharding is None:
        return function
    axes = sharding.mesh.explicit_axes
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=sharding)


def _names(axes: Any) -> set[str]:
    return set(axes) if isinstance(axes, tuple) else {axes} - {None}

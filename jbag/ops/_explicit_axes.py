"""Sharding of results along Explicit axes of a mesh."""

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
    """Return the sharding of the output; None if no operand has Explicit axes.

    The bags are sharded like ids [B, L], the features like the columns of the table.

    Raises:
      ValueError: the table is sharded by rows, or its columns and the ids share an
        axis.
    """
    operands = [x for x in (table, ids, offsets, weights) if x is not None]
    meshes = [jax.typeof(x).sharding.mesh for x in operands if is_sharded(x)]
    if not meshes:
        return None
    rows, columns = jax.typeof(table).sharding.spec
    batch = jax.typeof(ids).sharding.spec[0] if offsets is None else None
    advice = "Use jbag.sharding.embedding_bag, or jax.sharding.reshard the table."
    if rows is not None:
        raise ValueError(
            "`table` must not be sharded by rows along Explicit axes of a mesh; "
            f"got {jax.typeof(table)}. {advice}"
        )
    if set(_names(batch)) & set(_names(columns)):
        raise ValueError(
            "`table` must be sharded along other Explicit axes than `indices`; "
            f"got {jax.typeof(table)} and {jax.typeof(ids)}. {advice}"
        )
    return NamedSharding(meshes[0], P(batch, columns))


def explicit_sharding(x: Array) -> NamedSharding | None:
    """Return the sharding of an array on a mesh with Explicit axes, or None.

    The mesh may be that of `jax.set_mesh`, where new arrays are replicated.
    """
    sharding, ambient = jax.typeof(x).sharding, jax.sharding.get_abstract_mesh()
    if sharding.mesh.empty and ambient.explicit_axes:
        return NamedSharding(ambient, P())
    return sharding if sharding.mesh.explicit_axes else None


def flatten_slots(ids: Array) -> Array:
    """Return the ids in one column, [N, 1], sharded along the axes of `ids`."""
    shape = (ids.size, 1)
    if not is_sharded(ids):
        return ids.reshape(shape)
    mesh, spec = jax.typeof(ids).sharding.mesh, jax.typeof(ids).sharding.spec
    axes = tuple(name for axis in spec for name in _names(axis))
    return jax.lax.reshape(ids, shape, out_sharding=NamedSharding(mesh, P(axes, None)))


def unflatten_slots(rows: Array, ids: Array) -> Array:
    """Return rows [N, D] as [*ids.shape, D], sharded like `ids` and their columns."""
    shape = (*ids.shape, rows.shape[1])
    if not is_sharded(rows):
        return rows.reshape(shape)
    mesh, spec = jax.typeof(rows).sharding.mesh, jax.typeof(ids).sharding.spec
    columns = jax.typeof(rows).sharding.spec[1]
    sharding = NamedSharding(mesh, P(*spec, columns))
    return jax.lax.reshape(rows, shape, out_sharding=sharding)


def partitioned(
    function: Callable[..., Any], sharding: NamedSharding | None
) -> Callable[..., Any]:
    """Let the compiler partition a function whose results have this sharding."""
    if sharding is None:
        return function
    axes = sharding.mesh.explicit_axes
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=sharding)


def _names(axis: Any) -> tuple[str, ...]:
    if axis is None:
        return ()
    return axis if isinstance(axis, tuple) else (axis,)

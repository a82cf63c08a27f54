"""Sharding types, and the strategy that a `PartitionSpec` declares on a mesh.

`jbag/sharding/README.md` lists where each strategy is, and the steps to add one.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jbag.ops._packed_table import AnyTable, packing_of, storage, stored
from jbag.ops._packing import Packing

Axis = tuple[str, ...]


class ShardingType(enum.StrEnum):
    """Name a sharding strategy, as TorchRec does.

    Attributes:
      DATA_PARALLEL: each device has the whole table.
      COLUMN_WISE: each device has a part of the columns.
      TABLE_WISE: each device has some of the tables.
      ROW_WISE: each device has a part of the rows.

    Example:
      >>> jbag.sharding.ShardingType("row_wise").name
      'ROW_WISE'
    """

    DATA_PARALLEL = "data_parallel"
    COLUMN_WISE = "column_wise"
    TABLE_WISE = "table_wise"
    ROW_WISE = "row_wise"


# The types that shard the first axis of the stacked tables.
SHARDED_BY_ROWS = (ShardingType.TABLE_WISE, ShardingType.ROW_WISE)


@dataclasses.dataclass(frozen=True)
class TableWise:
    """Declare table-wise sharding: each table is on one device along a mesh axis.

    It replaces a `PartitionSpec` in the `specs` of an `EmbeddingBagCollection`.

    Attributes:
      axis: a mesh axis, or a tuple of axes.
      lanes: the number of equal parts of the stacked array, a multiple of the number of
        devices. Each table is in one lane. A checkpoint restores on any number of
        devices that divides it.

    Example:
      >>> jbag.sharding.TableWise("x", lanes=8)
      TableWise(axis='x', lanes=8)
    """

    axis: str | Axis
    lanes: int

    @property
    def spec(self) -> P:
        """The `PartitionSpec` of the stacked tables."""
        return P(self.axis, None)


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A sharding type, and the mesh axes that shard the batch.

    A table that is not data parallel is sharded along the same axes.
    """

    mesh: Mesh | AbstractMesh
    sharding_type: ShardingType
    batch: Axis

    @property
    def size(self) -> int:
        """P, the number of blocks of a batch."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch)

    @property
    def blocks(self) -> P:
        """The spec of arrays with one block per device on the first axis."""
        return P(self.batch)

    @property
    def table(self) -> P:
        """The spec of the table and of optimizer states [V, D]."""
        specs = {
            ShardingType.DATA_PARALLEL: P(None, None),
            ShardingType.COLUMN_WISE: P(None, self.batch),
            ShardingType.ROW_WISE: P(self.batch, None),
            ShardingType.TABLE_WISE: P(self.batch, None),
        }
        return specs[self.sharding_type]

    @property
    def per_row(self) -> P:
        """The spec of optimizer states [V]."""
        return P(*self.table[:1])

    def shard(self, table: AnyTable) -> AnyTable:
        """Return a shard as a table of its own: the lines have those of all shards.

        Raises:
          ValueError: the blocks of a packed table are not those of the devices, or it
            is column-wise.
        """
        return stored(storage(table), self.shard_packing(packing_of(table)))

    def shard_packing(self, packing: Packing | None) -> Packing | None:
        """Return how the shard of a packed table is packed."""
        if packing is None or self.size == 1:
            return packing
        if self.sharding_type == ShardingType.COLUMN_WISE:
            raise ValueError("A packed table can't be sharded by columns.")
        if self.sharding_type == ShardingType.DATA_PARALLEL:
            return packing
        if packing.num_blocks % self.size:
            raise ValueError(
                f"The table must be packed with `num_blocks`, a multiple of the "
                f"{self.size} devices that shard its rows; got {packing.num_blocks}."
            )
        return packing.divide(self.size)

    @property
    def is_explicit(self) -> bool:
        kinds = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        return all(kinds[axis] == AxisType.Explicit for axis in self.batch)


def current_mesh(mesh: Mesh | AbstractMesh | None) -> Mesh | AbstractMesh | None:
    """Return the mesh, or the mesh of `jax.set_mesh`, or None."""
    if mesh is not None:
        if not isinstance(mesh, Mesh | AbstractMesh):
            raise TypeError(f"`mesh` must be a jax.sharding.Mesh; got {mesh!r}.")
        return mesh
    ambient = jax.sharding.get_abstract_mesh()
    return None if ambient.empty else ambient


def strategy(
    mesh: Mesh | AbstractMesh, spec: P | TableWise, batch_axis: str | Axis | None = None
) -> Strategy:
    """Return the strategy that `spec` declares on this mesh.

    `batch_axis` shards the batch if the spec names no axis; None uses all axes.

    Raises:
      TypeError: `spec` is neither a PartitionSpec nor a `TableWise`.
      ValueError: `spec` names an unknown axis, or shards both rows and columns.
    """
    if isinstance(spec, TableWise):
        return Strategy(
            mesh, ShardingType.TABLE_WISE, _check_axis(mesh, "spec", spec, spec.axis)
        )
    if not isinstance(spec, P):
        raise TypeError(
            "`spec` must be a jax.sharding.PartitionSpec or a jbag.sharding.TableWise; "
            f"got {spec!r}."
        )
    if len(spec) > 2:
        raise ValueError(f"`spec` must have at most two entries; got {spec}.")
    rows, columns = (*spec, None, None)[:2]
    if rows is not None and columns is not None:
        raise ValueError(f"`spec` must shard rows or columns, not both; got {spec}.")
    if rows is not None:
        return Strategy(
            mesh, ShardingType.ROW_WISE, _check_axis(mesh, "spec", spec, rows)
        )
    if columns is not None:
        return Strategy(
            mesh, ShardingType.COLUMN_WISE, _check_axis(mesh, "spec", spec, columns)
        )
    axes = tuple(mesh.axis_names) if batch_axis is None else batch_axis
    axes = _check_axis(mesh, "batch_axis", batch_axis, axes)
    return Strategy(mesh, ShardingType.DATA_PARALLEL, axes)


def _check_axis(mesh: Mesh | AbstractMesh, name: str, given: Any, axis: Any) -> Axis:
    axes = axis if isinstance(axis, tuple) else (axis,)
    for one in axes:
        if one not in mesh.axis_names:
            raise ValueError(
                f"`{name}` must name axes of the mesh, {mesh.axis_names}; "
                f"got {given!r}."
            )
    return axes


def per_device(
    body: Callable[..., Any],
    strategy: Strategy,
    in_specs: Any,
    out_specs: Any,
    *,
    check: bool,
) -> Callable[..., Any]:
    """Return `jax.shard_map` of `body` over the mesh of a strategy.

    On Explicit axes, the arguments are resharded to `in_specs`. With `check`, JAX
    tracks which values are replicated, which differentiation requires.
    """
    mapped = jax.shard_map(
        body,
        mesh=strategy.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=check,
    )
    if not strategy.is_explicit:
        return mapped

    def resharded(spec: P, tree: Any) -> Any:
        return jax.tree.map(lambda x: reshard(x, strategy, spec), tree)

    def call(*args: Any) -> Any:
        return mapped(*jax.tree.map(resharded, in_specs, args, is_leaf=_is_spec))

    return call


def reshard(x: Array, strategy: Strategy, spec: P) -> Array:
    """Reshard an array on Explicit axes; return it unchanged on Auto axes."""
    if not strategy.is_explicit:
        return x
    spec = P(*spec[: jax.numpy.ndim(x)])
    return jax.sharding.reshard(x, NamedSharding(strategy.mesh, spec))


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)

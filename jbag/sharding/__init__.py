"""Tables over many devices, by JAX's own runtime.

The `PartitionSpec` of a table is its strategy, "x" being an axis of the mesh, or a
tuple of several:

==========================  ======================================================
spec                        each device
==========================  ======================================================
``P()``                     has the table; the rows of its gradient go to all
``P("x", None)``            has some rows; distinct ids go to owners, and rows back
``P(None, "x")``            has some columns, and pools these for all of the batch
``TableWise("x", lanes)``   has some tables, and pools these for all of the batch
==========================  ======================================================

`ShardingType` has TorchRec's names for these.

A batch is cut into P blocks, one for each device, each with ids and offsets of its own:
a stack of `Bags`, [P, N] and [P, B / P + 1], or ids [B, L]. So does the result [B, D]
lie. `Blocks` makes that of what each process has read. Meshes of Auto and of Explicit
axes will do.

Rows are dealt to their owners by a `Layout`, which doesn't depend on the number of
devices: a checkpoint of 8 goes on with 12, and with another spec. Gradients of tables
with ``sparse=True`` are `RowSparse`; `jbag.optim` moves the rows where they lie, after
one sum for each distinct row of a device has gone to its owner. Neither V x D numbers
on a device, nor (ids x D) between devices, are ever made.

`plan` chooses specs. `jbag.sharding._planner` has its formulas, and the example of 1 TB
of tables on 1024 devices.

Make a large table where it lies, by `jax.jit` with ``out_shardings``, from a key of
``impl="rbg"``: to draw the numbers of the default one, each device would make all of
them on CPUs. Donate it to the steps that move it. Rounding at random (see `jbag.optim`)
depends on how a table is cut.
"""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float

from jbag._mesh.partition_specs import ShardingType as ShardingType
from jbag._mesh.partition_specs import TableWise as TableWise
from jbag._mesh.partition_specs import current_mesh
from jbag._mesh.row_layout import Layout as Layout
from jbag._validation import check_table
from jbag.collection._collection import (
    CollectionOptions,
    check_parts,
    pool_collection,
)
from jbag.collection._lookup import Traffic as Traffic
from jbag.collection._stacking import Feature, Table
from jbag.sharding._planner import Load as Load
from jbag.sharding._planner import Plan as Plan
from jbag.sharding._planner import TablePlan as TablePlan
from jbag.sharding._planner import plan as plan
from jbag.sharding._process_batches import Blocks as Blocks


def embedding_bag(
    table: Any,
    bags: Any,
    *,
    spec: jax.sharding.PartitionSpec,
    mesh: jax.sharding.Mesh | None = None,
    layout: Layout | None = None,
    batch_axis: str | tuple[str, ...] | None = None,
    mode: str = "mean",
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    rows_per_round: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B D"]:
    """Pool bags over a table that lies over a mesh; `jbag.embedding_bag` otherwise.

    Args:
      table: [V', D], the array of the layout's rows.
      bags: a stack of `Bags`, a block for each device, which may have weights; or ids
        [B, L].
      spec: how the table lies: ``P()``, ``P("x", None)`` or ``P(None, "x")``.
      mesh: the mesh; None is that of `jax.set_mesh`.
      layout: of the rows; None is that they stand in order, and V' is V.
      batch_axis: the axes along which a batch is cut where `spec` names none; None is
        all axes of the mesh.
      mode: as in `jbag.embedding_bag`, as are the other options.
      padding_idx: the row that stands for nothing.
      max_norm: rows are used scaled down to this norm, a number.
      norm_type: p of that norm.
      scale_grad_by_freq: divide each row's gradient by its count in the whole batch.
      sparse: ask for a row-sparse gradient.
      rows_per_round: C, how many rows a device requests of one owner in a round; None
        fits ids that are spread evenly. It changes the speed alone: where it is too
        small for a batch, there are more rounds.
      implementation: the kernel by name, or None.

    Returns:
      [B, D], cut along the batch axes. Ids that are no row's are NaN on a device.

    Raises:
      IndexError, TypeError, ValueError: as `jbag.embedding_bag`; the mesh, the spec,
        the layout and the blocks don't fit.

    Example:
      >>> mesh = jax.make_mesh((jax.device_count(),), ("x",))
      >>> layout = jbag.sharding.Layout(num_embeddings=1000)
      >>> table = jnp.ones((layout.num_rows, 4))
      >>> ids, spec = np.arange(16).reshape(8, 2), P("x", None)
      >>> jbag.sharding.embedding_bag(
      ...     table, ids, spec=spec, mesh=mesh, layout=layout, mode="sum"
      ... ).shape
      (8, 4)
    """
    table = check_table(table)
    if layout is None:
        layout = Layout(table.shape[0], grid=1)
    if not isinstance(layout, Layout):
        raise TypeError(f"`layout` must be a Layout or None; got {layout!r}.")
    if table.shape[0] != layout.num_rows:
        raise ValueError(
            f"`table` must have the {layout.num_rows} rows of its layout; "
            f"got shape {table.shape}."
        )
    if isinstance(spec, TableWise):
        raise TypeError(
            "`spec` must be a PartitionSpec for one table; got a TableWise."
        )
    if current_mesh(mesh) is None:
        raise ValueError("`mesh` must be given, or set by jax.set_mesh; got neither.")
    one = Table(
        layout.num_embeddings,
        table.shape[1],
        padding_idx=padding_idx,
        max_norm=max_norm,
        norm_type=norm_type,
        scale_grad_by_freq=scale_grad_by_freq,
        param_dtype=table.dtype,
    )
    options = CollectionOptions(
        {"table": one},
        {"bags": Feature("table", mode)},
        {one.group: spec},
        mesh=current_mesh(mesh),
        batch_axis=batch_axis,
        rows_per_round=rows_per_round,
        grid=layout.grid,
        sparse=sparse,
        implementation=implementation,
    )
    parts = check_parts(options)
    arrays = {parts.stacks[0].name: table}
    return pool_collection(options, parts, arrays, {"bags": bags})["bags"]

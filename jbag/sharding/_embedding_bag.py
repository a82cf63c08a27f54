"""`embedding_bag` of one table that is sharded over a mesh."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float

from jbag._mesh.row_layout import Layout
from jbag._mesh.strategies import TableWise, current_mesh
from jbag.collection._collection import (
    CollectionOptions,
    check_parts,
    pool_collection,
)
from jbag.collection._tables_and_features import Feature, Table
from jbag.ops._embedding_bag import check_mode
from jbag.ops._packed_table import check_stored


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
    """Pool bags of rows of one sharded table.

    The result equals that of `jbag.embedding_bag` on the unsharded table.

    Args:
      table: [V', D], the rows in the order of `layout`; or a `PackedTable` of a block
        for each device, if its rows are sharded.
      bags: stacked `Bags`, one block per device, with or without weights; or ids
        [B, L].
      spec: the sharding: ``P()``, ``P("x", None)`` or ``P(None, "x")``.
      mesh: the mesh; None uses the mesh of `jax.set_mesh`.
      layout: the row layout; None keeps the order of the rows, with V' = V.
      batch_axis: the mesh axes that shard the batch if `spec` names no axis; None uses
        all axes of the mesh.
      mode: "mean", "sum", "sqrtn", "max" or "min".
      padding_idx: the row that bags leave out.
      max_norm: scale rows down to this norm before pooling; a number or None.
      norm_type: the order p of that norm.
      scale_grad_by_freq: divide each row's gradient by its count in the whole batch.
      sparse: compute a row-sparse gradient under `jbag.value_and_grad`.
      rows_per_round: C, the rows that a device requests from one owner in a round; None
        fits uniformly distributed ids. It affects speed only: a batch that exceeds it
        takes more rounds.
      implementation: the name of a kernel; None selects one.

    Returns:
      [B, D], sharded along the batch axes. A bag with an out-of-range id in a device
      array is NaN.

    Raises:
      IndexError: a host array holds an out-of-range id.
      TypeError: an argument has a wrong type.
      ValueError: an option is out of range, no mesh is set, or the shapes of the table
        or the bags do not fit the layout, the spec or the mesh.

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
    table = check_stored(table)
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
    check_mode(mode)  # that of a `Feature` may be None
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

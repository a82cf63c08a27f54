"""Embedding tables sharded over a device mesh.

The `PartitionSpec` of a table selects its sharding strategy. "x" is an axis of the
mesh, or a tuple of axes. `ShardingType` has TorchRec's names.

==========================  ==========================================================
spec                        strategy
==========================  ==========================================================
``P()``                     data parallel: each device has the table; row gradients
                            are all-gathered
``P("x", None)``            row-wise: each device has a part of the rows; distinct
                            ids go to the owners of their rows, and rows return
``P(None, "x")``            column-wise: each device has a part of the columns, and
                            pools them for the whole batch
``TableWise("x", lanes)``   table-wise: each device has some of the tables, and
                            pools them for the whole batch
==========================  ==========================================================

A batch has one block per device. Ragged features are stacked `Bags` with indices [P, N]
and offsets [P, B / P + 1]; dense features are ids [B, L]. The output [B, D] is sharded
in the same way. `Blocks` builds such batches from the examples that each process reads.
Meshes with Auto and with Explicit axes are supported.

A `Layout` assigns rows to devices. It does not depend on the number of devices, so a
checkpoint from 8 devices restores on 12, and under another spec. Tables with
``sparse=True`` have `RowSparse` gradients. `jbag.optim` updates the rows on the device
that owns them, after each device sends one sum per distinct row to the owner. No device
forms a V x D gradient, and no device sends (ids x D) values.

`plan` chooses specs. The docstring of `jbag.sharding._planner` has the formulas and an
example of 1 TB of tables on 1024 devices.

Initialize a large table with `jax.jit` and ``out_shardings``, so that no device holds
all of it. Use a key with ``impl="rbg"``: with the default implementation, each CPU
device draws the numbers of the whole table. Donate the table to the training step. The
result of stochastic rounding (see `jbag.optim`) depends on the sharding.
"""

from jbag._mesh.row_layout import Layout
from jbag._mesh.strategies import ShardingType, TableWise
from jbag.collection._lookup import Traffic
from jbag.sharding._embedding_bag import embedding_bag
from jbag.sharding._feature_loads import Load
from jbag.sharding._planner import Plan, TablePlan, plan
from jbag.sharding._process_batches import Blocks

__all__ = [
    "Blocks",
    "Layout",
    "Load",
    "Plan",
    "ShardingType",
    "TablePlan",
    "TableWise",
    "Traffic",
    "embedding_bag",
    "plan",
]

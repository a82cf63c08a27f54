"""The planner: choose a sharding strategy for each table.

Letters: P devices, B examples per step, V rows and D features of a table, e bytes per
table element, a bytes per element of a sum or gradient (4, or 8 for float64). A device
has n slots for ids of 4 bytes, and f features, each with B / P bags. A lookup returns r
rows: one per bag, or one per slot of an unpooled feature.

A step sends these bytes from each device to each of the P - 1 others:

=============  ==================================  =======================
strategy       forward                             backward
=============  ==================================  =======================
data_parallel  0                                   min(n, V) (4 + a D)
row_wise       C (4 + e D) per round               C (4 + a D) per round
column_wise    4 n + 4 f (B/P + 1) + r D/P e       r D/P a
table_wise     4 n + 4 r + r a D                   r a D
=============  ==================================  =======================

Data-parallel tables all-gather at most n gradient rows. Row-wise tables exchange
buckets of C rows; the fullest bucket sets the number of rounds. Column-wise tables
all-gather the ids and return pooled columns; an optimizer with a scalar state per row
also sums squares over the columns, 2 / P min(P n, V) a bytes. Table-wise tables receive
their ids and return pooled rows; n and r are those of the device with the most, because
all-to-all messages have one size. Weights add a bytes per slot.

A device holds its part of the table and of the optimizer state, twice the received
bytes, and three copies (lookup, gradient, sums) of the rows in use: min(n, V), or
min(P n, V) for column-wise and table-wise tables.

Tables with the same D, dtype and strategy are stacked in one array: n, f, r, C and V
are sums over the stack. Memory, and the row counts of row-wise and column-wise tables,
use V rounded up to a multiple of the grid. Table-wise devices all allocate as much as
the fullest one.

**1 TB on 1024 devices.** One table of 2e9 items, five of 2e8 users and 95 small
ones. An example has 50 item ids and one id for each other table. A device has 16 GB.

>>> tables = {"item": jbag.EmbeddingBag(2_000_000_000, 64)}
>>> tables |= {f"user{i}": jbag.EmbeddingBag(200_000_000, 128) for i in range(5)}
>>> tables |= {f"city{i}": jbag.EmbeddingBag(1_000_000, 64) for i in range(35)}
>>> tables |= {f"day{i}": jbag.EmbeddingBag(1_000, 16) for i in range(60)}
>>> sum(4 * table.num_embeddings * table.features for table in tables.values())
1032963840000
>>> def cut(P, **user):
...     loads = {name: Load(name, 65536 // P) for name in tables}
...     loads["item"] = Load("item", 50 * 65536 // P)
...     loads |= {k: Load(k, 65536 // P, **user) for k in tables if "user" in k}
...     options = {"num_devices": P, "batch_size": 65536, "memory": 16 * 10**9}
...     return plan(tables, loads, **options, grid=math.lcm(20160, P))
>>> {table.strategy.value for table in cut(1024).tables}
{'row_wise'}
>>> for P in (256, 512, 1024):
...     print(P, str(cut(P)).splitlines()[-1])
256 A device sends 32.7 MB in a step, and holds 4.17 GB of 14.4 GB.
512 A device sends 28.8 MB in a step, and holds 2.11 GB of 14.4 GB.
1024 A device sends 37.3 MB in a step, and holds 1.1 GB of 14.4 GB.

All tables are row-wise, small ones too: a data-parallel row would send its gradient
1023 times, and there are fewer tables than devices. The grid, a multiple of P, is
322560.

With more devices, each holds less but does not send less: a bucket has capacity for the
mean n / P, six standard deviations and 8 more ids. On 1024 devices, the 320 user ids
need buckets of 16 ids, 8 kB each. The formulas ignore the latency of such small
messages. Set `rows_per_round` lower if the data allows it; a full bucket adds a round:

>>> print(str(cut(1024, rows_per_round=2)).splitlines()[-1])
A device sends 30.9 MB in a step, and holds 1.09 GB of 14.4 GB.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec

from jbag._mesh.row_layout import GRID
from jbag._mesh.strategies import Axis, ShardingType, TableWise
from jbag._validation import check_integer
from jbag.ops.kernels.update_rules import RULES
from jbag.sharding._cost_model import CostModel, choose, stacks_of
from jbag.sharding._feature_loads import Load, check_table_loads


@dataclasses.dataclass(frozen=True)
class TablePlan:
    """Hold the strategy of one table and its cost.

    The costs of a stack of tables are divided among its tables.

    Attributes:
      name: the name of the table.
      num_embeddings: V.
      embedding_dim: D.
      strategy: the `ShardingType`.
      spec: the `PartitionSpec` or `TableWise` of the strategy.
      forward_bytes: the bytes that a device sends per step in the forward pass.
      backward_bytes: the bytes that a device sends per step in the backward pass.
      memory_bytes: the bytes that a device holds.
      device: the device of a table-wise table; None for other strategies.

    Example:
      >>> tables = {"words": jbag.EmbeddingBag(900, 64)}
      >>> loads = {"text": Load("words", slots=8)}
      >>> best = plan(tables, loads, num_devices=2, batch_size=4, memory=10**8)
      >>> best.tables[0].strategy.value, best.tables[0].forward_bytes
      ('column_wise', 300)
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    strategy: ShardingType
    spec: PartitionSpec | TableWise
    forward_bytes: int
    backward_bytes: int
    memory_bytes: int
    device: int | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Hold the strategies of all tables; `print` shows them as a table of text.

    Attributes:
      tables: one `TablePlan` per table.
      limit: the usable bytes per device, without the spare part.
      warnings: sentences about slow or wasteful strategies.

    Example:
      >>> tables = {"words": jbag.EmbeddingBag(900, 64)}
      >>> loads = {"text": Load("words", slots=8)}
      >>> best = plan(tables, loads, num_devices=2, batch_size=4, memory=10**8)
      >>> best.bytes_per_step, best.memory_per_device, best.specs
      (620, 2669744, {'column_wise': P(None, 'x')})
    """

    tables: tuple[TablePlan, ...]
    limit: int
    warnings: tuple[str, ...] = ()

    @property
    def bytes_per_step(self) -> int:
        """The bytes that a device sends per step."""
        return sum(t.forward_bytes + t.backward_bytes for t in self.tables)

    @property
    def memory_per_device(self) -> int:
        """The bytes that each device holds."""
        return sum(table.memory_bytes for table in self.tables)

    @property
    def specs(self) -> dict[str, PartitionSpec | TableWise]:
        """The spec of each strategy; use the strategies as the groups of the tables."""
        return {str(table.strategy): table.spec for table in self.tables}

    def __str__(self) -> str:
        head = ("table", "strategy", "rows", "features", "forward", "backward", "held")
        rows = [dataclasses.astuple(table) for table in self.tables]
        lines: list[tuple[str, ...]] = [head]
        for name, V, D, strategy, _, *sizes, lane in rows:
            where = strategy if lane is None else f"{strategy} on {lane}"
            lines.append((name, where, str(V), str(D), *map(_format_bytes, sizes)))
        sums = (sum(column) for column in zip(*(row[5:8] for row in rows), strict=True))
        lines.append(("total", "", "", "", *map(_format_bytes, sums)))
        columns = []
        for at, cells in enumerate(zip(*lines, strict=True)):
            width = max(map(len, cells))
            columns.append(
                [c.ljust(width) if at < 2 else c.rjust(width) for c in cells]
            )
        sent, held = map(_format_bytes, (self.bytes_per_step, self.memory_per_device))
        return "\n".join(
            [
                *map("  ".join, zip(*columns, strict=True)),
                f"A device sends {sent} in a step, and holds {held} of "
                f"{_format_bytes(self.limit)}.",
                *(f"Warning: {warning}" for warning in self.warnings),
            ]
        )


def plan(
    tables: Mapping[str, Any],
    loads: Mapping[str, Load],
    *,
    num_devices: int,
    batch_size: int,
    memory: int,
    axis: str | Axis = "x",
    optimizer: str = "rowwise_adagrad",
    spare: float = 0.1,
    grid: int = GRID,
) -> Plan:
    """Choose strategies that minimize the bytes sent within the memory of a device.

    The search is greedy, on the formulas of `jbag.sharding._planner`. It starts from
    each uniform plan and changes one table or one array at a time. While memory does
    not suffice, it minimizes the bytes sent per byte of memory saved; then it minimizes
    the bytes sent. The best result is the plan. The search finds a plan if the
    all-row-wise plan fits; it may miss the optimum.

    Args:
      tables: a dict by table name of `Table` or `EmbeddingBag`, or of objects with
        `num_embeddings`, `param_dtype`, and `embedding_dim` or `features`.
      loads: a dict by feature name of `Load`.
      num_devices: P.
      batch_size: B, a multiple of P.
      memory: the bytes of memory of a device. On TPUs, tables and states of less than
        128 features, or no multiple of it, hold up to 30 % more than is planned.
      axis: the mesh axis, or a tuple of axes, that shards tables and batches.
      optimizer: the optimizer that defines the state: "sgd", "rowwise_adagrad", ...
      spare: the fraction of `memory` to leave unused.
      grid: K of the `Layout`, a multiple of P.

    Returns:
      A `Plan`.

    Raises:
      TypeError: an argument has a wrong type.
      ValueError: a number is out of range, a name is unknown, or memory is too small.

    Example:
      >>> tables = {"item": jbag.EmbeddingBag(50_000_000, 64)}
      >>> tables |= {"image": jbag.EmbeddingBag(100_000, 512)}
      >>> tables |= {f"tag{i}": jbag.EmbeddingBag(200_000, 32) for i in range(4)}
      >>> loads = {"seen": Load("item", slots=1024)}
      >>> loads |= {name: Load(name, slots=2560) for name in tables if name != "item"}
      >>> options = {"num_devices": 4, "batch_size": 1024, "memory": 3_750_000_000}
      >>> print(plan(tables, loads, **options))
      table  strategy             rows  features  forward  backward     held
      item   row_wise         50000000        64   281 kB    281 kB  3.25 GB
      image  column_wise        100000       512   427 kB    455 kB  70.1 MB
      tag0   table_wise on 0    200000        32    33 kB   24.6 kB  7.74 MB
      tag1   table_wise on 1    200000        32    33 kB   24.6 kB  7.74 MB
      tag2   table_wise on 2    200000        32    33 kB   24.6 kB  7.74 MB
      tag3   table_wise on 3    200000        32    33 kB   24.6 kB  7.74 MB
      total                                        840 kB    834 kB  3.35 GB
      A device sends 1.67 MB in a step, and holds 3.35 GB of 3.38 GB.
    """
    num_devices = check_integer("num_devices", num_devices, low=1)
    memory = check_integer("memory", memory, low=1)
    for name, number in {"batch_size": batch_size, "grid": grid}.items():
        if check_integer(name, number, low=1) % num_devices:
            raise ValueError(
                f"`{name}` must be a multiple of `num_devices`, {num_devices}; got "
                f"{number}. {math.lcm(number, num_devices)} is one."
            )
    if optimizer not in RULES:
        raise ValueError(
            f"`optimizer` must be one of {', '.join(RULES)}; got {optimizer!r}."
        )
    if isinstance(spare, bool) or not isinstance(spare, int | float):
        raise TypeError(f"`spare` must be a number; got {spare!r}.")
    if not 0 <= spare < 1:
        raise ValueError(f"`spare` must be in [0, 1); got {spare}.")
    if not all(isinstance(x, str) for x in (axis if type(axis) is tuple else (axis,))):
        raise TypeError(f"`axis` must be a name, or a tuple of names; got {axis!r}.")
    table_loads = check_table_loads(tables, loads)
    model = CostModel(num_devices, batch_size // num_devices, grid, RULES[optimizer])
    limit = math.floor(memory * (1 - spare))
    specs: dict[ShardingType, PartitionSpec | TableWise] = {
        ShardingType.DATA_PARALLEL: PartitionSpec(),
        ShardingType.COLUMN_WISE: PartitionSpec(None, axis),
        ShardingType.TABLE_WISE: TableWise(axis, lanes=num_devices),
        ShardingType.ROW_WISE: PartitionSpec(axis, None),
    }
    planned: dict[str, TablePlan] = {}
    warnings: list[str] = []
    for strategy, names in stacks_of(table_loads, choose(model, table_loads, limit)):
        stack = [table_loads[name] for name in names]
        warnings += model.warnings(strategy, stack)
        shares = model.shares(strategy, stack)
        is_table_wise = strategy == ShardingType.TABLE_WISE
        lanes = model.lanes(stack) if is_table_wise else itertools.repeat(None)
        for name, table, cost, lane in zip(names, stack, shares, lanes, strict=False):
            shape = (table.rows, table.embedding_dim)
            forward, backward, held = map(int, cost)
            planned[name] = TablePlan(
                name, *shape, strategy, specs[strategy], forward, backward, held, lane
            )
    best = Plan(tuple(planned[name] for name in tables), limit, tuple(warnings))
    if best.memory_per_device > limit:
        raise ValueError(
            "`memory` must suffice for the smallest plan found, "
            f"{best.memory_per_device} bytes; got {memory}, of which {limit} are "
            f"usable."
        )
    return best


def _format_bytes(size: float) -> str:
    power = next(
        power for power in range(5) if size < 999.5 * 1000**power or power == 4
    )
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"

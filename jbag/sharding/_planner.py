"""How to cut each table over a mesh, by what it takes to send and to hold.

Letters: P devices, B examples in a step, V rows and D features of a table; e bytes a
number of the table, a bytes a number of a sum or gradient: 4, or 8 for float64. One
device has n slots for ids of 4 bytes, and f features, each of B / P bags.

Bytes that a device sends to each of P - 1 others in a step:

=============  ==================================  =======================
strategy       forward                             backward
=============  ==================================  =======================
data_parallel  0                                   min(n, V) (4 + a D)
row_wise       C (4 + e D) a round                 C (4 + a D) a round
column_wise    4 n + 4 f (B/P + 1) + f B/P D/P e   f B/P D/P a
table_wise     4 n + 4 f B/P + f B/P a D           f B/P a D
=============  ==================================  =======================

Data-parallel tables send their gradient's rows, at most n. Rows are sent in buckets of
C, in as many rounds as the fullest bucket takes. Columns get all ids, and
send back pooled pieces; an optimizer with one number a row sums squares over them,
which takes 2 / P min(P n, V) a. Whole tables get their ids, and send back pooled rows;
as what is sent has one size, n and f are those of the busiest device. Where slots have
weights, these go with the ids, a bytes each.

A device holds its part of the table and of the optimizer's state; twice what it
receives; and three times (looked up, gradient, sums) the rows that may be requested
from it: min(n, V) of them, or of columns and whole tables min(P n, V).

Tables of one D, dtype and strategy lie in one array and send as one: n, f, C and V are
theirs together. What is held, and what rows and columns name, is of V padded to a
multiple of the grid; whole tables set aside what the fullest device has.

**1 TB on 1024 devices.** One table of 2e9 items, five of 2e8 users and 95 small ones;
an example names 50 items, and one row of each other table. A device has 16 GB.

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

All go in rows, small ones too: a replicated row's gradient would be sent 1023 times,
and whole tables are fewer than devices. The grid, which P must divide, is 322560. The
owners are all devices along the axis, or along several axes together.

Of more devices each holds less, but doesn't send less: a bucket has slots for n / P
ids, six standard deviations and 8 more. On 1024, the 320 ids of users go in buckets of
16, 8 kB each; the formulas leave out the latency of so many small messages. Set
`rows_per_round` lower if the data allows it. A full bucket takes another round:

>>> print(str(cut(1024, rows_per_round=2)).splitlines()[-1])
A device sends 30.9 MB in a step, and holds 1.09 GB of 14.4 GB.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jbag._mesh.partition_specs import Axis, ShardingType, TableWise
from jbag._mesh.row_layout import GRID
from jbag._validation import TABLE_DTYPES, check_flag, check_integer
from jbag.ops.kernels.update_rules import RULES
from jbag.ragged._bags import Bags
from jbag.sharding._cost_model import CostModel, TableLoad, choose, stacks_of


@dataclasses.dataclass(frozen=True)
class Load:
    """The load of a feature on its table in a step.

    Attributes:
      table: the table that it looks up.
      slots: n, the capacity for the ids of one device's bags.
      weighted: whether slots have weights.
      rows_per_round: C, its part of the ids in a bucket, if the table is row-wise; None
        for one that suffices.
      distinct: how many different ids a device has; None if all may differ.

    Example:
      >>> Load("words", slots=4096, distinct=900)
      Load(table='words', slots=4096, weighted=False, rows_per_round=None, distinct=900)
    """

    table: str
    slots: int
    weighted: bool = False
    rows_per_round: int | None = None
    distinct: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.table, str):
            raise TypeError(f"`table` must be the name of a table; got {self.table!r}.")
        check_integer("slots", self.slots, low=0)
        check_flag("weighted", self.weighted)
        if self.rows_per_round is not None:
            check_integer("rows_per_round", self.rows_per_round, low=1)
        if self.distinct is not None:
            check_integer("distinct", self.distinct, low=0, high=self.slots + 1)

    @classmethod
    def measure(
        cls, table: str, bags: Bags, *, rows_per_round: int | None = None
    ) -> Load:
        """Return the load of which one device's batch is an example.

        Raises:
          TypeError, ValueError: `bags` isn't one batch of bags.

        Example:
          >>> bags = jbag.Bags.from_lists([[7, 7], [7, 8]], capacity=6)
          >>> Load.measure("words", bags)
          Load(table='words', slots=6, weighted=False, rows_per_round=None, distinct=2)
        """
        if not isinstance(bags, Bags):
            raise TypeError(f"`bags` must be Bags; got {type(bags).__name__}.")
        if (shape := bags.indices.shape) != (bags.indices.size,):
            raise ValueError(f"`bags` must be one batch; got indices of shape {shape}.")
        named = np.unique(np.asarray(bags.indices)[: int(bags.offsets[-1])])
        weighted = bags.weights is not None
        return cls(table, bags.capacity, weighted, rows_per_round, named.size)


@dataclasses.dataclass(frozen=True)
class TablePlan:
    """What is planned for a table; bytes are its share, where several send as one.

    Attributes:
      name, num_embeddings, embedding_dim: of the table.
      strategy: a `ShardingType`, "data_parallel", "row_wise", "column_wise" or
        "table_wise".
      spec: the `PartitionSpec` or `TableWise` that declares it.
      forward_bytes, backward_bytes: what a device sends in a step.
      memory_bytes: what a device holds.
      device: where a whole table lies, or None.

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
    """A plan for tables; `print` shows it.

    Attributes:
      tables: a `TablePlan` for each.
      limit: the bytes that a device may hold, without the spare ones.
      warnings: what to mind, in words.

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
        """What a device sends in a step."""
        return sum(t.forward_bytes + t.backward_bytes for t in self.tables)

    @property
    def memory_per_device(self) -> int:
        """What a device holds: all alike, as the blocks of an array have one size."""
        return sum(table.memory_bytes for table in self.tables)

    @property
    def specs(self) -> dict[str, PartitionSpec | TableWise]:
        """The spec of each group, if tables are grouped by their strategies."""
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
                *(f"Mind: {warning}" for warning in self.warnings),
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
    """Choose how to cut each table, so that devices send little, and can hold it all.

    Bytes are those of the formulas above. From starts where all tables are alike,
    strategies change, of one table at a time or of all in an array: while memory
    doesn't suffice, first where the fewest bytes more are sent for a byte saved; then
    where the most sent are saved. The best of the ends is the plan. There is one if all
    tables in rows fit; one that sends a little less may be missed.

    Args:
      tables: by name; each a `Table` or an `EmbeddingBag`, or what has their
        `num_embeddings`, `param_dtype`, and `embedding_dim` or `features`.
      loads: by feature.
      num_devices: P.
      batch_size: B, a multiple of P.
      memory: what a device has, in bytes.
      axis: of the mesh, or several, over which tables and batches are cut.
      optimizer: the rule whose state is held: "sgd", "adam", "rowwise_adagrad", ...
      spare: the part of `memory` to leave alone.
      grid: K of the layout, a multiple of P.

    Raises:
      TypeError: an argument is of another type.
      ValueError: a number is out of range, a name isn't known, or memory is too small.

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
    table_loads = _check(tables, loads)
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
            f"`memory` must suffice for a plan: the thriftiest that was found needs "
            f"{best.memory_per_device} bytes; got {memory}, of which {limit} to use."
        )
    return best


def _check(tables: Any, loads: Any) -> dict[str, TableLoad]:
    """Return the load of each table; raise if an argument isn't a table or a load."""
    for name, mapping in {"tables": tables, "loads": loads}.items():
        if not isinstance(mapping, Mapping):
            raise TypeError(f"`{name}` must be a mapping by name; got {mapping!r}.")
    if not tables:
        raise ValueError("`tables` must hold at least one; got none.")
    for feature, load in loads.items():
        if not isinstance(load, Load):
            raise TypeError(f"`loads[{feature!r}]` must be a Load; got {load!r}.")
        if load.table not in tables:
            raise ValueError(
                f"`loads[{feature!r}].table` must be one of `tables`, "
                f"{', '.join(map(str, tables))}; got {load.table!r}."
            )
    checked = {}
    for name, table in tables.items():
        try:
            rows, dtype = table.num_embeddings, table.param_dtype
            has_dim = hasattr(
                table, "embedding_dim"
            )  # a Table; modules have `features`
            width = table.embedding_dim if has_dim else table.features
        except AttributeError as error:
            raise TypeError(
                f"`tables[{name!r}]` must have `num_embeddings`, `embedding_dim` (or "
                f"`features`) and `param_dtype`; got {table!r}."
            ) from error
        check_integer(f"tables[{name!r}].num_embeddings", rows, low=1)
        check_integer(f"tables[{name!r}].embedding_dim", width, low=1)
        dtype = jnp.dtype(dtype)
        if dtype.name not in TABLE_DTYPES:
            raise TypeError(
                f"`tables[{name!r}].param_dtype` must be one of "
                f"{', '.join(TABLE_DTYPES)}; got {dtype}."
            )
        own = [load for load in loads.values() if load.table == name]
        checked[name] = TableLoad(
            width,
            dtype,
            rows,
            slots=sum(load.slots for load in own),
            weights=sum(load.slots for load in own if load.weighted),
            num_features=len(own),
            distinct=min(
                rows, sum(x.slots if x.distinct is None else x.distinct for x in own)
            ),
            rows_per_round=sum(load.rows_per_round or 0 for load in own),
            default_slots=sum(
                load.slots for load in own if load.rows_per_round is None
            ),
        )
    return checked


def _format_bytes(size: float) -> str:
    power = next(
        power for power in range(5) if size < 999.5 * 1000**power or power == 4
    )
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"

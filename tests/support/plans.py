"""Plans of tables, and an oracle of the bytes that they say."""

import dataclasses
import math

import numpy as np
from jax.sharding import PartitionSpec

from jbag.sharding._feature_loads import Load
from jbag.sharding._planner import plan

P = PartitionSpec
STRATEGIES = ("data_parallel", "row_wise", "column_wise", "table_wise")


@dataclasses.dataclass(frozen=True)
class Table:
    num_embeddings: int
    embedding_dim: int
    param_dtype: str = "float32"


def plan_one(table, *loads, **options):
    """Plan for one table; return what is planned for it."""
    loads = {str(at): load for at, load in enumerate(loads)}
    defaults = {"num_devices": 4, "batch_size": 256, "memory": 10**12, "spare": 0}
    [found] = plan({"t": table}, loads, **(defaults | options)).tables
    return found


def oracle(tables, loads, choice, devices, batch_size, grid=20160):
    """Return the bytes sent forward and backward, and held, with row-wise state."""
    totals = np.zeros(3)
    kind = {k: (choice[k], table.embedding_dim) for k, table in tables.items()}
    for strategy, width in set(kind.values()):
        names = [k for k in tables if kind[k] == (strategy, width)]
        owners = [names]
        if strategy == "table_wise":
            owners = [[] for _ in range(devices)]
            filled = [0] * devices
            for k in sorted(names, key=lambda k: -tables[k].num_embeddings):
                owner = filled.index(min(filled))
                owners[owner].append(k)
                filled[owner] += tables[k].num_embeddings
        sizes = [[tables[k].num_embeddings for k in own] for own in owners]
        own_loads = [[x for x in loads.values() if x.table in own] for own in owners]
        slots = max(sum(x.slots for x in own) for own in own_loads)
        features = max(len(own) for own in own_loads)
        rows = max(sum(own) for own in sizes)
        padded = math.ceil(rows / grid) * grid
        bags = batch_size // devices
        share = slots / devices
        rows_per_round = min(
            slots, math.ceil((share + 6 * math.sqrt(share) + 8) / 8) * 8
        )
        if strategy == "data_parallel":
            each = (0, min(slots, rows) * (4 * width + 4))
            held = padded * (width + 1) * 4 + 12 * min(slots, rows) * width
        elif strategy == "row_wise":
            each = (rows_per_round * (4 * width + 4), rows_per_round * (4 * width + 4))
            held = padded * (width + 1) * 4 / devices
            held += 12 * min(slots, padded) * width
        elif strategy == "column_wise":
            own = width / devices
            named = min(devices * slots, padded)
            pooled = features * bags * own * 4
            each = (
                slots * 4 + features * (bags + 1) * 4 + pooled,
                pooled + 2 * named * 4 // devices,
            )
            held = padded * (own + 1) * 4 + 12 * named * own
        else:
            named = min(devices * slots, rows)
            pooled = features * bags * width * 4
            each = (slots * 4 + features * bags * 4 + pooled, pooled)
            held = rows * (width + 1) * 4 + 12 * named * width
        totals += [*((devices - 1) * np.array(each)), held + 2 * devices * sum(each)]
    return totals


def totals(found):
    columns = ("forward_bytes", "backward_bytes", "memory_bytes")
    return [sum(getattr(table, c) for table in found.tables) for c in columns]


def random_case(rng):
    """Return few tables, their loads and the options of a plan."""
    devices, bags = rng.choice([2, 4, 8, 16]), rng.choice([16, 64, 256])
    widths = [rng.choice([8, 16, 64, 256])] if rng.random() < 0.5 else [10, 16, 64, 256]
    tables, loads = {}, {}
    for t in range(rng.randint(1, 4)):
        name = f"table{t}"
        tables[name] = Table(int(10 ** rng.uniform(1, 6)), rng.choice(widths))
        for f in range(rng.choice([0, 1, 1, 1, 2])):
            loads[f"{name}.{f}"] = Load(name, bags * rng.choice([1, 1, 5, 50]))
    options = {"num_devices": devices, "batch_size": devices * bags, "spare": 0}
    return tables, loads, options | {"memory": int(10 ** rng.uniform(6.8, 9))}

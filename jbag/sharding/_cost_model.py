"""The planner's cost model: bytes sent and held per strategy, and a greedy search."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jbag._mesh.row_exchange import default_rows_per_round
from jbag._mesh.row_layout import Lanes
from jbag._mesh.strategies import ShardingType
from jbag.ops._row_gather import accumulation_dtype
from jbag.ops.kernels.update_rules import Rule

Choice = dict[str, ShardingType]
Cost = tuple[float, float, float]  # bytes: sent forward, sent backward, held


class TableLoad(NamedTuple):
    """The load of one table, or of stacked tables, on a device."""

    embedding_dim: int
    dtype: np.dtype
    rows: int
    slots: int
    weights: int
    num_features: int
    num_pooled: int  # of these features
    unpooled_slots: int  # of these slots
    distinct: int
    rows_per_round: Any  # the sum over features that set it
    default_slots: int  # the slots of features that do not set it


class CostModel(NamedTuple):
    """Compute the bytes that a device sends and holds; `_planner` has the formulas."""

    num_devices: int
    num_bags: int  # per feature and device
    grid: int
    rule: Rule

    def cost(self, strategy: ShardingType, load: TableLoad) -> Cost:
        """Return the bytes that a device sends forward and backward, and holds."""
        P, D, n, f = self.num_devices, load.embedding_dim, load.slots, load.num_features
        r = load.num_pooled * self.num_bags + load.unpooled_slots
        V = load.rows if strategy == ShardingType.TABLE_WISE else self.padded_rows(load)
        e, a = load.dtype.itemsize, accumulation_dtype(load.dtype).itemsize
        per_element = D * (e + len(self.rule.per_element) * a)
        per_row = len(self.rule.per_row) * a
        ids, pooled, times = 4 * n + a * load.weights, r * D, P - 1
        rows, held = min(P * n, V), V * (per_element + per_row)
        forward, backward = ids + 4 * r + pooled * a, pooled * a
        if strategy == ShardingType.DATA_PARALLEL:
            rows = min(n, load.rows)
            forward, backward = 0, rows * (4 + a * D)
        elif strategy == ShardingType.ROW_WISE:
            rows, held = min(n, V), -(-held // P)
            C, rounds = self.routing(load)
            forward, backward, times = C * (4 + e * D), C * (4 + a * D), times * rounds
        elif strategy == ShardingType.COLUMN_WISE:
            D, held = D // P, V * (per_element // P + per_row)
            forward = ids + 4 * f * (self.num_bags + 1) + pooled // P * e
            backward = pooled // P * a + (2 * rows * a // P if per_row else 0)
        held += 2 * P * (forward + backward) + 3 * rows * a * D
        return times * forward, times * backward, held

    def padded_rows(self, load: TableLoad) -> int:
        """Return V', the rows rounded up to a multiple of the grid."""
        return -(-load.rows // self.grid) * self.grid

    def routing(self, load: TableLoad) -> tuple[Any, int]:
        """Return C and the likely number of rounds for uniformly distributed ids.

        With this number, the expected number of full buckets over all devices is below
        one, by Chernoff's bound for the Poisson distribution.
        """
        default = default_rows_per_round(load.default_slots, self.num_devices)
        C, rounds = min(load.rows_per_round + default, load.slots), 1
        rows = self.padded_rows(load)
        while min(load.distinct, -(-rows // (self.num_devices * rounds))) > C:
            mean = load.distinct / (self.num_devices * rounds)
            exponent = mean - (C + 1) + (C + 1) * math.log((C + 1) / mean)
            if mean < C and exponent > math.log(self.num_devices**2 * rounds):
                break
            rounds *= 2
        return C, rounds

    def lanes(self, stack: Sequence[TableLoad]) -> tuple[int, ...]:
        """Return the device of each table of a table-wise stack."""
        return Lanes(tuple(table.rows for table in stack), self.num_devices).lanes

    def combined(self, strategy: ShardingType, stack: Sequence[TableLoad]) -> TableLoad:
        """Return the summed load of a stack; table-wise, the maximum over devices."""
        numbers = np.array([table[2:] for table in stack], np.int64)
        if strategy == ShardingType.TABLE_WISE:
            per_device = np.zeros((self.num_devices, numbers.shape[1]), np.int64)
            np.add.at(per_device, list(self.lanes(stack)), numbers)
            return TableLoad(*stack[0][:2], *per_device.max(0).tolist())
        return TableLoad(*stack[0][:2], *numbers.sum(0).tolist())

    def shares(
        self, strategy: ShardingType, stack: Sequence[TableLoad]
    ) -> Iterator[Cost]:
        """Divide the cost of a stack in proportion to the cost of each table alone."""
        combined = self.combined(strategy, stack)
        if strategy == ShardingType.ROW_WISE:  # each table has a share of C
            part = self.routing(combined)[0] / max(combined.slots, 1)
            stack = [
                x._replace(rows_per_round=part * x.slots, default_slots=0, distinct=0)
                for x in stack
            ]
        alone = zip(*(self.cost(strategy, table) for table in stack), strict=True)
        return zip(*map(_apportion, self.cost(strategy, combined), alone), strict=True)

    def warnings(
        self, strategy: ShardingType, stack: Sequence[TableLoad]
    ) -> Iterator[str]:
        """Yield warnings about a stack."""
        load, count = self.combined(strategy, stack), len(stack)
        D, P = load.embedding_dim, self.num_devices
        if strategy == ShardingType.COLUMN_WISE and D // P < 16:
            yield (
                f"column-wise tables of {D} features have {D // P} per device; fewer "
                "than 16 are slow."
            )
        if strategy == ShardingType.ROW_WISE and (routing := self.routing(load))[1] > 1:
            yield (
                f"row-wise tables of {D} features need {routing[1]} rounds; a bucket "
                f"holds {routing[0]} ids."
            )
        if strategy == ShardingType.TABLE_WISE and count < P:
            yield (
                f"table-wise tables of {D} features number {count} for {P} devices; "
                "devices without a table allocate and send as much as the others."
            )
        if (
            rows := load.rows
            if strategy == ShardingType.TABLE_WISE
            else self.padded_rows(load)
        ) >= 1 << 31:
            yield (
                f"{rows} rows of {D} features in one array exceed the range of "
                "32-bit ids."
            )


def choose(model: CostModel, loads: Mapping[str, TableLoad], limit: int) -> Choice:
    """Return the sharding type of each table, by greedy descent from uniform starts."""

    @functools.cache
    def cost(strategy: ShardingType, names: tuple[str, ...]) -> Cost:
        stack = [loads[name] for name in names]
        return model.cost(strategy, model.combined(strategy, stack))

    def objective(choice: Choice) -> tuple[float, float, float]:
        costs = itertools.starmap(cost, stacks_of(loads, choice))
        forward, backward, held = map(sum, zip(*costs, strict=True))
        return max(0, held - limit), forward + backward, held

    types = (
        list(ShardingType) if model.num_devices > 1 else [ShardingType.DATA_PARALLEL]
    )
    indivisible = {
        name for name, table in loads.items() if table.embedding_dim % model.num_devices
    }

    def neighbors(choice: Choice, together: bool) -> Iterator[Choice]:
        """Yield the choices that change one table, or one array if `together`."""
        arrays = [names for _, names in stacks_of(loads, choice)] if together else []
        for names in [(name,) for name in loads] + arrays:
            for sharding_type in types:
                if sharding_type != ShardingType.COLUMN_WISE or indivisible.isdisjoint(
                    names
                ):
                    yield choice | dict.fromkeys(names, sharding_type)

    candidates = []
    for sharding_type in types:
        if sharding_type != ShardingType.COLUMN_WISE or not indivisible:
            candidate = dict.fromkeys(loads, sharding_type)
            for together in (False, True):
                steps = functools.partial(neighbors, together=together)
                candidate = _descend(candidate, steps, objective)
            candidates.append(candidate)
    return min(candidates, key=objective)


def _descend(
    choice: Choice,
    neighbors: Callable[[Choice], Iterator[Choice]],
    objective: Callable[[Choice], tuple[float, float, float]],
) -> Choice:
    """Change the choice until no neighbor is better, the largest gain first."""
    while True:
        now, better = objective(choice), []
        for other in neighbors(choice):
            then = objective(other)
            if then < now:
                saved, more = now[0] - then[0], then[1] - now[1]
                changed = sorted(other.items() - choice.items())
                better.append((more / (saved or 1), changed))
        if not better:
            return choice
        for _, changed in sorted(better):
            if objective(choice | dict(changed)) < objective(choice):
                choice = choice | dict(changed)


def stacks_of(
    loads: Mapping[str, TableLoad], choice: Choice
) -> list[tuple[ShardingType, tuple[str, ...]]]:
    """Return the tables of each array: of one sharding type, width and dtype."""
    stacks: dict[Any, list[str]] = {}
    for name, table in loads.items():
        stacks.setdefault((choice[name], *table[:2]), []).append(name)
    return [(kind[0], tuple(names)) for kind, names in stacks.items()]


def _apportion(total: float, wanted: Sequence[float]) -> list[int]:
    """Return integers in these proportions that sum to the total."""
    *ends, whole = itertools.accumulate(wanted)
    if whole == 0:
        return [0] * len(wanted)
    bounds = [0, *(round(total * end / whole) for end in ends), int(total)]
    return [end - start for start, end in itertools.pairwise(bounds)]

"""The cost model of `_planner`: what tables send and hold; the best sharding types."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jbag._mesh.all_to_all import default_rows_per_round
from jbag._mesh.partition_specs import ShardingType
from jbag._mesh.row_layout import Lanes
from jbag.ops._row_gather import accumulation_dtype
from jbag.ops.kernels.update_rules import Rule

Choice = dict[str, ShardingType]
Cost = tuple[float, float, float]  # bytes sent forward, backward; held


class TableLoad(NamedTuple):
    """The load of a table, or of several as one, on a device."""

    embedding_dim: int
    dtype: np.dtype
    rows: int
    slots: int
    weights: int
    num_features: int
    distinct: int
    rows_per_round: Any  # the sum of those given
    default_slots: int  # slots of features without one


class CostModel(NamedTuple):
    """The bytes that tables send and hold, on so many devices, with a rule's state."""

    num_devices: int
    num_bags: int  # of a feature on a device
    grid: int
    rule: Rule

    def cost(self, strategy: ShardingType, load: TableLoad) -> Cost:
        """Return the bytes sent forward and backward, and held."""
        P, D, n, f = self.num_devices, load.embedding_dim, load.slots, load.num_features
        V = load.rows if strategy == ShardingType.TABLE_WISE else self.padded(load)
        e, a = load.dtype.itemsize, accumulation_dtype(load.dtype).itemsize
        per_element = D * (e + len(self.rule.per_element) * a)
        per_row = len(self.rule.per_row) * a
        ids, pooled, times = 4 * n + a * load.weights, f * self.num_bags * D, P - 1
        rows, held = min(P * n, V), V * (per_element + per_row)
        forward, backward = ids + 4 * f * self.num_bags + pooled * a, pooled * a
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

    def padded(self, load: TableLoad) -> int:
        """Return the rows of the array, whose columns are alike."""
        return -(-load.rows // self.grid) * self.grid

    def routing(self, load: TableLoad) -> tuple[Any, int]:
        """Return C, and the rounds that are likely if ids fall evenly on owners.

        By Chernoff's bound on Poisson's law, less than one of all devices' buckets is
        expected to overflow then.
        """
        default = default_rows_per_round(load.default_slots, self.num_devices)
        C, rounds = min(load.rows_per_round + default, load.slots), 1
        while (
            min(load.distinct, -(-self.padded(load) // (self.num_devices * rounds))) > C
        ):
            mean = load.distinct / (self.num_devices * rounds)
            exponent = mean - (C + 1) + (C + 1) * math.log((C + 1) / mean)
            if mean < C and exponent > math.log(self.num_devices**2 * rounds):
                break
            rounds *= 2
        return C, rounds

    def lanes(self, stack: Sequence[TableLoad]) -> tuple[int, ...]:
        """Return the devices that whole tables lie on."""
        return Lanes(tuple(table.rows for table in stack), self.num_devices).lanes

    def combined(self, strategy: ShardingType, stack: Sequence[TableLoad]) -> TableLoad:
        """Return the load of tables as one, or of the device that has the largest."""
        numbers = np.array([table[2:] for table in stack], np.int64)
        if strategy == ShardingType.TABLE_WISE:
            dealt = np.zeros((self.num_devices, numbers.shape[1]), np.int64)
            np.add.at(dealt, list(self.lanes(stack)), numbers)
            return TableLoad(*stack[0][:2], *dealt.max(0).tolist())
        return TableLoad(*stack[0][:2], *numbers.sum(0).tolist())

    def shares(
        self, strategy: ShardingType, stack: Sequence[TableLoad]
    ) -> Iterator[Cost]:
        """Share what tables cost as one in proportion to what each costs alone."""
        joined = self.combined(strategy, stack)
        if strategy == ShardingType.ROW_WISE:  # alone, with its part of C
            part = self.routing(joined)[0] / max(joined.slots, 1)
            stack = [
                x._replace(rows_per_round=part * x.slots, default_slots=0, distinct=0)
                for x in stack
            ]
        alone = zip(*(self.cost(strategy, table) for table in stack), strict=True)
        return zip(*map(_apportion, self.cost(strategy, joined), alone), strict=True)

    def warnings(
        self, strategy: ShardingType, stack: Sequence[TableLoad]
    ) -> Iterator[str]:
        """Say what to mind about tables of one kind."""
        load, count = self.combined(strategy, stack), len(stack)
        D, P = load.embedding_dim, self.num_devices
        if strategy == ShardingType.COLUMN_WISE and D // P < 16:
            yield (
                f"of {D} features in columns a device has {D // P}; reading fewer than "
                "16 is slow."
            )
        if strategy == ShardingType.ROW_WISE and (routing := self.routing(load))[1] > 1:
            yield (
                f"rows of {D} features are sent in {routing[1]} rounds, as buckets "
                f"take {routing[0]} ids."
            )
        if strategy == ShardingType.TABLE_WISE and count < P:
            yield (
                f"whole tables of {D} features are {count} for {P} devices; all set "
                "aside and send as much as those that have one."
            )
        if (
            rows := load.rows
            if strategy == ShardingType.TABLE_WISE
            else self.padded(load)
        ) >= 1 << 31:
            yield (
                f"{rows} rows of {D} features in one array are more than 32-bit "
                "ids count."
            )


def choose(model: CostModel, loads: Mapping[str, TableLoad], limit: int) -> Choice:
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
        """Yield the choices that are one table's step away, or one array's."""
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
    """Change the choice while that helps, first what helps most."""
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
    """Return, by sharding types, the names of tables that lie and send as one."""
    stacks: dict[Any, list[str]] = {}
    for name, table in loads.items():
        stacks.setdefault((choice[name], *table[:2]), []).append(name)
    return [(kind[0], tuple(names)) for kind, names in stacks.items()]


def _apportion(total: float, wanted: Sequence[float]) -> list[int]:
    """Return integers that sum up to the total, in these proportions."""
    *ends, whole = itertools.accumulate(wanted)
    if whole == 0:
        return [0] * len(wanted)
    bounds = [0, *(round(total * end / whole) for end in ends), int(total)]
    return [end - start for start, end in itertools.pairwise(bounds)]

"""What tables send and hold, by the formulas of `_planner`, and the best strategies."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jbag._mesh.all_to_all import default_capacity
from jbag._mesh.row_layout import Lanes
from jbag.ops._row_gather import accumulation_dtype
from jbag.ops.kernels.update_rules import Rule

STRATEGIES = ("replicated", "columns", "whole", "rows")

Choice = dict[str, str]
Cost = tuple[float, float, float]  # bytes sent forward, backward; held


class Asked(NamedTuple):
    """What a table, or several as one, ask of a device."""

    width: int
    dtype: np.dtype
    rows: int
    slots: int
    weights: int
    features: int
    distinct: int
    given: Any  # of the capacity
    free: int  # slots whose capacity isn't given


class Site(NamedTuple):
    devices: int
    bags: int  # of a feature on a device
    grid: int
    rule: Rule

    def cost(self, strategy: str, asked: Asked) -> Cost:
        """Return the bytes sent forward and backward, and held."""
        P, D, n, f = self.devices, asked.width, asked.slots, asked.features
        V = asked.rows if strategy == "whole" else self.padded(asked)
        e, a = asked.dtype.itemsize, accumulation_dtype(asked.dtype).itemsize
        per_element = D * (e + len(self.rule.per_element) * a)
        per_row = len(self.rule.per_row) * a
        ids, pooled, times = 4 * n + a * asked.weights, f * self.bags * D, P - 1
        rows, held = min(P * n, V), V * (per_element + per_row)
        there, back = ids + 4 * f * self.bags + pooled * a, pooled * a
        if strategy == "replicated":
            rows = min(n, asked.rows)
            there, back = 0, rows * (4 + a * D)
        elif strategy == "rows":
            rows, held = min(n, V), -(-held // P)
            C, rounds = self.routing(asked)
            there, back, times = C * (4 + e * D), C * (4 + a * D), times * rounds
        elif strategy == "columns":
            D, held = D // P, V * (per_element // P + per_row)
            there = ids + 4 * f * (self.bags + 1) + pooled // P * e
            back = pooled // P * a + (2 * rows * a // P if per_row else 0)
        held += 2 * P * (there + back) + 3 * rows * a * D
        return times * there, times * back, held

    def padded(self, asked: Asked) -> int:
        """Return the rows of the array, whose columns are alike."""
        return -(-asked.rows // self.grid) * self.grid

    def routing(self, asked: Asked) -> tuple[Any, int]:
        """Return C, and the rounds that are likely if ids fall evenly on owners.

        By Chernoff's bound on Poisson's law, less than one of all devices' buckets is
        expected to overflow then.
        """
        ample = default_capacity(asked.free, self.devices)
        C, rounds = min(asked.given + ample, asked.slots), 1
        while (
            min(asked.distinct, -(-self.padded(asked) // (self.devices * rounds))) > C
        ):
            mean = asked.distinct / (self.devices * rounds)
            surprise = mean - (C + 1) + (C + 1) * math.log((C + 1) / mean)
            if mean < C and surprise > math.log(self.devices**2 * rounds):
                break
            rounds *= 2
        return C, rounds

    def lanes(self, stack: Sequence[Asked]) -> tuple[int, ...]:
        """Return the devices that whole tables lie on."""
        return Lanes(tuple(table.rows for table in stack), self.devices).lanes

    def together(self, strategy: str, stack: Sequence[Asked]) -> Asked:
        """Return what tables ask as one, or of the device of which they ask most."""
        numbers = np.array([table[2:] for table in stack], np.int64)
        if strategy == "whole":
            dealt = np.zeros((self.devices, numbers.shape[1]), np.int64)
            np.add.at(dealt, list(self.lanes(stack)), numbers)
            return Asked(*stack[0][:2], *dealt.max(0).tolist())
        return Asked(*stack[0][:2], *numbers.sum(0).tolist())

    def shares(self, strategy: str, stack: Sequence[Asked]) -> Iterator[Cost]:
        """Share what tables cost as one in proportion to what each costs alone."""
        joined = self.together(strategy, stack)
        if strategy == "rows":  # alone, with its part of C
            part = self.routing(joined)[0] / max(joined.slots, 1)
            stack = [
                x._replace(given=part * x.slots, free=0, distinct=0) for x in stack
            ]
        alone = zip(*(self.cost(strategy, table) for table in stack), strict=True)
        return zip(*map(_share_out, self.cost(strategy, joined), alone), strict=True)

    def warnings(self, strategy: str, stack: Sequence[Asked]) -> Iterator[str]:
        """Say what to mind about tables of one kind."""
        asked, count = self.together(strategy, stack), len(stack)
        D, P = asked.width, self.devices
        if strategy == "columns" and D // P < 16:
            yield (
                f"of {D} features in columns a device has {D // P}; reading fewer than "
                "16 is slow."
            )
        if strategy == "rows" and (routing := self.routing(asked))[1] > 1:
            yield (
                f"rows of {D} features travel in {routing[1]} rounds, as buckets take "
                f"{routing[0]} ids."
            )
        if strategy == "whole" and count < P:
            yield (
                f"whole tables of {D} features are {count} for {P} devices; all set "
                "aside and send as much as those that have one."
            )
        if (
            rows := asked.rows if strategy == "whole" else self.padded(asked)
        ) >= 1 << 31:
            yield (
                f"{rows} rows of {D} features in one array are more than 32-bit "
                "ids count."
            )


def choose(site: Site, asked: Mapping[str, Asked], limit: int) -> Choice:
    @functools.cache
    def cost(strategy: str, names: tuple[str, ...]) -> Cost:
        stack = [asked[name] for name in names]
        return site.cost(strategy, site.together(strategy, stack))

    def price(choice: Choice) -> tuple[float, float, float]:
        costs = itertools.starmap(cost, stacks_of(asked, choice))
        there, back, held = map(sum, zip(*costs, strict=True))
        return max(0, held - limit), there + back, held

    ways = STRATEGIES if site.devices > 1 else STRATEGIES[:1]
    odd = {name for name, table in asked.items() if table.width % site.devices}

    def others(choice: Choice, together: bool) -> Iterator[Choice]:
        """Yield the choices that are one table's step away, or one array's."""
        arrays = [names for _, names in stacks_of(asked, choice)] if together else []
        for names in [(name,) for name in asked] + arrays:
            for way in ways:
                if way != "columns" or odd.isdisjoint(names):
                    yield choice | dict.fromkeys(names, way)

    ends = []
    for way in ways:
        if way != "columns" or not odd:
            end = dict.fromkeys(asked, way)
            for together in (False, True):
                steps = functools.partial(others, together=together)
                end = _settle(end, steps, price)
            ends.append(end)
    return min(ends, key=price)


def _settle(
    choice: Choice,
    others: Callable[[Choice], Iterator[Choice]],
    price: Callable[[Choice], tuple[float, float, float]],
) -> Choice:
    """Change the choice while that helps, first what helps most."""
    while True:
        now, better = price(choice), []
        for other in others(choice):
            then = price(other)
            if then < now:
                saved, more = now[0] - then[0], then[1] - now[1]
                changed = sorted(other.items() - choice.items())
                better.append((more / (saved or 1), changed))
        if not better:
            return choice
        for _, changed in sorted(better):
            if price(choice | dict(changed)) < price(choice):
                choice = choice | dict(changed)


def stacks_of(
    asked: Mapping[str, Asked], choice: Choice
) -> list[tuple[str, tuple[str, ...]]]:
    """Return, by strategies, the names of tables that lie and send as one."""
    stacks: dict[Any, list[str]] = {}
    for name, table in asked.items():
        stacks.setdefault((choice[name], *table[:2]), []).append(name)
    return [(kind[0], tuple(names)) for kind, names in stacks.items()]


def _share_out(total: float, wanted: Sequence[float]) -> list[int]:
    """Return integers that sum up to the total, in these proportions."""
    *ends, whole = itertools.accumulate(wanted)
    if whole == 0:
        return [0] * len(wanted)
    bounds = [0, *(round(total * end / whole) for end in ends), int(total)]
    return [end - start for start, end in itertools.pairwise(bounds)]

"""Input dist and output dist: bags are sent to the tables that pool them, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jbag._mesh.gradients import AllGatheredGradients, LocalGradients
from jbag._mesh.partition_specs import Strategy
from jbag._mesh.row_layout import Lanes
from jbag.collection._stacking import Bag, Launch, Stack, size
from jbag.ragged._concatenate import concatenate_bags, concatenate_slots, to_ragged
from jbag.ragged._csr import PAD_ID

Bags = Mapping[str, Bag]


def own_block(bags: Bags) -> Bags:
    """Return a device's bags from its block: a ragged one has an axis of one."""
    return {
        name: bag if bag.offsets is None else Bag(*_first(tuple(bag)))
        for name, bag in bags.items()
    }


def _first(arrays: Any) -> Any:
    return jax.tree.map(lambda x: x[0], arrays)


class Exchange:
    """How the features of a launch are pooled where the table is.

    Attributes:
      placement: of the gradient.
      bags: the spec of the features' bags, as `input_dist` takes them.
      columns: the axes over which the table's columns are cut, or None.
      replicas: the axes over which the batch is cut, where a device has a part of it.
    """

    placement: LocalGradients
    bags: P
    columns: Any = None
    replicas: Any = None

    def __init__(self, stack: Stack, launch: Launch, strategy: Strategy) -> None:
        self.stack, self.launch, self.strategy = stack, launch, strategy
        self.bags = strategy.blocks

    def input_dist(self, bags: Bags) -> tuple[Array, Any, Any]:
        """Return ids, offsets and weights of the bags that this device pools."""
        return self.launch.join(self.stack, [own_block(bags)])

    def first_row(self, rows: int) -> Array | int:
        """Return the number of the first of this device's rows."""
        del rows
        return 0

    def output_dist(self, total: Array, bags: Bags) -> Array:
        """Return the rows of this device's own bags."""
        del bags
        return total


class _Alone(Exchange):
    """One device has all: nothing travels, whatever the spec is."""

    def __init__(self, stack: Stack, launch: Launch, strategy: Strategy) -> None:
        super().__init__(stack, launch, strategy)
        self.placement = LocalGradients(
            strategy, P(strategy.batch, None), P(strategy.batch)
        )


class _Replicated(Exchange):
    def __init__(self, stack: Stack, launch: Launch, strategy: Strategy) -> None:
        super().__init__(stack, launch, strategy)
        rows = sum(table.num_embeddings for table in stack.tables)
        spec = P(strategy.batch, None)
        self.placement = AllGatheredGradients(strategy, spec, strategy.blocks, rows)
        self.replicas = strategy.batch


class _Columns(Exchange):
    """All bags go to every device, which pools some of the columns."""

    def __init__(self, stack: Stack, launch: Launch, strategy: Strategy) -> None:
        super().__init__(stack, launch, strategy)
        self.placement = LocalGradients(strategy, strategy.table, P())
        self.bags = P()
        self.columns = strategy.batch

    def input_dist(self, bags: Bags) -> tuple[Array, Any, Any]:
        blocks = []
        for block in range(self.strategy.size):
            own = {}
            for name, bag in bags.items():
                if bag.offsets is None:
                    rows = bag.ids.shape[0] // self.strategy.size
                    span = slice(block * rows, (block + 1) * rows)
                    own[name] = Bag(*jax.tree.map(lambda x, s=span: x[s], tuple(bag)))
                else:
                    own[name] = Bag(*jax.tree.map(lambda x, b=block: x[b], tuple(bag)))
            blocks.append(own)
        return self.launch.join(self.stack, blocks)

    def output_dist(self, total: Array, bags: Bags) -> Array:
        del bags
        if self.strategy.size == 1:
            return total
        return jax.lax.all_to_all(total, self.strategy.batch, 0, 1, tiled=True)


class _WholeTables(Exchange):
    """Each feature's bags go to the device that has its table."""

    def __init__(self, stack: Stack, launch: Launch, strategy: Strategy) -> None:
        super().__init__(stack, launch, strategy)
        self.placement = LocalGradients(
            strategy, P(strategy.batch, None), P(strategy.batch)
        )
        assert isinstance(stack.layout, Lanes)
        lanes = stack.layout.num_lanes // strategy.size
        self.dealt: list[list[int]] = [[] for _ in range(strategy.size)]
        for at, table in enumerate(launch.tables):
            lane = stack.layout.lanes[stack.names.index(table)]
            self.dealt[lane // lanes].append(at)
        self.most = max(map(len, self.dealt))

    def input_dist(self, bags: Bags) -> tuple[Array, Any, Any]:
        bags = own_block(bags)
        launch, sending = self.launch, []
        for own in self.dealt:
            parts, values = [], []
            for at in own:
                bag = bags[launch.features[at]]
                ids = self.stack.place(launch.tables[at], bag.ids)
                parts.append(to_ragged(ids, bag.offsets))
                if bag.weights is not None:
                    values.append(bag.weights.reshape(-1))
            like = bags[launch.features[0]]
            for _ in range(self.most - len(own)):
                parts.append(_no_bags(like))
                if like.weights is not None:
                    values.append(jnp.zeros(0, like.weights.dtype))
            ids, offsets = concatenate_bags(parts)
            weights = concatenate_slots(parts, values) if values else None
            sending.append(Bag(ids, offsets, weights))
        room = max(bag.ids.size for bag in sending)
        sending = [
            Bag(
                _pad(bag.ids, room, PAD_ID),
                bag.offsets,
                None if bag.weights is None else _pad(bag.weights, room, 0),
            )
            for bag in sending
        ]
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *map(tuple, sending))
        got = Bag(*jax.tree.map(self._all_to_all, stacked))
        sources = range(self.strategy.size)
        assert got.offsets is not None
        parts = [(got.ids[p], got.offsets[p]) for p in sources]
        ids, offsets = concatenate_bags(parts)
        if got.weights is None:
            return ids, offsets, None
        return ids, offsets, concatenate_slots(parts, [got.weights[p] for p in sources])

    def first_row(self, rows: int) -> Array | int:
        return jax.lax.axis_index(self.strategy.batch) * rows

    def output_dist(self, total: Array, bags: Bags) -> Array:
        count = size(bags[self.launch.features[0]])
        got = self._all_to_all(total.reshape(self.strategy.size, -1, total.shape[1]))
        rows = {}
        for owner, own in enumerate(self.dealt):
            for place, at in enumerate(own):
                rows[at] = got[owner, place * count : (place + 1) * count]
        return jnp.concatenate([rows[at] for at in range(len(rows))])

    def _all_to_all(self, x: Array) -> Array:
        if self.strategy.size == 1:
            return x
        return jax.lax.all_to_all(x, self.strategy.batch, 0, 0)


def exchange(stack: Stack, launch: Launch, strategy: Strategy) -> Exchange:
    """Return the exchange that a strategy is."""
    kinds = {"replicated": _Replicated, "columns": _Columns, "whole": _WholeTables}
    kind = kinds[strategy.name] if strategy.size > 1 else _Alone
    return kind(stack, launch, strategy)


def _no_bags(like: Bag) -> tuple[Array, Array]:
    """Return as many empty bags."""
    return jnp.zeros(0, jnp.int32), jnp.zeros(size(like) + 1, jnp.int32)


def _pad(x: Array, room: int, fill: int) -> Array:
    return jnp.pad(x, (0, room - x.size), constant_values=fill)

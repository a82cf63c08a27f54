"""Input dist of bags to the devices that pool them; output dist of pooled rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jbag._mesh.gradient_placements import AllGatheredGradients, LocalGradients
from jbag._mesh.row_layout import Lanes
from jbag._mesh.strategies import ShardingType, Strategy
from jbag.collection._stacking import Bag, Launch, Stack
from jbag.ragged._concatenate import concatenate_bags, concatenate_slots, to_ragged
from jbag.ragged._csr_arrays import PAD_ID

Bags = Mapping[str, Bag]


def own_block(bags: Bags) -> Bags:
    """Return a device's bags from its block; ragged bags lose their axis of size 1."""
    return {
        name: bag if bag.offsets is None else Bag(*_first(tuple(bag)))
        for name, bag in bags.items()
    }


def _first(arrays: Any) -> Any:
    return jax.tree.map(lambda x: x[0], arrays)


class BagDist:
    """Send the bags of a launch to the table, and the pooled rows to the batch.

    Attributes:
      placement: the placement of the gradient.
      bags: the spec of the bags that `input_dist` takes.
      columns: the mesh axes that shard the columns of the table, or None.
      replicas: the mesh axes that shard the batch of a data-parallel table, or None.
    """

    placement: LocalGradients
    bags: P
    columns: Any = None
    replicas: Any = None

    def __init__(self, stack: Stack, launch: Launch, strategy: Strategy) -> None:
        self.stack, self.launch, self.strategy = stack, launch, strategy
        self.bags = strategy.blocks

    def input_dist(self, bags: Bags) -> tuple[Array, Any, Any]:
        """Return the ids, offsets and weights of the bags that this device pools."""
        return self.launch.join(self.stack, [own_block(bags)])

    def first_row(self, rows: int) -> Array | int:
        """Return the first row of this device's shard."""
        del rows
        return 0

    def output_dist(self, total: Array, bags: Bags) -> Array:
        """Return the pooled rows of this device's block of the batch."""
        del bags
        return total


class _OneDeviceDist(BagDist):
    """Pool on one device; send nothing."""

    def __init__(self, stack: Stack, launch: Launch, strategy: Strategy) -> None:
        super().__init__(stack, launch, strategy)
        self.placement = LocalGradients(
            strategy, P(strategy.batch, None), P(strategy.batch)
        )


class _DataParallelDist(BagDist):
    """Pool each block of the batch on its own device; send nothing."""

    def __init__(self, stack: Stack, launch: Launch, strategy: Strategy) -> None:
        super().__init__(stack, launch, strategy)
        rows = sum(table.num_embeddings for table in stack.tables)
        spec = P(strategy.batch, None)
        self.placement = AllGatheredGradients(strategy, spec, strategy.blocks, rows)
        self.replicas = strategy.batch


class _ColumnWiseDist(BagDist):
    """All-gather the bags; pool a part of the columns; all-to-all the result."""

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


class _TableWiseDist(BagDist):
    """All-to-all the bags to the device of their table, and the pooled rows back."""

    def __init__(self, stack: Stack, launch: Launch, strategy: Strategy) -> None:
        super().__init__(stack, launch, strategy)
        self.placement = LocalGradients(
            strategy, P(strategy.batch, None), P(strategy.batch)
        )
        assert isinstance(stack.layout, Lanes)
        lanes = stack.layout.num_lanes // strategy.size
        self.features_of_device: list[list[int]] = [[] for _ in range(strategy.size)]
        for at, table in enumerate(launch.tables):
            lane = stack.layout.lanes[stack.names.index(table)]
            self.features_of_device[lane // lanes].append(at)

    def input_dist(self, bags: Bags) -> tuple[Array, Any, Any]:
        bags = own_block(bags)
        launch, to_send = self.launch, []
        sizes = launch.sizes(bags)
        most = max(self._num_bags(own, sizes) for own in self.features_of_device)
        for own in self.features_of_device:
            parts, values = [], []
            for at in own:
                bag = launch.place(self.stack, at, bags)
                parts.append(to_ragged(bag.ids, bag.offsets))
                if bag.weights is not None:
                    values.append(bag.weights.reshape(-1))
            like = bags[launch.features[0]]
            missing = most - self._num_bags(own, sizes)
            if missing or not parts:
                parts.append(_empty_bags(missing))
                if like.weights is not None:
                    values.append(jnp.zeros(0, like.weights.dtype))
            ids, offsets = concatenate_bags(parts)
            weights = concatenate_slots(parts, values) if values else None
            to_send.append(Bag(ids, offsets, weights))
        capacity = max(bag.ids.size for bag in to_send)
        to_send = [
            Bag(
                _pad(bag.ids, capacity, PAD_ID),
                bag.offsets,
                None if bag.weights is None else _pad(bag.weights, capacity, 0),
            )
            for bag in to_send
        ]
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *map(tuple, to_send))
        received = Bag(*jax.tree.map(self._all_to_all, stacked))
        sources = range(self.strategy.size)
        assert received.offsets is not None
        parts = [(received.ids[p], received.offsets[p]) for p in sources]
        ids, offsets = concatenate_bags(parts)
        if received.weights is None:
            return ids, offsets, None
        return (
            ids,
            offsets,
            concatenate_slots(parts, [received.weights[p] for p in sources]),
        )

    def first_row(self, rows: int) -> Array | int:
        return jax.lax.axis_index(self.strategy.batch) * rows

    def output_dist(self, total: Array, bags: Bags) -> Array:
        sizes = self.launch.sizes(bags)
        received = self._all_to_all(
            total.reshape(self.strategy.size, -1, total.shape[1])
        )
        rows = {}
        for owner, own in enumerate(self.features_of_device):
            first = 0
            for at in own:
                end = first + sizes[self.launch.features[at]]
                rows[at] = received[owner, first:end]
                first = end
        return jnp.concatenate([rows[at] for at in range(len(rows))])

    def _num_bags(self, own: list[int], sizes: Mapping[str, int]) -> int:
        return sum(sizes[self.launch.features[at]] for at in own)

    def _all_to_all(self, x: Array) -> Array:
        if self.strategy.size == 1:
            return x
        return jax.lax.all_to_all(x, self.strategy.batch, 0, 0)


def bag_dist(stack: Stack, launch: Launch, strategy: Strategy) -> BagDist:
    """Return the dist of a launch under a strategy."""
    dists = {
        ShardingType.DATA_PARALLEL: _DataParallelDist,
        ShardingType.COLUMN_WISE: _ColumnWiseDist,
        ShardingType.TABLE_WISE: _TableWiseDist,
    }
    dist = dists[strategy.sharding_type] if strategy.size > 1 else _OneDeviceDist
    return dist(stack, launch, strategy)


def _empty_bags(count: int) -> tuple[Array, Array]:
    """Return empty bags."""
    return jnp.zeros(0, jnp.int32), jnp.zeros(count + 1, jnp.int32)


def _pad(x: Array, capacity: int, fill: int) -> Array:
    return jnp.pad(x, (0, capacity - x.size), constant_values=fill)

"""Pooling of the features of stacked tables, on one device or over a mesh.

Over a mesh, a lookup is a sequence of `shard_map` programs. `value_and_grad` reads the
marks between the programs; it does not trace into them.

    row_wise                   deduplicate ids -> fetch rows (marked) -> pool
    column_wise, table_wise,   input dist, pool (marked) -> output dist, normalize
    data_parallel
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jbag._mesh.gradient_placements import AllToAllGradients
from jbag._mesh.row_exchange import (
    deduplicate,
    default_rows_per_round,
    fetch,
    router,
    sum_counts,
)
from jbag._mesh.strategies import ShardingType, Strategy, per_device
from jbag.collection._bag_dist import Bags, bag_dist, own_block
from jbag.collection._stacking import Bag, Launch, Stack, only_in_bags
from jbag.ops import _pooling
from jbag.ops._packed_table import AnyTable
from jbag.ops._pooling import CsrBags
from jbag.ops._row_gather import accumulation_dtype, take
from jbag.ops._sparse_marks import mark_pooled, mark_table
from jbag.ragged._csr_arrays import OUT_OF_RANGE_ID, PAD_ID

Pooled = dict[str, Float[Array, "*B D"]]


@functools.partial(
    jax.jit,
    static_argnames=("stack", "launches", "strategy", "sparse", "rows_per_round"),
)
def pool_stack(
    table: AnyTable,
    bags: Bags,
    *,
    stack: Stack,
    launches: tuple[Launch, ...],
    strategy: Strategy | None,
    sparse: bool,
    rows_per_round: int | None,
) -> Pooled:
    """Return each feature's pooled bags; over a mesh, sharded along the batch.

    An unpooled feature has a row for each slot: [*ids.shape, D].
    """
    if strategy is None:
        return _pool_on_one_device(table, bags, stack, launches, sparse)
    if sparse:
        table = mark_table(table)
    mapped = _Mapped(stack, launches, strategy, sparse)
    filled = _with_slots(bags, strategy)
    if strategy.sharding_type == ShardingType.ROW_WISE and strategy.size > 1:
        out = _pool_row_wise(table, filled, mapped, rows_per_round)
    else:
        out = _pool_with_dist(table, filled, mapped)
    for launch in launches:
        out |= launch.empty_rows(bags, table)
    return out


class Traffic(NamedTuple):
    """Count the rows that P devices exchange for a batch of a row-wise table.

    Attributes:
      rounds: the number of rounds, a power of two; 1 unless `rows_per_round` is too
        small for the batch.
      distinct: [P], the number of distinct rows that each device requests.
      requested: [P, P], the number of rows that device p requests from owner q.
      out_of_range: [P], the number of out-of-range ids on each device.

    Example:
      >>> collection = jbag.EmbeddingBagCollection(
      ...     tables={"words": jbag.Table(100, 4)},
      ...     features={"text": jbag.Feature("words")},
      ...     specs={"embedding": P("x", None)},
      ...     mesh=jax.make_mesh((1,), ("x",)),
      ... )
      >>> traffic = collection.traffic({"text": np.array([[1, 2], [2, 3]])})
      >>> traffic["embedding_4"].distinct
      Array([3], dtype=int32)
    """

    rounds: Int[Array, ""]
    distinct: Int[Array, " P"]
    requested: Int[Array, "P P"]
    out_of_range: Int[Array, " P"]


jax.export.register_namedtuple_serialization(
    Traffic, serialized_name="jbag.sharding.Traffic"
)


@functools.partial(
    jax.jit, static_argnames=("stack", "launches", "strategy", "rows_per_round")
)
def measure_traffic(
    bags: Bags,
    *,
    stack: Stack,
    launches: tuple[Launch, ...],
    strategy: Strategy,
    rows_per_round: int | None,
) -> Traffic:
    """Return the traffic of `pool_stack` with these arguments."""
    bags = _with_slots(bags, strategy)
    mapped = _Mapped(stack, launches, strategy, False)
    num_rows, rows_per_round = (
        stack.shape[0],
        mapped.rows_per_round(bags, rows_per_round),
    )

    def measure(bags: Bags) -> tuple[Array, ...]:
        bags = own_block(bags)
        ids = [only_in_bags(*launch.join(stack, [bags])[:2]) for launch in launches]
        named = jnp.concatenate([x.reshape(-1) for x in ids])
        unique, _ = deduplicate(named, num_rows)
        route = router(strategy, num_rows, unique.size, rows_per_round)
        rounds = jnp.asarray(route.rounds(unique), jnp.int32)
        owners = jnp.where(unique < num_rows, unique // route.shard, strategy.size)
        requested = jnp.zeros(strategy.size, jnp.int32).at[owners].add(1, mode="drop")
        count = requested.sum(dtype=requested.dtype)
        out_of_range = (named == OUT_OF_RANGE_ID).sum(dtype=jnp.int32)
        return rounds, count[None], requested[None], out_of_range[None]

    specs = (P(), strategy.blocks, strategy.blocks, strategy.blocks)
    return Traffic(*mapped.run(measure, (strategy.blocks,), specs, check=False)(bags))


def _pool_on_one_device(
    table: AnyTable,
    bags: Bags,
    stack: Stack,
    launches: Sequence[Launch],
    sparse: bool,
) -> Pooled:
    out: Pooled = {}
    for launch in launches:
        ids, offsets, weights = launch.join(stack, [bags])
        pooled = _pooling.pool(
            table,
            ids,
            offsets,
            weights,
            launch.norm(),
            pooling=launch.pooling,
            padding_idx=PAD_ID,
            sparse=sparse,
        )
        out |= launch.split(pooled, bags)
    return out


class _Mapped(NamedTuple):
    """The stack and the strategy of the programs that run over a mesh."""

    stack: Stack
    launches: tuple[Launch, ...]
    strategy: Strategy
    sparse: bool

    @property
    def rows(self) -> P:
        """The spec of matrices with bags or slots on the first axis."""
        return P(self.strategy.batch, None)

    def run(self, body: Any, in_specs: Any, out_specs: Any, check: bool = True) -> Any:
        return per_device(body, self.strategy, in_specs, out_specs, check=check)

    def rows_per_round(self, bags: Bags, given: int | None) -> int:
        """Return C: the given value, or the default for a device's slots."""
        if given is not None:
            return given
        slots = sum(
            bag.ids.size // self.strategy.size
            for launch in self.launches
            for bag in launch.own(bags).values()
        )
        return default_rows_per_round(slots, self.strategy.size)


def _with_slots(bags: Bags, strategy: Strategy) -> Bags:
    """Return bags with at least one slot per device: XLA cannot shard empty arrays."""

    def with_slot(bag: Bag) -> Bag:
        ids, offsets, weights = bag
        if ids.size:
            return bag
        if offsets is None:
            shape = (strategy.size, ids.shape[0] // strategy.size + 1)
            offsets = jnp.zeros(shape, ids.dtype)
        slot = (strategy.size, 1)  # outside every bag
        return Bag(
            jnp.zeros(slot, ids.dtype),
            jnp.where(offsets == 0, 0, -1),  # a malformed offset stays malformed
            None if weights is None else jnp.zeros(slot, weights.dtype),
        )

    return {name: with_slot(bag) for name, bag in bags.items()}


def _pool_row_wise(
    table: AnyTable, bags: Bags, mapped: _Mapped, rows_per_round: int | None
) -> Pooled:
    stack, launches, strategy, sparse = mapped
    blocks = strategy.blocks
    num_rows, rows_per_round = (
        stack.shape[0],
        mapped.rows_per_round(bags, rows_per_round),
    )
    implementation = launches[0].pooling.implementation

    def deduplicate_ids(bags: Bags) -> tuple[Array, Any, Any]:
        bags = own_block(bags)
        joined = [launch.join(stack, [bags])[:2] for launch in launches]
        named = [only_in_bags(*one) for one in joined]
        unique, inverse = deduplicate(
            jnp.concatenate([ids.reshape(-1) for ids in named]), num_rows
        )
        found: list[Any] = []
        counts: list[Array | None] = []
        first = 0
        for launch, ids, (_, offsets) in zip(launches, named, joined, strict=True):
            own = inverse[first : first + ids.size]
            first += ids.size
            found.append((own.reshape(ids.shape), offsets))
            if launch.pooling.scale_grad_by_freq:
                route = router(strategy, num_rows, unique.size, rows_per_round)
                dtype = accumulation_dtype(jnp.dtype(stack.dtype))
                own = jnp.where(own < 0, unique.size, own)
                count = jnp.zeros(unique.size, dtype).at[own].add(1, mode="drop")
                count = jnp.maximum(sum_counts(count, unique, route), 1)
                counts.append(take(count, own, 1).reshape(ids.shape))
            else:
                counts.append(None)
        return unique, found, counts

    unique, found, counts = mapped.run(deduplicate_ids, (blocks,), blocks, check=False)(
        bags
    )
    rows = fetch(
        table,
        unique,
        strategy=strategy,
        rows_per_round=rows_per_round,
        implementation=implementation,
    )
    if sparse:
        placement = AllToAllGradients(strategy, mapped.rows, blocks, rows_per_round)
        to_bags = mapped.run(lambda x: x[:, None], (blocks,), mapped.rows, check=False)
        rows = mark_pooled(
            rows,
            table,
            to_bags(unique),
            None,
            None,
            average=None,
            pad_id=None,
            implementation=implementation,
            placement=placement,
        )

    def pool(rows: Array, bags: Bags, found: Any, counts: Any) -> Pooled:
        own = own_block(bags)
        out: Pooled = {}
        for launch, (ids, offsets), count in zip(launches, found, counts, strict=True):
            _, _, weights = launch.join(stack, [own])
            pooled = _pooling.pool(
                rows,
                ids,
                offsets,
                weights,
                launch.norm(),
                count,
                pooling=launch.pooling,
                padding_idx=PAD_ID,
                sparse=False,
            )
            out |= launch.split(pooled, bags)
        return out

    specs = (mapped.rows, blocks, blocks, blocks)
    return mapped.run(pool, specs, mapped.rows)(rows, bags, found, counts)


def _pool_with_dist(table: AnyTable, bags: Bags, mapped: _Mapped) -> Pooled:
    out: Pooled = {}
    for launch in mapped.launches:
        out |= _launch_with_dist(table, launch.own(bags), mapped, launch)
    return out


def _launch_with_dist(
    table: AnyTable, bags: Bags, mapped: _Mapped, launch: Launch
) -> Pooled:
    stack, strategy = mapped.stack, mapped.strategy
    dist = bag_dist(stack, launch, strategy)
    spec, slots = dist.placement.cotangent, dist.placement.bags

    def combine(table: AnyTable, bags: Bags) -> tuple[Array, Array | None, CsrBags]:
        table = strategy.shard(table)
        ids, offsets, weights = dist.input_dist(bags)
        first = dist.first_row(table.shape[0])
        csr, _ = _pooling.prepare(
            table,
            jnp.where(ids < 0, ids, ids - first),
            offsets,
            weights,
            launch.norm(),
            pooling=launch.pooling,
            padding_idx=PAD_ID,
            columns=dist.columns,
            replicas=dist.replicas,
        )
        total, winners = _pooling.combine(
            table, csr, pooling=launch.pooling, pad_id=PAD_ID
        )
        ids = jnp.where(csr.ids < 0, csr.ids, csr.ids + first)
        return total, winners, csr._replace(ids=ids, value_scale=None)

    total, winners, csr = mapped.run(
        combine, (strategy.table, dist.bags), (spec, spec, slots)
    )(table, bags)
    if mapped.sparse:
        total = _pooling.mark(
            total,
            winners,
            table,
            csr,
            pooling=launch.pooling,
            pad_id=PAD_ID,
            placement=dist.placement,
        )

    def finish(total: Array, bags: Bags) -> Pooled:
        own = own_block(bags)
        like: Any = jax.ShapeDtypeStruct(stack.shape, table.dtype)
        pooling = launch.pooling._replace(scale_grad_by_freq=False)
        joined = launch.join(stack, [own])
        csr, pad_id = _pooling.prepare(
            like, *joined, pooling=pooling, padding_idx=PAD_ID
        )
        total = dist.output_dist(total, own)
        pooled = _pooling.finish(total, csr, like, pooling=pooling, pad_id=pad_id)
        return launch.split(pooled, bags)

    return mapped.run(finish, (spec, strategy.blocks), mapped.rows)(total, bags)

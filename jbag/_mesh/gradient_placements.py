"""Placements of the gradients of sharded tables.

The terms of the table's `RowSparse` gradient have one block per device. A placement
sends the blocks to the shards that they update, and runs the operation on each shard.
Row ids are those of the whole table, unless a docstring names the shard.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from jbag._mesh.row_exchange import router
from jbag._mesh.strategies import (
    SHARDED_BY_ROWS,
    ShardingType,
    Strategy,
    per_device,
    reshard,
)
from jbag.ops._factored_gradient import (
    ONE_DEVICE,
    FactoredGradient,
    TableStorage,
    concatenate_gradients,
)
from jbag.ops._packed_table import AnyTable, put_rows, take_rows
from jbag.ops._row_gather import accumulation_dtype
from jbag.ops._row_updates import coalesce, stack_scalars, update_rows
from jbag.ops._spmm import spmm_transpose
from jbag.ops.kernels import update_rules as rules
from jbag.ops.kernels import xla
from jbag.ragged import _csr_arrays
from jbag.ragged._csr_arrays import PAD_ID

Receive = Callable[[Any, FactoredGradient], Any]


@dataclasses.dataclass(frozen=True)
class LocalGradients(TableStorage):
    """Place the terms on the devices whose shards they update; send nothing.

    Attributes:
      strategy: the strategy of the table.
      cotangent: the spec of the cotangent.
      bags: the spec of ids, offsets and coefficients.
    """

    over_mesh: ClassVar[bool] = True

    strategy: Strategy
    cotangent: P
    bags: P

    @property
    def num_blocks(self) -> int:
        """The number of blocks of ids, offsets and coefficients."""
        return self.strategy.size if self.bags else 1

    def collect(
        self, terms: list[FactoredGradient], shape: Any, receive: Receive, carry: Any
    ) -> Any:
        """Fold `receive` over the terms that this device receives; return the carry.

        The terms have ids of the shard, of shape `shape`. All contributions to a row
        are in one term.
        """
        # `plain` needs the out-of-range ids, which `_to_shard_ids` drops.
        term = concatenate_gradients(terms, shape[1]).plain()
        return receive(carry, _to_shard_ids(term, self.strategy, shape[0]))

    def received_placement(self) -> LocalGradients:
        """Return the placement of received rows."""
        return self

    def max_rows(self, terms: Sequence[FactoredGradient], rows: int) -> int:
        """Return the largest number of distinct rows of the terms in a shard."""
        return min(rows, sum(term.ids.size for term in terms))

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return zeros with the sharding of the cotangent."""
        return reshard(jnp.zeros(shape, dtype), self.strategy, self.cotangent)

    def place_ids(self, ids: Int[Array, "B 1"]) -> Int[Array, "B 1"]:
        """Return ids with the sharding of those of bags."""
        return reshard(ids, self.strategy, self.bags)

    def update_rows(
        self,
        terms: Sequence[FactoredGradient],
        table: Float[Array, "V D"],
        states: tuple[Array, ...],
        scalars: Sequence[Any] | Array,
        seed: Array | None,
        *,
        rule: str,
    ) -> tuple[Array, ...]:
        """Update the rows of each shard by a rule; see `RowSparse.update_table`."""
        numbers = stack_scalars(scalars, accumulation_dtype(table.dtype))
        specs = tuple(self._spec(x) for x in (table, *states))
        # The mean square of a row is over the columns of all devices.
        is_column_wise = self.strategy.sharding_type == ShardingType.COLUMN_WISE
        sums_squares = is_column_wise and rules.rule_of(rule).reads_squares

        def update(
            arrays: tuple[Array, ...],
            numbers: Array,
            seed: Any,
            terms: list[FactoredGradient],
        ) -> tuple[Array, ...]:
            def receive(
                arrays: tuple[Array, ...], term: FactoredGradient
            ) -> tuple[Array, ...]:
                if sums_squares:
                    axes = self.strategy.batch
                    return _update_columns(term, arrays, numbers, seed, rule, axes)
                own, *states = map(self._shard_of, arrays)
                return term.apply(update_rows, own, states, numbers, seed, rule=rule)

            shape = self._shard_of(arrays[0]).shape
            return self.collect(_on_one_device(terms), shape, receive, arrays)

        run = per_device(
            update,
            self.strategy,
            (specs, P(), P(), self._gradient_specs(terms)),
            specs,
            check=False,
        )
        return run((table, *states), numbers, seed, list(terms))

    def todense(
        self, terms: Sequence[FactoredGradient], shape: tuple[int, ...], dtype: Any
    ) -> Float[Array, "V D"]:
        """Return the sum of the terms, dense, in the accumulation dtype."""
        dtype = accumulation_dtype(jnp.dtype(dtype))

        def add(terms: list[FactoredGradient]) -> Array:
            own = self._shard(shape)

            def receive(total: Array, term: FactoredGradient) -> Array:
                return total + term.apply(
                    spmm_transpose, num_embeddings=own[0], dtype=dtype
                )

            return self.collect(
                _on_one_device(terms), own, receive, jnp.zeros(own, dtype)
            )

        specs = (self._gradient_specs(terms),)
        run = per_device(add, self.strategy, specs, self.strategy.table, check=False)
        return run(list(terms))

    def flat(
        self, terms: Sequence[FactoredGradient], shape: tuple[int, ...], dtype: Any
    ) -> FactoredGradient:
        """Return the terms as bags of one id; they are also coalesced."""
        return self.coalesce(terms, shape, dtype)

    def coalesce(
        self, terms: Sequence[FactoredGradient], shape: tuple[int, ...], dtype: Any
    ) -> FactoredGradient:
        """Return one term with one sum per distinct row, on the owner of the row."""
        del dtype
        num_embeddings, width = shape
        received = self.received_placement()

        def gather(terms: list[FactoredGradient]) -> tuple[Array, Array]:
            own = self._shard((num_embeddings, width))
            terms = _on_one_device(terms)
            max_rows = self.max_rows(terms, own[0])

            def receive(
                carry: tuple[Any, ...], term: FactoredGradient
            ) -> tuple[Any, ...]:
                # Rounds cover increasing ranges of rows, so the indices are sorted.
                indices, sums, count = carry
                new_indices, rows = term.apply(coalesce, num_embeddings=own[0])
                slots = count + jnp.arange(new_indices.size, dtype=count.dtype)
                slots = jnp.where(new_indices < own[0], slots, max_rows)
                indices = indices.at[slots].set(new_indices, mode="drop")
                sums = sums.at[slots].set(rows.astype(sums.dtype), mode="drop")
                return (
                    indices,
                    sums,
                    count + (new_indices < own[0]).sum(dtype=count.dtype),
                )

            dtype = terms[0].ids.dtype
            start = (
                jnp.full(max_rows, own[0], dtype),
                jnp.zeros((max_rows, own[1]), terms[0].cotangent.dtype),
                jnp.zeros((), dtype),
            )
            indices, sums, _ = self.collect(terms, own, receive, start)
            base = _first_row(self.strategy, own[0]).astype(dtype)
            indices = jnp.where(indices < own[0], indices + base, num_embeddings)
            return indices[:, None], sums

        indices, sums = per_device(
            gather,
            self.strategy,
            (self._gradient_specs(terms),),
            (received.bags, received.cotangent),
            check=False,
        )(list(terms))
        return FactoredGradient(
            sums,
            indices,
            implementation=terms[0].implementation,
            placement=received,
        )

    def take(
        self, array: Shaped[Array, "V ..."], indices: Int[Array, " N"]
    ) -> Shaped[Array, "N ..."]:
        """Return rows of an array at received indices."""
        spec, rows = self._spec(array), self._rows_spec(array)

        def get(array: Array, indices: Array) -> Array:
            shard = self._shard_of(array)
            own = indices - _first_row(self.strategy, shard.shape[0])
            return take_rows(shard, own.astype(indices.dtype), 0)

        specs = (spec, self.bags)
        return per_device(get, self.strategy, specs, rows, check=False)(array, indices)

    def put(
        self,
        array: Shaped[Array, "V ..."],
        indices: Int[Array, " N"],
        rows: Shaped[Array, "N ..."],
    ) -> Shaped[Array, "V ..."]:
        """Return the array with the rows at received indices replaced."""
        spec, rows_spec = self._spec(array), self._rows_spec(array)

        def set_rows(array: Array, indices: Array, rows: Array) -> Array:
            shard = self._shard_of(array)
            size = shard.shape[0]
            own = indices - _first_row(self.strategy, size)
            own = jnp.where((own >= 0) & (own < size), own, size)
            return put_rows(shard, own, rows)

        specs = (spec, self.bags, rows_spec)
        run = per_device(set_rows, self.strategy, specs, spec, check=False)
        return run(array, indices, rows)

    def _shard_of(self, array: Array) -> AnyTable:
        """Return the shard of a table or of an optimizer state, from its array."""
        packing = self.strategy.shard_packing(self.packing)
        return TableStorage(packing=packing).table_of(array)

    def _spec(self, array: Array) -> P:
        """Return the spec of a table or of an optimizer state."""
        return self.strategy.table if array.ndim == 2 else self.strategy.per_row

    def _rows_spec(self, array: Array) -> P:
        return P(*self.cotangent[: array.ndim]) if self.cotangent else P()

    def _shard(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the shape of a device's shard of an array [V, D]."""
        rows, columns = shape
        sharding_type, size = self.strategy.sharding_type, self.strategy.size
        return (
            rows // size if sharding_type in SHARDED_BY_ROWS else rows,
            columns // size if sharding_type == ShardingType.COLUMN_WISE else columns,
        )

    def _gradient_specs(
        self, terms: Sequence[FactoredGradient]
    ) -> list[FactoredGradient]:
        specs: dict[str, Any] = {
            "cotangent": self.cotangent,
            "ids": self.bags,
            "offsets": self.bags,
            "coefficients": self.bags,
            "winners": self.cotangent,
        }
        return [dataclasses.replace(term, **specs) for term in terms]


@dataclasses.dataclass(frozen=True)
class AllGatheredGradients(LocalGradients):
    """All-gather the row sums of each device, for a data-parallel table.

    Attributes:
      rows: V, without padding.
    """

    rows: int = 0

    def collect(
        self, terms: list[FactoredGradient], shape: Any, receive: Receive, carry: Any
    ) -> Any:
        """Override `LocalGradients`."""
        rows, indices = _deduplicate_rows(terms, *shape)
        if not indices.size:  # no bags
            return receive(carry, FactoredGradient(rows, indices[:, None]))
        axes = self.strategy.batch
        rows = jax.lax.all_gather(rows[: self.rows], axes, tiled=True)
        indices = jax.lax.all_gather(indices[: self.rows], axes, tiled=True)
        return receive(carry, FactoredGradient(rows, indices[:, None]))

    def received_placement(self) -> LocalGradients:
        """Override `LocalGradients`."""
        return LocalGradients(self.strategy, P(), P(), packing=self.packing)

    def max_rows(self, terms: Sequence[FactoredGradient], rows: int) -> int:
        """Override `LocalGradients`."""
        slots = min(self.rows, sum(term.ids.size for term in terms))
        return min(rows, slots * self.strategy.size)


@dataclasses.dataclass(frozen=True)
class AllToAllGradients(LocalGradients):
    """Send one sum per distinct row to its owner, for a row-wise table.

    Attributes:
      rows_per_round: C, the rows per pair of devices and round.
    """

    rows_per_round: int = 0

    def collect(
        self, terms: list[FactoredGradient], shape: Any, receive: Receive, carry: Any
    ) -> Any:
        """Override `LocalGradients`."""
        rows, width = shape
        owners = self.strategy.size
        if len(terms) == 1:  # one row per id of `fetch`, already summed
            sums, unique = terms[0].cotangent, terms[0].ids[:, 0]
        else:
            sums, unique = _deduplicate_rows(terms, rows * owners, width)

        def receive_rows(carry: Any, ids: Array, sent: Array) -> Any:
            return receive(carry, FactoredGradient(sent, ids[:, None], pad_id=rows))

        route = router(self.strategy, rows * owners, unique.size, self.rows_per_round)
        return route.scatter_rows(unique, sums, receive_rows, carry)

    def received_placement(self) -> LocalGradients:
        """Override `LocalGradients`."""
        specs = (self.cotangent, self.bags)
        return LocalGradients(self.strategy, *specs, packing=self.packing)

    def max_rows(self, terms: Sequence[FactoredGradient], rows: int) -> int:
        """Override `LocalGradients`."""
        return min(rows, sum(term.ids.size for term in terms) * self.strategy.size)


def _on_one_device(terms: list[FactoredGradient]) -> list[FactoredGradient]:
    return [dataclasses.replace(term, placement=ONE_DEVICE) for term in terms]


def _first_row(strategy: Strategy, rows: int) -> Int[Array, ""]:
    """Return the first row of this device's shard."""
    if strategy.sharding_type in SHARDED_BY_ROWS:
        return jax.lax.axis_index(strategy.batch) * rows
    return jnp.zeros((), jnp.int32)


def _to_shard_ids(
    term: FactoredGradient, strategy: Strategy, rows: int
) -> FactoredGradient:
    """Return the term with ids of the shard; other ids become padding."""
    own = term.ids - _first_row(strategy, rows).astype(term.ids.dtype)
    kept = (own >= 0) & (own < rows) & _csr_arrays.filled(term.ids, term.pad_id)
    return dataclasses.replace(term, ids=jnp.where(kept, own, PAD_ID), pad_id=PAD_ID)


def _deduplicate_rows(
    terms: list[FactoredGradient], num_embeddings: int, width: int
) -> tuple[Float[Array, "U D"], Int[Array, " U"]]:
    indices, sums = concatenate_gradients(terms, width).apply(
        coalesce, num_embeddings=num_embeddings
    )
    return sums, indices


def _update_columns(
    term: FactoredGradient,
    arrays: tuple[Array, ...],
    scalars: Array,
    seed: Array | None,
    rule: str,
    axes: tuple[str, ...],
) -> tuple[Array, ...]:
    """Apply a rule to a device's columns, with mean squares over all columns."""
    table, states = arrays[0], arrays[1:]
    indices, sums = term.apply(coalesce, num_embeddings=table.shape[0])
    squares = jax.lax.pmean((sums * sums).mean(-1), axes)
    return xla.update_unique_rows(
        table, states, scalars, seed, indices, sums, rule=rule, mean_square=squares
    )

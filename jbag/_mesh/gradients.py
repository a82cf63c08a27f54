"""Gradients of a table over a mesh: how they are sent to the shards that they update.

A `RowSparse` of such a table holds terms whose arrays have a block for each device. A
placement knows how these blocks lie, and sends each device what its shard needs; the
operation runs there, on the shard alone. Rows are numbered as the whole table's, unless
said otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from jbag._mesh.all_to_all import router
from jbag._mesh.partition_specs import (
    SHARDED_BY_ROWS,
    ShardingType,
    Strategy,
    per_device,
    reshard,
)
from jbag.ops._factored_gradient import (
    ONE_DEVICE,
    FactoredGradient,
    concatenate_gradients,
)
from jbag.ops._row_gather import accumulation_dtype, take
from jbag.ops._row_updates import coalesce, update_rows
from jbag.ops._spmm import spmm_transpose
from jbag.ops.kernels import update_rules as rules
from jbag.ops.kernels import xla
from jbag.ragged import _csr
from jbag.ragged._csr import PAD_ID

Receive = Callable[[Any, FactoredGradient], Any]


@dataclasses.dataclass(frozen=True)
class LocalGradients:
    """Each device has all that its shard needs; also: a base of the other placements.

    Attributes:
      strategy: of the table.
      cotangent: the spec of the cotangent.
      bags: the spec of ids, offsets and coefficients.
    """

    over_mesh: ClassVar[bool] = True

    strategy: Strategy
    cotangent: P
    bags: P

    @property
    def num_blocks(self) -> int:
        """How many blocks ids, offsets and coefficients are cut into."""
        return self.strategy.size if self.bags else 1

    def collect(
        self, terms: list[FactoredGradient], shape: Any, receive: Receive, carry: Any
    ) -> Any:
        """Return what `receive` makes of the carry and what this device receives.

        It is called with terms whose rows are the shard's; every row is whole in one of
        them. `shape` is the shard's.
        """
        # Divided before ids of no row are taken for empty slots.
        term = concatenate_gradients(terms, shape[1]).plain()
        return receive(carry, _to_local(term, self.strategy, shape[0]))

    def coalesced(self) -> LocalGradients:
        """Return the placement of what has been received."""
        return self

    def max_rows(self, terms: Sequence[FactoredGradient], rows: int) -> int:
        """Return how many rows of the shard the terms can name."""
        return min(rows, sum(term.ids.size for term in terms))

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return zeros that lie as the cotangent does."""
        return reshard(jnp.zeros(shape, dtype), self.strategy, self.cotangent)

    def update_rows(
        self,
        terms: Sequence[FactoredGradient],
        table: Float[Array, "V D"],
        states: tuple[Array, ...],
        scalars: Sequence[Any],
        seed: Array | None,
        *,
        rule: str,
    ) -> tuple[Array, ...]:
        """Update the rows of each shard by a rule; see `RowSparse.update_table`."""
        dtype = accumulation_dtype(table.dtype)
        numbers = jnp.stack([jnp.asarray(x, dtype) for x in scalars])
        specs = tuple(self._spec(x) for x in (table, *states))
        # Each device has some columns of a row, whose squares are averaged over all.
        is_column_wise = self.strategy.sharding_type == ShardingType.COLUMN_WISE
        sums_squares = is_column_wise and bool(rules.RULES[rule].per_row)

        def move(
            arrays: tuple[Array, ...],
            numbers: Array,
            seed: Any,
            terms: list[FactoredGradient],
        ) -> tuple[Array, ...]:
            def receive(
                arrays: tuple[Array, ...], term: FactoredGradient
            ) -> tuple[Array, ...]:
                operands = (arrays[0], arrays[1:], numbers, seed)
                if sums_squares:
                    return _update_columns(term, *operands, rule, table.shape[1], axes)
                return term.apply(update_rows, *operands, rule=rule)

            return self.collect(_local(terms), arrays[0].shape, receive, arrays)

        axes = self.strategy.batch
        run = per_device(
            move,
            self.strategy,
            (specs, P(), P(), self._gradient_specs(terms)),
            specs,
            check=False,
        )
        return run((table, *states), numbers, seed, list(terms))

    def todense(
        self, terms: Sequence[FactoredGradient], shape: tuple[int, ...], dtype: Any
    ) -> Float[Array, "V D"]:
        """Return the sum of the terms as an array, in the accumulation dtype."""
        dtype = accumulation_dtype(jnp.dtype(dtype))

        def add(terms: list[FactoredGradient]) -> Array:
            own = self._shard(shape)

            def receive(total: Array, term: FactoredGradient) -> Array:
                return total + term.apply(
                    spmm_transpose, num_embeddings=own[0], dtype=dtype
                )

            return self.collect(_local(terms), own, receive, jnp.zeros(own, dtype))

        specs = (self._gradient_specs(terms),)
        run = per_device(add, self.strategy, specs, self.strategy.table, check=False)
        return run(list(terms))

    def flat(
        self, terms: Sequence[FactoredGradient], shape: tuple[int, ...], dtype: Any
    ) -> FactoredGradient:
        """Return the rows that are named, as bags of one: they are coalesced."""
        return self.coalesce(terms, shape, dtype)

    def coalesce(
        self, terms: Sequence[FactoredGradient], shape: tuple[int, ...], dtype: Any
    ) -> FactoredGradient:
        """Return the rows that are named, each once where it lies, and their sums."""
        del dtype
        num_embeddings, width = shape
        coalesced = self.coalesced()

        def gather(terms: list[FactoredGradient]) -> tuple[Array, Array]:
            own = self._shard((num_embeddings, width))
            terms = _local(terms)
            max_rows = self.max_rows(terms, own[0])

            def receive(
                carry: tuple[Any, ...], term: FactoredGradient
            ) -> tuple[Any, ...]:
                # Rounds go up the shard: what they receive stays in order.
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
            (coalesced.bags, coalesced.cotangent),
            check=False,
        )(list(terms))
        return FactoredGradient(
            sums,
            indices,
            implementation=terms[0].implementation,
            placement=coalesced,
        )

    def take(
        self, array: Shaped[Array, "V ..."], indices: Int[Array, " N"]
    ) -> Shaped[Array, "N ..."]:
        """Return rows of an array at the indices of what has been received."""
        spec, rows = self._spec(array), self._rows_spec(array)

        def get(array: Array, indices: Array) -> Array:
            own = indices - _first_row(self.strategy, array.shape[0])
            return take(array, own.astype(indices.dtype), 0)

        specs = (spec, self.bags)
        return per_device(get, self.strategy, specs, rows, check=False)(array, indices)

    def put(
        self,
        array: Shaped[Array, "V ..."],
        indices: Int[Array, " N"],
        rows: Shaped[Array, "N ..."],
    ) -> Shaped[Array, "V ..."]:
        """Return the array with those rows replaced."""
        spec, rows_spec = self._spec(array), self._rows_spec(array)

        def set_rows(array: Array, indices: Array, rows: Array) -> Array:
            own = indices - _first_row(self.strategy, array.shape[0])
            own = jnp.where((own >= 0) & (own < array.shape[0]), own, array.shape[0])
            return array.at[own].set(rows, mode="drop")

        specs = (spec, self.bags, rows_spec)
        run = per_device(set_rows, self.strategy, specs, spec, check=False)
        return run(array, indices, rows)

    def _spec(self, array: Array) -> P:
        """Return the spec of a table, or of a state of it."""
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
    """The table is replicated: every device sends its sums of rows to all.

    Attributes:
      rows: how many rows there are, without padding.
    """

    rows: int = 0

    def collect(
        self, terms: list[FactoredGradient], shape: Any, receive: Receive, carry: Any
    ) -> Any:
        """See `LocalGradients`."""
        rows, indices = _deduplicate_rows(terms, *shape)
        if not indices.size:  # there are no bags
            return receive(carry, FactoredGradient(rows, indices[:, None]))
        axes = self.strategy.batch
        rows = jax.lax.all_gather(rows[: self.rows], axes, tiled=True)
        indices = jax.lax.all_gather(indices[: self.rows], axes, tiled=True)
        return receive(carry, FactoredGradient(rows, indices[:, None]))

    def coalesced(self) -> LocalGradients:
        """See `LocalGradients`."""
        return LocalGradients(self.strategy, P(), P())

    def max_rows(self, terms: Sequence[FactoredGradient], rows: int) -> int:
        """See `LocalGradients`."""
        slots = min(self.rows, sum(term.ids.size for term in terms))
        return min(rows, slots * self.strategy.size)


@dataclasses.dataclass(frozen=True)
class AllToAllGradients(LocalGradients):
    """The rows are dealt out: one sum for each distinct row goes to the owner.

    Attributes:
      rows_per_round: C, of a pair of devices and a round.
    """

    rows_per_round: int = 0

    def collect(
        self, terms: list[FactoredGradient], shape: Any, receive: Receive, carry: Any
    ) -> Any:
        """See `LocalGradients`."""
        rows, width = shape
        owners = self.strategy.size
        if len(terms) == 1:  # as `fetch` has requested them
            sums, unique = terms[0].cotangent, terms[0].ids[:, 0]
        else:
            sums, unique = _deduplicate_rows(terms, rows * owners, width)

        def receive_rows(carry: Any, ids: Array, sent: Array) -> Any:
            return receive(carry, FactoredGradient(sent, ids[:, None], pad_id=rows))

        route = router(self.strategy, rows * owners, unique.size, self.rows_per_round)
        return route.scatter_rows(unique, sums, receive_rows, carry)

    def coalesced(self) -> LocalGradients:
        """See `LocalGradients`."""
        return LocalGradients(self.strategy, self.cotangent, self.bags)

    def max_rows(self, terms: Sequence[FactoredGradient], rows: int) -> int:
        """See `LocalGradients`."""
        return min(rows, sum(term.ids.size for term in terms) * self.strategy.size)


def _local(terms: list[FactoredGradient]) -> list[FactoredGradient]:
    return [dataclasses.replace(term, placement=ONE_DEVICE) for term in terms]


def _first_row(strategy: Strategy, rows: int) -> Int[Array, ""]:
    """Return the number of this device's first row."""
    if strategy.sharding_type in SHARDED_BY_ROWS:
        return jax.lax.axis_index(strategy.batch) * rows
    return jnp.zeros((), jnp.int32)


def _to_local(
    term: FactoredGradient, strategy: Strategy, rows: int
) -> FactoredGradient:
    """Return a term whose rows are numbered as the shard's."""
    own = term.ids - _first_row(strategy, rows).astype(term.ids.dtype)
    kept = (own >= 0) & (own < rows) & _csr.filled(term.ids, term.pad_id)
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
    table: Array,
    states: tuple[Array, ...],
    scalars: Array,
    seed: Array | None,
    rule: str,
    width: int,
    axes: tuple[str, ...],
) -> tuple[Array, ...]:
    """Move some columns of rows by a rule that averages over all of them."""
    indices, sums = term.apply(coalesce, num_embeddings=table.shape[0])
    squares = jax.lax.psum((sums * sums).sum(-1), axes) / width
    return xla.update_unique_rows(
        table, states, scalars, seed, indices, sums, rule=rule, mean_square=squares
    )

"""All-to-all of distinct ids, of table rows and of row gradients.

The functions run per device under `shard_map`. A table of V' rows has P shards of S
rows, one per device; the owner of a row is row // S. In each round, each pair of
devices exchanges a bucket of C ids and C rows.

If a bucket would overflow, there are more rounds. Round r covers the r-th part of the
rows of every shard, not a part of the batch. The gradient of a row therefore arrives in
one round, as a non-linear optimizer requires. At most C distinct ids fall in a part of
C rows, so doubling the number of rounds terminates.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from jbag._mesh.strategies import Strategy, per_device
from jbag.ops import _spmm
from jbag.ops._packed_table import AnyTable, packing_of, storage, stored
from jbag.ops._packing import Packing
from jbag.ops._primitive import evaluate_compiled
from jbag.ops._row_gather import accumulation_dtype, take
from jbag.ragged._csr_arrays import OUT_OF_RANGE_ID


def default_rows_per_round(slots: int, owners: int) -> int:
    r"""Return :math:`C = n / P + 6 \sqrt{n / P} + 8`, rounded up to a multiple of 8.

    n is the number of slots per device. With n distinct ids, uniformly distributed over
    the owners, a bucket overflows with a probability below 1e-8.
    """
    share = slots / owners
    wanted = math.ceil((share + 6 * math.sqrt(share) + 8) / 8) * 8
    return min(slots, wanted)


def deduplicate(
    ids: Int[Array, " N"], num_rows: int
) -> tuple[Int[Array, " U"], Int[Array, " N"]]:
    """Return the distinct ids, sorted, and the position of each id among them.

    U = min(N, V'); unused entries are V'. The positions of negative ids are the ids
    themselves; those of ids of V' or more are `OUT_OF_RANGE_ID`.
    """
    size = ids.size
    known = (ids >= 0) & (ids < num_rows)
    named = jnp.where(known, ids, num_rows)
    order = jnp.argsort(named)
    named = named[order]
    is_first = jnp.diff(named, prepend=-1) > 0
    rank = jnp.cumsum(is_first, dtype=ids.dtype) - 1
    max_unique_ids = min(size, num_rows)
    slots = jnp.where(is_first & (named < num_rows), rank, max_unique_ids)
    unique = (
        jnp.full(max_unique_ids, num_rows, ids.dtype).at[slots].set(named, mode="drop")
    )
    inverse = jnp.zeros_like(ids).at[order].set(rank, unique_indices=True)
    out_of_range = jnp.where(ids < 0, ids, OUT_OF_RANGE_ID)
    return unique, jnp.where(known, inverse, out_of_range)


@dataclasses.dataclass(frozen=True)
class Router:
    """Exchange ids and rows between the devices along mesh axes.

    Attributes:
      axis: the mesh axes.
      owners: P, the number of devices.
      shard: S, the rows per device.
      rows_per_round: C, the capacity of a bucket.
    """

    axis: tuple[str, ...]
    owners: int
    shard: int
    rows_per_round: int

    def rounds(self, unique: Int[Array, " U"]) -> Int[Array, ""] | int:
        """Return the number of rounds that all devices need, a power of two."""
        rows_per_round = self.rows_per_round
        if rows_per_round >= min(unique.size, self.shard):
            return 1
        owner, row = unique // self.shard, unique % self.shard
        known = unique < self.owners * self.shard

        def overflows(rounds: Int[Array, ""]) -> Array:
            width = -(-self.shard // rounds)
            bucket = owner * rounds + row // width
            return (
                (bucket[rows_per_round:] == bucket[:-rows_per_round])
                & known[rows_per_round:]
            ).any()

        one = jnp.ones((), unique.dtype)
        own = jax.lax.while_loop(overflows, lambda rounds: 2 * rounds, one)
        return jax.lax.pmax(own, self.axis)

    def each_round(
        self, body: Callable[[Any, Any], Any], carry: Any, rounds: Int[Array, ""] | int
    ) -> Any:
        """Run `carry = body(round, carry)` for each round; return the carry."""
        if isinstance(rounds, int):
            return body(0, carry)
        first = jnp.zeros((), rounds.dtype)
        _, carry = jax.lax.while_loop(
            lambda state: state[0] < rounds,
            lambda state: (state[0] + 1, body(*state)),
            (first, carry),
        )
        return carry

    def bucket(
        self, unique: Int[Array, " U"], number: Any, rounds: Any
    ) -> tuple[Int[Array, "P C"], Int[Array, "P C"], Int[Array, " P"]]:
        """Return a round's shard ids, their positions in `unique`, and the starts.

        Empty slots have id S and position U. Bucket p starts at starts[p] in `unique`.
        """
        width = -(-self.shard // rounds)
        begin = self.shard * jnp.arange(self.owners, dtype=unique.dtype)
        low = begin + jnp.minimum(number * width, self.shard)
        high = begin + jnp.minimum((number + 1) * width, self.shard)
        starts, ends = jnp.searchsorted(unique, jnp.stack([low, high])).astype(
            unique.dtype
        )
        positions = starts[:, None] + jnp.arange(
            self.rows_per_round, dtype=unique.dtype
        )
        is_filled = positions < ends[:, None]
        positions = jnp.where(is_filled, positions, unique.size)
        ids = take(unique, positions, 0) - begin[:, None]
        return jnp.where(is_filled, ids, self.shard), positions, starts

    def all_to_all(self, x: Shaped[Array, "P ..."]) -> Shaped[Array, "P ..."]:
        """Send x[p] to device p; return the block received from each device."""
        if self.owners == 1:
            return x
        return jax.lax.all_to_all(x, self.axis, 0, 0)

    def gather_rows(
        self,
        unique: Int[Array, " U"],
        lookup: Callable[..., Shaped[Array, "P C ..."]],
        out: Shaped[Array, "U ..."],
        *arrays: Shaped[Array, "U ..."],
    ) -> Shaped[Array, "U ..."]:
        """Return the owners' `lookup` of each row; `out` for unused entries.

        `lookup` takes a round's ids [P, C] and the elements of `arrays` at these ids.
        """
        rounds = self.rounds(unique)
        owner, row = unique // self.shard, unique % self.shard
        slots = jnp.arange(unique.size, dtype=unique.dtype)

        def body(number: Any, out: Array) -> Array:
            ids, positions, starts = self.bucket(unique, number, rounds)
            sent = [self.all_to_all(take(x, positions, 0)) for x in arrays]
            received = self.all_to_all(lookup(self.all_to_all(ids), *sent))
            received = received.reshape(-1, *received.shape[2:])
            requested = row // -(-self.shard // rounds) == number
            requested &= owner < self.owners
            position = slots - take(starts, owner, 0) + self.rows_per_round * owner
            found = take(received, jnp.where(requested, position, -1), 0)
            requested = requested.reshape(-1, *[1] * (out.ndim - 1))
            return jnp.where(requested, found.astype(out.dtype), out)

        return self.each_round(body, out, rounds)

    def scatter_rows(
        self,
        unique: Int[Array, " U"],
        rows: Shaped[Array, "U D"],
        receive: Callable[[Any, Int[Array, " M"], Shaped[Array, "M D"]], Any],
        carry: Any,
    ) -> Any:
        """Send rows to their owners; fold `receive` over the rounds on each owner.

        `receive(carry, ids, rows)` takes the M = P * C rows from all devices and their
        ids in the shard; empty slots have id S.
        """
        rounds = self.rounds(unique)

        def body(number: Any, carry: Any) -> Any:
            ids, positions, _ = self.bucket(unique, number, rounds)
            ids, sent = self.all_to_all(ids), self.all_to_all(take(rows, positions, 0))
            return receive(carry, ids.reshape(-1), sent.reshape(-1, rows.shape[1]))

        return self.each_round(body, carry, rounds)


def router(
    strategy: Strategy, num_rows: int, slots: int, rows_per_round: int
) -> Router:
    """Return the router for a table of V' rows and `slots` ids per device."""
    owners = strategy.size
    return Router(
        strategy.batch, owners, num_rows // owners, min(rows_per_round, slots)
    )


def fetch(
    table: AnyTable,
    unique: Int[Array, " all_U"],
    *,
    strategy: Strategy,
    rows_per_round: int,
    implementation: str | None,
) -> Float[Array, "all_U D"]:
    """Return the table rows at the ids of each device; zeros for unused entries.

    `unique` has one block per device, of sorted distinct ids. The function is linear in
    the table; its transpose sends one row per distinct id to the owner.
    """
    return fetch_p.bind(
        storage(table),
        unique,
        num_rows=table.shape[0],
        packing=packing_of(table),
        strategy=strategy,
        rows_per_round=rows_per_round,
        implementation=implementation,
    )


def _fetch_impl(
    lines: Float[Array, "rows width"],
    unique: Int[Array, " all_U"],
    *,
    num_rows: int,
    packing: Packing | None,
    strategy: Strategy,
    rows_per_round: int,
    implementation: str | None,
) -> Float[Array, "all_U D"]:
    width, slots = stored(lines, packing).shape[1], unique.size // strategy.size
    route = router(strategy, num_rows, slots, rows_per_round)

    def fetch_shard(
        lines: Float[Array, "own width"], unique: Int[Array, " U"]
    ) -> Float[Array, "U D"]:
        shard = strategy.shard(stored(lines, packing))

        def lookup(ids: Int[Array, "P C"]) -> Float[Array, "P C D"]:
            # One bag per id.
            rows = _spmm.spmm(
                shard,
                ids.reshape(-1, 1),
                None,
                None,
                dtype=shard.dtype,
                pad_id=route.shard,
                implementation=implementation,
            )
            return rows.reshape(*ids.shape, width)

        return route.gather_rows(
            unique, lookup, jnp.zeros((unique.size, width), shard.dtype)
        )

    rows = P(strategy.batch, None)
    specs = (rows, strategy.blocks)
    return per_device(fetch_shard, strategy, specs, rows, check=False)(lines, unique)


def _scatter_add_impl(
    rows: Float[Array, "all_U D"],
    unique: Int[Array, " all_U"],
    *,
    num_rows: int,
    packing: Packing | None,
    strategy: Strategy,
    rows_per_round: int,
    implementation: str | None,
) -> Float[Array, "rows width"]:
    """Return the [V', D] sums of the rows that each owner receives, or their lines."""
    dtype, own = accumulation_dtype(rows.dtype), strategy.shard_packing(packing)
    route = router(strategy, num_rows, unique.size // strategy.size, rows_per_round)

    def scatter_add_shard(rows: Float[Array, "U D"], unique: Int[Array, " U"]) -> Array:
        def receive(total: Array, ids: Array, sent: Array) -> Array:
            return total + _spmm.spmm_transpose(
                sent,
                ids[:, None],
                None,
                None,
                num_embeddings=route.shard,
                packing=own,
                dtype=dtype,
                pad_id=None,
                implementation=implementation,
            )

        shape = (route.shard, rows.shape[1]) if own is None else own.shape
        total = jnp.zeros(shape, dtype)
        total = route.scatter_rows(unique, rows.astype(dtype), receive, total)
        return total.astype(rows.dtype)

    spec = P(strategy.batch, None)
    specs = (spec, strategy.blocks)
    return per_device(scatter_add_shard, strategy, specs, spec, check=False)(
        rows, unique
    )


def _define(name: str, function: Callable[..., Any]) -> Primitive:
    """Define a primitive from a function that is linear in its first operand."""
    primitive = Primitive(f"jbag_{name}")
    evaluate_compiled(primitive)

    @primitive.def_abstract_eval
    def infer(*avals: Any, **params: Any) -> Any:
        return jax.make_jaxpr(functools.partial(function, **params))(*avals).out_avals[
            0
        ]

    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    return primitive


def _differentiate(primitive: Primitive, transposed: Primitive) -> None:
    """Register the derivative rules of a primitive with this transpose."""

    def jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
        value = primitive.bind(*primals, **params)
        if isinstance(tangents[0], ad.Zero):
            return value, ad.Zero(jax.typeof(value).to_tangent_aval())
        return value, primitive.bind(tangents[0], primals[1], **params)

    def transpose(cotangent: Any, x: Any, unique: Array, **params: Any) -> list[Any]:
        if isinstance(cotangent, ad.Zero):
            return [ad.Zero(x.aval), None]
        return [transposed.bind(cotangent, unique, **params), None]

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose


fetch_p, scatter_add_p = (
    _define("fetch", _fetch_impl),
    _define("scatter_add", _scatter_add_impl),
)
_differentiate(fetch_p, scatter_add_p)
_differentiate(scatter_add_p, fetch_p)


def sum_counts(
    counts: Float[Array, " U"], unique: Int[Array, " U"], route: Router
) -> Float[Array, " U"]:
    """Return each row's count, summed over all devices."""

    def lookup(
        ids: Int[Array, "P C"], counts: Float[Array, "P C"]
    ) -> Float[Array, "P C"]:
        sums = jnp.zeros(route.shard, counts.dtype).at[ids].add(counts, mode="drop")
        return take(sums, ids, 0)

    return route.gather_rows(unique, lookup, jnp.zeros_like(counts), counts)

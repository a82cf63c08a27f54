"""All-to-all: distinct ids to the rows' owners, rows back, gradients to the owners.

All of it runs on one device of a mesh, under `shard_map`. A table of V' rows is cut
into P shards of S, one for each device; a row's owner is row // S. Per pair of devices
and round, C ids and C rows are sent, in buckets of that one size.

Where a bucket would overflow, there are more rounds. They are cut by ranges of rows,
not by position in the batch: round r is about the r-th part of every shard. So what all
devices send about a row arrives in one round, and an optimizer that isn't linear sees a
row's gradient whole. A part of at most C rows is never named by more than C distinct
ids, so that doubling the number of rounds ends.
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

from jbag._mesh.partition_specs import Strategy, per_device
from jbag.ops import _spmm
from jbag.ops._primitive import evaluate_compiled
from jbag.ops._row_gather import accumulation_dtype, take
from jbag.ragged._csr import OUT_OF_RANGE_ID


def default_rows_per_round(slots: int, owners: int) -> int:
    r"""Return C for n slots a device: :math:`n / P + 6 \sqrt{n / P} + 8`, in eights.

    If n distinct ids fall on owners evenly, as the grid makes them, no bucket overflows
    but once in a hundred million.
    """
    share = slots / owners
    wanted = math.ceil((share + 6 * math.sqrt(share) + 8) / 8) * 8
    return min(slots, wanted)


def deduplicate(
    ids: Int[Array, " N"], num_rows: int
) -> tuple[Int[Array, " U"], Int[Array, " N"]]:
    """Return the rows that ids name, in order, and where each id stands among them.

    The result has U = min(N, V') rows; the rest is V'. Ids outside [0, V') name none
    and stand for themselves if negative, and at `OUT_OF_RANGE_ID` otherwise.
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
    places = jnp.zeros_like(ids).at[order].set(rank, unique_indices=True)
    out_of_range = jnp.where(ids < 0, ids, OUT_OF_RANGE_ID)
    return unique, jnp.where(known, places, out_of_range)


@dataclasses.dataclass(frozen=True)
class Router:
    """How ids and rows are sent: over which axes, by how many devices, in what buckets.

    Attributes:
      axis: of the mesh.
      owners: P.
      shard: S, the rows that an owner has.
      rows_per_round: C.
    """

    axis: tuple[str, ...]
    owners: int
    shard: int
    rows_per_round: int

    def rounds(self, unique: Int[Array, " U"]) -> Int[Array, ""] | int:
        """Return how many rounds all devices need, a power of two."""
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
        """Return what `body(round, carry)` makes of the carry, round by round."""
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
        """Return a round's ids as owners number them, and where they stand in `unique`.

        Empty places hold S, and stand at U. With them comes where each bucket starts.
        """
        width = -(-self.shard // rounds)
        begin = self.shard * jnp.arange(self.owners, dtype=unique.dtype)
        low = begin + jnp.minimum(number * width, self.shard)
        high = begin + jnp.minimum((number + 1) * width, self.shard)
        starts, ends = jnp.searchsorted(unique, jnp.stack([low, high])).astype(
            unique.dtype
        )
        places = starts[:, None] + jnp.arange(self.rows_per_round, dtype=unique.dtype)
        is_filled = places < ends[:, None]
        places = jnp.where(is_filled, places, unique.size)
        ids = take(unique, places, 0) - begin[:, None]
        return jnp.where(is_filled, ids, self.shard), places, starts

    def all_to_all(self, x: Shaped[Array, "P ..."]) -> Shaped[Array, "P ..."]:
        """Send x[p] to device p; return what each of them sent."""
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
        """Return what the owners look up for each row, `out` where no row is named.

        `lookup` takes a round's ids [P, C] and the elements of `arrays` for each id.
        """
        rounds = self.rounds(unique)
        owner, row = unique // self.shard, unique % self.shard
        slots = jnp.arange(unique.size, dtype=unique.dtype)

        def body(number: Any, out: Array) -> Array:
            ids, places, starts = self.bucket(unique, number, rounds)
            sent = [self.all_to_all(take(x, places, 0)) for x in arrays]
            received = self.all_to_all(lookup(self.all_to_all(ids), *sent))
            received = received.reshape(-1, *received.shape[2:])
            requested = row // -(-self.shard // rounds) == number
            requested &= owner < self.owners
            place = slots - take(starts, owner, 0) + self.rows_per_round * owner
            found = take(received, jnp.where(requested, place, -1), 0)
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
        """Send rows to their owners; return what they make of the carry, by rounds.

        `receive(carry, ids, rows)` gets what came from all devices, M = P * C rows, and
        their numbers in the shard, S in empty places.
        """
        rounds = self.rounds(unique)

        def body(number: Any, carry: Any) -> Any:
            ids, places, _ = self.bucket(unique, number, rounds)
            ids, sent = self.all_to_all(ids), self.all_to_all(take(rows, places, 0))
            return receive(carry, ids.reshape(-1), sent.reshape(-1, rows.shape[1]))

        return self.each_round(body, carry, rounds)


def router(
    strategy: Strategy, num_rows: int, slots: int, rows_per_round: int
) -> Router:
    """Return the router for a table of V' rows and that many distinct ids."""
    owners = strategy.size
    return Router(
        strategy.batch, owners, num_rows // owners, min(rows_per_round, slots)
    )


def fetch(
    table: Float[Array, "rows D"],
    unique: Int[Array, " all_U"],
    *,
    strategy: Strategy,
    rows_per_round: int,
    implementation: str | None,
) -> Float[Array, "all_U D"]:
    """Return the rows that each device requests, zeros where it names none.

    `unique` has a block for each device, in order, each row once. It is linear in the
    table; its transpose sends one row for each distinct id back to the owner.
    """
    return fetch_p.bind(
        table,
        unique,
        num_rows=table.shape[0],
        strategy=strategy,
        rows_per_round=rows_per_round,
        implementation=implementation,
    )


def _fetch_impl(
    table: Float[Array, "rows D"],
    unique: Int[Array, " all_U"],
    *,
    num_rows: int,
    strategy: Strategy,
    rows_per_round: int,
    implementation: str | None,
) -> Float[Array, "all_U D"]:
    width, slots = table.shape[1], unique.size // strategy.size
    route = router(strategy, num_rows, slots, rows_per_round)

    def fetch_shard(
        shard: Float[Array, "S D"], unique: Int[Array, " U"]
    ) -> Float[Array, "U D"]:
        def lookup(ids: Int[Array, "P C"]) -> Float[Array, "P C D"]:
            # Each id is a bag of its own.
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
    return per_device(fetch_shard, strategy, specs, rows, check=False)(table, unique)


def _scatter_add_impl(
    rows: Float[Array, "all_U D"],
    unique: Int[Array, " all_U"],
    *,
    num_rows: int,
    strategy: Strategy,
    rows_per_round: int,
    implementation: str | None,
) -> Float[Array, "rows D"]:
    """Return the array of which each owner's rows are the sums of what it receives."""
    dtype = accumulation_dtype(rows.dtype)
    route = router(strategy, num_rows, unique.size // strategy.size, rows_per_round)

    def scatter_add_shard(rows: Float[Array, "U D"], unique: Int[Array, " U"]) -> Array:
        def receive(total: Array, ids: Array, sent: Array) -> Array:
            return total + _spmm.spmm_transpose(
                sent,
                ids[:, None],
                None,
                None,
                num_embeddings=route.shard,
                dtype=dtype,
                pad_id=None,
                implementation=implementation,
            )

        total = jnp.zeros((route.shard, rows.shape[1]), dtype)
        total = route.scatter_rows(unique, rows.astype(dtype), receive, total)
        return total.astype(rows.dtype)

    spec = P(strategy.batch, None)
    specs = (spec, strategy.blocks)
    return per_device(scatter_add_shard, strategy, specs, spec, check=False)(
        rows, unique
    )


def _define(name: str, function: Callable[..., Any]) -> Primitive:
    """Make the primitive of a function that is linear in its first operand."""
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
    """Let `transposed` be the transpose of a primitive."""

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
    """Return each row's count summed over all devices. Runs on one device."""

    def lookup(
        ids: Int[Array, "P C"], counts: Float[Array, "P C"]
    ) -> Float[Array, "P C"]:
        sums = jnp.zeros(route.shard, counts.dtype).at[ids].add(counts, mode="drop")
        return take(sums, ids, 0)

    return route.gather_rows(unique, lookup, jnp.zeros_like(counts), counts)

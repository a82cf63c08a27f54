"""The portable implementation of a vocabulary's operations: their meaning.

**Places.** A table of V rows has G buckets of V / G rows each. The first R rows of a
bucket are reserved for ids without a row. The others are its S slots. An id has a
bucket and a first slot in it, both by hash. Its P probes are the slots from there on,
around from the last slot to the first. Its row is always one of its probes. Evictions
leave holes that end no search: every search reads all P probes.

**Assignment.** The result is a function of the multiset of ids, not of their order.

1. Ids that have a row keep it. Their row's `last_seen` becomes the step.
2. With an admission count of A > 1, the sketch counts the other ids. Those that it has
   counted A times or more are admitted.
3. An admitted id prefers free slots, the first probe first. Then come slots that may be
   evicted, by `last_seen` ("lru") or `counts` ("lfu"), and by probe. Slots of ids seen
   in the last `time_to_live` steps or in this step may not be evicted.
4. If several ids want a slot, it goes to the id with the larger count, then to the
   smaller id. The others take the next slot that they prefer. This is the stable
   matching (Gale and Shapley, College Admissions and the Stability of Marriage, 1962),
   which is unique and independent of the order of proposals.

**Sketch.** A count-min sketch (Cormode and Muthukrishnan, 2005) of lines of 16 cells.
An id has a line of its bucket, and one cell in each quarter of the line. A cell holds
an epoch in its upper 4 bits and a count in the others. The epoch of a bucket advances
with every `cells / 4` counted occurrences, and counts are halved once an epoch, on
their next use.

No array of probes is larger than [N].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, UInt32

from jbag.vocabulary._state import Statistics, VocabularyState

Words = UInt32[Array, " N"]

LINE = 16  # cells of the sketch in a line
COUNT_BITS = 28
COUNT_MASK = (1 << COUNT_BITS) - 1
MOST_COUNTED = 1 << 16  # larger counts are reduced to it before the next batch
MAX_IDS = 1 << 27  # in a batch, so that a cell's count can't overflow
MAX_COUNT = 2**31 - 1
NO_ROW = -1  # of ids that are masked
_NONE = 2**31 - 1


class Options(NamedTuple):
    """The static parameters of the operations.

    Attributes:
      bucket_size: V / G.
      num_buckets: G, of the whole vocabulary. A device may hold some of them.
      num_reserved: R.
      hashed_unknown: whether ids without a row use the R rows of their bucket, by hash;
        else all use row 0.
      num_probes: P.
      admission_count: A.
      eviction: "lru", "lfu" or "none".
      time_to_live: see above; 0 protects the ids of this step.
    """

    bucket_size: int
    num_buckets: int
    num_reserved: int
    hashed_unknown: bool
    num_probes: int
    admission_count: int
    eviction: str
    time_to_live: int

    @property
    def num_slots(self) -> int:
        """S."""
        return self.bucket_size - self.num_reserved

    @property
    def cells_per_bucket(self) -> int:
        """The cells of a bucket's sketch: at least 4 a row, a power of two."""
        if self.admission_count <= 1:
            return 0
        return max(LINE, 1 << (4 * self.bucket_size - 1).bit_length())


class _Place(NamedTuple):
    """Where ids are: the bucket among the local ones, and hashes."""

    is_local: Bool[Array, " N"]
    bucket: Int32[Array, " N"]
    start: UInt32[Array, " N"]
    spare: UInt32[Array, " N"]  # for the sketch and for unknown rows

    def row(self, probe: Any, options: Options) -> Int32[Array, " N"]:
        """Return the row of a probe, among the local rows."""
        # `start` and `probe` are below S, and their sum below 2^32.
        slot = self.start + jnp.asarray(probe, jnp.uint32)
        slot = jnp.where(slot >= options.num_slots, slot - options.num_slots, slot)
        first = self.bucket * options.bucket_size + options.num_reserved
        return first + slot.astype(jnp.int32)


def mix(x: UInt32[Any, "..."]) -> UInt32[Any, "..."]:
    """Hash words, bijectively (Wellons, Prospecting for Hash Functions, 2018)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def hash_ids(high: Words, low: Words) -> tuple[Words, Words, Words]:
    """Return the hashes that give an id's bucket, its first slot, and the rest."""
    a = mix(low ^ mix(high + np.uint32(0x9E3779B9)))
    b = mix(a + high * np.uint32(0x85EBCA6B) + np.uint32(0xC2B2AE35))
    return a, b, mix(a ^ (b << np.uint32(16)) ^ (b >> np.uint32(16)))


def lookup(
    state: VocabularyState,
    high: Words,
    low: Words,
    is_valid: Bool[Array, " N"],
    first_bucket: Int32[Array, ""],
    options: Options,
) -> Int32[Array, " N"]:
    """Return the row of each id, or that of an unknown id.

    With some of the buckets, ids of other buckets get the row -1.
    """
    place = _place(state, high, low, first_bucket, options)
    row, found = _find(state, high, low, place, options)
    row = _global_rows(row, found, place, first_bucket, options)
    return jnp.where(is_valid & place.is_local, row, NO_ROW)


def assign(
    state: VocabularyState,
    high: Words,
    low: Words,
    is_valid: Bool[Array, " N"],
    step: Int32[Array, ""],
    first_bucket: Int32[Array, ""],
    options: Options,
) -> tuple[Int32[Array, " N"], VocabularyState]:
    """Return the row of each id, and the state after the assignment."""
    n = high.shape[0]
    position = jax.lax.iota(jnp.int32, n)
    is_valid &= _place(state, high, low, first_bucket, options).is_local
    invalid, high, low, origin = jax.lax.sort(
        ((~is_valid).astype(jnp.int32), high, low, position), num_keys=3
    )
    is_valid = invalid == 0
    before = jnp.maximum(position - 1, 0)
    differs = (high != high[before]) | (low != low[before])
    is_first = is_valid & (differs | (position == 0))
    first = jax.lax.cummax(jnp.where(is_first, position, 0))
    multiplicity = jnp.zeros(n, jnp.int32).at[first].add(is_valid.astype(jnp.int32))

    place = _place(state, high, low, first_bucket, options)
    row, found = _find(state, high, low, place, options)
    is_hit = is_first & found
    state = _count_hits(state, row, is_hit, multiplicity, step)
    is_miss = is_first & ~found
    state, counted = _count_misses(state, place, is_miss, multiplicity, options)
    admitted = is_miss & (counted >= options.admission_count)
    row, placed = _match(state, row, place, admitted, counted, step, options)
    state, is_eviction = _insert(state, row, high, low, placed, counted, step)

    has_row = is_hit | placed
    rows = _global_rows(row, has_row, place, first_bucket, options)
    unsorted = jnp.where(is_valid, rows[first], NO_ROW)
    rows = jnp.zeros(n, jnp.int32).at[origin].set(unsorted, unique_indices=True)
    one = jnp.ones(n, jnp.int32)
    events = Statistics(
        hits=jnp.where(is_hit, multiplicity, 0),
        misses=jnp.where(is_first & ~has_row, multiplicity, 0),
        admissions=jnp.where(placed, one, 0),
        evictions=jnp.where(is_eviction, one, 0),
        rejections=jnp.where(admitted & ~placed, one, 0),
        size=jnp.where(placed & ~is_eviction, one, 0),
    )
    statistics = Statistics(
        *(
            total.at[place.bucket].add(event.astype(jnp.uint32), mode="drop")
            for total, event in zip(state.statistics, events, strict=True)
        )
    )
    return rows, state._replace(statistics=statistics)


def new_rows(is_new: Bool[Array, " V"], max_rows: Any) -> Int32[Array, " M"]:
    """Return the positions of True in increasing order, padded with V."""
    rows = jnp.nonzero(is_new, size=max_rows, fill_value=is_new.shape[0])[0]
    return rows.astype(jnp.int32)


def _place(
    state: VocabularyState,
    high: Words,
    low: Words,
    first_bucket: Int32[Array, ""],
    options: Options,
) -> _Place:
    a, b, spare = hash_ids(high, low)
    bucket = jax.lax.rem(a, jnp.full_like(a, options.num_buckets)).astype(jnp.int32)
    local = bucket - first_bucket
    num_local = state.sketch_updates.shape[0]
    is_local = (local >= 0) & (local < num_local)
    start = jax.lax.rem(b, jnp.full_like(b, options.num_slots))
    return _Place(is_local, jnp.where(is_local, local, 0), start, spare)


def _find(
    state: VocabularyState, high: Words, low: Words, place: _Place, options: Options
) -> tuple[Int32[Array, " N"], Bool[Array, " N"]]:
    """Return the local row of each id, and whether it has one."""

    def probe(p: Any, found: Any) -> Any:
        row = place.row(p, options)
        match = (state.low[row] == low) & (state.high[row] == high)
        return jnp.where(match & (state.last_seen[row] >= 0), row, found)

    nothing = jnp.where(place.is_local, NO_ROW, NO_ROW)
    row = jax.lax.fori_loop(0, options.num_probes, probe, nothing)
    return row, row >= 0


def _global_rows(
    row: Int32[Array, " N"],
    has_row: Bool[Array, " N"],
    place: _Place,
    first_bucket: Int32[Array, ""],
    options: Options,
) -> Int32[Array, " N"]:
    """Return rows of the whole table, those of unknown ids included."""
    first = first_bucket * options.bucket_size
    unknown = jnp.zeros_like(row)
    if options.hashed_unknown:
        size = jnp.full_like(place.spare, options.num_reserved)
        hashed = jax.lax.rem(place.spare, size).astype(jnp.int32)
        unknown = first + place.bucket * options.bucket_size + hashed
    return jnp.where(has_row, first + row, unknown)


def _count_hits(
    state: VocabularyState,
    row: Int32[Array, " N"],
    is_hit: Bool[Array, " N"],
    multiplicity: Int32[Array, " N"],
    step: Int32[Array, ""],
) -> VocabularyState:
    before = state.counts[row]
    counts = jnp.minimum(before, MAX_COUNT - multiplicity) + multiplicity
    at = _where_set(is_hit, row, state)
    return state._replace(
        last_seen=state.last_seen.at[at].max(step, mode="drop"),
        counts=state.counts.at[at].set(counts, mode="drop"),
    )


def _count_misses(
    state: VocabularyState,
    place: _Place,
    is_miss: Bool[Array, " N"],
    multiplicity: Int32[Array, " N"],
    options: Options,
) -> tuple[VocabularyState, Int32[Array, " N"]]:
    """Count ids in the sketch; return the state and how often each was counted."""
    if options.admission_count <= 1:
        return state, multiplicity
    cells, updates = options.cells_per_bucket, state.sketch_updates
    epoch = ((updates // np.uint32(cells // 4)) & np.uint32(15))[place.bucket]
    line = (place.spare & np.uint32(cells // LINE - 1)).astype(jnp.int32)
    line = place.bucket * (cells // LINE) + line
    sketch, size = state.sketch, state.sketch.shape[0]
    at = []
    for quarter in range(4):
        choice = (place.spare >> np.uint32(24 + 2 * quarter)) & np.uint32(3)
        cell = line * LINE + 4 * quarter + choice.astype(jnp.int32)
        old = sketch[cell]
        age = (epoch - (old >> np.uint32(COUNT_BITS))) & np.uint32(15)
        count = (old & np.uint32(COUNT_MASK)) >> age
        count = jnp.minimum(count, np.uint32(MOST_COUNTED))
        cell = jnp.where(is_miss, cell, size)
        aged = epoch << np.uint32(COUNT_BITS) | count
        sketch = sketch.at[cell].set(aged, mode="drop")
        at.append(cell)
    seen = jnp.where(is_miss, multiplicity, 0).astype(jnp.uint32)
    for cell in at:
        sketch = sketch.at[cell].add(seen, mode="drop")
    totals = [sketch.at[cell].get(mode="clip") & np.uint32(COUNT_MASK) for cell in at]
    least = jnp.minimum(
        jnp.minimum(totals[0], totals[1]), jnp.minimum(totals[2], totals[3])
    )
    updates = updates.at[place.bucket].add(seen, mode="drop")
    state = state._replace(sketch=sketch, sketch_updates=updates)
    return state, least.astype(jnp.int32)


def _match(
    state: VocabularyState,
    row: Int32[Array, " N"],
    place: _Place,
    admitted: Bool[Array, " N"],
    counted: Int32[Array, " N"],
    step: Int32[Array, ""],
    options: Options,
) -> tuple[Int32[Array, " N"], Bool[Array, " N"]]:
    """Match admitted ids and slots; return rows, and which ids got one now."""
    n, num_rows = admitted.shape[0], state.last_seen.shape[0]
    position = jax.lax.iota(jnp.int32, n)
    _, order = jax.lax.sort((-counted, position), num_keys=1, is_stable=True)
    rank = jnp.zeros(n, jnp.int32).at[order].set(position, unique_indices=True)
    limit = step - options.time_to_live

    def score(at: Int32[Array, " N"]) -> Int32[Array, " N"]:
        """Return the preference for a slot, the least first; _NONE: it is kept."""
        seen = state.last_seen[at]
        if options.eviction == "none":
            return jnp.where(seen < 0, seen, _NONE)
        value = state.counts[at] if options.eviction == "lfu" else seen
        return jnp.where(seen < 0, -1, jnp.where(seen < limit, value, _NONE))

    def prefer(last: Any) -> Any:
        """Return the score, probe and row of the slot that is next to the last."""

        def probe(p: Any, best: Any) -> Any:
            at = place.row(p, options)
            own = score(at)
            later = (own > last[0]) | ((own == last[0]) & (p > last[1]))
            better = later & (own < best[0])
            new = (own, jnp.broadcast_to(p, own.shape).astype(jnp.int32), at)
            return tuple(
                jnp.where(better, x, y) for x, y in zip(new, best, strict=True)
            )

        none = (jnp.full_like(rank, _NONE), jnp.zeros_like(rank), rank)
        return jax.lax.fori_loop(0, options.num_probes, probe, none)

    def wants(choice: Any) -> Bool[Array, " N"]:
        return admitted & (choice[0] != _NONE)

    def propose(loop: Any) -> Any:
        choice, owner, _ = loop
        at = jnp.where(wants(choice), choice[2], num_rows)
        owner = owner.at[at].min(rank, mode="drop")
        lost = wants(choice) & (owner[choice[2]] != rank)
        following = prefer(choice)
        choice = tuple(
            jnp.where(lost, x, y) for x, y in zip(following, choice, strict=True)
        )
        return choice, owner, lost.any()

    choice = prefer((jnp.full_like(rank, -2), rank, rank))
    owner = jnp.where(state.is_new, _NONE, _NONE)
    loop = (choice, owner, wants(choice).any())
    choice, *_ = jax.lax.while_loop(lambda loop: loop[2], propose, loop)
    placed = wants(choice)
    return jnp.where(placed, choice[2], row), placed


def _insert(
    state: VocabularyState,
    row: Int32[Array, " N"],
    high: Words,
    low: Words,
    placed: Bool[Array, " N"],
    counted: Int32[Array, " N"],
    step: Int32[Array, ""],
) -> tuple[VocabularyState, Bool[Array, " N"]]:
    """Write the ids that got a row; return the state, and which evicted another."""
    is_eviction = placed & (state.last_seen[row] >= 0)
    at = _where_set(placed, row, state)
    state = state._replace(
        high=state.high.at[at].set(high, mode="drop"),
        low=state.low.at[at].set(low, mode="drop"),
        last_seen=state.last_seen.at[at].set(step, mode="drop"),
        counts=state.counts.at[at].set(counted, mode="drop"),
        is_new=jnp.zeros_like(state.is_new).at[at].set(True, mode="drop"),
    )
    return state, is_eviction


def _where_set(
    chosen: Bool[Array, " N"], row: Int32[Array, " N"], state: VocabularyState
) -> Int32[Array, " N"]:
    """Return the rows to write, past the end where none is."""
    return jnp.where(chosen, row, state.last_seen.shape[0])

"""The state of a vocabulary, and its counters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.export
from jaxtyping import Array, Bool, Int32, UInt32


class Statistics(NamedTuple):
    """Counters of a vocabulary since `init`, modulo 2^32.

    The difference of two readings is exact if less than 2^32 events lie between them.
    In a `VocabularyState` each counter is [G], one element a bucket;
    `Vocabulary.statistics` sums over the buckets.

    Attributes:
      hits: occurrences of ids that had a row before the call.
      misses: occurrences of ids that got no row; they used a row for unknown ids.
      admissions: ids that got a row.
      evictions: ids that lost their row to another id.
      rejections: ids that were to be admitted and found no row, as all of their probes
        were taken and could not be evicted: the vocabulary was full for them.
      size: the number of ids that have a row now.

    Example:
      >>> vocabulary = jbag.vocabulary.Vocabulary(100)
      >>> state = vocabulary.init()
      >>> for step, ids in enumerate([[5, 6], [6, 7]]):
      ...     _, state = vocabulary.assign(state, jnp.array(ids), step)
      >>> counters = vocabulary.statistics(state)
      >>> int(counters.hits), int(counters.admissions), int(counters.size)
      (1, 3, 3)
    """

    hits: UInt32[Array, "*buckets"]
    misses: UInt32[Array, "*buckets"]
    admissions: UInt32[Array, "*buckets"]
    evictions: UInt32[Array, "*buckets"]
    rejections: UInt32[Array, "*buckets"]
    size: UInt32[Array, "*buckets"]


class VocabularyState(NamedTuple):
    """The state of a vocabulary of V rows in G buckets, a pytree.

    Row v belongs to bucket v // (V / G). An array [V] or [G] split evenly over devices
    has each bucket on one device, if their number divides G.

    Attributes:
      high: the upper word of the id of each row, [V]; 0 in a row without an id.
      low: the lower word, [V]; 0 in a row without an id.
      last_seen: the step in which the id was last seen, [V]; -1 in a row without an id.
      counts: how often the id was seen, [V]; 0 in a row without an id.
      is_new: whether the last `assign` gave the row to its id, [V].
      sketch: counts of ids without a row, [G * cells]; see `_reference.py`.
      sketch_updates: the number of occurrences counted in the sketch, [G].
      statistics: the counters, [G] each.

    Example:
      >>> state = jbag.vocabulary.Vocabulary(100).init()
      >>> state.last_seen.shape, int(state.last_seen[7])
      ((100,), -1)
    """

    high: UInt32[Array, " V"]
    low: UInt32[Array, " V"]
    last_seen: Int32[Array, " V"]
    counts: Int32[Array, " V"]
    is_new: Bool[Array, " V"]
    sketch: UInt32[Array, " cells"]
    sketch_updates: UInt32[Array, " G"]
    statistics: Statistics


def to_state(arrays: Sequence[Array]) -> VocabularyState:
    """Return the state whose leaves these are."""
    own = VocabularyState._fields[:-1]
    statistics = Statistics(*arrays[len(own) :])
    return VocabularyState(
        **dict(zip(own, arrays, strict=False)), statistics=statistics
    )


for _tuple in (Statistics, VocabularyState):
    jax.export.register_namedtuple_serialization(
        _tuple, serialized_name=f"jbag.vocabulary.{_tuple.__name__}"
    )

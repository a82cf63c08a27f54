"""`Vocabulary`: the options of a vocabulary, and its operations."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int32

from jbag._validation import (
    check_flag,
    check_integer,
    is_sharded,
    on_host,
    unsharded,
)
from jbag.ops.kernels import check_implementation
from jbag.ops.kernels.huge_pages import to_huge_pages
from jbag.vocabulary import _primitives
from jbag.vocabulary._reference import MAX_IDS, Options
from jbag.vocabulary._split_ids import SplitIds, split_ids
from jbag.vocabulary._state import Statistics, VocabularyState

_LARGEST_INT32 = 2**31 - 1
_MIN_BUCKET = 4096  # rows by default, so that buckets fill equally
_MAX_BUCKETS = 1024  # by default


class FullVocabularyError(RuntimeError):
    """An id found no row, as all of its probes were taken and could not be evicted.

    Example:
      >>> vocabulary = jbag.vocabulary.Vocabulary(
      ...     2, num_probes=1, eviction=None, raises_when_full=True
      ... )
      >>> try:
      ...     vocabulary.assign(vocabulary.init(), jnp.array([5, 6]), step=0)
      ... except jbag.vocabulary.FullVocabularyError as error:
      ...     print(error)
      1 of the ids of the vocabulary found no row: ...
    """


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The options of a vocabulary: which ids get rows, and which lose them.

    A table of V rows is divided into G buckets. An id has one bucket, by hash, and P
    probes in it: its row is one of them. An id that is admitted takes a free probe, or
    the row of an id that may be evicted. If there is none, or the id isn't admitted, it
    uses a row for unknown ids, and tries again at its next occurrence. Ids of a batch
    never evict each other.

    Attributes:
      num_embeddings: V, the rows of the table, those for unknown ids included.
      num_probes: P. More probes fill the table further before ids are rejected or
        evicted, and take longer to read. Without eviction use 64 or more. It is reduced
        to the slots of a bucket.
      admission_count: admit an id when it was counted so often without a row. 1 admits
        every id at once. A count-min sketch counts, some too much, and halves its
        counts once in V or more such occurrences, so that rare ids are forgotten.
      eviction: which id loses its row to an admitted one that has no free probe: "lru",
        the least recently seen of its probes; "lfu", the least frequently seen; None,
        no id ever.
      time_to_live: evict only ids that were not seen for more than so many steps. None
        evicts all but those of the current step.
      num_unknown_rows: 1 for one shared row, row 0. A larger number is the number of
        rows that unknown ids are hashed to, a multiple of G: the first ones of each
        bucket.
      num_buckets: G, which divides V. It must be a multiple of the number of devices
        that the state is divided over. None is the largest power of two that divides V,
        up to 1024, and leaves 4096 rows in a bucket. The first row of each bucket is
        never an id's.
      raises_when_full: whether `assign`, outside of `jit`, raises if an admitted id
        finds no row. Under `jit`, call `check` with the state. If False, such ids use
        the row of unknown ids. They are counted in either case.
      implementation: None, "xla" or "cpu", with the meaning that it has in
        `jbag.embedding_bag`. All give the same bits.

    Raises:
      TypeError: a number is not an integer.
      ValueError: a number is out of range; `num_embeddings` is not a multiple of
        `num_buckets`, or `num_unknown_rows` isn't one; `time_to_live` is given without
        eviction; `eviction` or `implementation` is unknown.

    Example:
      >>> vocabulary = jbag.vocabulary.Vocabulary(num_embeddings=1000)
      >>> state = vocabulary.init()
      >>> ids = np.array([2**63, 12, 2**63], np.uint64)
      >>> rows, state = jax.jit(vocabulary.assign)(state, split_ids(ids), step=0)
      >>> bool(rows[0] == rows[2]), bool(rows[0] == rows[1])
      (True, False)
      >>> vocabulary.lookup(state, np.array([12, 13], np.uint64)) == rows[1]
      Array([ True, False], dtype=bool)
    """

    num_embeddings: int
    _: dataclasses.KW_ONLY
    num_probes: int = 32
    admission_count: int = 1
    eviction: Literal["lru", "lfu"] | None = "lru"
    time_to_live: int | None = None
    num_unknown_rows: int = 1
    num_buckets: int | None = None
    raises_when_full: bool = False
    implementation: str | None = None

    def __post_init__(self) -> None:
        V = check_integer(
            "num_embeddings", self.num_embeddings, low=2, high=_LARGEST_INT32 + 1
        )
        check_integer("num_probes", self.num_probes, low=1)
        check_integer("admission_count", self.admission_count, low=1, high=1 << 16)
        check_integer("num_unknown_rows", self.num_unknown_rows, low=1)
        if self.eviction not in (None, "lru", "lfu"):
            raise ValueError(
                f"`eviction` must be 'lru', 'lfu' or None; got {self.eviction!r}."
            )
        if self.time_to_live is not None:
            high = _LARGEST_INT32 + 1
            check_integer("time_to_live", self.time_to_live, low=0, high=high)
            if self.eviction is None:
                raise ValueError(
                    "`time_to_live` must be None without `eviction`; "
                    f"got {self.time_to_live}."
                )
        if self.num_buckets is not None:
            check_integer("num_buckets", self.num_buckets, low=1)
        G, unknown = self._num_buckets, self.num_unknown_rows
        if V % G:
            raise ValueError(
                "`num_embeddings` must be a multiple of `num_buckets`; "
                f"got {V} and {G}."
            )
        if unknown > 1 and unknown % G:
            raise ValueError(
                "`num_unknown_rows` must be 1 or a multiple of the number of buckets, "
                f"{G}; got {unknown}."
            )
        if self._options.num_slots < 1:
            raise ValueError(
                f"`num_embeddings` must leave each of {G} buckets a row beside those "
                f"for unknown ids, {self._options.num_reserved} each; got {V}."
            )
        if G * self._options.cells_per_bucket > _LARGEST_INT32:
            raise ValueError(
                "`num_embeddings` must be at most 2^28 with `admission_count` above 1; "
                f"got {V}."
            )
        check_flag("raises_when_full", self.raises_when_full)
        check_implementation(self.implementation)
        if self.implementation not in (None, "xla", "cpu"):
            raise ValueError(
                "`implementation` of a vocabulary must be None, 'xla' or 'cpu'; "
                f"got {self.implementation!r}."
            )

    @property
    def capacity(self) -> int:
        """The number of ids that can have a row."""
        return self._num_buckets * self._options.num_slots

    def init(self) -> VocabularyState:
        """Return the state of a vocabulary without ids.

        Its arrays take 17 bytes a row, and 16 to 32 more with admission by count.
        """
        V, G = self.num_embeddings, self._num_buckets
        cells = G * self._options.cells_per_bucket
        return to_huge_pages(
            VocabularyState(
                high=jnp.zeros(V, jnp.uint32),
                low=jnp.zeros(V, jnp.uint32),
                last_seen=jnp.full(V, -1, jnp.int32),
                counts=jnp.zeros(V, jnp.int32),
                is_new=jnp.zeros(V, bool),
                sketch=jnp.zeros(cells, jnp.uint32),
                sketch_updates=jnp.zeros(G, jnp.uint32),
                statistics=Statistics(
                    *(jnp.zeros(G, jnp.uint32) for _ in Statistics._fields)
                ),
            )
        )

    def assign(
        self,
        state: VocabularyState,
        ids: Any,
        step: ArrayLike,
        *,
        where: Any = None,
    ) -> tuple[Int32[Array, "..."], VocabularyState]:
        """Return the rows of ids, new ones included, and the new state.

        Donate the state to `jax.jit`: it is then updated in place.

        Args:
          state: from `init`, or an earlier call.
          ids: of any shape; see `split_ids`.
          step: an integer of int32, at least 0 (a smaller one counts as 0), that
            doesn't decrease from call to call. Calls with equal steps don't evict each
            other's ids.
          where: a mask of the shape of `ids`; ids at False are ignored. None takes all.
            Use it for slots in no bag.

        Returns:
          (rows, state). The rows have the shape of `ids`, int32; -1 at False of
          `where`.

        Raises:
          TypeError: `ids` are not integers, or `step` is not an integer.
          ValueError: the state is not one of this vocabulary; `where` doesn't have the
            shape of `ids`; `step`, known, is negative; there are 2^27 ids or more.
          FullVocabularyError: see `raises_when_full`.
        """
        self._check_state(state)
        words, is_valid, shape = _flat(ids, where)
        rows, new_state = _primitives.assign(
            state,
            *words,
            is_valid,
            _check_step(step),
            jnp.zeros((), jnp.int32),
            self._options,
            self.implementation,
        )
        if self.raises_when_full and not isinstance(rows, jax.core.Tracer):
            self.check(new_state, since=state)
        return rows.reshape(shape), new_state

    def lookup(
        self, state: VocabularyState, ids: Any, *, where: Any = None
    ) -> Int32[Array, "..."]:
        """Return the rows of ids; those without a row get that of unknown ids.

        Args:
          state: from `assign`.
          ids: of any shape; see `split_ids`.
          where: as in `assign`.

        Returns:
          Rows of the shape of `ids`, int32.

        Raises:
          TypeError: `ids` are not integers.
          ValueError: the state is not one of this vocabulary; `where` doesn't have the
            shape of `ids`.
        """
        self._check_state(state)
        words, is_valid, shape = _flat(ids, where)
        first_bucket = jnp.zeros((), jnp.int32)
        rows = _primitives.lookup(
            state, *words, is_valid, first_bucket, self._options, self.implementation
        )
        return rows.reshape(shape)

    def new_rows(self, state: VocabularyState, max_rows: int) -> Int32[Array, " M"]:
        """Return the rows that the last `assign` gave to an id.

        Args:
          state: from `assign`.
          max_rows: the size of the result; the number of ids of the batch is enough.

        Returns:
          The rows in increasing order, then V, min(max_rows, V) in all.

        Raises:
          TypeError: `max_rows` is not an integer.
          ValueError: `max_rows` is negative; the state is not one of this vocabulary.
        """
        self._check_state(state)
        if not jax.export.is_symbolic_dim(max_rows):
            max_rows = check_integer("max_rows", max_rows, low=0)
            max_rows = min(max_rows, self.num_embeddings)
        return _primitives.new_rows(state.is_new, max_rows, self.implementation)

    def statistics(self, state: VocabularyState) -> Statistics:
        """Return the counters of all buckets, scalars of uint32.

        `statistics.size / vocabulary.capacity` tells how full the vocabulary is.
        """
        self._check_state(state)
        return Statistics(*(x.sum(dtype=jnp.uint32) for x in state.statistics))

    def check(
        self, state: VocabularyState, *, since: VocabularyState | None = None
    ) -> None:
        """Raise if an admitted id found no row.

        It waits for the state, which can't be traced.

        Args:
          state: from `assign`.
          since: an earlier state; None is the initial one.

        Raises:
          FullVocabularyError: an id found no row.
        """
        now = int(self.statistics(state).rejections)
        before = 0 if since is None else int(self.statistics(since).rejections)
        if rejected := (now - before) % 2**32:
            size = int(self.statistics(state).size)
            raise FullVocabularyError(
                f"{rejected} of the ids of the vocabulary found no row: their "
                f"{self._options.num_probes} probes are taken and may not be evicted; "
                f"{size} of {self.capacity} rows have an id."
            )

    @property
    def _num_buckets(self) -> int:
        if self.num_buckets is not None:
            return self.num_buckets
        divisor = self.num_embeddings & -self.num_embeddings
        most = max(1, self.num_embeddings // _MIN_BUCKET)
        return min(divisor, _MAX_BUCKETS, 1 << (most.bit_length() - 1))

    @property
    def _options(self) -> Options:
        G = self._num_buckets
        bucket_size = self.num_embeddings // G
        num_reserved = max(1, self.num_unknown_rows // G)
        return Options(
            bucket_size=bucket_size,
            num_buckets=G,
            num_reserved=num_reserved,
            hashed_unknown=self.num_unknown_rows > 1,
            num_probes=max(1, min(self.num_probes, bucket_size - num_reserved)),
            admission_count=self.admission_count,
            eviction=self.eviction or "none",
            time_to_live=self.time_to_live or 0,
        )

    def _check_state(self, state: VocabularyState) -> None:
        V, G = self.num_embeddings, self._num_buckets
        shapes = {"low": (V,), "sketch_updates": (G,)}
        shapes["sketch"] = (G * self._options.cells_per_bucket,)
        for name, shape in shapes.items():
            array: Any = getattr(state, name, None)
            found = np.shape(array)
            if found != shape:
                raise ValueError(
                    f"`state` must be one of this vocabulary, whose `{name}` has the "
                    f"shape {shape}; got {found}."
                )
            if isinstance(array, jax.Array) and is_sharded(array):
                raise ValueError(
                    "`state` must not be sharded along Explicit axes of a mesh; got "
                    f"{jax.typeof(array)} for `{name}`."
                )


def _flat(ids: Any, where: Any) -> tuple[SplitIds, Array, tuple[int, ...]]:
    """Return ids [N], the mask [N], and the shape of the ids."""
    words = split_ids(ids)
    shape = words.shape
    if where is None:
        is_valid = jnp.ones(shape, bool)
    else:
        is_valid = jnp.asarray(where)
        if is_valid.dtype != bool:
            raise TypeError(f"`where` must be boolean; got {is_valid.dtype}.")
        if is_valid.shape != shape:
            raise ValueError(
                f"`where` must have the shape of `ids`, {shape}; got {is_valid.shape}."
            )
    high, low, is_valid = (jnp.ravel(unsharded(x)) for x in (*words, is_valid))
    if isinstance(low.shape[0], int) and low.shape[0] >= MAX_IDS:
        raise ValueError(f"`ids` must be fewer than 2^27; got {low.shape[0]}.")
    return SplitIds(high, low), is_valid, shape


def _check_step(step: Any) -> Int32[Array, ""]:
    if on_host(step):
        number = check_integer("step", step, low=0, high=_LARGEST_INT32 + 1)
        return jnp.asarray(number, jnp.int32)
    if not jnp.issubdtype(step.dtype, jnp.integer):
        raise TypeError(f"`step` must be an integer; got {step.dtype}.")
    if step.ndim != 0:
        raise ValueError(f"`step` must be a scalar; got shape {step.shape}.")
    return jnp.maximum(step, 0).astype(jnp.int32)

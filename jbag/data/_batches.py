"""`batches`: shuffle a data set, pack it into batches, prefetch them."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jbag._validation import check_flag, check_integer
from jbag.data import _pack_examples
from jbag.data._order import batch_positions, epoch_capacity, permutation
from jbag.data._pack_examples import Batch


def batches(
    bags: Any,
    arrays: Any = None,
    *,
    batch_size: int,
    seed: int | None = None,
    epoch: int = 0,
    start: int = 0,
    capacity: Any = None,
    drop_remainder: bool = False,
    steps: int | Literal["epoch"] | None = None,
    shard: tuple[int, int] = (0, 1),
    prefetch: int = 0,
    device: Any = None,
    num_embeddings: Any = None,
) -> Batches:
    """Shuffle a data set and pack it into batches of B bags in N slots.

    The batches are a function of the arguments alone: they are the same on every run,
    and processes need no communication. NumPy shuffles; another version of NumPy may
    shuffle differently.

    Args:
      bags: the n examples of the data set: a `Bags`, or ids [n, L], or a tree (of dicts
        and tuples) of them, such as a dict by feature. Device arrays are copied to the
        host once.
      arrays: a tree of arrays [n, ...], such as labels; or None.
      batch_size: B, the examples per batch of this process.
      seed: the seed of the shuffle, different in each epoch; None does not shuffle.
      epoch: the epoch to yield.
      start: the number of items to skip at the start of the epoch, for a restart.
      capacity: N. None chooses one capacity for all epochs: the mean number of ids per
        batch and six standard deviations, rounded up by `jbag.bucket`; a rare epoch
        with a larger batch has a larger one. A number is the capacity. A function of
        the number of ids, such as `jbag.bucket`, applies per item: fewer empty slots,
        more shapes. Or a tree of these with the structure of `bags`.
      drop_remainder: drop the last batch, and the last stack, if it is not full.
      steps: None yields batches. K yields stacks of K batches for `jax.lax.scan`, the
        last one padded with empty batches. "epoch" yields one stack.
      shard: (index, count) of this process, such as (jax.process_index(),
        jax.process_count()). A step takes count * B examples, B per process. All
        processes have the same number of steps and the same shapes.
      prefetch: the number of items that a thread prepares ahead; 0 starts no thread.
      device: a device or `Sharding`, or a tree of them, for `jax.device_put`; None
        leaves items on the host. A stack of K batches sharded on its first axis has one
        batch per device; `jax.make_array_from_process_local_data` joins the items of
        several processes.
      num_embeddings: V, to check the ids of each batch; or a tree of numbers with the
        structure of `bags`. None checks nothing.

    Returns:
      A `Batches`, an iterable of `Batch`.

    Raises:
      IndexError: an id is outside [0, num_embeddings). The iterator raises it, with the
        feature, the example and the position.
      TypeError: an argument has a wrong type.
      ValueError: a number is out of range, `bags` and `arrays` differ in length, a
        batch exceeds `capacity`, or `drop_remainder` drops everything.

    Example:
      >>> bags = jbag.Bags.from_lists([[1, 2], [3], [4, 5, 6], [7], [8]])
      >>> labels = np.array([0, 1, 0, 1, 1])
      >>> stream = jbag.data.batches(bags, labels, batch_size=2, seed=0)
      >>> [batch.arrays.shape for batch in stream]
      [(2,), (2,), (2,)]
      >>> [stack] = jbag.data.batches(bags, batch_size=2, steps="epoch")
      >>> stack.bags.offsets
      array([[0, 2, 3],
             [0, 3, 4],
             [0, 1, 1]], dtype=int32)
    """
    examples = _pack_examples.check_examples(bags, arrays)
    batch_size = check_integer("batch_size", batch_size, low=1)
    if seed is not None:
        seed = check_integer("seed", seed, low=0)
    if isinstance(steps, str) and steps != "epoch":
        raise ValueError(f'`steps` must be a number, None or "epoch"; got {steps!r}.')
    if steps is not None and not isinstance(steps, str):
        steps = check_integer("steps", steps, low=1)
    check_flag("drop_remainder", drop_remainder)
    options = _Options(
        batch_size,
        seed,
        _pack_examples.check_capacities(capacity, examples.names, examples.bags_tree),
        bool(drop_remainder),
        steps,
        _check_shard(shard),
        check_integer("prefetch", prefetch, low=0),
        device,
        _pack_examples.check_sizes(num_embeddings, examples.names, examples.bags_tree),
    )
    return Batches(examples, options, epoch, start)


class _Options(NamedTuple):
    """The checked arguments of `batches`."""

    batch_size: int
    seed: int | None
    capacities: list[_pack_examples.Capacity | None]
    drop_remainder: bool
    steps: int | str | None
    shard: tuple[int, int]
    prefetch: int
    device: Any
    num_embeddings: list[int | None]


class Batches:
    """Iterate over the batches of an epoch; `jbag.data.batches` constructs it.

    Each iteration yields the same items. `len()` is their number.

    Example:
      >>> bags = jbag.Bags.from_lists([[1, 2], [3], [4, 5, 6], [7], [8]])
      >>> stream = jbag.data.batches(bags, batch_size=2, seed=0)
      >>> step = 7  # of a checkpoint
      >>> epoch, start = divmod(step, len(stream))
      >>> epoch, start, len(stream.at(epoch, start))
      (2, 1, 2)
    """

    def __init__(
        self,
        examples: _pack_examples.Examples,
        options: _Options,
        epoch: int,
        start: int,
    ) -> None:
        epoch = check_integer("epoch", epoch, low=0)
        self._examples, self._options = examples, options
        index, num_shards = options.shard
        all_positions = batch_positions(
            permutation(examples.size, options.seed, epoch),
            batch_size=options.batch_size,
            steps=options.steps,
            num_shards=num_shards,
            drop_remainder=options.drop_remainder,
        )
        self._start = check_integer("start", start, low=0, high=len(all_positions) + 1)
        self._positions = all_positions[:, :, index]
        # Sizes of all processes, because their shapes must be equal.
        self._used = [
            _pack_examples.sizes(bags, all_positions).max((1, 2), initial=0)
            for bags in examples.bags
        ]
        self._capacities = list(map(self._capacity, range(len(examples.bags))))

    def at(self, epoch: int, start: int = 0) -> Batches:
        """Return the batches of another epoch, from its item `start`.

        Args:
          epoch: the epoch to yield.
          start: the number of items to skip.

        Raises:
          TypeError: an argument is not an integer.
          ValueError: an argument is out of range.

        Example:
          >>> bags = jbag.Bags.from_lists([[1], [2], [3], [4]])
          >>> stream = jbag.data.batches(bags, batch_size=2, seed=0)
          >>> sorted(i for batch in stream.at(1) for i in batch.positions.tolist())
          [0, 1, 2, 3]
        """
        return Batches(self._examples, self._options, epoch, start)

    def __len__(self) -> int:
        return len(self._positions) - self._start

    def __iter__(self) -> Iterator[Batch]:
        # JAX's configuration is per thread: use that of the iterating thread.
        x64 = jax.dtypes.canonicalize_dtype(np.int64) == np.int64
        make = functools.partial(self._make, x64=x64)
        items = range(self._start, len(self._positions))
        if self._options.prefetch:
            return _Prefetched(make, items, self._options.prefetch)
        return map(make, items)

    def _capacity(self, leaf: int) -> _pack_examples.Capacity:
        options, bags = self._options, self._examples.bags[leaf]
        capacity = options.capacities[leaf]
        largest = int(self._used[leaf].max(initial=0))
        if capacity is None:
            lengths, shuffled = np.asarray(bags.lengths), options.seed is not None
            return epoch_capacity(lengths, options.batch_size, largest, shuffled)
        if not callable(capacity):
            _pack_examples.fit(self._examples.names[leaf], capacity, largest)
        return capacity

    def _make(self, item: int, x64: bool) -> Batch:
        examples, positions = self._examples, self._positions[item]
        bags = []
        for leaf, name in enumerate(examples.names):
            used = int(self._used[leaf][item])
            capacity = _pack_examples.fit(name, self._capacities[leaf], used)
            own = _pack_examples.select(examples.bags[leaf], positions, capacity)
            num_embeddings = self._options.num_embeddings[leaf]
            if num_embeddings is not None:
                _pack_examples.check_rows(name, own, num_embeddings, positions)
            bags.append(own)
        arrays = [_pack_examples.take(array, positions) for array in examples.arrays]
        batch = Batch(
            jax.tree.unflatten(examples.bags_tree, bags),
            jax.tree.unflatten(examples.arrays_tree, arrays),
            positions >= 0,
            positions.copy(),
        )
        if self._options.steps is None:
            batch = jax.tree.map(lambda x: x[0], batch)
        if self._options.device is None:
            return batch
        with jax.enable_x64(x64):
            return jax.device_put(batch, self._options.device)


class _Prefetched:
    """Yield `make(item)` of each item; a thread computes up to `ahead` items early.

    The thread ends with the iterator. This is a class because Python may close an
    unfinished generator late and on any thread.
    """

    def __init__(
        self, make: Callable[[int], Batch], items: Iterable[int], ahead: int
    ) -> None:
        self._make, self._items, self._ahead = make, iter(items), ahead
        self._futures: deque[concurrent.futures.Future[Batch]] = deque()
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "jbag.data")
        self._end = weakref.finalize(
            self, self._executor.shutdown, wait=False, cancel_futures=True
        )

    def __iter__(self) -> _Prefetched:
        return self

    def __next__(self) -> Batch:
        for item in itertools.islice(self._items, self._ahead + 1 - len(self._futures)):
            self._futures.append(self._executor.submit(self._make, item))
        try:
            if self._futures:
                return self._futures.popleft().result()
            raise StopIteration
        except BaseException:
            self._items = iter(())
            self._futures.clear()
            self._end()
            raise


def _check_shard(shard: Any) -> tuple[int, int]:
    if not isinstance(shard, tuple | list) or len(shard) != 2:
        raise TypeError(f"`shard` must be (index, count); got {shard!r}.")
    count = check_integer("shard[1]", shard[1], low=1)
    return check_integer("shard[0]", shard[0], low=0, high=count), count

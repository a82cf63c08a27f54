"""From examples to batches of one static shape, so that a step is compiled once.

A data set is one `Bags`, with its examples end to end on the host, or a dict of
features, each a `Bags` or ids [n, L]; and a tree of arrays that have the examples on
their first axis. `batches` shuffles it, cuts it and
packs it:

    >>> texts = jbag.Bags.from_lists([[1, 2], [3], [4, 5, 6]])
    >>> labels = np.array([0, 1, 1])
    >>> stream = jbag.data.batches(texts, labels, batch_size=2, seed=0, prefetch=2)
    >>> for epoch in range(2):
    ...     for batch in stream.at(epoch):
    ...         print(epoch, batch.bags.num_bags, batch.bags.capacity, batch.mask)
    0 2 64 [ True  True]
    0 2 64 [ True False]
    1 2 64 [ True  True]
    1 2 64 [ True False]

For Grain, with its own shuffling, transformations, workers and checkpoints, `Source`
gives the examples and `Collate` packs them::

    pipeline = (
        grain.MapDataset.source(jbag.data.Source(texts, labels))
        .seed(0)
        .shuffle()
        .batch(256, batch_fn=jbag.data.Collate(256))
        .to_iter_dataset()
    )

Nothing is dropped unless asked for: the last batch is filled up with empty bags, and
`Batch.mask` says with how many.
"""

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
from jbag.data import _batches
from jbag.data._batches import Batch as Batch
from jbag.data._collate import Collate as Collate
from jbag.data._collate import Example as Example
from jbag.data._collate import Source as Source
from jbag.data._sampler import batch_positions, epoch_capacity, permutation


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
    """Cut a data set into batches of B bags in N slots each.

    Everything follows from the arguments: it is the same on every run, and processes
    agree without a word between them. (NumPy does the shuffling; another version of it
    may shuffle in another way.)

    Args:
      bags: the data set: n examples as one `Bags`, or as an array of ids [n, L], n
        bags of L; or several that belong together, as a dict of features (dicts and
        tuples, nested). Data on a device is copied to the host, once.
      arrays: a tree of arrays [n, ...], such as labels, or None.
      batch_size: B, the examples of a batch, on this process.
      seed: shuffles, each epoch in another way; None keeps the order of the data set.
      epoch: which epoch to yield.
      start: how many items of the epoch to skip, as after a restart.
      capacity: N. None takes one for all epochs: the mean size of a batch and six
        standard deviations, rounded up by `jbag.bucket`; or more in an epoch that has
        a larger batch, which few have, if any. A number is that capacity. A function of
        the number of ids, such as `jbag.bucket`, is called for each item: fewer empty
        slots, a few more shapes. Or a tree of these, as `bags` is.
      drop_remainder: leave out the last batch, and the last stack, unless it is full.
      steps: None yields batches; K yields stacks of K of them, to `jax.lax.scan` over,
        the last one filled up with batches of empty bags; "epoch" yields one stack.
      shard: which process this is, of how many: (jax.process_index(),
        jax.process_count()). A step takes `count * batch_size` examples, of which each
        process has its own part. All take as many steps, in the same shapes.
      prefetch: how many items a thread prepares ahead; 0 starts no thread.
      device: where to put items: a device or `Sharding`, or a tree of them, as
        `jax.device_put` takes. None leaves them on the host. Sharded on its first axis,
        a stack of K gives K devices a batch each; those of several processes are put
        together by `jax.make_array_from_process_local_data`.
      num_embeddings: V, the rows of the table: ids of each batch are checked when it is
        made. Or a tree of these, as `bags` is, such as a dict by feature. None checks
        nothing.

    Returns:
      `Batches`, which yield a `Batch` for each item whenever they are iterated.

    Raises:
      IndexError: an id is outside [0, num_embeddings); raised by the iterator of the
        batches, with the feature, the example and the position.
      TypeError: an argument is of another type.
      ValueError: a number is out of range, `bags` and `arrays` differ in length, a
        batch doesn't fit in `capacity`, or `drop_remainder` leaves nothing.

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
    examples = _batches.check_examples(bags, arrays)
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
        _batches.check_capacities(capacity, examples.names, examples.bags_tree),
        bool(drop_remainder),
        steps,
        _check_shard(shard),
        check_integer("prefetch", prefetch, low=0),
        device,
        _batches.check_sizes(num_embeddings, examples.names, examples.bags_tree),
    )
    return Batches(examples, options, epoch, start)


class _Options(NamedTuple):
    """What `batches` was given, checked."""

    batch_size: int
    seed: int | None
    capacities: list[_batches.Capacity | None]
    drop_remainder: bool
    steps: int | str | None
    shard: tuple[int, int]
    prefetch: int
    device: Any
    num_embeddings: list[int | None]


class Batches:
    """What `batches` gives: an iterable of `Batch`, the same ones each time.

    `len()` is the number of items that it yields.

    Example:
      >>> bags = jbag.Bags.from_lists([[1, 2], [3], [4, 5, 6], [7], [8]])
      >>> stream = jbag.data.batches(bags, batch_size=2, seed=0)
      >>> step = 7  # where a checkpoint was written
      >>> epoch, start = divmod(step, len(stream))
      >>> epoch, start, len(stream.at(epoch, start))
      (2, 1, 2)
    """

    def __init__(
        self, examples: _batches.Examples, options: _Options, epoch: int, start: int
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
        # Of all processes, as their shapes must be the same.
        self._used = [
            _batches.sizes(bags, all_positions).max((1, 2), initial=0)
            for bags in examples.bags
        ]
        self._capacities = list(map(self._capacity, range(len(examples.bags))))

    def at(self, epoch: int, start: int = 0) -> Batches:
        """Return the batches of another epoch, from its item `start` on.

        Raises:
          TypeError, ValueError: as `batches`.

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
        # JAX's configuration belongs to a thread; the one that iterates decides.
        x64 = jax.dtypes.canonicalize_dtype(np.int64) == np.int64
        make = functools.partial(self._make, x64=x64)
        items = range(self._start, len(self._positions))
        if self._options.prefetch:
            return _Prefetched(make, items, self._options.prefetch)
        return map(make, items)

    def _capacity(self, leaf: int) -> _batches.Capacity:
        options, bags = self._options, self._examples.bags[leaf]
        capacity = options.capacities[leaf]
        largest = int(self._used[leaf].max(initial=0))
        if capacity is None:
            lengths, shuffled = np.asarray(bags.lengths), options.seed is not None
            return epoch_capacity(lengths, options.batch_size, largest, shuffled)
        if not callable(capacity):
            _batches.fit(self._examples.names[leaf], capacity, largest)
        return capacity

    def _make(self, item: int, x64: bool) -> Batch:
        examples, positions = self._examples, self._positions[item]
        bags = []
        for leaf, name in enumerate(examples.names):
            used = int(self._used[leaf][item])
            capacity = _batches.fit(name, self._capacities[leaf], used)
            own = _batches.select(examples.bags[leaf], positions, capacity)
            num_embeddings = self._options.num_embeddings[leaf]
            if num_embeddings is not None:
                _batches.check_rows(name, own, num_embeddings, positions)
            bags.append(own)
        arrays = [_batches.take(array, positions) for array in examples.arrays]
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
    """Yield `make(item)` of each, made by a thread, `ahead` of them before their time.

    The thread ends with the iterator. It is a class, as a generator that is left behind
    in a cycle or at the end of the program is closed on any thread, and too late.
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

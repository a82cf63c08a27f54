"""The order of an epoch: the positions of the examples per batch; the capacity."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Int

from jbag.ragged._bucket_capacity import bucket


def batch_positions(
    order: Int[np.ndarray, " n"],
    *,
    batch_size: int,
    steps: int | str | None,
    num_shards: int,
    drop_remainder: bool,
) -> Int[np.ndarray, "items K shards B"]:
    """Return the positions of an epoch; -1 is padding.

    Raises:
      ValueError: `drop_remainder` drops all examples.
    """
    num_batches = _divide(order.size, batch_size * num_shards, drop_remainder)
    stacked = num_batches if steps == "epoch" else int(steps or 1)
    num_items = _divide(num_batches, max(1, stacked), drop_remainder)
    if num_items == 0 and order.size:
        full = max(1, stacked) * num_shards * batch_size
        raise ValueError(
            f"`drop_remainder` must leave an item: there are {order.size} examples, "
            f"and an item takes {full}."
        )
    # Signed, for -1.
    dtype = np.int32 if order.size <= np.iinfo(np.int32).max else np.int64
    positions = np.full((num_items, stacked, num_shards, batch_size), -1, dtype)
    used = min(order.size, positions.size)
    positions.reshape(-1)[:used] = order[:used]
    return positions


def permutation(size: int, seed: int | None, epoch: int) -> Int[np.ndarray, " n"]:
    """Return the order of the examples in an epoch."""
    if seed is None:
        return np.arange(size)
    return np.random.default_rng((seed, epoch)).permutation(size)


def epoch_capacity(
    lengths: Int[np.ndarray, " n"], batch_size: int, largest: int, shuffled: bool
) -> int:
    """Return one capacity for the batches of all epochs, at least `largest`."""
    if lengths.size and lengths.min() == lengths.max():
        return batch_size * int(lengths[0])
    if shuffled and batch_size < lengths.size:
        mean, longest = lengths.mean(), int(lengths.max())
        # The standard deviation of the sum of B lengths drawn without replacement. The
        # maximum covers data with a few very long bags.
        spread = lengths.std() * math.sqrt(batch_size * (1 - batch_size / lengths.size))
        likely = batch_size * mean + 6 * spread
        likely = max(likely, longest + (batch_size - 1) * mean + 3 * spread)
        highest = np.partition(lengths, -batch_size)[-batch_size:]
        most = int(highest.sum(dtype=np.int64))
        largest = max(largest, min(math.ceil(likely), most))
    return bucket(largest)


def _divide(n: int, size: int, drop_remainder: bool) -> int:
    return n // size if drop_remainder else -(-n // size)

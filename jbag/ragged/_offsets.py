"""Conversions between offsets and segment ids.

Host offsets are checked by `check_offsets` in `jbag/_validation.py`, which has the
error messages. Malformed offsets on a device are found by `bag_bounds` in
`_csr_arrays.py`.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jbag._validation import (
    AnyArray,
    Integers,
    check_integer,
    check_integers,
    check_offsets,
    on_host,
    to_index_dtype,
)
from jbag.ragged import _csr_arrays


def offsets_to_segment_ids(offsets: Integers, capacity: int) -> Int[AnyArray, " N"]:
    """Return the bag of each slot.

    Args:
      offsets: [B + 1], from 0, non-decreasing.
      capacity: N, the number of slots.

    Returns:
      Sorted segment ids [N], int32; B in the tail. If offsets on a device are
      malformed, every segment id is -1.

    Raises:
      TypeError: `offsets` or `capacity` are not integers.
      ValueError: `offsets` on the host start above 0, decrease, or exceed N.

    Example:
      >>> jbag.offsets_to_segment_ids(numpy.array([0, 4, 6, 10]), capacity=11)
      array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 3], dtype=int32)
    """
    check_integer("capacity", capacity, low=0)
    offsets = check_offsets(offsets, capacity, include_last_offset=True)
    if on_host(offsets):
        lengths = np.diff(offsets, append=capacity)
        return np.repeat(np.arange(offsets.size, dtype=np.int32), lengths)
    bounds, malformed = _csr_arrays.bag_bounds(jnp.asarray(offsets), capacity)
    return jnp.where(malformed.any(), -1, _csr_arrays.segment_ids(bounds, capacity))


def segment_ids_to_offsets(
    segment_ids: Integers, num_bags: int
) -> Int[AnyArray, " {num_bags}+1"]:
    """Return the first slot of each bag, and the end of the last one.

    Args:
      segment_ids: the bag of each slot [N], sorted; `num_bags` in the tail.
      num_bags: B.

    Returns:
      Offsets [B + 1], int32. If segment ids on a device are unsorted or out of range,
      every offset is -1, and every bag pools to NaN.

    Raises:
      TypeError: `segment_ids` or `num_bags` are not integers.
      ValueError: `segment_ids` are not 1-D; on the host, they decrease or are outside
        [0, num_bags].

    Example:
      >>> jbag.segment_ids_to_offsets(numpy.array([0, 0, 2]), num_bags=3)
      array([0, 2, 2, 3], dtype=int32)
    """
    check_integer("num_bags", num_bags, low=0)
    segments = check_integers("segment_ids", segment_ids)
    if segments.ndim != 1:
        raise ValueError(f"`segment_ids` must be 1-D; got shape {segments.shape}.")
    host = on_host(segments)
    if not host:
        segments = to_index_dtype(segments)
    numpy = np if host else jnp
    outside = (segments < 0) | (segments > num_bags)
    drops = segments[1:] < segments[:-1]
    if host and outside.any():
        at = int(np.argmax(outside))
        raise ValueError(
            f"`segment_ids` must lie in [0, {num_bags}]; got {segments[at]} "
            f"at position {at}."
        )
    if host and drops.any():
        at = int(np.argmax(drops)) + 1
        raise ValueError(
            f"`segment_ids` must be sorted; got {segments[at - 1]} then {segments[at]} "
            f"at position {at}."
        )
    # Narrowed after the checks, as `num_bags` may not fit in the dtype.
    segments = to_index_dtype(segments)
    bags = numpy.arange(num_bags + 1, dtype=segments.dtype)
    offsets = numpy.searchsorted(segments, bags).astype(np.int32)
    if not host:
        offsets = jnp.where(outside.any() | drops.any(), -1, offsets)
    return offsets

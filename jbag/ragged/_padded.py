"""Conversions between padded ids [B, L] and `Bags`."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jbag._validation import (
    AnyArray,
    check_integer,
    check_integers,
    check_weights,
    on_host,
    to_index_dtype,
)
from jbag.ragged import _csr_arrays


class Padded(NamedTuple):
    """The result of `Bags.to_padded`, and the arguments of `Bags.from_padded`.

    Attributes:
      ids: [B, L], 0 in empty slots.
      mask: [B, L], True at slots with an id.
      weights: [B, L], 0 in empty slots, or None.

    Example:
      >>> padded = jbag.Bags.from_lists([[7, 8], [9]]).to_padded(2)
      >>> jbag.Bags.from_padded(*padded).to_lists()
      [[7, 8], [9]]
    """

    ids: Int[AnyArray, "B L"]
    mask: Bool[AnyArray, "B L"]
    weights: Float[AnyArray, "B L"] | None


jax.export.register_namedtuple_serialization(Padded, serialized_name="jbag.Padded")


def from_padded(
    ids: Any, mask: Any, weights: Any, pad_id: Any
) -> tuple[AnyArray, AnyArray, AnyArray | None]:
    """Check padded ids; return ids [B * L], lengths [B] and weights [B * L].

    Empty slots are moved to the end.
    """
    ids = check_integers("ids", ids)
    if ids.ndim != 2:
        raise ValueError(f"`ids` must be [B, L]; got shape {ids.shape}.")
    if pad_id is not None:
        if mask is not None:
            raise ValueError("`pad_id` must be None with a mask; got both.")
        pad_id = check_integer("pad_id", pad_id)
    if mask is None:
        limits = jnp.iinfo(ids.dtype)
        can_occur = pad_id is not None and limits.min <= pad_id <= limits.max
        mask = ids != pad_id if can_occur else np.ones(ids.shape, bool)
    mask = np.asarray(mask) if on_host(mask) else mask
    if mask.dtype != bool:
        raise TypeError(f"`mask` must be boolean; got {mask.dtype}.")
    if mask.shape != ids.shape:
        raise ValueError(
            f"`mask` must have the shape of `ids`, {ids.shape}; got {mask.shape}."
        )
    if weights is not None:
        weights = check_weights(weights, ids.shape, like="ids")
    numpy = _array_module(ids, mask, weights)
    if numpy is jnp:
        ids, mask = jnp.asarray(to_index_dtype(ids)), jnp.asarray(mask)
    # A stable sort moves empty slots to the end and keeps the order of the others.
    order = numpy.argsort(~mask.reshape(-1), stable=True)
    if weights is not None:
        weights = numpy.asarray(weights).reshape(-1)[order]
    return ids.reshape(-1)[order], mask.sum(1), weights


def to_padded(
    indices: Int[AnyArray, " N"],
    offsets: Int[AnyArray, " ends"],
    weights: Float[AnyArray, " N"] | None,
    length: int,
) -> Padded:
    """Return the bags padded to `length` slots.

    On a device, a bag that is malformed or longer gets ids out of range.
    """
    capacity, offsets = indices.size, to_index_dtype(offsets)
    lengths = offsets[1:] - offsets[:-1]
    numpy = _array_module(indices, offsets, weights)
    if numpy is np and (lengths > length).any():
        raise ValueError(
            f"`length` must be at least the longest bag, {lengths.max()}; got {length}."
        )
    slots = offsets[:-1, None] + numpy.arange(length, dtype=offsets.dtype)
    mask = slots < offsets[1:, None]
    slots = numpy.where(mask, slots, 0)

    def fill(x: AnyArray) -> AnyArray:
        if not capacity:
            return numpy.zeros(slots.shape, x.dtype)
        return numpy.where(mask, numpy.take(numpy.asarray(x), slots, mode="clip"), 0)

    ids = fill(indices)
    if numpy is jnp:
        _, malformed = _csr_arrays.bag_bounds(jnp.asarray(offsets), capacity)
        invalid = (malformed | (lengths > length))[:, None]
        ids = jnp.where(invalid, jnp.iinfo(ids.dtype).max, ids)
        mask |= invalid
    return Padded(ids, mask, None if weights is None else fill(weights))


def _array_module(*arrays: AnyArray | None) -> ModuleType:
    """Return `numpy` if every array is on the host, else `jax.numpy`."""
    return np if all(x is None or on_host(x) for x in arrays) else jnp

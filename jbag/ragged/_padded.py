"""Padded ids [B, L] from and to flat slots: `Bags.from_padded`, `Bags.to_padded`."""

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
from jbag.ragged import _csr


class Padded(NamedTuple):
    """What `Bags.to_padded` returns: the arguments of `Bags.from_padded`."""

    ids: Int[AnyArray, "B L"]
    mask: Bool[AnyArray, "B L"]
    weights: Float[AnyArray, "B L"] | None


jax.export.register_namedtuple_serialization(Padded, serialized_name="jbag.Padded")


def from_padded(
    ids: Any, mask: Any, weights: Any, pad_id: Any
) -> tuple[AnyArray, AnyArray, AnyArray | None]:
    """Check a rectangle; return ids [B * L], lengths [B] and weights [B * L].

    The ids and weights of empty slots stand behind the others.
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
        marks = pad_id is not None and limits.min <= pad_id <= limits.max
        mask = ids != pad_id if marks else np.ones(ids.shape, bool)
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
    # A stable sort moves the empty slots, in their order, behind the others.
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
    """Return the bags as rows of `length` slots; those that don't fit are lost.

    On a device a lost bag, or a malformed one, is a row of ids out of range.
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
        _, malformed = _csr.bag_bounds(jnp.asarray(offsets), capacity)
        lost = (malformed | (lengths > length))[:, None]
        ids = jnp.where(lost, jnp.iinfo(ids.dtype).max, ids)
        mask |= lost
    return Padded(ids, mask, None if weights is None else fill(weights))


def _array_module(*arrays: AnyArray | None) -> ModuleType:
    """Return NumPy if every array is on the host, else JAX's."""
    return np if all(x is None or on_host(x) for x in arrays) else jnp

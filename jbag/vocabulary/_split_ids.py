"""64-bit ids as two words of 32 bits, so that no program needs 64-bit integers."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt32

from jbag._validation import check_integers, on_host
from jbag.text._string_hash import hash_strings, holds_strings


class SplitIds(NamedTuple):
    """Unsigned 64-bit ids as two words, a pytree.

    Attributes:
      high: the upper 32 bits of each id, uint32, of any shape.
      low: the lower 32 bits, of the same shape.

    Example:
      >>> ids = jbag.vocabulary.SplitIds(jnp.uint32([0, 1]), jnp.uint32([7, 7]))
      >>> ids.shape, [int(high) << 32 | int(low) for high, low in zip(*ids)]
      ((2,), [7, 4294967303])
    """

    high: UInt32[Any, "..."]
    low: UInt32[Any, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the ids."""
        return self.low.shape


jax.export.register_namedtuple_serialization(
    SplitIds, serialized_name="jbag.vocabulary.SplitIds"
)


def split_ids(ids: Any) -> SplitIds:
    """Split ids into two words.

    A negative id is the unsigned one of the same 64 bits: -1 is 2^64 - 1. Split 64-bit
    ids before they are arguments of a jitted function: JAX keeps their lower words
    only, unless it has 64 bits enabled.

    Args:
      ids: integers of any shape: an array of JAX, whose dtype has at most 32 bits
        unless JAX has 64 bits enabled; or data on the host (NumPy, lists) with up to 64
        bits; or strings on the host, which `jbag.text.hash_strings` hashes; or a
        `SplitIds`.

    Returns:
      The ids as arrays of JAX, or of NumPy if they are on the host.

    Raises:
      TypeError: `ids` are neither integers nor strings, or the words of a `SplitIds`
        aren't uint32.
      ValueError: the words of a `SplitIds` differ in shape.
      OverflowError: an id of a list doesn't fit in 64 bits.

    Example:
      >>> jbag.vocabulary.split_ids(np.array([3, -1, 1 << 40]))
      SplitIds(high=array([         0, 4294967295,        256], dtype=uint32),
               low=array([         3, 4294967295,          0], dtype=uint32))
    """
    if isinstance(ids, SplitIds):
        return _checked(ids)
    if on_host(ids):
        if holds_strings(ids):
            ids = hash_strings(ids)
        ids = check_integers("ids", _unsigned_if_large(ids))
        words = ids.astype(np.uint64)
        high = np.asarray(words >> np.uint64(32)).astype(np.uint32)
        return SplitIds(high, words.astype(np.uint32))
    ids = check_integers("ids", ids)
    if ids.dtype.itemsize == 8:
        return SplitIds((ids >> 32).astype(jnp.uint32), ids.astype(jnp.uint32))
    if jnp.issubdtype(ids.dtype, jnp.unsignedinteger):
        low = ids.astype(jnp.uint32)
        return SplitIds(jnp.zeros_like(low), low)
    signed = ids.astype(jnp.int32)
    words = (signed >> 31, signed)
    return SplitIds(*(jax.lax.bitcast_convert_type(x, jnp.uint32) for x in words))


def _checked(ids: SplitIds) -> SplitIds:
    high, low = (x if isinstance(x, jax.Array) else np.asarray(x) for x in ids)
    if high.dtype != np.uint32 or low.dtype != np.uint32:
        raise TypeError(
            f"The words of `ids` must be uint32; got {high.dtype} and {low.dtype}."
        )
    if high.shape != low.shape:
        raise ValueError(
            "The words of `ids` must have equal shapes; "
            f"got {high.shape} and {low.shape}."
        )
    return SplitIds(high, low)


def _unsigned_if_large(ids: Any) -> Any:
    """Convert lists with integers of 2^63 or more, which NumPy makes floats of."""
    if isinstance(ids, np.ndarray | np.generic):
        return ids
    array = np.asarray(ids)
    if array.dtype != np.float64 and array.dtype != object:
        return array
    exact = np.asarray(ids, object)
    if exact.size == 0 or not all(
        isinstance(x, int) and not isinstance(x, bool) for x in exact.flat
    ):
        return array
    if any(not -(2**63) <= x < 2**64 for x in exact.flat):
        raise OverflowError("`ids` must fit in 64 bits; got a larger one.")
    return np.array([x % 2**64 for x in exact.flat], np.uint64).reshape(exact.shape)

"""`Bags`: a ragged batch of ids with static shapes, and its conversions."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jbag._validation import (
    AnyArray,
    Floats,
    Integers,
    check_ids,
    check_integer,
    check_integers,
    check_offsets,
    check_weights,
    on_host,
    to_index_dtype,
)
from jbag.ragged import _pack_lists, _padded
from jbag.ragged._offsets import offsets_to_segment_ids, segment_ids_to_offsets


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["indices", "offsets", "weights"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Bags:
    """A ragged batch of B bags of ids in CSR form, with static shapes.

    Bag b is `indices[offsets[b]:offsets[b + 1]]`. Slots at or past `offsets[-1]`, the
    tail, are in no bag. Batches with equal B and capacity N share one compilation.

    It is a pytree for jit, vmap, scan, `jax.device_put`, `jax.export` and checkpoints;
    `jbag.linen` registers it with `flax.serialization`. Bags from host data hold NumPy
    arrays, which are checked by value and stay on the host until used.

    Attributes:
      indices: [N], integers.
      offsets: [B + 1], integers, from 0, non-decreasing.
      weights: [N], floating, or None.

    Example:
      >>> bags = jbag.Bags.from_lists([[0, 1, 2, 3], [4, 5], [6, 0, 7, 8]], capacity=12)
      >>> bags.offsets
      array([ 0,  4,  6, 10], dtype=int32)
      >>> bags.num_bags, bags.capacity
      (3, 12)
    """

    indices: Int[AnyArray, "*batch N"]
    offsets: Int[AnyArray, "*batch ends"]
    weights: Float[AnyArray, "*batch N"] | None = None

    @classmethod
    def from_lists(
        cls,
        ids: Iterable[Integers],
        weights: Iterable[Floats] | None = None,
        *,
        capacity: int | None = None,
        num_bags: int | None = None,
    ) -> Bags:
        """Pack one list or 1-D array of ids per bag.

        Args:
          ids: B lists of ids.
          weights: B lists of weights of the lengths of `ids`, or None.
          capacity: N, at least the number of ids, which is the default. See `bucket`.
          num_bags: B, at least `len(ids)`, which is the default. Empty bags are added.

        Raises:
          IndexError: an id exceeds the widest enabled integer of JAX.
          TypeError: `ids` holds a non-integer, or `weights` a non-number.
          ValueError: lengths of `weights` differ, or `capacity` or `num_bags` is low.

        Example:
          >>> jbag.Bags.from_lists([[3, 1], [], [2]]).offsets
          array([0, 2, 2, 3], dtype=int32)
        """
        indices, lengths = _pack_lists.pack("ids", ids)
        packed = None
        if weights is not None:
            packed, own = _pack_lists.pack("weights", weights)
            if not np.array_equal(own, lengths):
                raise ValueError(_pack_lists.describe_mismatch(lengths, own))
            if packed.dtype.kind != "f":
                packed = packed.astype(np.float32)
        bags = cls.from_lengths(indices, lengths, packed)
        return bags.pad_to(
            bags.capacity if capacity is None else capacity,
            bags.num_bags if num_bags is None else num_bags,
        )

    @classmethod
    def from_offsets(
        cls,
        indices: Integers,
        offsets: Integers,
        weights: Floats | None = None,
        *,
        include_last_offset: bool = False,
    ) -> Bags:
        """Convert ids [N] and offsets in either convention of PyTorch.

        Args:
          indices: [N].
          offsets: [B], where the last bag ends at N; or [B + 1] with
            `include_last_offset`.
          weights: [N] or None.
          include_last_offset: whether `offsets` ends with the number of slots in use.

        Raises:
          TypeError, ValueError: as `embedding_bag`.

        Example:
          >>> jbag.Bags.from_offsets([7, 8, 9], [0, 2]).offsets
          array([0, 2, 3], dtype=int32)
        """
        ids = _flat_ids(indices)
        offsets = check_offsets(
            offsets, ids.size, include_last_offset=include_last_offset
        )
        return cls(ids, offsets, _flat_weights(weights, ids))

    @classmethod
    def from_lengths(
        cls, indices: Integers, lengths: Integers, weights: Floats | None = None
    ) -> Bags:
        """Convert ids [N] and the length of each bag [B].

        Args:
          indices: [N].
          lengths: [B], at least 0; slots past their sum are the tail.
          weights: [N] or None.

        Raises:
          TypeError: as `embedding_bag`.
          ValueError: as `embedding_bag`; a length is negative, or the sum exceeds N.

        Example:
          >>> jbag.Bags.from_lengths([7, 8, 9], [2, 0, 1]).offsets
          array([0, 2, 2, 3], dtype=int32)
        """
        ids = _flat_ids(indices)
        lengths = check_integers("lengths", lengths)
        if lengths.ndim != 1:
            raise ValueError(f"`lengths` must be 1-D; got shape {lengths.shape}.")
        if on_host(lengths):
            negative = lengths < 0
            if negative.any():
                at = int(np.argmax(negative))
                raise ValueError(
                    f"`lengths` must be at least 0; got {lengths[at]} at position {at}."
                )
            # The sum may overflow only if a single length exceeds the size.
            too_long = int(lengths.max(initial=0)) > ids.size
            total = int(lengths.max() if too_long else lengths.sum(dtype=np.int64))
            if total > ids.size:
                raise ValueError(
                    f"`lengths` must sum to at most the size of `indices`, {ids.size}; "
                    f"got {total}."
                )
        numpy = np if on_host(lengths) else jnp
        lengths = to_index_dtype(lengths)
        offsets = numpy.pad(numpy.cumsum(lengths, dtype=lengths.dtype), (1, 0))
        return cls(ids, offsets, _flat_weights(weights, ids))

    @classmethod
    def from_segment_ids(
        cls,
        indices: Integers,
        segment_ids: Integers,
        num_bags: int,
        weights: Floats | None = None,
    ) -> Bags:
        """Convert ids [N] and sorted segment ids [N].

        Args:
          indices: [N].
          segment_ids: the bag of each slot [N], sorted; `num_bags` in the tail.
          num_bags: B.
          weights: [N] or None.

        Raises:
          TypeError, ValueError: as `segment_ids_to_offsets`; the shapes differ.

        Example:
          >>> jbag.Bags.from_segment_ids([7, 8, 9], [0, 0, 2], num_bags=3).offsets
          array([0, 2, 2, 3], dtype=int32)
        """
        ids = _flat_ids(indices)
        offsets = segment_ids_to_offsets(segment_ids, num_bags)
        if np.shape(segment_ids) != ids.shape:
            raise ValueError(
                f"`segment_ids` must have the shape of `indices`, {ids.shape}; "
                f"got {np.shape(segment_ids)}."
            )
        return cls(ids, offsets, _flat_weights(weights, ids))

    @classmethod
    def from_padded(
        cls,
        ids: Integers,
        mask: Any = None,
        weights: Floats | None = None,
        *,
        pad_id: int | None = None,
    ) -> Bags:
        """Convert padded ids [B, L]; the capacity is B * L.

        Args:
          ids: [B, L].
          mask: [B, L], True at slots with an id; None means all, or use `pad_id`.
          weights: [B, L] or None.
          pad_id: the id of empty slots, in place of a mask.

        Raises:
          TypeError: `ids` or `pad_id` are not integers, or `mask` is not boolean.
          ValueError: shapes differ, or both `mask` and `pad_id` are given.

        Example:
          >>> bags = jbag.Bags.from_padded([[5, -1, 6], [7, -1, -1]], pad_id=-1)
          >>> bags.to_lists()
          [[5, 6], [7]]
        """
        indices, lengths, weights = _padded.from_padded(ids, mask, weights, pad_id)
        return cls.from_lengths(indices, lengths, weights)

    @property
    def num_bags(self) -> int:
        """B, a static int."""
        return self.offsets.shape[-1] - 1

    @property
    def capacity(self) -> int:
        """N, the number of slots, a static int."""
        return self.indices.shape[-1]

    @property
    def lengths(self) -> Int[AnyArray, "*batch B"]:
        """The number of slots of each bag, [B]."""
        return self.offsets[..., 1:] - self.offsets[..., :-1]

    @property
    def segment_ids(self) -> Int[AnyArray, " N"]:
        """The bag of each slot [N]; B in the tail."""
        return offsets_to_segment_ids(self.offsets, self.capacity)

    def __len__(self) -> int:
        return self.num_bags

    def check_single(self) -> None:
        """Raise ValueError if this is a stack of batches."""
        if np.ndim(self.indices) != 1 or np.ndim(self.offsets) != 1:
            raise ValueError(
                "`bags` must be one batch, with indices [N] and offsets [B + 1]; got "
                f"shapes {np.shape(self.indices)} and {np.shape(self.offsets)}. "
                "For a stack of them use jax.vmap."
            )

    def pad_to(self, capacity: int, num_bags: int | None = None) -> Bags:
        """Return the bags with another capacity, followed by empty bags.

        On a device, bags that exceed the capacity become malformed and pool to NaN.

        Args:
          capacity: the new N, at least the number of slots in use.
          num_bags: the new B, at least the current one, which is the default.

        Raises:
          TypeError, ValueError: an argument is not an integer, or too small.

        Example:
          >>> jbag.Bags.from_lists([[1, 2], [3]]).pad_to(4, num_bags=3)
          Bags(indices=array([1, 2, 3, 0], dtype=int32),
               offsets=array([0, 2, 3, 3], dtype=int32), weights=None)
        """
        self.check_single()
        num_bags = self.num_bags if num_bags is None else num_bags
        check_integer("num_bags", num_bags, low=self.num_bags)
        check_integer("capacity", capacity, low=0)
        if on_host(self.offsets) and self.offsets[-1] > capacity:
            raise ValueError(
                f"`capacity` must be at least the slots in use, {self.offsets[-1]}; "
                f"got {capacity}."
            )

        def fit(x: AnyArray) -> AnyArray:
            numpy = np if on_host(x) else jnp
            return numpy.pad(x[:capacity], (0, max(0, capacity - x.shape[0])))

        numpy = np if on_host(self.offsets) else jnp
        offsets = self.offsets
        if not on_host(offsets) and capacity < self.capacity:
            # -1 is never a valid offset, so these bags stay malformed if padded again.
            offsets = jnp.where(offsets > capacity, -1, offsets)
        more = (0, num_bags - self.num_bags)
        return Bags(
            fit(self.indices),
            numpy.pad(offsets, more, mode="edge"),
            None if self.weights is None else fit(self.weights),
        )

    def to_lists(self) -> list[list[int]]:
        """Copy the ids of each bag to a list.

        Raises:
          ValueError: the offsets are malformed, or this is a stack of batches.

        Example:
          >>> jbag.Bags.from_offsets([7, 8, 9], [0, 2]).to_lists()
          [[7, 8], [9]]
        """
        self.check_single()
        ids = np.asarray(self.indices).tolist()
        offsets = np.asarray(self.offsets)
        ends = check_offsets(offsets, len(ids), include_last_offset=True).tolist()
        return [ids[start:end] for start, end in itertools.pairwise(ends)]

    def to_padded(self, length: int) -> _padded.Padded:
        """Return padded ids, mask and weights [B, L], the inverse of `from_padded`.

        Empty slots have the id 0 and the weight 0. On a device, a bag that is malformed
        or longer than L gets ids out of range and pools to NaN.

        Args:
          length: L.

        Raises:
          TypeError, ValueError: `length` is not an integer, or too small.

        Example:
          >>> jbag.Bags.from_lists([[7, 8], [9]]).to_padded(3).ids
          array([[7, 8, 0],
                 [9, 0, 0]], dtype=int32)
        """
        self.check_single()
        length = check_integer("length", length, low=1)
        return _padded.to_padded(self.indices, self.offsets, self.weights, length)

    def validate(self, num_embeddings: int) -> Bags:
        """Check all arrays by value, with a copy to the host; return self.

        Args:
          num_embeddings: V.

        Raises:
          IndexError: an id in a bag is outside [0, num_embeddings).
          TypeError, ValueError: as `from_offsets`.

        Example:
          >>> jbag.Bags.from_lists([[1, 2], [30]]).validate(num_embeddings=10)
          Traceback (most recent call last):
          IndexError: `indices` must lie in [0, 10), the rows of the table; ...
        """
        num_embeddings = check_integer("num_embeddings", num_embeddings, low=0)
        ids = np.asarray(self.indices)
        offsets = np.asarray(self.offsets)
        weights = None if self.weights is None else np.asarray(self.weights)
        Bags.from_offsets(ids, offsets, weights, include_last_offset=True)
        check_ids(ids, num_embeddings, np.arange(ids.size) < offsets[-1])
        return self


jax.export.register_pytree_node_serialization(
    Bags,
    serialized_name="jbag.Bags",
    serialize_auxdata=lambda _: b"",
    deserialize_auxdata=lambda _: (),
)


def _flat_ids(indices: Integers) -> AnyArray:
    ids = check_integers("indices", indices)
    if ids.ndim != 1:
        raise ValueError(f"`indices` must be [N]; got shape {ids.shape}.")
    narrow = to_index_dtype(ids)
    if narrow is not ids and on_host(ids) and not np.array_equal(narrow, ids):
        at = int(np.argmax(narrow != ids))
        raise IndexError(
            f"`indices` must fit in {narrow.dtype}; got {ids[at]} at position {at}."
        )
    return narrow


def _flat_weights(weights: Floats | None, ids: AnyArray) -> AnyArray | None:
    return None if weights is None else check_weights(weights, ids.shape)

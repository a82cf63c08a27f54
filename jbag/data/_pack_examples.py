"""`Batch`, and the selection of examples of a host data set by position.

Position -1 selects an empty bag.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np
from jaxtyping import Bool, Int

from jbag._validation import AnyArray, check_integer, check_integers
from jbag.ragged._bags import Bags

Capacity = int | Callable[[int], int]

# With a shorter mean bag than this, one `take` is faster than a copy per bag.
SHORT = 128


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["bags", "arrays", "mask", "positions"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Hold B examples in static shapes, as a pytree.

    In a stack of K batches, every array has a leading axis K.

    Attributes:
      bags: a `Bags` of B bags, or a tree of them with the structure of the data set.
        Ids [n, L] become bags of L.
      arrays: the tree of arrays [B, ...], or None; padding is zero.
      mask: [B], False for padding.
      positions: [B], the position of each example in the data set, -1 for padding; None
        if the examples of `Collate` have no positions.

    Example:
      >>> bags = jbag.Bags.from_lists([[1, 2], [3], [4, 5, 6]])
      >>> for batch in jbag.data.batches(bags, batch_size=2):
      ...     print(batch.bags.to_lists(), batch.mask, batch.positions)
      [[1, 2], [3]] [ True  True] [0 1]
      [[4, 5, 6], []] [ True False] [ 2 -1]
    """

    bags: Any
    arrays: Any
    mask: Bool[AnyArray, "*stack B"]
    positions: Int[AnyArray, "*stack B"] | None = None


jax.export.register_pytree_node_serialization(
    Batch,
    serialized_name="jbag.data.Batch",
    serialize_auxdata=lambda _: b"",
    deserialize_auxdata=lambda _: (),
)


class Examples(NamedTuple):
    """A data set: the leaves of the trees of `Bags` and of arrays, on the host."""

    bags: list[Bags]
    names: list[str]
    bags_tree: Any
    arrays: list[np.ndarray]
    arrays_tree: Any
    size: int


def check_examples(bags: Any, arrays: Any) -> Examples:
    """Check that all leaves have one length; return the data set on the host."""
    # A list is an error here: `Collate` takes lists as the ids of one bag.
    paths, tree = jax.tree_util.tree_flatten_with_path(
        bags, is_leaf=lambda x: x is None or isinstance(x, Bags | list)
    )
    names = ["bags" + jax.tree_util.keystr(path) for path, _ in paths]
    leaves = [_check_bags(name, x) for name, (_, x) in zip(names, paths, strict=True)]
    if not leaves:
        raise TypeError(f"`bags` must be Bags, or a tree of them; got {bags!r}.")
    size = leaves[0].num_bags
    for name, leaf in zip(names, leaves, strict=True):
        if leaf.num_bags != size:
            raise ValueError(
                f"`{name}` must hold {size} bags, as `{names[0]}`; got {leaf.num_bags}."
            )
    paths, arrays_tree = jax.tree_util.tree_flatten_with_path(arrays)
    checked = [
        _check_array("arrays" + jax.tree_util.keystr(path), x, size)
        for path, x in paths
    ]
    return Examples(leaves, names, tree, checked, arrays_tree, size)


def check_capacities(capacity: Any, names: list[str], tree: Any) -> list[Any]:
    """Return one capacity, function or None for each leaf of the tree of bags."""
    leaves = _for_each("capacity", capacity, names, tree)
    for name, leaf in zip(names, leaves, strict=True):
        if leaf is not None and not callable(leaf):
            check_integer(_option_of("capacity", name), leaf, low=0)
    return leaves


def check_sizes(num_embeddings: Any, names: list[str], tree: Any) -> list[int | None]:
    """Return one number of rows or None for each leaf of the tree of bags."""
    leaves = _for_each("num_embeddings", num_embeddings, names, tree)
    for name, leaf in zip(names, leaves, strict=True):
        if leaf is not None:
            check_integer(_option_of("num_embeddings", name), leaf, low=0)
    return leaves


def _for_each(option: str, given: Any, names: list[str], tree: Any) -> list[Any]:
    """Return the value of an option for each leaf of the tree of bags."""
    leaves, own = jax.tree.flatten(given, is_leaf=lambda x: x is None)
    if jax.tree_util.treedef_is_leaf(own):
        return leaves * len(names)
    if own != tree:
        raise ValueError(
            f"`{option}` must be one value, or a tree like `bags`, {tree}; got {own}."
        )
    return leaves


def fit(name: str, capacity: Capacity, used: int) -> int:
    """Return the capacity for `used` ids; raise ValueError if they exceed it."""
    name = _option_of("capacity", name)
    if callable(capacity):
        return check_integer(f"{name}({used})", capacity(used), low=used)
    if capacity < used:
        raise ValueError(
            f"`{name}` must be at least the ids of the largest batch, {used}; "
            f"got {capacity}."
        )
    return int(capacity)


def sizes(bags: Bags, positions: Int[np.ndarray, "... B"]) -> Int[np.ndarray, "..."]:
    """Return the number of ids of each batch."""
    return _spans(bags, positions)[1].sum(-1, dtype=np.int64)


def select(bags: Bags, positions: Int[np.ndarray, "K B"], capacity: int) -> Bags:
    """Return a stack of K batches with this capacity, which must suffice."""
    num_batches, batch_size = positions.shape
    starts, lengths = _spans(bags, positions)
    offsets = np.zeros((num_batches, batch_size + 1), bags.offsets.dtype)
    np.cumsum(lengths, axis=1, out=offsets[:, 1:])

    def gather(source: Any) -> np.ndarray:
        out = np.empty((num_batches, capacity), source.dtype)
        ends = offsets[:, -1].tolist()
        for row, start, length, end in zip(out, starts, lengths, ends, strict=True):
            _gather(source, start, length, row[:end])
            row[end:] = 0
        return out

    weights = None if bags.weights is None else gather(bags.weights)
    return Bags(gather(bags.indices), offsets, weights)


def check_rows(
    name: str, bags: Bags, num_embeddings: int, positions: Int[np.ndarray, "K B"]
) -> None:
    """Raise IndexError for the first id of K batches outside [0, num_embeddings)."""
    bad = (bags.indices < 0) | (bags.indices >= num_embeddings)
    bad &= np.arange(bags.capacity) < bags.offsets[:, -1:]
    if bad.any():
        batch, slot = np.unravel_index(np.argmax(bad), bad.shape)
        offsets = bags.offsets[batch]
        bag = np.searchsorted(offsets, slot, side="right") - 1
        raise IndexError(
            f"`{name}` must hold ids in [0, {num_embeddings}), the rows of the table; "
            f"got {bags.indices[batch, slot]} in example {positions[batch, bag]} at "
            f"position {slot - offsets[bag]}."
        )


def take(array: np.ndarray, positions: Int[np.ndarray, "K B"]) -> np.ndarray:
    """Return the rows of an array, [K, B, ...]; zeros at position -1."""
    rows = array.take(positions, axis=0, mode="wrap")  # faster than array[positions]
    empty = positions < 0
    if empty.any():
        rows[empty] = np.zeros((), array.dtype)
    return rows


def _option_of(option: str, name: str) -> str:
    return re.sub("^[a-z]+", option, name)


def _spans(bags: Bags, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the start and the length of each bag; the length at -1 is zero."""
    offsets = np.asarray(bags.offsets)
    starts = offsets[positions]
    return starts, np.where(positions < 0, 0, offsets[positions + 1] - starts)


def _gather(
    source: np.ndarray, starts: np.ndarray, lengths: np.ndarray, out: np.ndarray
) -> None:
    """Concatenate `source[start:start + length]` of each bag into `out`."""
    ends = starts + lengths
    if np.array_equal(starts[1:], ends[:-1]):  # contiguous, as without shuffling
        out[:] = source[starts[0] : ends[-1]]
    elif out.size < SHORT * starts.size:
        shifts = starts - (np.cumsum(lengths, dtype=starts.dtype) - lengths)
        slots = np.repeat(shifts, lengths)
        slots += np.arange(out.size, dtype=slots.dtype)
        np.take(source, slots, out=out, mode="clip")  # "raise" makes a copy
    else:
        pairs = zip(starts.tolist(), ends.tolist(), strict=True)
        np.concatenate([source[start:end] for start, end in pairs], out=out)


def _check_bags(name: str, given: Any) -> Bags:
    if not isinstance(given, Bags) and hasattr(given, "dtype"):
        given = _from_rectangle(name, given)
    if not isinstance(given, Bags):
        lists = " jbag.Bags.from_lists packs lists." if isinstance(given, list) else ""
        raise TypeError(
            f"`{name}` must be Bags, or ids [n, L], or dicts or tuples of them; "
            f"got {type(given).__name__}.{lists}"
        )
    given.check_single()
    on_host: Bags = jax.tree.map(np.asarray, given)
    return Bags.from_offsets(
        on_host.indices, on_host.offsets, on_host.weights, include_last_offset=True
    )


def _from_rectangle(name: str, given: Any) -> Bags:
    """Return ids [n, L] as n bags of L."""
    ids = check_integers(name, np.asarray(given))
    if ids.ndim != 2:
        raise ValueError(f"`{name}` must be ids [n, L]; got shape {ids.shape}.")
    return Bags.from_lengths(ids.reshape(-1), np.full(*ids.shape))


def _check_array(name: str, array: Any, size: int) -> np.ndarray:
    shape = np.shape(array)
    if not hasattr(array, "dtype") or not shape:
        raise TypeError(
            f"`{name}` must be an array with the examples on its first axis; "
            f"got {array!r}."
        )
    if shape[0] != size:
        raise ValueError(
            f"`{name}` must have the length of `bags`, {size}; got shape {shape}."
        )
    return np.asarray(array)

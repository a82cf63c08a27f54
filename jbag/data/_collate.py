"""One example at a time: `Source` gives them and `Collate` packs them, as in Grain."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np

from jbag._validation import check_integer
from jbag.data._batches import Batch, check_capacities, check_examples, fit
from jbag.ragged._bags import Bags
from jbag.ragged._bucket import bucket


class Example(NamedTuple):
    """One example of a data set; its fields after `ids` may be left out.

    Attributes:
      ids: a list or 1-D array of ids, or a tree (of dicts and tuples) of them.
      arrays: a tree of arrays and numbers, such as a label, or None.
      weights: as `ids`, or None.
      position: where it is in the data set, or None.

    Example:
      >>> jbag.data.Example([3, 1, 2], arrays=0)
      Example(ids=[3, 1, 2], arrays=0, weights=None, position=None)
    """

    ids: Any
    arrays: Any = None
    weights: Any = None
    position: Any = None


jax.export.register_namedtuple_serialization(
    Example, serialized_name="jbag.data.Example"
)


class Source:
    """The examples of a data set by position, without copies of their ids.

    It is what `grain.MapDataset.source` and `grain.DataLoader` take: something with a
    length and items, that can be pickled.

    Args:
      bags: n examples, as `batches` takes them.
      arrays: a tree of arrays [n, ...], or None.

    Raises:
      TypeError, ValueError: as `batches`.

    Example:
      >>> bags = jbag.Bags.from_lists([[1, 2], [3]])
      >>> source = jbag.data.Source(bags, {"label": np.array([0, 1])})
      >>> len(source), source[0].ids
      (2, array([1, 2], dtype=int32))
    """

    def __init__(self, bags: Any, arrays: Any = None) -> None:
        self._examples = check_examples(bags, arrays)

    def __len__(self) -> int:
        return self._examples.size

    def __getitem__(self, position: int) -> Example:
        examples = self._examples
        # A range knows of negative positions, and where it ends.
        position = range(examples.size)[check_integer("position", position)]
        spans = [
            slice(*bags.offsets[position : position + 2]) for bags in examples.bags
        ]
        pairs = list(zip(examples.bags, spans, strict=True))
        weights = [None if b.weights is None else b.weights[span] for b, span in pairs]
        return Example(
            jax.tree.unflatten(
                examples.bags_tree, [bags.indices[span] for bags, span in pairs]
            ),
            jax.tree.unflatten(
                examples.arrays_tree, [array[position] for array in examples.arrays]
            ),
            jax.tree.unflatten(examples.bags_tree, weights)
            if any(w is not None for w in weights)
            else None,
            position,
        )

    def __repr__(self) -> str:
        return f"jbag.data.Source({self._examples.size} examples)"


@dataclasses.dataclass(frozen=True)
class Collate:
    """Pack examples into a `Batch` of static shape, as the `batch_fn` of Grain's batch.

    An example is an `Example`, a tuple of its first fields, such as (ids, label), or
    ids alone. Fewer of them than B are filled up, as in a last batch.

    Attributes:
      batch_size: B.
      capacity: N. None is `jbag.bucket`: few shapes. A number is one shape, which every
        batch must fit in; a function of the number of ids decides itself. Or a tree of
        these, as the ids are.

    Raises:
      IndexError, TypeError, ValueError: as `Bags.from_lists`; when called, examples
        differ in their trees or shapes, or are too many or too long.

    Example:
      >>> collate = jbag.data.Collate(batch_size=3, capacity=8)
      >>> batch = collate([([1, 2], 0), ([3], 1)])
      >>> batch.bags.to_lists(), batch.arrays, batch.mask
      ([[1, 2], [3], []], array([0, 1, 0], dtype=int32), array([ True,  True, False]))
    """

    batch_size: int
    capacity: Any = None

    def __post_init__(self) -> None:
        check_integer("batch_size", self.batch_size, low=1)
        for leaf in jax.tree.leaves(self.capacity):
            check_capacities(leaf, ["bags"], None)

    def __call__(self, examples: Sequence[Any]) -> Batch:
        """Return the batch of 1 to B examples."""
        count, size = len(examples), self.batch_size
        if not 0 < count <= size:
            raise ValueError(
                f"`examples` must be 1 to {size}, the `batch_size`; got {count}."
            )
        rows = [_example(at, example) for at, example in enumerate(examples)]
        names, tree, ids = _columns("ids", [row.ids for row in rows], _is_list)
        weights: list[Any] = [[None]] * len(ids)
        if any(row.weights is not None for row in rows):
            _, own, weights = _columns(
                "weights", [row.weights for row in rows], _is_list
            )
            if own != tree:
                raise ValueError(
                    f"`weights` must be a tree as `ids`, {tree}; got {own}."
                )
        capacities = check_capacities(self.capacity, names, tree)
        bags = [
            _pack(*leaf, size)
            for leaf in zip(names, ids, weights, capacities, strict=True)
        ]
        names, arrays_tree, arrays = _columns("arrays", [row.arrays for row in rows])
        stacked = [_stack(*leaf, size) for leaf in zip(names, arrays, strict=True)]
        positions = None
        if all(row.position is not None for row in rows):
            positions = np.full(size, -1, np.int32)
            positions[:count] = [row.position for row in rows]
        return Batch(
            jax.tree.unflatten(tree, bags),
            jax.tree.unflatten(arrays_tree, stacked),
            np.arange(size) < count,
            positions,
        )


def _example(at: int, example: Any) -> Example:
    if isinstance(example, Example):
        return example
    if not isinstance(example, tuple):
        return Example(example)
    if not 0 < len(example) <= len(Example._fields):
        raise TypeError(
            f"`examples[{at}]` must be ids, or a tuple of them and "
            f"{', '.join(Example._fields[1:])}; got a tuple of {len(example)}."
        )
    return Example(*example)


def _is_list(x: Any) -> bool:
    return x is None or isinstance(x, list) or hasattr(x, "dtype")


def _columns(
    name: str, trees: list[Any], is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[str], Any, list[list[Any]]]:
    """Return the name of each leaf, the tree, and each leaf of all examples."""
    tree: Any
    paths, tree = jax.tree_util.tree_flatten_with_path(trees[0], is_leaf)
    rows = []
    for at, example in enumerate(trees):
        leaves, own = jax.tree.flatten(example, is_leaf)
        if own != tree:
            raise ValueError(
                f"`{name}` must be the same tree in all examples, {tree}; got {own} in "
                f"example {at}."
            )
        rows.append(leaves)
    names = [name + jax.tree_util.keystr(path) for path, _ in paths]
    return names, tree, [list(column) for column in zip(*rows, strict=True)]


def _pack(
    name: str, ids: list[Any], weights: list[Any], capacity: Any, size: int
) -> Bags:
    if all(row is None for row in weights):
        bags = Bags.from_lists(ids, num_bags=size)
    else:
        bags = Bags.from_lists(ids, weights, num_bags=size)
    return bags.pad_to(
        fit(name, bucket if capacity is None else capacity, bags.capacity)
    )


def _stack(name: str, rows: list[Any], size: int) -> np.ndarray:
    """Return [B, ...], zeros at the end."""
    try:
        array = np.stack(rows)
    except ValueError as error:
        shapes = sorted({np.shape(row) for row in rows})
        raise ValueError(
            f"`{name}` must have one shape in all examples; got {shapes}."
        ) from error
    if not any(hasattr(row, "dtype") for row in rows):
        array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
    out = np.zeros((size, *array.shape[1:]), array.dtype)
    out[: len(rows)] = array
    return out

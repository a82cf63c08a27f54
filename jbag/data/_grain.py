"""`Source` and `Collate`: the interface to Grain, one example at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np

from jbag._validation import check_integer
from jbag.data._pack_examples import Batch, check_capacities, check_examples, fit
from jbag.ragged._bags import Bags
from jbag.ragged._bucket_capacity import bucket


class Example(NamedTuple):
    """Hold one example of a data set.

    Attributes:
      ids: a list or 1-D array of ids, or a tree (of dicts and tuples) of them.
      arrays: a tree of arrays and numbers, such as a label; or None.
      weights: one weight per id, in the structure of `ids`; or None.
      position: the position in the data set, or None.

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
    """Index the examples of a data set, without copies of their ids.

    It is a random-access data source of Grain, for `grain.MapDataset.source` and
    `grain.DataLoader`: it has a length and items, and pickles.

    Args:
      bags: n examples, as for `jbag.data.batches`.
      arrays: a tree of arrays [n, ...], or None.

    Raises:
      TypeError: an argument has a wrong type.
      ValueError: `bags` and `arrays` differ in length.

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
        # A range handles negative positions and raises IndexError at its end.
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
    """Pack examples into a `Batch` of static shape, as the `batch_fn` of Grain.

    An example is an `Example`, a tuple of its first fields, such as (ids, label), or
    its ids. Empty bags pad fewer than B examples.

    Attributes:
      batch_size: B.
      capacity: N: a number, or a function of the number of ids, or a tree of these with
        the structure of the ids. None uses `jbag.bucket`.

    Raises:
      IndexError: an id does not fit in int32.
      TypeError: an option, an example or an id has a wrong type.
      ValueError: an option is out of range, examples differ in their trees or shapes,
        or there are too many examples or ids.

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
        """Return the batch of a list of 1 to B examples."""
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
                    f"`weights` must be a tree like `ids`, {tree}; got {own}."
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
    """Return the leaf names, the tree, and per leaf the values of all examples."""
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
    """Stack rows to [B, ...]; padding is zero."""
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

"""`predict`: the results of a function for all examples of masked batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from jbag._validation import check_integer


def predict(
    function: Callable[[Any], Any], batches: Iterable[Any], *, in_flight: int = 2
) -> Any:
    """Apply a function to all batches, and return the results of the examples.

    Results of padding are left out, so there is one result per example, in the order of
    the batches: that of the data set, if `jbag.data.batches` has no seed. JAX computes
    while the next batch is made, and results are copied to the host in the meantime.
    Batches of one shape take one compilation.

    Args:
      function: a function of a batch, usually compiled by `jax.jit`, that returns a
        tree of arrays with the axes of the mask first: [B, ...], or [K, B, ...] for a
        stack. Give it parameters by a lambda around the compiled function; in one that
        is compiled, they would be constants.
      batches: an iterable of `Batch`, or of other batches with an attribute `mask`,
        boolean, False for padding.
      in_flight: the number of batches whose results stay on the device. More of them
        let the device work ahead; each takes memory.

    Returns:
      The tree of the results with NumPy arrays [n, ...].

    Raises:
      TypeError: an argument has a wrong type, or a batch has no boolean mask.
      ValueError: there are no batches, `in_flight` is below 0, results differ in their
        trees, shapes or dtypes, or do not begin with the axes of the mask, or are
        spread over processes.

    Example:
      >>> table = jnp.arange(10.0).reshape(5, 2)
      >>> bags = jbag.Bags.from_lists([[1, 2], [3], [4, 0, 0]])
      >>> stream = jbag.data.batches(bags, batch_size=2)
      >>> pool = jax.jit(lambda table, bags: jbag.embedding_bag(table, bags))
      >>> jbag.data.predict(lambda batch: pool(table, batch.bags), stream)
      array([[3.       , 4.       ],
             [6.       , 7.       ],
             [2.6666667, 3.6666667]], dtype=float32)
    """
    if not callable(function):
        raise TypeError(f"`function` must be callable; got {function!r}.")
    if not isinstance(batches, Iterable):
        raise TypeError(f"`batches` must be an iterable of batches; got {batches!r}.")
    in_flight = check_integer("in_flight", in_flight, low=0)
    pending: deque[_Result] = deque()
    columns: list[list[np.ndarray]] = []
    first: _Result | None = None

    def finish(result: _Result) -> None:
        mask = np.asarray(result.mask)
        for column, leaf in zip(columns, result.leaves, strict=True):
            column.append(np.asarray(leaf)[mask])

    for number, batch in enumerate(batches):
        mask = _mask(number, batch)
        result = _result(number, mask, function(batch))
        if first is None:
            first = result
            columns = [[] for _ in result.leaves]
        _check_like(number, result, first)
        pending.append(result)
        if len(pending) > in_flight:
            finish(pending.popleft())
    if first is None:
        raise ValueError("`batches` must hold at least one batch; got none.")
    while pending:
        finish(pending.popleft())
    return jax.tree.unflatten(first.tree, [np.concatenate(x) for x in columns])


class _Result(NamedTuple):
    """The mask and the results of a batch, on its device."""

    mask: Any
    names: list[str]
    leaves: list[Any]
    tree: Any


def _mask(number: int, batch: Any) -> Any:
    mask: Any = getattr(batch, "mask", None)
    if getattr(mask, "dtype", None) != np.dtype(bool) or np.ndim(mask) == 0:
        raise TypeError(
            f"batch {number} must have a boolean `mask`, as those of "
            f"jbag.data.batches; got {type(batch).__name__} with {_kind(mask)}."
        )
    _fetch_early(number, "the mask", mask)
    return mask


def _result(number: int, mask: Any, output: Any) -> _Result:
    paths, tree = jax.tree_util.tree_flatten_with_path(output)
    names = ["the result" + jax.tree_util.keystr(path) for path, _ in paths]
    leaves = [leaf for _, leaf in paths]
    for name, leaf in zip(names, leaves, strict=True):
        axes = np.shape(mask)
        if not hasattr(leaf, "dtype") or np.shape(leaf)[: len(axes)] != axes:
            raise ValueError(
                f"{name} of batch {number} must be an array with the axes of the mask "
                f"first, {axes}; got {_kind(leaf)}."
            )
        _fetch_early(number, name, leaf)
    return _Result(mask, names, leaves, tree)


def _fetch_early(number: int, name: str, array: Any) -> None:
    """Start to copy a device array to the host."""
    if not isinstance(array, jax.Array):
        return
    if not array.is_fully_addressable and not array.is_fully_replicated:
        raise ValueError(
            f"{name} of batch {number} must be whole in each process; got sharding "
            f"{array.sharding}. jax.experimental.multihost_utils.process_allgather "
            "joins the parts."
        )
    array.copy_to_host_async()


def _check_like(number: int, result: _Result, first: _Result) -> None:
    """Raise ValueError unless the results of two batches can be concatenated."""
    if result.tree != first.tree:
        raise ValueError(
            f"the results must be the same tree for all batches, {first.tree}; "
            f"got {result.tree} for batch {number}."
        )
    axes, own = np.ndim(first.mask), np.ndim(result.mask)
    for name, x, y in zip(first.names, first.leaves, result.leaves, strict=True):
        if (x.dtype, x.shape[axes:]) != (y.dtype, y.shape[own:]):
            raise ValueError(
                f"{name} must have one dtype and one shape for all batches, "
                f"{_kind(x)}; got {_kind(y)} for batch {number}."
            )


def _kind(leaf: Any) -> str:
    if not hasattr(leaf, "dtype"):
        return type(leaf).__name__
    return f"{leaf.dtype}{list(leaf.shape)}"

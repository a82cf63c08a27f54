"""fastText's predictions: the probabilities of labels, and the best labels.

The functions reproduce fastText's rounding, with its tabulated sigmoid, and the order
of equal labels in its heap, so that predictions are identical.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jbag.ops._embedding_bag import embedding_bag
from jbag.ragged._bags import Bags

_GUARD = 1e-5  # fastText takes log(x + 1e-5)
_SIGMOID_STEPS, _SIGMOID_END = 512, 8
_NO_COUNT = 10**15  # of a node without children
_SIGMOID = 1 / (
    1 + np.exp(_SIGMOID_END * (1 - np.arange(_SIGMOID_STEPS + 1) * 2 / _SIGMOID_STEPS))
)


class Tree(NamedTuple):
    """A Huffman tree over L labels with 2 L - 1 nodes: the leaves, then inner nodes.

    Attributes:
      edges: [2 L - 1], the index of the edge to each node's parent, among the L - 1
        left edges, then the L - 1 right edges; 2 L - 2 for the root.
      jumps: for each power of two, the ancestor that many steps up, or the root,
        [2 L - 1].
      order: [L], the labels from left to right.
    """

    edges: np.ndarray
    jumps: tuple[np.ndarray, ...]
    order: np.ndarray


def huffman(counts: Sequence[int]) -> Tree:
    """Return fastText's Huffman tree of labels with these descending counts."""
    num = len(counts)
    nodes = [*counts, *[_NO_COUNT] * (num - 1)]
    parents = np.full(2 * num - 1, 2 * num - 2, np.int32)
    edges = np.full(2 * num - 1, 2 * (num - 1), np.int32)
    children = np.zeros((2 * num - 1, 2), np.int32)
    leaf, node = num - 1, num
    for new in range(num, 2 * num - 1):
        for side in range(2):
            if leaf >= 0 and nodes[leaf] < nodes[node]:
                child, leaf = leaf, leaf - 1
            else:
                child, node = node, node + 1
            children[new, side] = child
            parents[child] = new
            edges[child] = new - num + side * (num - 1)
        nodes[new] = nodes[children[new, 0]] + nodes[children[new, 1]]
    order, pending = [], [2 * num - 2]
    while pending:
        node_at = pending.pop()
        if node_at < num:
            order.append(node_at)
        else:
            pending += children[node_at, ::-1].tolist()
    jumps = [parents]
    while (jumps[-1] != 2 * num - 2).any():
        jumps.append(jumps[-1][jumps[-1]])
    return Tree(edges, tuple(jumps[:-1]), np.array(order))


@functools.partial(jax.jit, static_argnames="loss")
def values(
    table: Float[Array, "V D"],
    output: Float[Array, "L D"],
    bags: Bags,
    tree: Tree | None,
    *,
    loss: str,
) -> Float[Array, "B L"]:
    """Return the probability of each label; with a tree, fastText's log probability."""
    pooled = embedding_bag(table, bags, mode="mean")
    logits = jnp.matmul(pooled, output.T, precision="highest")
    if loss == "softmax":
        return jax.nn.softmax(logits)
    if tree is None:
        steps = (logits + _SIGMOID_END) * (_SIGMOID_STEPS / 2 / _SIGMOID_END)
        steps = jnp.clip(steps, 0, _SIGMOID_STEPS).astype(jnp.int32)
        near = jnp.asarray(_SIGMOID, logits.dtype)[steps]
        far = jnp.where(jnp.isnan(logits), logits, (logits > 0).astype(logits.dtype))
        return jnp.where(jnp.abs(logits) <= _SIGMOID_END, near, far)
    right = 1 / (1 + jnp.exp(-logits[:, :-1].T))
    # Without the barrier, XLA folds this to 1.00001 - right, which rounds differently.
    left = jax.lax.optimization_barrier(1 - right)
    root = jnp.zeros((1, right.shape[1]), right.dtype)
    edges = jnp.concatenate([jnp.log(left + _GUARD), jnp.log(right + _GUARD)])
    paths = jnp.concatenate([edges, root])[tree.edges]
    for jump in tree.jumps:  # Double the summed path length each time.
        paths += paths[jump]
    return paths[: output.shape[0]].T


@functools.partial(jax.jit, static_argnames="k")
def largest(x: Float[Array, "B L"], k: int) -> tuple[Array, Array]:
    """Return the k largest values of each row, and their columns."""
    top, places = jax.lax.top_k(x, k)
    return top, places


def best_labels(
    p: Float[Array, "B L"],
    best: tuple[Array, Array],
    has_rows: np.ndarray,
    *,
    k: int,
    least: np.float32,
    tree: Tree | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best labels of each text, and fastText's log probabilities.

    Args:
      p: the result of `values`, which may have more rows than `has_rows`.
      best: the result of `largest` for min(k + 1, L).
      has_rows: [B], whether a text has rows.
      k: the number of labels.
      least: the minimum probability.
      tree: the tree of hierarchical softmax, or None.

    Returns:
      (labels, scores): [B, k]; missing labels are -1.
    """
    logarithm = _guarded_log if tree is None else np.asarray
    order = np.arange(p.shape[1]) if tree is None else np.asarray(tree.order)
    least = least if tree is None else np.float32(_guarded_log(least))
    top, labels = (np.array(x)[: len(has_rows)] for x in best)
    if np.isnan(top).any():
        raise ValueError("`table` and `output` must hold numbers; got NaN.")
    scores = logarithm(top)
    labels[top < least] = -1
    equal = np.flatnonzero((scores[:, 1:] == scores[:, :-1]).any(axis=1))
    rows = np.asarray(p) if equal.size else np.empty(0)
    for at in equal:
        row = rows[at]
        own = order[row[order] >= least]
        own_scores = logarithm(row[own])
        first = _first_of_equals(own_scores, k)
        labels[at] = -1
        labels[at, : len(first)] = own[first]
        scores[at, : len(first)] = own_scores[first]
    labels[~has_rows] = -1
    return labels[:, :k], scores[:, :k]


def _guarded_log(x: np.ndarray | np.float32) -> np.ndarray:
    return np.log(np.asarray(x, np.float64) + _GUARD).astype(np.float32)


def _first_of_equals(scores: np.ndarray, k: int) -> list[int]:
    """Return the positions of the k largest scores in the order of fastText's heap.

    The heap functions of libstdc++ decide the order of equal scores: `std::push_heap`,
    `std::pop_heap` and `std::sort_heap`, with the smallest score on top.
    """
    heap: list[tuple[float, int]] = []
    for at, score in enumerate(scores.tolist()):
        if len(heap) == k and score < heap[0][0]:
            continue
        heap.append((score, at))
        _sift_up(heap, len(heap) - 1, 0)
        if len(heap) > k:
            _pop_heap(heap, len(heap))
            heap.pop()
    for end in range(len(heap), 1, -1):
        _pop_heap(heap, end)
    return [at for _, at in heap]


def _sift_up(heap: list[tuple[float, int]], hole: int, top: int) -> None:
    """Move the entry at `hole` up past larger entries."""
    moved = heap[hole]
    while hole > top and heap[(hole - 1) // 2][0] > moved[0]:
        heap[hole] = heap[(hole - 1) // 2]
        hole = (hole - 1) // 2
    heap[hole] = moved


def _pop_heap(heap: list[tuple[float, int]], end: int) -> None:
    """Move the top of `heap[:end]` to its end; restore the heap of the rest."""
    last = end - 1
    if not last:
        return
    moved = heap[last]
    heap[last] = heap[0]
    hole = 0
    # Move the hole down by the smaller child, the right one if equal, then up.
    while 2 * hole + 2 < last:
        child = 2 * hole + 2
        if heap[child][0] > heap[child - 1][0]:
            child -= 1
        heap[hole] = heap[child]
        hole = child
    if 2 * hole + 2 == last:
        heap[hole] = heap[last - 1]
        hole = last - 1
    heap[hole] = moved
    _sift_up(heap, hole, 0)

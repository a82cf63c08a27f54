"""Global batches over a mesh from the examples that each process reads."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from jbag._mesh.strategies import Strategy, strategy
from jbag._validation import check_integer
from jbag.data._pack_examples import check_capacities, check_examples, select


class Blocks:
    """Build global batches of one static shape from each process's examples.

    All processes must pass the same sizes; the constructor checks this, because
    different sizes would give wrong results. No size depends on the data of a batch.

    Args:
      mesh: the mesh over the devices of all processes.
      batch_size: B, the examples of the global batch.
      capacity: N, the slots for the ids of one device's block: a number for all
        features, or a tree with the structure of the bags.
      axis: the mesh axes that shard the batch; None uses all axes.

    Raises:
      TypeError: an argument has a wrong type.
      ValueError: a number is out of range, P does not divide `batch_size`, or the sizes
        differ between processes.

    Example:
      >>> mesh = jax.make_mesh((1,), ("x",))
      >>> blocks = jbag.sharding.Blocks(mesh, batch_size=2, capacity={"tags": 8})
      >>> tags = jbag.Bags.from_lists([[1, 2], [3]])
      >>> bags, labels = blocks({"tags": tags}, np.array([0, 1]))
      >>> bags["tags"].indices.shape, bags["tags"].offsets.shape, labels.shape
      ((1, 8), (1, 3), (2,))
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        batch_size: int,
        capacity: Any,
        axis: str | tuple[str, ...] | None = None,
    ) -> None:
        if not isinstance(mesh, Mesh):
            raise TypeError(f"`mesh` must be a jax.sharding.Mesh; got {mesh!r}.")
        self._strategy: Strategy = strategy(mesh, P(), axis)
        self._sharding = NamedSharding(mesh, self._strategy.blocks)
        devices = self._strategy.size
        self._batch_size = check_integer("batch_size", batch_size, low=1)
        if batch_size % devices:
            raise ValueError(
                f"`batch_size` must be divisible by the {devices} blocks; "
                f"got {batch_size}."
            )
        for one in jax.tree.leaves(capacity):
            check_integer("capacity", one, low=0)
        self._capacity = capacity
        self._arrays: tuple[Any, ...] | None = None
        sizes = (batch_size, devices, tuple(jax.tree.leaves(capacity)))
        self._check_processes_agree("batch_size, devices and capacity", sizes)

    @property
    def num_bags(self) -> int:
        """The number of examples of this process."""
        return self._batch_size // self._strategy.size * self.num_blocks

    @property
    def num_blocks(self) -> int:
        """The number of blocks of this process."""
        return len(self._own_blocks)

    @property
    def positions(self) -> Int[np.ndarray, " n"]:
        """The positions of this process's examples in the global batch, sorted."""
        size = self._batch_size // self._strategy.size
        return (self._own_blocks[:, None] * size + np.arange(size)).reshape(-1)

    @property
    def _own_blocks(self) -> Int[np.ndarray, " blocks"]:
        shape = (self._strategy.size, 1)
        index_map = self._sharding.addressable_devices_indices_map(shape)
        starts = {(index[0].start or 0) for index in index_map.values() if index}
        return np.array(sorted(starts))

    def __call__(self, bags: Any, arrays: Any = None) -> tuple[Any, Any]:
        """Return the global batch, sharded along the batch axes.

        Args:
          bags: this process's examples: a `Bags` on the host, or a tree of them.
          arrays: a tree of arrays [n, ...], or None.

        Returns:
          (bags, arrays): the trees with `Bags` of indices [P, N] and offsets
          [P, B / P + 1], and with arrays [B, ...].

        Raises:
          TypeError: an argument has a wrong type.
          ValueError: an argument has a wrong length, the dtypes or shapes differ from
            the first batch's, or the ids of a block exceed the capacity. No collective
            has started when this is raised.
        """
        examples = check_examples(bags, arrays)
        if examples.size != self.num_bags:
            raise ValueError(
                f"`bags` must hold the {self.num_bags} examples of this process; "
                f"got {examples.size}."
            )
        capacities = check_capacities(
            self._capacity, examples.names, examples.bags_tree
        )
        positions = np.arange(examples.size).reshape(self.num_blocks, -1)
        blocks = []
        for name, own, capacity in zip(
            examples.names, examples.bags, capacities, strict=True
        ):
            ends = np.asarray(own.offsets)[:: positions.shape[1]]
            used = np.diff(ends)
            if (used > capacity).any():
                at = int(np.argmax(used))
                raise ValueError(
                    f"`capacity` must be at least the ids of a block of `{name}`, "
                    f"{used[at]} in block {at} of this process; got {capacity}."
                )
            blocks.append(select(own, positions, capacity))
        signature = tuple(
            (name, str(x.dtype), x.shape[1:])
            for name, leaf in [("bags", blocks), ("arrays", examples.arrays)]
            for x in jax.tree.leaves(leaf)
        )
        if self._arrays is None:
            self._check_processes_agree("arrays in a batch", signature)
            self._arrays = signature
        elif signature != self._arrays:
            # No collective here: other processes may not run this code.
            raise ValueError(
                "`bags` and `arrays` must have the dtypes and shapes of the first "
                f"batch, {self._arrays}; got {signature}."
            )
        placed = jax.make_array_from_process_local_data(
            self._sharding, (blocks, examples.arrays)
        )
        return (
            jax.tree.unflatten(examples.bags_tree, placed[0]),
            jax.tree.unflatten(examples.arrays_tree, placed[1]),
        )

    def _check_processes_agree(self, what: str, own: Any) -> None:
        """Raise ValueError if `own` differs between processes."""
        if jax.process_count() == 1:
            return
        text = repr(own).encode()
        max_bytes = 1 << 16
        padded = np.zeros(max_bytes, np.uint8)
        padded[: len(text[:max_bytes])] = np.frombuffer(text[:max_bytes], np.uint8)
        every = multihost_utils.process_allgather(padded)
        for process, other in enumerate(every):
            if not np.array_equal(other, padded):
                theirs = bytes(other).rstrip(b"\0").decode(errors="replace")
                raise ValueError(
                    f"All processes must have the same {what}; process "
                    f"{jax.process_index()} has {own}, process {process} has {theirs}."
                )

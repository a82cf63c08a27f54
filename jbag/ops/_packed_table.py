"""`PackedTable`: a table whose rows are packed into lines as wide as a TPU reads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jbag._validation import check_flag, check_integer, check_table
from jbag.ops._explicit_axes import explicit_sharding, partitioned
from jbag.ops._packing import LANES, Packing
from jbag.ops._row_gather import take


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["lines"], meta_fields=["packing"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class PackedTable:
    """A table [V, D] that is stored as lines of several rows, for TPUs.

    A TPU reads memory in lines of 128 numbers. XLA stores a matrix of fewer columns
    transposed, and then copies it in each gather of rows. Lines whose width is a
    multiple of 128 are read in place. `jbag.pack` makes them.

    It is a pytree with one leaf, the lines, and takes the place of the table in
    parameters, gradients and states of optimizers. Optax treats the leaf as it treats a
    table. `jbag.embedding_bag` and the modules take it as the table. Conversions to
    arrays, as by `numpy.asarray`, and `jbag.unpack` give [V, D].

    Attributes:
      lines: [R, W], a line for each k rows; the `RowSparse` in a gradient; [V] in the
        state of a row-wise optimizer.
      packing: the geometry, V and D among it.

    Example:
      >>> table = jbag.pack(jnp.ones((1000, 10)), always=True)
      >>> table.shape, table.lines.shape
      ((1000, 10), (84, 128))
      >>> jbag.embedding_bag(table, [[1, 2], [3, 4]]).shape
      (2, 10)
    """

    lines: Any
    packing: Packing

    @property
    def shape(self) -> tuple[int, int]:
        """(V, D)."""
        return self.packing.num_embeddings, self.packing.features

    @property
    def ndim(self) -> int:
        """The number of axes, 2."""
        return 2

    @property
    def dtype(self) -> Any:
        """The dtype of the table."""
        return self.lines.dtype

    def unpack(self) -> Any:
        """Return the array [V, D]; of a row-wise state, [V]; or the `RowSparse`."""
        if getattr(self.lines, "shape", None) != self.packing.shape:
            return self.lines
        return unpack_lines(self.packing, self.lines)

    def __getitem__(self, key: Any) -> PackedTable:
        """Return itself for `...`, with which a variable of NNX reads its value."""
        if key is not Ellipsis:
            raise TypeError(
                "The index of a PackedTable must be `...`; "
                f"got {key!r}. `jbag.unpack` returns the array."
            )
        return self

    def __jax_array__(self) -> Array:
        return self.unpack()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.unpack(), dtype, copy=copy)


AnyTable = Float[Array, "V D"] | PackedTable


@functools.partial(jax.jit, static_argnums=0)
def pack_lines(packing: Packing, table: Shaped[Array, "V D"]) -> Shaped[Array, "R W"]:
    """Return the lines of a table, sharded as it is."""
    return partitioned(packing.pack, explicit_sharding(table))(table)


@functools.partial(jax.jit, static_argnums=0)
def unpack_lines(packing: Packing, lines: Shaped[Array, "R W"]) -> Shaped[Array, "V D"]:
    """Return the table of lines, sharded as they are."""
    return partitioned(packing.unpack, explicit_sharding(lines))(lines)


def pack(table: Any, *, always: bool = False, num_blocks: int = 1) -> Any:
    """Pack the rows of a table on a TPU, so that it is read there without copies.

    Call it once, after initialization, as the Flax modules do by themselves. The result
    takes the place of the table; `unpack` and `pack_like` convert parameters and states
    for checkpoints.

    Args:
      table: [V, D], floating.
      always: whether to pack on every platform, as for a program that is compiled for a
        TPU on another machine.
      num_blocks: the number of blocks of equally many rows that devices of a mesh hold.

    Returns:
      A `PackedTable`; or `table`, if it is not on a TPU or D is a multiple of 128,
      which needs no packing. A traced table is taken to be on the default backend.

    Raises:
      TypeError, ValueError: `table` is not a floating matrix, or V is no multiple of
        `num_blocks`.

    Example:
      >>> table = jbag.pack(jnp.ones((1000, 10)))  # on a CPU the array itself
      >>> table.shape
      (1000, 10)
    """
    check_flag("always", always)
    check_integer("num_blocks", num_blocks, low=1)
    if isinstance(table, PackedTable):
        return table
    array = check_table(table)
    rows, width = array.shape
    if rows % num_blocks:
        raise ValueError(
            f"V must be a multiple of `num_blocks`, {num_blocks}; got {rows}."
        )
    packing = packing_for(rows, width, num_blocks)
    if packing is None or not (always or _on_tpu(array)):
        return table
    return PackedTable(pack_lines(packing, array), packing)


def packing_for(rows: int, width: int, num_blocks: int) -> Packing | None:
    """Return how a table is packed, or None if that has no use."""
    if width % LANES == 0 or rows == 0:
        return None
    return Packing(rows, width, num_blocks)


def unpack(tree: Any) -> Any:
    """Return a pytree with an array [V, D] in the place of each packed table.

    For checkpoints that machines of all kinds read. A tree without packed tables, as on
    CPUs and GPUs, is returned as it is. In the states of NNX, the variables stay.

    Example:
      >>> params = {"embedding": jbag.pack(jnp.ones((1000, 10)), always=True)}
      >>> jbag.unpack(params)["embedding"].shape
      (1000, 10)
    """

    def one(x: Any) -> Any:
        if isinstance(x, PackedTable):
            return x.unpack()
        return _map_lines(lambda lines: unpack_lines(x.packing, lines), x)

    return map_packed(one, tree)


def pack_like(tree: Any, like: Any) -> Any:
    """Return a pytree with arrays packed where `like` has a packed table.

    It is the inverse of `unpack`: `like` are the parameters or states that a restored
    checkpoint replaces.

    Raises:
      ValueError: an array has another shape than the table.

    Example:
      >>> params = {"embedding": jbag.pack(jnp.ones((1000, 10)), always=True)}
      >>> restored = jbag.unpack(params)
      >>> jbag.pack_like(restored, like=params)["embedding"].lines.shape
      (84, 128)
    """

    def one(old: Any, new: Any) -> Any:
        if isinstance(new, PackedTable):
            return new
        (lines,), (value,) = jax.tree.leaves(old), jax.tree.leaves(new)
        wanted = np.shape(lines)  # also [V], of a state of rows
        if wanted == old.packing.shape != np.shape(value):
            wanted = old.packing[:2]
        if np.shape(value) != wanted:
            raise ValueError(
                f"A table of `tree` must be {wanted}; got {np.shape(value)}."
            )
        if wanted == old.packing[:2]:
            value = pack_lines(old.packing, jnp.asarray(value))
        return jax.tree.map(lambda _: value, old)

    return map_packed(one, like, tree)


def map_packed(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Map over the packed tables of a tree; other leaves are those of the last tree.

    A packed table is a `PackedTable`, or a variable of NNX with `packing` as metadata,
    whose value is the lines: NNX takes the pytree in a variable apart.
    """
    return jax.tree.map(
        lambda x, *others: function(x, *others) if packs(x) else (x, *others)[-1],
        tree,
        *rest,
        is_leaf=packs,
    )


def packs(x: Any) -> bool:
    """Return whether x is a packed table, in a `PackedTable` or a variable of NNX."""
    return isinstance(getattr(x, "packing", None), Packing)


def _map_lines(function: Callable[[Array], Array], variable: Any) -> Any:
    shape = variable.packing.shape
    return jax.tree.map(lambda x: function(x) if np.shape(x) == shape else x, variable)


def check_stored(table: Any) -> AnyTable:
    """Return a packed table, or the table as an array; raise if it is neither."""
    if not isinstance(table, PackedTable):
        return check_table(table)
    lines = check_table(table.lines)
    if lines.shape != table.packing.shape:
        raise ValueError(
            f"`table.lines` must have shape {table.packing.shape}; got {lines.shape}."
        )
    return PackedTable(lines, table.packing)


def packing_of(table: AnyTable) -> Packing | None:
    """Return the packing of a table; None for an array."""
    return table.packing if isinstance(table, PackedTable) else None


def storage(table: AnyTable) -> Array:
    """Return the array that stores a table."""
    return table.lines if isinstance(table, PackedTable) else table


def stored(array: Array, packing: Packing | None) -> AnyTable:
    """Return the table that an array stores."""
    return array if packing is None else PackedTable(array, packing)


def take_rows(
    table: Shaped[Array, "V ..."] | PackedTable,
    ids: Int[Array, "*slots"],
    fill: float | int | bool,
) -> Shaped[Array, "*slots ..."]:
    """Gather rows of a table; an id out of range gives `fill`."""
    if not isinstance(table, PackedTable):
        return take(table, ids, fill)
    lines, places = table.packing.locate(ids)
    return table.packing.select(take(table.lines, lines, fill), places)


def put_rows(
    table: Shaped[Array, "V ..."] | PackedTable,
    ids: Int[Array, " U"],
    rows: Shaped[Array, "U ..."],
) -> Array:
    """Set rows at distinct, sorted ids; drop those out of range, which come last.

    It returns the array that stores the table.
    """
    if isinstance(table, PackedTable):
        return table.packing.put(table.lines, ids, rows)
    return table.at[ids].set(rows, mode="drop", indices_are_sorted=True)


def _on_tpu(array: Array) -> bool:
    if isinstance(array, jax.core.Tracer):
        return jax.default_backend() == "tpu"
    return all(device.platform == "tpu" for device in array.devices())


jax.export.register_pytree_node_serialization(
    PackedTable,
    serialized_name="jbag.PackedTable",
    serialize_auxdata=lambda aux: ",".join(map(str, aux[0])).encode(),
    deserialize_auxdata=lambda data: (Packing(*map(int, data.decode().split(","))),),
)

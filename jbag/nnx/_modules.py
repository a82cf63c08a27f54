"""The embedding bag and its collection as Flax NNX modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from flax import nnx
from flax.core import FrozenDict
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jbag._validation import Floats, Integers
from jbag.collection._collection import (
    CollectionOptions,
    check_parts,
    collection_shardings,
    collection_traffic,
    export_tables,
    import_tables,
    initializer,
    pool_collection,
    validate_batch,
)
from jbag.collection._lookup import Traffic
from jbag.interop import _flax_serialization as _flax_serialization  # registers types
from jbag.interop import _torch
from jbag.ops._module_options import (
    EmbeddingBagOptions,
    TableOptions,
    pretrained_options,
)
from jbag.ops._packed_table import (
    AnyTable,
    PackedTable,
    pack_like,
    packs,
    storage,
    stored,
    unpack,
)
from jbag.ragged._bags import Bags

if TYPE_CHECKING:
    import torch


class Frozen(nnx.Variable[Array]):
    """A table kept from training: not an `nnx.Param`, which optimizers select.

    Example:
      >>> bag = jbag.nnx.EmbeddingBag.from_pretrained(jax.numpy.ones((10, 2)))
      >>> type(bag.embedding) is jbag.nnx.Frozen
      True
    """


@dataclasses.dataclass(eq=False, repr=False)
class EmbeddingBag(EmbeddingBagOptions, nnx.Module):
    """A table of embeddings, pooled over bags of ids by `jbag.embedding_bag`.

    The table is `self.embedding`, an `nnx.Param` [V, D], or a `Frozen` variable. If it
    is packed, it is the lines of a `PackedTable`, and the variable's metadata "packing"
    is their geometry.

    Args:
      num_embeddings: V.
      features: D.
      mode: "mean", "sum", "sqrtn", "max" or "min".
      padding_idx: the row that stands for nothing; it starts as zeros.
      include_last_offset: whether offsets end with the number of slots in use.
      max_norm: rows are used scaled down to this norm.
      norm_type: p of that norm.
      scale_grad_by_freq: divide each row's gradient by its count in the batch.
      sparse: ask for a row-sparse gradient where the caller can take one, as
        `jbag.value_and_grad` can.
      dtype: of the result; None for the table's own. Only the result is cast.
      param_dtype: of the table.
      embedding_init: the table's initializer, called with (key, shape, dtype); by
        default N(0, 1 / D), as in `flax.nnx.Embed`. `nnx.with_partitioning` around it,
        or `embedding_metadata`, brings metadata.
      implementation: the kernel by name, or None for the platform's best one.
      freeze: whether the table is kept from training.
      packed: whether the table is a `PackedTable`; None packs it on TPUs, unless it has
        metadata, as for a mesh.
      embedding_metadata: metadata of the variable, such as `out_sharding`.
      rngs: gives the initializer its key; not needed by `from_pretrained`.

    Example:
      >>> bag = jbag.nnx.EmbeddingBag(10, 2, rngs=flax.nnx.Rngs(0))
      >>> bag(jbag.Bags.from_lists([[0, 1, 2, 3], [4, 5], [6, 0, 7, 8]])).shape
      (3, 2)
    """

    embedding_metadata: dataclasses.InitVar[Mapping[str, Any]] = dataclasses.field(
        default=MappingProxyType({}), kw_only=True
    )
    rngs: dataclasses.InitVar[nnx.Rngs] = dataclasses.field(kw_only=True)

    def __post_init__(
        self, embedding_metadata: Mapping[str, Any], rngs: nnx.Rngs
    ) -> None:
        self._check_options()
        self.embedding = make_variable(self, embedding_metadata, rngs)
        del self.embedding_init  # a pretrained one would keep its table alive

    def __call__(
        self,
        indices: Integers | Bags,
        offsets: Integers | None = None,
        weights: Floats | None = None,
    ) -> Float[Array, "B D"]:
        """Pool the bags; see `jbag.embedding_bag` for the arguments and errors.

        Args:
          indices: [N] with `offsets`, [B, L], or a `Bags`.
          offsets: [B] or [B + 1], or None.
          weights: of the shape of `indices`, or None.

        Returns:
          [B, D], of `dtype`.
        """
        return self._pool(table_of(self.embedding), indices, offsets, weights)

    @classmethod
    def from_pretrained(
        cls, table: ArrayLike, freeze: bool = True, **options: Any
    ) -> EmbeddingBag:
        """Return a module that holds `table`, frozen by default.

        Args:
          table: [V, D], floating.
          freeze: whether the table is kept from training.
          **options: of the module.

        Raises:
          TypeError, ValueError: `table` is not a floating matrix.

        Example:
          >>> table = jax.numpy.ones((10, 2))
          >>> bag = jbag.nnx.EmbeddingBag.from_pretrained(table, mode="sum")
          >>> bag([[1, 2], [3, 4]])
          Array([[2., 2.],
                 [2., 2.]], dtype=float32)
        """
        options = {"rngs": nnx.Rngs(0), **pretrained_options(table, options)}
        return cls(freeze=freeze, **options)

    @classmethod
    def from_torch(cls, module: torch.nn.EmbeddingBag) -> EmbeddingBag:
        """Return the module that equals a PyTorch module, with a copy of its state.

        A weight that requires no gradient comes frozen.

        Raises:
          TypeError: `module` is not a `torch.nn.EmbeddingBag`.

        Example:
          >>> module = torch.nn.EmbeddingBag(10, 3)  # doctest: +SKIP
          >>> bag = jbag.nnx.EmbeddingBag.from_torch(module)  # doctest: +SKIP
        """
        table, options = _torch.read(module, "EmbeddingBag")
        return cls.from_pretrained(table, **options)

    def to_torch(self) -> torch.nn.EmbeddingBag:
        """Return the PyTorch module that equals this one, with a copy of its table.

        Raises:
          ValueError: PyTorch lacks the module's mode, or its combination of options.

        Example:
          >>> module = bag.to_torch()  # doctest: +SKIP
        """
        return _torch.write(table_of(self.embedding), self)


@dataclasses.dataclass(eq=False, repr=False)
class EmbeddingBagCollection(CollectionOptions, nnx.Module):
    """Several tables, and the features that are pooled from them.

    It is `jbag.linen.EmbeddingBagCollection`, of which see the arguments, as an NNX
    module: each stack of tables is an `nnx.Param`, an attribute "group_width".

    Args:
      tables: a `jbag.Table` by name.
      features: a `jbag.Feature` by name, in the order of the outputs.
      specs: by group, a `PartitionSpec` or a `jbag.sharding.TableWise`. They are the
        parameters' `out_sharding` metadata, too.
      mesh: the mesh; None is that of `jax.set_mesh`, if there are specs.
      batch_axis: along which batches are cut, where all tables are replicated.
      rows_per_round: C, how many rows a device requests of one owner in a round, or
        None.
      grid: K of the layouts, or None.
      sparse: ask for row-sparse gradients.
      concatenate: return one array, the features side by side.
      dtype: of the results; None for the tables' own.
      implementation: the kernel by name, or None for the platform's best one.
      packed: whether parameters are the lines of a `PackedTable`; None packs on TPUs.
      rngs: gives the initializers their keys.

    Example:
      >>> collection = jbag.nnx.EmbeddingBagCollection(
      ...     tables={"items": jbag.Table(1000, 8)},
      ...     features={"seen": jbag.Feature("items", mode="sum")},
      ...     rngs=flax.nnx.Rngs(0),
      ... )
      >>> collection({"seen": [[1, 2, 3]]})["seen"].shape
      (1, 8)
    """

    rngs: dataclasses.InitVar[nnx.Rngs] = dataclasses.field(kw_only=True)

    def __post_init__(self, rngs: nnx.Rngs) -> None:
        for name in ("tables", "features", "specs"):
            given = getattr(self, name)
            if isinstance(given, Mapping):  # else an error, below
                setattr(self, name, FrozenDict(given))
        parts = check_parts(self)
        for stack in parts.stacks:
            metadata: dict[str, Any] = {}
            if stack.partition_spec is not None:
                # A state of one number a row can't lie so: it follows the table.
                metadata["out_sharding"] = stack.partition_spec
                metadata["optimizer_sharding"] = PartitionSpec()
                if isinstance(self.mesh, Mesh):
                    metadata["mesh"] = self.mesh
            table = initializer(self, parts, stack, self.packed)(rngs.params())
            variable = nnx.Param(storage(table), **_packing(table), **metadata)
            setattr(self, stack.name, variable)

    def __call__(self, batch: Any) -> Any:
        """Pool every feature; see `jbag.linen.EmbeddingBagCollection`."""
        parts = check_parts(self)
        return pool_collection(self, parts, self._arrays(), batch)

    def _arrays(self) -> dict[str, AnyTable]:
        names = [stack.name for stack in check_parts(self).stacks]
        return {name: table_of(getattr(self, name)) for name in names}

    def validate(self, batch: Any) -> Any:
        """Check a batch by value; see `jbag.linen.EmbeddingBagCollection.validate`."""
        return validate_batch(self, batch)

    def traffic(self, batch: Any) -> dict[str, Traffic]:
        """Return the traffic of a batch for each parameter that is row-wise."""
        return collection_traffic(self, batch)

    def shardings(self, tree: Any) -> Any:
        """Return a `NamedSharding` for each array of a tree, such as an `nnx.State`."""
        return collection_shardings(self, tree)

    def export_tables(self) -> dict[str, Array]:
        """Return each table by name, [V, D], its rows in the order of their ids."""
        return export_tables(check_parts(self), self._arrays())

    def import_tables(self, tables: Mapping[str, ArrayLike]) -> None:
        """Take over such tables; see `export_tables`."""
        given = import_tables(self, tables)
        # As the variables are: packed or not.
        for name, table in pack_like(unpack(given), self._arrays()).items():
            getattr(self, name)[...] = storage(table)


def make_variable(
    module: TableOptions, embedding_metadata: Mapping[str, Any], rngs: nnx.Rngs
) -> nnx.Variable[Array]:
    """Return the variable with the initial table of a module."""
    packed = bool(module.packed) if embedding_metadata else module.packed
    table = module._initial_table(rngs.params(), _map_value, packed)
    variable = Frozen if module.freeze else nnx.Param
    return variable(_map_value(storage, table), **_packing(table), **embedding_metadata)


def _map_value(function: Callable[[Array], Any], value: Any) -> Any:
    """Apply a function to a table, inside its metadata if it has some."""
    if isinstance(value, nnx.VariableMetadata):
        return dataclasses.replace(value, raw_value=function(value.raw_value))
    return function(value)


def _packing(value: Any) -> dict[str, Any]:
    """Return the metadata of a variable that holds a table: how it is packed."""
    table = value.raw_value if isinstance(value, nnx.VariableMetadata) else value
    return {"packing": table.packing} if isinstance(table, PackedTable) else {}


def table_of(variable: nnx.Variable[Array]) -> AnyTable:
    """Return the table in a variable, packed if its metadata says so."""
    array = variable[...]
    packing = variable.packing if packs(variable) else None
    is_packed = packing is not None and array.shape == packing.shape
    return stored(array, packing if is_packed else None)

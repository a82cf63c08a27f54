"""The embedding bag and its collection as Linen modules; PyTorch's modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
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
from jbag.linen._embed import Embed
from jbag.linen._table_variable import TableVariable
from jbag.ops._module_options import EmbeddingBagOptions, pretrained_options
from jbag.ops._packed_table import AnyTable, packs
from jbag.ragged._bags import Bags

if TYPE_CHECKING:
    import torch


class EmbeddingBag(TableVariable, EmbeddingBagOptions, nn.Module):
    """A table of embeddings, pooled over bags of ids by `jbag.embedding_bag`.

    The table is the parameter "embedding", [V, D]. Frozen, it is in the collection
    "frozen" instead, out of reach of `jax.grad` over the parameters, of optimizers and
    of their weight decay.

    Attributes:
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
      dtype: of the result; None for the table's own. Pooling runs in float32 at least,
        and only the result is cast: a large table is never copied to another dtype.
      param_dtype: of the table.
      embedding_init: the table's initializer, called with (key, shape, dtype). The
        default draws from N(0, 1 / D), as `flax.linen.Embed` does; PyTorch's draws from
        N(0, 1), which is `jax.nn.initializers.normal(1.0)`. Partitioning metadata comes
        with `nn.with_partitioning` around it.
      implementation: the kernel by name, or None for the platform's best one.
      freeze: whether the table is kept from training.
      packed: whether the table is a `PackedTable`; None packs it on TPUs, unless it has
        metadata, as for a mesh.

    Example:
      >>> bag = jbag.EmbeddingBag(num_embeddings=10, features=2, mode="sum")
      >>> bags = jbag.Bags.from_lists([[0, 1, 2, 3], [4, 5], [6, 0, 7, 8]])
      >>> variables = bag.init(jax.random.key(0), bags)
      >>> bag.apply(variables, bags).shape
      (3, 2)
    """

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
        return self._pool(self._table(), indices, offsets, weights)

    @classmethod
    def from_pretrained(
        cls, table: ArrayLike, freeze: bool = True, **options: Any
    ) -> EmbeddingBag:
        """Return a module that starts from `table`, frozen by default.

        Args:
          table: [V, D], floating.
          freeze: whether the table is kept from training.
          **options: of the module.

        Raises:
          TypeError, ValueError: `table` is not a floating matrix.

        Example:
          >>> table = jax.numpy.ones((10, 2))
          >>> bag = jbag.EmbeddingBag.from_pretrained(table, mode="sum")
          >>> variables = bag.init(jax.random.key(0), [[1, 2]])
          >>> bag.apply(variables, [[1, 2], [3, 4]])
          Array([[2., 2.],
                 [2., 2.]], dtype=float32)
        """
        return cls(freeze=freeze, **pretrained_options(table, options))


class EmbeddingBagCollection(CollectionOptions, nn.Module):
    """Several tables, and the features that are pooled from them.

    Tables of one group, width and dtype are stacked in one parameter, "group_width", so
    that all features of a mode are pooled by one call. To be cut over a mesh, its rows
    are dealt by a `jbag.sharding.Layout`; `export_tables` has each table's in order. To
    train tables in different ways, put them in groups: `optax.partition` can tell their
    parameters apart.

    Over a mesh, `specs` say how each group lies; see `jbag.sharding`. They are the
    parameters' partitioning metadata, too. Without a mesh, all is pooled on one device.

    Attributes:
      tables: a `jbag.Table` by name.
      features: a `jbag.Feature` by name, in the order of the outputs.
      specs: by group, a `PartitionSpec` or a `jbag.sharding.TableWise`; groups that
        aren't named are replicated.
      mesh: the mesh; None is that of `jax.set_mesh`, if there are specs.
      batch_axis: along which batches are cut, where all tables are replicated.
      rows_per_round: C, how many rows a device requests of one owner in a round, or
        None.
      grid: K of the layouts. None is 20160 if there are specs; and 1, the rows of one
        table after another's, if there are none.
      sparse: ask for row-sparse gradients.
      concatenate: return one array, the features side by side; all must be pooled.
      dtype: of the results; None for the tables' own.
      implementation: the kernel by name, or None for the platform's best one.
      packed: whether each parameter is a `PackedTable`; None packs them on TPUs. Tables
        that are sharded by columns are arrays.

    Example:
      >>> collection = jbag.EmbeddingBagCollection(
      ...     tables={"items": jbag.Table(1000, 8), "tags": jbag.Table(50, 8)},
      ...     features={
      ...         "shown": jbag.Feature("items"),
      ...         "seen": jbag.Feature("items", mode="sum"),
      ...         "tags": jbag.Feature("tags"),
      ...     },
      ...     concatenate=True,
      ... )
      >>> batch = {
      ...     "shown": numpy.array([[7], [8]]),
      ...     "seen": jbag.Bags.from_lists([[1, 2, 3], []]),
      ...     "tags": jbag.Bags.from_lists([[5], [6, 49]]),
      ... }
      >>> variables = collection.init(jax.random.key(0), batch)
      >>> collection.apply(variables, batch).shape
      (2, 24)
      >>> list(variables["params"])
      ['embedding_8']
    """

    @nn.compact
    def __call__(self, batch: Any) -> Any:
        """Pool every feature.

        Args:
          batch: a dict of the features' bags, each a `Bags` or ids [B, L]; or one keyed
            `Bags`, the bags of all features one feature after another. Over a mesh, a
            `Bags` is a stack, a block for each device. Weights are the bags'.

        Returns:
          A dict of [B, D] by feature, in the order of `features`; or [B, sum of D]. An
          unpooled feature has a row for each slot, [*indices.shape, D], with zeros for
          padding and outside its bags. Of keyed bags, it has a row for each slot of all
          features, with zeros for the others.

        Raises:
          IndexError, TypeError, ValueError: as `jbag.embedding_bag`; the batch hasn't
            the features, or the mesh and the specs don't fit.
        """
        parts = check_parts(self)
        arrays = {}
        for stack in parts.stacks:
            given = nn.meta.unbox(self.get_variable("params", stack.name))
            # Linen compares a given table with the shape of an initial one.
            packed = self.packed if given is None else packs(given)
            init: Any = initializer(self, parts, stack, packed)
            if stack.partition_spec is not None:
                names = (*stack.partition_spec, None, None)[:2]
                init = nn.with_partitioning(init, names)
            arrays[stack.name] = self.param(stack.name, init)
        return pool_collection(self, parts, arrays, batch)

    def validate(self, batch: Any) -> Any:
        """Check a batch by value, copying from the device if need be; return it.

        Raises:
          IndexError: an id in a bag is outside its table; the message has the feature,
            the position and the id.
          TypeError, ValueError: as the module when it is called.

        Example:
          >>> collection = jbag.EmbeddingBagCollection(
          ...     tables={"items": jbag.Table(10, 8)},
          ...     features={"seen": jbag.Feature("items")},
          ... )
          >>> collection.validate({"seen": jax.numpy.array([[1, 2], [30, 4]])})
          Traceback (most recent call last):
          IndexError: In `batch['seen']`: `indices` must lie in [0, 10), the rows ...
        """
        return validate_batch(self, batch)

    def traffic(self, batch: Any) -> dict[str, Traffic]:
        """Return the traffic of a batch for each parameter that is row-wise."""
        return collection_traffic(self, batch)

    def shardings(self, tree: Any) -> Any:
        """Return a `NamedSharding` for each array of a tree, such as a train state's.

        The tables, and what an optimizer keeps of them, lie by their specs; other
        arrays are replicated. The arrays may be those of `jax.eval_shape`.
        """
        return collection_shardings(self, tree)

    def export_tables(self, params: Mapping[str, Any]) -> dict[str, Array]:
        """Return each table by name, [V, D], its rows in the order of their ids.

        `params` are the module's, or what an optimizer keeps by the same names: then
        [V, D] or [V].
        """
        return export_tables(check_parts(self), nn.meta.unbox(params))

    def import_tables(self, tables: Mapping[str, ArrayLike]) -> dict[str, AnyTable]:
        """Return the parameters that hold such tables; see `export_tables`."""
        return import_tables(self, tables)


def from_torch(
    module: torch.nn.EmbeddingBag | torch.nn.Embedding,
) -> tuple[Any, dict[str, Any]]:
    """Return the Linen module and the variables that equal a PyTorch module.

    Args:
      module: a `torch.nn.EmbeddingBag` or a `torch.nn.Embedding`. Its state is copied;
        a weight that requires no gradient comes frozen.

    Returns:
      (module, variables) of an `EmbeddingBag` or an `Embed`:
      `module.apply(variables, indices, offsets)`, or `module.apply(variables, ids)`,
      gives what the PyTorch module gives.

    Raises:
      TypeError: `module` is neither of these.

    Example:
      >>> module = torch.nn.EmbeddingBag(10, 3)  # doctest: +SKIP
      >>> bag, variables = jbag.from_torch(module)  # doctest: +SKIP
    """
    table, options = _torch.read(module, "EmbeddingBag", "Embedding")
    kind = EmbeddingBag if "mode" in options else Embed
    own = kind(param_dtype=table.dtype, **options)
    return own, {"frozen" if own.freeze else "params": {"embedding": table}}


def to_torch(
    module: EmbeddingBag | Embed, variables: Any
) -> torch.nn.EmbeddingBag | torch.nn.Embedding:
    """Return the PyTorch module that equals a Linen module with its variables.

    Args:
      module: `dtype`, `implementation` and initializers have no counterpart there.
      variables: what `module.init` returned, or training made of it.

    Raises:
      ValueError: PyTorch lacks the module's mode, or its combination of options.

    Example:
      >>> module = jbag.to_torch(bag, variables)  # doctest: +SKIP
    """
    variables = nn.meta.unbox(variables)
    table = variables["frozen" if module.freeze else "params"]["embedding"]
    if isinstance(module, Embed):
        return _torch.write_embedding(table, module)
    return _torch.write(table, module)

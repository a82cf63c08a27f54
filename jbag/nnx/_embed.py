"""The embedding lookup as a Flax NNX module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jbag._validation import Integers
from jbag.interop import _torch
from jbag.nnx._modules import make_variable, table_of
from jbag.ops._module_options import EmbedOptions, pretrained_options
from jbag.ops._packed_table import unpack
from jbag.ragged._bags import Bags

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(eq=False, repr=False)
class Embed(EmbedOptions, nnx.Module):
    """A table of embeddings, looked up by `jbag.embedding_lookup`.

    It takes the place of `flax.nnx.Embed`: the same constructor, methods, variable
    `self.embedding` and initial values. With `sparse`, the gradient of a lookup is
    row-sparse. It differs in what it does with ids outside [0, V), negative ones too:
    on the host they raise, and on a device their rows are NaN.

    Args:
      num_embeddings: V.
      features: D.
      dtype: of the result; None for the table's own. Only the rows are cast.
      param_dtype: of the table.
      embedding_init: the table's initializer, called with (key, shape, dtype); the
        default draws from N(0, 1 / D).
      promote_dtype: as in `flax.nnx.Embed`; here it takes the rows and not the table,
        except in `attend`.
      padding_idx: the row that gets no gradient; it starts as zeros.
      max_norm: rows are used scaled down to this norm; `attend` uses the table itself.
      norm_type: p of that norm.
      scale_grad_by_freq: divide each row's gradient by its count in the batch.
      sparse: ask for a row-sparse gradient where the caller can take one, as
        `jbag.value_and_grad` can. The gradient of a table that `attend` uses too is
        dense.
      implementation: the kernel by name, or None for the platform's best one.
      freeze: whether the table is kept from training, in a `Frozen` variable.
      packed: whether the table is a `PackedTable`; None packs it on TPUs, unless it has
        metadata, as for a mesh.
      embedding_metadata: metadata of the variable, such as `out_sharding`.
      rngs: gives the initializer its key; not needed by `from_pretrained`.

    Example:
      >>> embed = jbag.nnx.Embed(10, 2, sparse=True, rngs=flax.nnx.Rngs(0))
      >>> embed(jnp.array([[0, 1, 2]])).shape
      (1, 3, 2)
    """

    promote_dtype: Callable[..., Any] = promote_dtype
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
        self.dtype = self.dtype or self.param_dtype

    def __call__(
        self, inputs: Integers | Bags, out_sharding: Any = None
    ) -> Float[Array, "*slots D"]:
        """Look up a row for each id; see `jbag.embedding_lookup` for the errors.

        Args:
          inputs: ids of any shape, or a `Bags`.
          out_sharding: the sharding of the result on a mesh with Explicit axes; None is
            that of `inputs` and of the columns of the table.

        Returns:
          [*inputs.shape, D], of `dtype`; of a `Bags`, [N, D].
        """
        rows = self._look_up(table_of(self.embedding), inputs)
        (rows,) = self.promote_dtype((rows,), dtype=self.dtype, inexact=False)
        return (
            rows if out_sharding is None else jax.sharding.reshard(rows, out_sharding)
        )

    def attend(
        self, query: ArrayLike, out_sharding: Any = None
    ) -> Float[Array, "*batch V"]:
        """Return the inner product of each query and each row: logits of tied weights.

        The gradient that the table gets here is dense. `jbag.value_and_grad` then adds
        that of the lookups to it, and returns an array; `allow_dense=True` expects it.

        Args:
          query: [..., D], floating.
          out_sharding: the sharding of the result on a mesh with Explicit axes.

        Returns:
          [..., V], of `dtype`.
        """
        table = unpack(table_of(self.embedding))
        query, table = self.promote_dtype((query, table), dtype=self.dtype)
        return jnp.dot(query, table.T, out_sharding=out_sharding)

    @classmethod
    def from_pretrained(
        cls, table: ArrayLike, freeze: bool = True, **options: Any
    ) -> Embed:
        """Return a module that holds `table`, frozen by default.

        Args:
          table: [V, D], floating.
          freeze: whether the table is kept from training.
          **options: of the module.

        Raises:
          TypeError, ValueError: `table` is not a floating matrix.

        Example:
          >>> embed = jbag.nnx.Embed.from_pretrained(jnp.ones((10, 2)))
          >>> embed(3)
          Array([1., 1.], dtype=float32)
        """
        options = {"rngs": nnx.Rngs(0), **pretrained_options(table, options)}
        return cls(freeze=freeze, **options)

    @classmethod
    def from_torch(cls, module: torch.nn.Embedding) -> Embed:
        """Return the module that equals a PyTorch module, with a copy of its state.

        A weight that requires no gradient comes frozen.

        Raises:
          TypeError: `module` is not a `torch.nn.Embedding`.

        Example:
          >>> module = torch.nn.Embedding(10, 3)  # doctest: +SKIP
          >>> embed = jbag.nnx.Embed.from_torch(module)  # doctest: +SKIP
        """
        table, options = _torch.read(module, "Embedding")
        return cls.from_pretrained(table, **options)

    def to_torch(self) -> torch.nn.Embedding:
        """Return the PyTorch module that equals this one, with a copy of its table.

        Example:
          >>> module = embed.to_torch()  # doctest: +SKIP
        """
        return _torch.write_embedding(table_of(self.embedding), self)

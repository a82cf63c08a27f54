"""The embedding lookup as a Flax Linen module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jbag._validation import Integers
from jbag.linen._table_variable import TableVariable
from jbag.ops._module_options import EmbedOptions, pretrained_options
from jbag.ops._packed_table import unpack
from jbag.ragged._bags import Bags


class Embed(TableVariable, EmbedOptions, nn.Module):
    """A table of embeddings, looked up by `jbag.embedding_lookup`.

    It takes the place of `flax.linen.Embed`: the same constructor, methods, parameter
    "embedding" and initial values. With `sparse`, the gradient of a lookup is
    row-sparse. It differs in what it does with ids outside [0, V), negative ones too:
    on the host they raise, and on a device their rows are NaN.

    Attributes:
      num_embeddings: V.
      features: D.
      dtype: of the result; None for the table's own. Only the rows are cast.
      param_dtype: of the table.
      embedding_init: the table's initializer, called with (key, shape, dtype); the
        default draws from N(0, 1 / D). PyTorch's draws from N(0, 1).
      promote_dtype: as in `flax.linen.Embed`; here it takes the rows and not the table,
        except in `attend`.
      padding_idx: the row that gets no gradient; it starts as zeros.
      max_norm: rows are used scaled down to this norm; `attend` uses the table itself.
      norm_type: p of that norm.
      scale_grad_by_freq: divide each row's gradient by its count in the batch.
      sparse: ask for a row-sparse gradient where the caller can take one, as
        `jbag.value_and_grad` can. The gradient of a table that `attend` uses too is
        dense.
      implementation: the kernel by name, or None for the platform's best one.
      freeze: whether the table is kept from training, in the collection "frozen".
      packed: whether the table is a `PackedTable`; None packs it on TPUs, unless it has
        metadata, as for a mesh.

    Example:
      >>> embed = jbag.linen.Embed(num_embeddings=10, features=2, sparse=True)
      >>> variables = embed.init(jax.random.key(0), jnp.array([[0, 1, 2]]))
      >>> embed.apply(variables, jnp.array([[0, 1, 2]])).shape
      (1, 3, 2)
    """

    promote_dtype: Callable[..., Any] = promote_dtype

    def __call__(self, inputs: Integers | Bags) -> Float[Array, "*slots D"]:
        """Look up a row for each id; see `jbag.embedding_lookup` for the errors.

        Args:
          inputs: ids of any shape, or a `Bags`.

        Returns:
          [*inputs.shape, D], of `dtype`; of a `Bags`, [N, D].
        """
        rows = self._look_up(self._table(), inputs)
        (rows,) = self.promote_dtype(rows, dtype=self.dtype, inexact=False)
        return rows

    def attend(self, query: ArrayLike) -> Float[Array, "*batch V"]:
        """Return the inner product of each query and each row: logits of tied weights.

        The gradient that the table gets here is dense. `jbag.value_and_grad` then adds
        that of the lookups to it, and returns an array; `allow_dense=True` expects it.

        Args:
          query: [..., D], floating.

        Returns:
          [..., V], of `dtype`, or of the promoted dtypes of `query` and the table.
        """
        table = unpack(self._table())
        query, table = self.promote_dtype(query, table, dtype=self.dtype)
        return jnp.dot(query, table.T)

    @classmethod
    def from_pretrained(
        cls, table: ArrayLike, freeze: bool = True, **options: Any
    ) -> Embed:
        """Return a module that starts from `table`, frozen by default.

        Args:
          table: [V, D], floating.
          freeze: whether the table is kept from training.
          **options: of the module.

        Raises:
          TypeError, ValueError: `table` is not a floating matrix.

        Example:
          >>> embed = jbag.linen.Embed.from_pretrained(jnp.ones((10, 2)))
          >>> variables = embed.init(jax.random.key(0), 3)
          >>> embed.apply(variables, 3)
          Array([1., 1.], dtype=float32)
        """
        return cls(freeze=freeze, **pretrained_options(table, options))

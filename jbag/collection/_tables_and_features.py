"""`Table` and `Feature`: the declaration of a collection."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jbag._validation import TABLE_DTYPES, check_flag, check_integer
from jbag.ops._embedding_bag import check_mode, check_padding_idx
from jbag.ops._max_norm import check_norm
from jbag.ops._module_options import Initializer, default_embedding_init


@dataclasses.dataclass(frozen=True)
class Table:
    """Declare one table of an `EmbeddingBagCollection`.

    Attributes:
      num_embeddings: V, the number of rows.
      embedding_dim: D, the width of a row.
      group: the name of a group. Tables of the same group, width and dtype are stacked
        in one parameter with one optimizer and one sharding.
      padding_idx: the row that bags leave out; it is initialized to zeros.
      max_norm: scale rows down to this norm before pooling; None does not.
      norm_type: the order p of that norm.
      scale_grad_by_freq: divide each row's gradient by its count in a feature's batch.
      param_dtype: the dtype of the table.
      embedding_init: a function of (key, (V, D), param_dtype); the default is
        N(0, 1 / D).

    Raises:
      TypeError: an attribute has a wrong type.
      ValueError: an attribute is out of range.

    Example:
      >>> jbag.Table(num_embeddings=1000, embedding_dim=64).group
      'embedding'
    """

    num_embeddings: int
    embedding_dim: int
    _: dataclasses.KW_ONLY
    group: str = "embedding"
    padding_idx: int | None = None
    max_norm: float | None = None
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    param_dtype: Any = jnp.float32
    embedding_init: Initializer = default_embedding_init

    def __post_init__(self) -> None:
        size = check_integer("num_embeddings", self.num_embeddings, low=1)
        check_integer("embedding_dim", self.embedding_dim, low=1)
        if not isinstance(self.group, str):
            raise TypeError(f"`group` must be a string; got {self.group!r}.")
        if not self.group.isidentifier():
            raise ValueError(f"`group` must be an identifier; got {self.group!r}.")
        if self.padding_idx is not None:
            check_padding_idx(self.padding_idx, size)
        if self.max_norm is not None and not isinstance(self.max_norm, int | float):
            raise TypeError(f"`max_norm` must be a number; got {self.max_norm!r}.")
        check_norm(self.max_norm, self.norm_type)
        check_flag("scale_grad_by_freq", self.scale_grad_by_freq)
        dtype = jnp.dtype(self.param_dtype).name
        if dtype not in TABLE_DTYPES:
            names = ", ".join(TABLE_DTYPES)
            raise TypeError(f"`param_dtype` must be one of {names}; got {dtype}.")


@dataclasses.dataclass(frozen=True)
class Feature:
    """Declare one feature of an `EmbeddingBagCollection`: bags of ids of one table.

    Attributes:
      table: the name of the table.
      mode: the pooling mode: "mean", which is the default, "sum", "sqrtn", "max" or
        "min"; None in an unpooled feature.
      pooling: "bag" pools the rows of each bag; None does not: the output has a row for
        each slot, as of a sequence.

    Raises:
      TypeError: `table` is not a string.
      ValueError: `mode` is unknown, or given with `pooling` None.

    Example:
      >>> jbag.Feature("items", mode="sum")
      Feature(table='items', mode='sum', pooling='bag')
      >>> jbag.Feature("items", pooling=None)
      Feature(table='items', mode=None, pooling=None)
    """

    table: str
    mode: str | None = None
    _: dataclasses.KW_ONLY
    pooling: str | None = "bag"

    def __post_init__(self) -> None:
        if not isinstance(self.table, str):
            raise TypeError(f"`table` must be a string; got {self.table!r}.")
        check_pooling(self.pooling)
        if self.pooling is None:
            if self.mode is not None:
                raise ValueError(
                    "`mode` must not be given with `pooling` None, which pools "
                    f"nothing; got {self.mode!r}."
                )
            return
        if self.mode is None:
            object.__setattr__(self, "mode", "mean")
        check_mode(self.mode)


def check_pooling(pooling: Any) -> None:
    """Raise ValueError unless `pooling` is "bag" or None."""
    if pooling is not None and pooling != "bag":
        raise ValueError(f"`pooling` must be 'bag' or None; got {pooling!r}.")

"""The loads of features on tables, as the planner takes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jbag._validation import TABLE_DTYPES, check_flag, check_integer
from jbag.collection._tables_and_features import check_pooling
from jbag.ragged._bags import Bags
from jbag.sharding._cost_model import TableLoad


@dataclasses.dataclass(frozen=True)
class Load:
    """Describe the ids that one feature looks up per device and step.

    Attributes:
      table: the name of the table.
      slots: n, the capacity for the ids of one device's bags.
      weighted: whether slots have weights.
      rows_per_round: the feature's share of C, the ids per bucket of a row-wise table;
        None fits uniformly distributed ids.
      distinct: the number of distinct ids per device; None assumes n.
      pooling: as of the `Feature`; None counts a row per slot in place of one per bag.

    Example:
      >>> Load("words", slots=4096, distinct=900)
      Load(table='words', slots=4096, weighted=False, rows_per_round=None, distinct=900,
           pooling='bag')
    """

    table: str
    slots: int
    weighted: bool = False
    rows_per_round: int | None = None
    distinct: int | None = None
    _: dataclasses.KW_ONLY
    pooling: str | None = "bag"

    def __post_init__(self) -> None:
        if not isinstance(self.table, str):
            raise TypeError(f"`table` must be the name of a table; got {self.table!r}.")
        check_integer("slots", self.slots, low=0)
        check_flag("weighted", self.weighted)
        if self.rows_per_round is not None:
            check_integer("rows_per_round", self.rows_per_round, low=1)
        if self.distinct is not None:
            check_integer("distinct", self.distinct, low=0, high=self.slots + 1)
        check_pooling(self.pooling)

    @classmethod
    def measure(
        cls,
        table: str,
        bags: Bags,
        *,
        rows_per_round: int | None = None,
        pooling: str | None = "bag",
    ) -> Load:
        """Return the load of one device's batch.

        Args:
          table: the name of the table.
          bags: B / P bags in N slots, in host or device arrays.
          rows_per_round: as the attribute.
          pooling: as the attribute.

        Raises:
          TypeError: `bags` is not a `Bags`.
          ValueError: `bags` is a stack of batches.

        Example:
          >>> bags = jbag.Bags.from_lists([[7, 7], [7, 8]], capacity=6)
          >>> Load.measure("words", bags)
          Load(table='words', slots=6, weighted=False, rows_per_round=None, distinct=2,
               pooling='bag')
        """
        if not isinstance(bags, Bags):
            raise TypeError(f"`bags` must be Bags; got {type(bags).__name__}.")
        if (shape := bags.indices.shape) != (bags.indices.size,):
            raise ValueError(f"`bags` must be one batch; got indices of shape {shape}.")
        named = np.unique(np.asarray(bags.indices)[: int(bags.offsets[-1])])
        weighted = bags.weights is not None
        load = (table, bags.capacity, weighted, rows_per_round, named.size)
        return cls(*load, pooling=pooling)


def check_table_loads(tables: Any, loads: Any) -> dict[str, TableLoad]:
    """Check the tables and loads; return the load of each table."""
    for name, mapping in {"tables": tables, "loads": loads}.items():
        if not isinstance(mapping, Mapping):
            raise TypeError(f"`{name}` must be a mapping by name; got {mapping!r}.")
    if not tables:
        raise ValueError("`tables` must hold at least one table; got none.")
    for feature, load in loads.items():
        if not isinstance(load, Load):
            raise TypeError(f"`loads[{feature!r}]` must be a Load; got {load!r}.")
        if load.table not in tables:
            raise ValueError(
                f"`loads[{feature!r}].table` must be one of `tables`, "
                f"{', '.join(map(str, tables))}; got {load.table!r}."
            )
    checked = {}
    for name, table in tables.items():
        try:
            rows, dtype = table.num_embeddings, table.param_dtype
            is_table = hasattr(table, "embedding_dim")  # modules have `features`
            width = table.embedding_dim if is_table else table.features
        except AttributeError as error:
            raise TypeError(
                f"`tables[{name!r}]` must have `num_embeddings`, `embedding_dim` (or "
                f"`features`) and `param_dtype`; got {table!r}."
            ) from error
        check_integer(f"tables[{name!r}].num_embeddings", rows, low=1)
        check_integer(f"tables[{name!r}].embedding_dim", width, low=1)
        dtype = jnp.dtype(dtype)
        if dtype.name not in TABLE_DTYPES:
            raise TypeError(
                f"`tables[{name!r}].param_dtype` must be one of "
                f"{', '.join(TABLE_DTYPES)}; got {dtype}."
            )
        own = [load for load in loads.values() if load.table == name]
        unpooled = [load for load in own if load.pooling is None]
        checked[name] = TableLoad(
            width,
            dtype,
            rows,
            slots=sum(load.slots for load in own),
            weights=sum(load.slots for load in own if load.weighted),
            num_features=len(own),
            num_pooled=len(own) - len(unpooled),
            unpooled_slots=sum(load.slots for load in unpooled),
            distinct=min(
                rows, sum(x.slots if x.distinct is None else x.distinct for x in own)
            ),
            rows_per_round=sum(load.rows_per_round or 0 for load in own),
            default_slots=sum(
                load.slots for load in own if load.rows_per_round is None
            ),
        )
    return checked

"""The table of a Flax Linen module: a parameter, or a variable kept from training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jaxtyping import Array

from jbag.ops._module_options import TableOptions
from jbag.ops._packed_table import AnyTable, packs


class TableVariable(TableOptions):
    """The table "embedding" of a module of one table, in "params" or in "frozen"."""

    def setup(self: Any) -> None:
        """Check the options and make the table."""
        self._check_options()
        if self.freeze:
            self.frozen = self.variable(
                "frozen", "embedding", lambda: self._initial(self.make_rng("params"))
            )
        else:
            self.embedding = self.param("embedding", self._initial)

    def _initial(self: Any, key: Array) -> Any:
        collection = "frozen" if self.freeze else "params"
        given = nn.meta.unbox(self.get_variable(collection, "embedding"))
        # Linen compares a given table with the shape of an initial one.
        packed = self.packed if given is None else packs(given)
        return self._initial_table(key, map_boxed, packed)

    def _table(self: Any) -> AnyTable:
        return self.frozen.value if self.freeze else self.embedding


def map_boxed(function: Callable[[Array], Any], value: Any) -> Any:
    """Apply a function to a table, inside its metadata if it has some."""
    if isinstance(value, nn.meta.AxisMetadata):
        return value.replace_boxed(function(value.unbox()))
    return function(value)

"""`AppliedUpdate`: the update of a table that an optimizer has already applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from jbag.ops._factored_gradient import FactoredGradient
from jbag.sparse._row_sparse import RowSparse


@jax.tree_util.register_pytree_node_class
class AppliedUpdate(RowSparse):
    """The update of a table that an optimizer has already updated in place.

    `table + update` is the updated table, without a copy. In any other use, with
    another array or after flattening, the update is the `RowSparse` that `difference`
    computes on demand.
    """

    def __init__(
        self,
        table: Float[Array, "rows width"],
        new_table: Float[Array, "rows width"],
        shape: tuple[int, ...],
        difference: Callable[[], RowSparse],
    ) -> None:
        super().__init__((), shape, table.dtype, is_coalesced=True)
        self._terms = None
        self._table, self._new_table, self._difference = table, new_table, difference

    @property
    def terms(self) -> tuple[FactoredGradient, ...]:
        """The terms whose sum it is."""
        if self._sealed is not None:
            return super().terms
        return self._difference().terms

    def __radd__(self, other: Any) -> Any:
        """Return the updated table, or an array with the rows added to it."""
        if self._sealed is None and other is self._table:
            return self._new_table
        return super().__radd__(other)

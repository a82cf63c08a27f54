"""`RowUpdate`: what an optimizer adds to a table of which it has moved the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from jbag.ops._factored_gradient import FactoredGradient
from jbag.sparse._row_sparse import RowSparse


@jax.tree_util.register_pytree_node_class
class RowUpdate(RowSparse):
    """What an optimizer adds to a table whose rows it has moved already.

    Added to that very table, it gives the moved one, in place; added to another array,
    or after it has passed through a function, it is the `RowSparse` that `difference`
    computes, which is done only then.
    """

    def __init__(
        self,
        table: Float[Array, "V D"],
        moved: Float[Array, "V D"],
        difference: Callable[[], RowSparse],
    ) -> None:
        super().__init__((), table.shape, table.dtype, is_coalesced=True)
        self._terms = None
        self._table, self._moved, self._difference = table, moved, difference

    @property
    def terms(self) -> tuple[FactoredGradient, ...]:
        """The products that it is the sum of."""
        if self._sealed is not None:
            return super().terms
        return self._difference().terms

    def __radd__(self, other: Any) -> Any:
        """Return the moved table, or an array with the rows added to it."""
        if self._sealed is None and other is self._table:
            return self._moved
        return super().__radd__(other)

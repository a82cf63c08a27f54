"""The pullback of pooling: from a cotangent to a `RowSparse`."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, Int

from jbag.ops._factored_gradient import FactoredGradient
from jbag.ops._row_gather import accumulation_dtype
from jbag.ragged._csr_arrays import Ids, Offsets, Slots
from jbag.sparse._row_sparse import RowSparse


def pull_back(
    cotangent: Float[Array, "B D"],
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    winners: Int[Array, "B D"] | None,
    *,
    shape: tuple[int, ...],
    dtype: Any,
    **options: Any,
) -> RowSparse:
    """Return the gradient of a table, A.T @ cotangent, as unmultiplied factors.

    The arguments and options are the fields of `FactoredGradient`.
    """
    cotangent = cotangent.astype(accumulation_dtype(cotangent.dtype))
    term = FactoredGradient(
        cotangent, ids, offsets, coefficients, winners=winners, **options
    )
    return RowSparse((term,), shape, dtype)

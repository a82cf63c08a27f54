"""Gathers of rows of tables and cotangents, and the accumulation dtype."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from jbag.ragged._csr_arrays import Ids, Offsets, bag_bounds, segment_ids


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return float32 for 16-bit tables, else the dtype of the table."""
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


def take(
    x: Shaped[Array, "rows ..."], index: Int[Array, "..."], fill: float | int | bool
) -> Shaped[Array, "..."]:
    """Gather rows of x; an index out of range gives `fill`."""
    num_rows = x.shape[0]
    if num_rows == 0:
        return jnp.full((*index.shape, *x.shape[1:]), fill, x.dtype)
    # JAX narrows 64-bit indices to 32 bits if the rows fit; clip so that none wraps.
    index = jnp.clip(index, -1, num_rows)
    return x.at[index].get(mode="fill", fill_value=fill, wrap_negative_indices=False)


def bag_rows(
    cotangent: Shaped[Array, "B D"], ids: Ids, offsets: Offsets
) -> tuple[Shaped[Array, "*slots D"], Bool[Array, "*slots"]]:
    """Gather the bag's row of each slot; mask the slots of well-formed bags."""
    if offsets is None:
        rows = jnp.broadcast_to(cotangent[:, None], (*ids.shape, cotangent.shape[1]))
        return rows, jnp.ones(ids.shape, bool)
    bounds, malformed = bag_bounds(offsets, ids.size)
    bags = segment_ids(bounds, ids.size)
    return take(cotangent, bags, 0), ~take(malformed, bags, True)

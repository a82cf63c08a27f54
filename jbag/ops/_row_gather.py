"""Gathers of rows of tables and cotangents, and the dtype in which they add up."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from jbag.ragged._csr import Ids, Offsets, bag_bounds, segment_ids


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """float32 for 16-bit tables, else the table's own dtype."""
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


def take(
    x: Shaped[Array, "rows ..."], index: Int[Array, "..."], fill: float | int | bool
) -> Shaped[Array, "..."]:
    """Return the rows of x, `fill` at negative indices and past the last."""
    num_rows = x.shape[0]
    if num_rows == 0:
        return jnp.full((*index.shape, *x.shape[1:]), fill, x.dtype)
    # JAX narrows a 64-bit index to 32 bits where the rows fit: it must not wrap.
    index = jnp.clip(index, -1, num_rows)
    return x.at[index].get(mode="fill", fill_value=fill, wrap_negative_indices=False)


def bag_rows(
    cotangent: Shaped[Array, "B D"], ids: Ids, offsets: Offsets
) -> tuple[Shaped[Array, "*slots D"], Bool[Array, "*slots"]]:
    """Return the bag's row of each slot, and which slots lie in a well-formed bag."""
    if offsets is None:
        rows = jnp.broadcast_to(cotangent[:, None], (*ids.shape, cotangent.shape[1]))
        return rows, jnp.ones(ids.shape, bool)
    bounds, malformed = bag_bounds(offsets, ids.size)
    bags = segment_ids(bounds, ids.size)
    return take(cotangent, bags, 0), ~take(malformed, bags, True)

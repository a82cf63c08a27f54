"""Stochastic rounding to bfloat16."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, Int, UInt32


def round_stochastically(
    rows: Float32[Array, "U D"], seed: UInt32[Array, "2"], indices: Int[Array, " U"]
) -> BFloat16[Array, "U D"]:
    """Round to bfloat16 so that the expected value is exact.

    The noise is a function of the seed, the index of the row and that of the column.
    """
    columns = jnp.arange(rows.shape[1], dtype=jnp.uint32)
    hashed = _hash(indices.astype(jnp.uint32) ^ seed[0])[:, None]
    noise = _hash(hashed + columns * jnp.uint32(0x9E3779B9) + seed[1]) >> 16
    bits = jax.lax.bitcast_convert_type(rows, jnp.uint32)
    upper = ((bits + noise) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isfinite(rows), rounded, rows.astype(jnp.bfloat16))


def _hash(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Hash 32-bit integers (Wellons, Prospecting for Hash Functions, 2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)

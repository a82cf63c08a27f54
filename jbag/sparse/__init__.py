"""Explicit row-sparse gradients: `pool` returns the pooled bags and their pullback.

The pullback maps a cotangent to a `RowSparse`. Use it in custom training loops,
pipelines and `jax.custom_vjp` rules; for a loss use `jbag.value_and_grad`. `pool` works
under every transformation of JAX, also in the body of `jax.lax.scan`. `psum` and
`pmean` reduce trees with `RowSparse` leaves over the axes of `jax.shard_map`,
`jax.vmap` and `jax.pmap`.
"""

from jbag.sparse._collectives import AxisName as AxisName
from jbag.sparse._collectives import pmean, psum
from jbag.sparse._pool import pool

__all__ = [
    "pmean",
    "pool",
    "psum",
]

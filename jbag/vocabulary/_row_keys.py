"""Keys of `jax.random` for the rows of a table, whose bits are cheap to draw.

JAX's default generator takes 30 times as long on a CPU, which is more than a training
step if many rows are new. The bits are hashes of a counter; they are not suited to
cryptography.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import random
from jaxtyping import Array, Int32, UInt32

from jbag.vocabulary._reference import mix

_GOLDEN = np.uint32(0x9E3779B9)  # 2^32 divided by the golden ratio


def row_keys(key: Array, rows: Int32[Array, " M"]) -> Array:
    """Return a key for each row, a function of `key` and the row."""
    words = jax.random.bits(key, (2,), jnp.uint32)
    seeds = jax.vmap(_fold_in, in_axes=(None, 0))(words, rows.astype(jnp.uint32))
    return jax.random.wrap_key_data(seeds, impl=_implementation())


def _random_bits(
    key: UInt32[Array, "2"], bit_width: int, shape: tuple[int, ...]
) -> Array:
    size = math.prod(shape) * (2 if bit_width == 64 else 1)
    counter = jax.lax.iota(jnp.uint32, size) * _GOLDEN
    bits = mix(mix(counter + key[0]) ^ key[1])
    if bit_width == 64:
        high, low = bits.reshape(2, -1).astype(jnp.uint64)
        bits = high << np.uint64(32) | low
    elif bit_width < 32:
        bits = (bits >> np.uint32(32 - bit_width)).astype(f"uint{bit_width}")
    return bits.reshape(shape)


def _fold_in(key: UInt32[Array, "2"], data: UInt32[Any, ""]) -> UInt32[Array, "2"]:
    a = mix(key[0] ^ mix(data + _GOLDEN))
    return jnp.stack([a, mix(key[1] + a + data * _GOLDEN)])


def _split(key: UInt32[Array, "2"], shape: tuple[int, ...]) -> Array:
    numbers = jax.lax.iota(jnp.uint32, math.prod(shape))
    return jax.vmap(_fold_in, in_axes=(None, 0))(key, numbers).reshape(*shape, 2)


def _refuse_seed(*_: Any) -> NoReturn:
    raise TypeError("Keys of rows are not made from seeds.")


@functools.cache
def _implementation() -> Any:
    return random.define_prng_impl(
        key_shape=(2,),
        seed=_refuse_seed,
        split=_split,
        random_bits=_random_bits,
        fold_in=_fold_in,
        name="jbag_row_keys",
        tag="jbag.vocabulary",
    )

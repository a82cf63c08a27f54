"""Argument checks of public functions.

Host data (lists, NumPy) is checked by value. Device data and traced data is checked by
dtype and shape only, as a copy to the host would block on the device.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

AnyArray = jax.Array | np.ndarray
Integers = ArrayLike | Sequence[Any]
Floats = ArrayLike | Sequence[Any]

TABLE_DTYPES = ("float32", "float64", "bfloat16", "float16")


def on_host(x: Any) -> TypeGuard[np.ndarray]:
    """Return whether x is host data: neither a JAX array nor traced."""
    return not isinstance(x, jax.Array)


def check_table(table: Any) -> jax.Array:
    """Return the table as an array; raise unless it is a floating matrix [V, D]."""
    try:
        table = jnp.asarray(table)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`table` must be a floating matrix [V, D]; got {type(table).__name__}."
        ) from error
    hint = (
        " jbag takes (table, indices) where PyTorch's functional form takes "
        "(indices, table): are the arguments in PyTorch's order?"
    )
    if table.dtype.name not in TABLE_DTYPES:
        integers = jnp.issubdtype(table.dtype, jnp.integer)
        raise TypeError(
            f"`table` must be a matrix of {', '.join(TABLE_DTYPES)}; got {table.dtype} "
            f"of shape {table.shape}.{hint if integers else ''}"
        )
    if table.ndim != 2:
        raise ValueError(
            f"`table` must be a matrix [V, D]; got shape {table.shape}. "
            "For a stack of tables use jax.vmap."
        )
    return table


def check_integers(name: str, x: Any) -> AnyArray:
    """Return x as an array; raise TypeError unless it holds integers."""
    if on_host(x):
        x = _host_array(name, x, "integers")
        if x.size == 0 and x.dtype == np.float64:
            x = x.astype(np.int32)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(
            f"`{name}` must hold integers; got {x.dtype} of shape {x.shape}"
            f"{_first_invalid(x)}."
        )
    return x


def check_weights(
    weights: Any, shape: tuple[int, ...], *, like: str = "indices"
) -> AnyArray:
    """Return the weights as an array; raise unless they are floating, of `shape`."""
    if on_host(weights):
        listed = not hasattr(weights, "dtype")
        weights = _host_array("weights", weights, "numbers")
        if listed and weights.dtype.kind == "i":
            weights = weights.astype(np.float32)
        if weights.dtype == np.float64:
            weights = weights.astype(jax.dtypes.canonicalize_dtype(np.float64))
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise TypeError(
            f"`weights` must be floating; got {weights.dtype} of shape "
            f"{weights.shape}{_first_invalid(weights)}."
        )
    if weights.shape != shape:
        raise ValueError(
            f"`weights` must have the shape of `{like}`, {shape}; got {weights.shape}."
        )
    return weights


def check_offsets(
    offsets: Any, capacity: Any, *, include_last_offset: bool
) -> AnyArray:
    """Return offsets [B + 1] over `capacity` slots; host offsets stay on the host.

    The capacity is an int, or a symbolic size under `jax.export`.
    """
    offsets = check_integers("offsets", offsets)
    if offsets.ndim != 1:
        raise ValueError(f"`offsets` must be 1-D; got shape {offsets.shape}.")
    if include_last_offset and offsets.size == 0:
        raise ValueError(
            "`offsets` must be [B + 1] with include_last_offset; got an empty array."
        )
    if not include_last_offset and offsets.size == 0 and capacity != 0:
        raise ValueError(
            f"`offsets` must start at 0; got an empty array for {capacity} `indices`."
        )
    host = on_host(offsets)
    if host and offsets.size:
        _check_monotone(offsets, capacity)
    offsets = to_index_dtype(unsharded(offsets))
    if include_last_offset:
        return offsets
    if host and isinstance(capacity, int):
        return np.append(offsets, np.array(capacity, offsets.dtype))
    return jnp.append(offsets, jnp.asarray(capacity, offsets.dtype))


def _check_monotone(offsets: np.ndarray, capacity: int) -> None:
    if offsets[0] != 0:
        raise ValueError(f"`offsets` must start at 0; got {offsets[0]}.")
    drops = np.flatnonzero(offsets[1:] < offsets[:-1])
    if drops.size:
        at = drops[0] + 1
        raise ValueError(
            f"`offsets` must not decrease; got {offsets[at - 1]} then {offsets[at]} "
            f"at position {at}."
        )
    if offsets[-1] > capacity:
        at = int(np.argmax(offsets > capacity))
        raise ValueError(
            f"`offsets` must not pass the end of `indices`, {capacity}; "
            f"got {offsets[at]} at position {at}."
        )


def check_ids(
    ids: np.ndarray,
    num_embeddings: int,
    counted: np.ndarray | None = None,
    *,
    name: str = "indices",
) -> None:
    """Raise IndexError at the first id outside [0, num_embeddings).

    `counted` masks the slots to check; None means all.
    """
    bad = (ids < 0) | (ids >= num_embeddings)
    if counted is not None:
        bad &= counted
    if bad.any():
        at = tuple(int(i) for i in np.unravel_index(np.argmax(bad), bad.shape))
        raise IndexError(
            f"`{name}` must lie in [0, {num_embeddings}), the rows of the table; "
            f"got {ids[at]} at position {at[0] if len(at) == 1 else at}."
        )


def check_integer(
    name: str, value: Any, *, low: int | None = None, high: int | None = None
) -> int:
    """Return value as an int; raise unless it is an integer in [low, high)."""
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be an integer; got {value!r}.")
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"`{name}` must be an integer; got {value!r}.") from error
    too_low = low is not None and number < low
    if too_low or (high is not None and number >= high):
        expected = f"at least {low}" if high is None else f"in [{low}, {high})"
        raise ValueError(f"`{name}` must be {expected}; got {number}.")
    return number


def to_index_dtype(x: AnyArray) -> AnyArray:
    """Convert integers to int32, or wide ones to int64 if JAX has 64 bits enabled.

    A value that doesn't fit becomes -1, which is neither a valid id nor a valid offset;
    a wrapped value may be one.
    """
    wide = x.dtype.itemsize > 4 or x.dtype == np.uint32
    target = jax.dtypes.canonicalize_dtype(np.int64 if wide else np.int32)
    if x.dtype == target:
        return x
    limits, own = jnp.iinfo(target), jnp.iinfo(x.dtype)
    numpy = np if isinstance(x, np.ndarray) else jnp
    narrow = x.astype(target)
    if own.max > limits.max:
        fits = x <= limits.max
        if own.min < 0:
            fits &= x >= limits.min
        narrow = numpy.where(fits, narrow, numpy.asarray(-1, target))
    return narrow


def _host_array(name: str, x: Any, kind: str) -> np.ndarray:
    if x is None or isinstance(x, str | bytes | dict | set):
        raise TypeError(f"`{name}` must hold {kind}; got {x!r}.")
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"`{name}` must be a plain array; got a masked one.")
    try:
        array = np.asarray(x)
    except ValueError as error:
        raise ValueError(
            f"`{name}` must be an array of {kind}; got lists of different lengths. "
            "jbag.Bags.from_lists packs those."
        ) from error
    # NumPy converts numbers beside strings to strings; object arrays keep them.
    return array if array.dtype.kind not in "USO" else np.asarray(x, object)


def _first_invalid(x: Any) -> str:
    """Describe the first element of an object array that is not a number."""
    if x.dtype != object:
        return ""
    for at, value in np.ndenumerate(x):
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            return f", with {value!r} at position {at[0] if len(at) == 1 else at}"
    return ""


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False; got {value!r}.")


def check_strings(name: str, strings: Iterable[str]) -> list[str]:
    """Return strings as a list; raise TypeError if one is not a string."""
    if isinstance(strings, str | bytes) or not isinstance(strings, Iterable):
        raise TypeError(f"`{name}` must be a list of strings; got {strings!r}.")
    strings = list(strings)
    for at, string in enumerate(strings):
        if not isinstance(string, str):
            raise TypeError(f"`{name}` must hold strings; got {string!r} at {at}.")
    return strings


def is_sharded(x: jax.Array) -> bool:
    """Return whether an array is sharded along an Explicit axis."""
    return any(axes is not None for axes in jax.typeof(x).sharding.spec)


def unsharded(x: Any) -> Any:
    """Replicate an array along Explicit axes; return other arrays unchanged."""
    if not isinstance(x, jax.Array) or not is_sharded(x):
        return x
    return jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, P()))

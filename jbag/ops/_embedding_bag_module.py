"""The `EmbeddingBag` modules of Linen and NNX: options, initialization, the call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jbag._validation import Floats, Integers, check_flag, check_integer, check_table
from jbag.ops._embedding_bag import check_mode, check_padding_idx, embedding_bag
from jbag.ops._max_norm import check_norm
from jbag.ops.kernels import check_implementation
from jbag.ragged._bags import Bags

Initializer = Callable[..., Any]

# Rows of unit expected square norm, as `flax.linen.Embed` and `flax.nnx.Embed` start.
default_embedding_init: Initializer = jax.nn.initializers.variance_scaling(
    1.0, "fan_in", "normal", out_axis=0
)


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """An initializer that returns a given table."""

    table: Float[Array, "V D"]

    def __call__(self, key: Array, shape: tuple[int, int], dtype: Any) -> Array:
        del key
        if shape != self.table.shape:
            raise ValueError(f"`table` must be {shape}; got {self.table.shape}.")
        # A copy: parameters may be donated, and the given table must not go with them.
        return jnp.array(self.table, dtype, copy=True)


def pretrained_options(table: ArrayLike, options: dict[str, Any]) -> dict[str, Any]:
    """Return what `from_pretrained` gives the constructor."""
    table = check_table(table)
    if "embedding_init" in options:
        raise TypeError("`embedding_init` must not be given with a table; got both.")
    num_embeddings, features = table.shape
    return {
        "num_embeddings": num_embeddings,
        "features": features,
        "param_dtype": table.dtype,
        "embedding_init": Pretrained(table),
        **options,
    }


def check_options(module: Any) -> None:
    """Raise where a module's options can't be meant, before any table is made."""
    check_integer("num_embeddings", module.num_embeddings, low=1)
    check_integer("features", module.features, low=1)
    for name in ("dtype", "param_dtype"):
        dtype = getattr(module, name)
        if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"`{name}` must be floating; got {jnp.dtype(dtype)}.")
    check_mode(module.mode)
    check_implementation(module.implementation)
    check_norm(module.max_norm, module.norm_type)
    for flag in ("include_last_offset", "scale_grad_by_freq", "sparse", "freeze"):
        check_flag(flag, getattr(module, flag))
    if module.padding_idx is not None:
        check_padding_idx(module.padding_idx, module.num_embeddings)


def initialize(
    module: Any,
    init: Initializer,
    key: Array,
    map_boxed: Callable[[Callable, Any], Any],
) -> Any:
    """Return the module's first table, in the box that its initializer puts it in.

    `map_boxed` applies a function to the array inside such a box.
    """
    table = init(key, (module.num_embeddings, module.features), module.param_dtype)
    if module.padding_idx is None or isinstance(init, Pretrained):
        return table
    return map_boxed(lambda array: array.at[module.padding_idx].set(0), table)


def pool(
    module: Any,
    table: Array,
    indices: Integers | Bags,
    offsets: Integers | None,
    weights: Floats | None,
) -> Float[Array, "B D"]:
    """Apply `embedding_bag` with the module's options."""
    out = embedding_bag(
        table,
        indices,
        offsets,
        mode=module.mode,
        weights=weights,
        padding_idx=module.padding_idx,
        include_last_offset=module.include_last_offset,
        max_norm=module.max_norm,
        norm_type=module.norm_type,
        scale_grad_by_freq=module.scale_grad_by_freq,
        sparse=module.sparse,
        implementation=module.implementation,
    )
    return out if module.dtype is None else out.astype(module.dtype)

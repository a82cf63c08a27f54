"""What the Linen and the NNX module share: how a table starts, and how it is used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jbag._bag import check_mode, check_padding_idx, embedding_bag
from jbag._bags import Bags
from jbag._kernels import check_implementation
from jbag._validation import Floats, Integers, check_integer, check_table

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
        return self.table.astype(dtype)


def pretrained_options(table: ArrayLike, options: dict[str, Any]) -> dict[str, Any]:
    """Return what `from_pretrained` gives the constructor."""
    table = check_table(table)
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
    check_integer("num_embeddings", module.num_embeddings, low=0)
    check_integer("features", module.features, low=0)
    check_mode(module.mode)
    check_implementation(module.implementation)
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

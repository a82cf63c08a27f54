"""The parts that the modules of one table share, in Linen and in NNX."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from jbag._validation import Floats, Integers, check_flag, check_integer, check_table
from jbag.ops._embedding_bag import check_mode, check_padding_idx, embedding_bag
from jbag.ops._embedding_lookup import embedding_lookup
from jbag.ops._max_norm import check_norm
from jbag.ops._packed_table import AnyTable, pack
from jbag.ops.kernels import check_implementation
from jbag.ragged._bags import Bags

Initializer = Callable[..., Any]

# The default of `flax.linen.Embed` and `flax.nnx.Embed`: E|row|^2 = 1.
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
        # A copy, as donated parameters would delete the caller's table.
        return jnp.array(self.table, dtype, copy=True)


def pretrained_options(table: ArrayLike, options: dict[str, Any]) -> dict[str, Any]:
    """Return the constructor's options for `from_pretrained`."""
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


class TableOptions:
    """The options and methods that every module of one table has.

    The children are dataclasses with these fields, each in the order of its peers.
    """

    num_embeddings: int
    features: int
    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    sparse: bool
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    embedding_init: Initializer
    implementation: str | None
    freeze: bool
    packed: bool | None

    def _check_options(self) -> None:
        """Check the options before the table is initialized."""
        check_integer("num_embeddings", self.num_embeddings, low=1)
        check_integer("features", self.features, low=1)
        for name in ("dtype", "param_dtype"):
            dtype = getattr(self, name)
            if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
                raise TypeError(f"`{name}` must be floating; got {jnp.dtype(dtype)}.")
        check_implementation(self.implementation)
        check_norm(self.max_norm, self.norm_type)
        for flag in ("scale_grad_by_freq", "sparse", "freeze"):
            check_flag(flag, getattr(self, flag))
        if self.packed is not None:
            check_flag("packed", self.packed)
        if self.padding_idx is not None:
            check_padding_idx(self.padding_idx, self.num_embeddings)

    def _initial_table(
        self,
        key: Array,
        map_boxed: Callable[[Callable[[Array], Any], Any], Any],
        packed: bool | None,
    ) -> Any:
        """Initialize the table; the row of `padding_idx` is zero.

        `map_boxed` applies a function to the array in the box that the initializer
        returns. What is in a box, as for a mesh, is packed only if `packed` is True.
        """
        init, padding_idx = self.embedding_init, self.padding_idx
        table = init(key, (self.num_embeddings, self.features), self.param_dtype)
        if padding_idx is not None and not isinstance(init, Pretrained):
            table = map_boxed(lambda array: array.at[padding_idx].set(0), table)
        if packed is False or (packed is None and not isinstance(table, jax.Array)):
            return table
        return map_boxed(functools.partial(pack, always=bool(packed)), table)


@dataclasses.dataclass(eq=False, repr=False)
class EmbeddingBagOptions(TableOptions):
    """The options and methods that the `EmbeddingBag` modules of Linen and NNX share.

    It is not a frozen dataclass, as Linen freezes its modules itself.
    """

    num_embeddings: int
    features: int
    mode: str = "mean"
    padding_idx: int | None = None
    include_last_offset: bool = False
    max_norm: float | None = None
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    sparse: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    embedding_init: Initializer = default_embedding_init
    implementation: str | None = None
    freeze: bool = False
    packed: bool | None = None

    def _check_options(self) -> None:
        super()._check_options()
        check_mode(self.mode)
        check_flag("include_last_offset", self.include_last_offset)

    def _pool(
        self,
        table: AnyTable,
        indices: Integers | Bags,
        offsets: Integers | None,
        weights: Floats | None,
    ) -> Float[Array, "B D"]:
        """Call `embedding_bag` with these options."""
        out = embedding_bag(
            table,
            indices,
            offsets,
            mode=self.mode,
            weights=weights,
            padding_idx=self.padding_idx,
            include_last_offset=self.include_last_offset,
            max_norm=self.max_norm,
            norm_type=self.norm_type,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
            implementation=self.implementation,
        )
        return out if self.dtype is None else out.astype(self.dtype)


@dataclasses.dataclass(eq=False, repr=False)
class EmbedOptions(TableOptions):
    """The options and methods that the `Embed` modules of Linen and NNX share.

    The positional fields are those of Flax's `Embed`.
    """

    num_embeddings: int
    features: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    embedding_init: Initializer = default_embedding_init
    _: dataclasses.KW_ONLY
    padding_idx: int | None = None
    max_norm: float | None = None
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    sparse: bool = False
    implementation: str | None = None
    freeze: bool = False
    packed: bool | None = None

    def _look_up(
        self, table: AnyTable, inputs: Integers | Bags
    ) -> Float[Array, "*slots D"]:
        """Call `embedding_lookup` with these options."""
        return embedding_lookup(
            table,
            inputs,
            padding_idx=self.padding_idx,
            max_norm=self.max_norm,
            norm_type=self.norm_type,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
            implementation=self.implementation,
        )

"""`embedding_bag`: the door that checks, and the modes as coefficients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from jbag import _product
from jbag._bags import Bags
from jbag._extremum import extremum
from jbag._kernels import check_implementation, xla
from jbag._kernels.xla import Size, accumulation_dtype, take
from jbag._norm import check_norm, row_scale
from jbag._validation import (
    AnyArray,
    Floats,
    Integers,
    check_flag,
    check_ids,
    check_integer,
    check_integers,
    check_offsets,
    check_table,
    check_weights,
    on_host,
    to_index_dtype,
)

MODES = ("sum", "mean", "max", "min", "sqrtn")


def embedding_bag(
    table: ArrayLike,
    indices: Integers | Bags,
    offsets: Integers | None = None,
    *,
    mode: str = "mean",
    weights: Floats | None = None,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    max_norm: Any = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B D"]:
    r"""Pool the embeddings of each bag of ids.

    With :math:`e_i` the row of `table` that slot i names, :math:`w_i` its weight (1
    without `weights`), and i over the slots of bag b that aren't padding:

    ========  ==============================================
    mode      output b
    ========  ==============================================
    "sum"     :math:`\sum w_i e_i`
    "mean"    :math:`\sum w_i e_i / \sum w_i`
    "sqrtn"   :math:`\sum w_i e_i / \sqrt{\sum w_i^2}`
    "max"     the largest :math:`w_i e_i`, feature by feature
    "min"     the smallest
    ========  ==============================================

    An empty bag, and one whose denominator is zero, is zero with zero gradient. Sums
    run in float32 for 16-bit tables, forward and backward, and are rounded once. The
    gradient of "max" and "min" goes whole to the first winning slot; a NaN wins.

    Args:
      table: [V, D], float32, float64, bfloat16 or float16.
      indices: ids of rows, integers: [N] with `offsets`; or [B, L], B bags of L; or a
        `Bags`, which brings its own offsets and may bring weights.
      offsets: where each bag starts, from 0, never decreasing. [B], the last bag
        running to the end of `indices`; or [B + 1] with `include_last_offset`.
      mode: "sum", "mean", "max", "min" or "sqrtn".
      weights: one for each slot, floating, of the shape of `indices`. Differentiable.
      padding_idx: the row that stands for nothing: its slots are left out of every
        value, count and gradient. Negative counts from the end.
      include_last_offset: `offsets` end with the number of slots in use; slots at or
        past it are in no bag. This keeps one shape, and one compilation, for ragged
        batches.
      max_norm: rows are used scaled down to this norm, a number at least 0 or a traced
        scalar. The table isn't changed (see `renorm`), and the gradient passes by the
        scaling.
      norm_type: p of the norm that `max_norm` means, above 0; `math.inf` is allowed.
      scale_grad_by_freq: divide each row's gradient by how often the bags name it.
      sparse: ask for a row-sparse gradient where the caller can take one, as
        `jbag.value_and_grad` can. `jax.grad` gives a dense array, as it always does.
      implementation: the kernel by name, "cpu" (C++) or "xla" (JAX's own operations),
        or None for the platform's best one.

    Returns:
      [B, D], the dtype of `table`. A bag that holds an id outside [0, V), or whose
      offsets are malformed, is NaN where that data was on a device, out of reach of the
      checks below; no gradient reaches the table through such a slot, and its weight's
      gradient is NaN.

    Raises:
      IndexError: an id on the host (in a list or NumPy array) is outside [0, V), unless
        offsets on a device leave unknown whether it is in a bag.
      TypeError: an argument is of the wrong dtype or type.
      ValueError: an argument is of the wrong shape or value; offsets on the host start
        above 0, decrease, or pass the end of `indices`.

    References:
      Joulin et al., Bag of Tricks for Efficient Text Classification, 2016.
      PyTorch, `torch.nn.functional.embedding_bag`; TensorFlow,
      `tf.nn.embedding_lookup_sparse` ("sqrtn" and the weighted mean).

    Example:
      >>> table = jax.numpy.arange(20.0).reshape(10, 2)
      >>> ids = [0, 1, 2, 3, 4, 5, 6, 0, 7, 8]
      >>> jbag.embedding_bag(table, ids, [0, 4, 6], mode="sum")
      Array([[12., 16.],
             [18., 20.],
             [42., 46.]], dtype=float32)
    """
    table = check_table(table)
    check_flag("include_last_offset", include_last_offset)
    check_flag("scale_grad_by_freq", scale_grad_by_freq)
    check_flag("sparse", sparse)
    check_mode(mode)
    check_implementation(implementation)
    num_embeddings = table.shape[0]
    if padding_idx is not None:
        padding_idx = check_padding_idx(padding_idx, num_embeddings)
    max_norm, norm_type = check_norm(max_norm, norm_type)
    indices, offsets, weights = _check_bags(
        indices, offsets, weights, include_last_offset, num_embeddings
    )
    return _pool(
        table,
        indices,
        offsets,
        weights,
        max_norm,
        mode=mode,
        padding_idx=padding_idx,
        norm_type=norm_type,
        scale_grad_by_freq=bool(scale_grad_by_freq),
        sparse=bool(sparse),
        implementation=implementation,
    )


def check_mode(mode: Any) -> None:
    """Raise ValueError unless `mode` is one of the five."""
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(
            f"`mode` must be one of {', '.join(map(repr, MODES))}; got {mode!r}."
        )


def check_padding_idx(padding_idx: Any, num_embeddings: int) -> int:
    """Return the row of `padding_idx` from the start; raise if there is none."""
    row = check_integer(
        "padding_idx", padding_idx, low=-num_embeddings, high=num_embeddings
    )
    return row % num_embeddings


def _check_bags(
    indices: Integers | Bags,
    offsets: Integers | None,
    weights: Floats | None,
    include_last_offset: bool,
    num_embeddings: int,
) -> tuple[AnyArray, AnyArray | None, AnyArray | None]:
    """Check the bags; return ids [N] with offsets [B + 1], or ids [B, L]."""
    if isinstance(indices, Bags):
        bags = indices
        if offsets is not None:
            raise ValueError(
                "`offsets` must be None with a Bags; got its own and others."
            )
        if weights is not None and bags.weights is not None:
            raise ValueError(
                "`weights` must be None with a Bags that has some; got both."
            )
        bags.check_single()
        weights = bags.weights if weights is None else weights
        indices, offsets, include_last_offset = bags.indices, bags.offsets, True

    ids = check_integers("indices", indices)
    if ids.ndim == 2:
        if offsets is not None:
            raise ValueError(
                "`offsets` must be None with indices [B, L], which are B bags of L; "
                f"got `indices` of shape {ids.shape} and `offsets`."
            )
    elif ids.ndim != 1:
        raise ValueError(f"`indices` must be [N] or [B, L]; got shape {ids.shape}.")
    elif offsets is None:
        raise ValueError(
            f"`offsets` must be given with indices [N]; got None and {ids.shape}."
        )
    if weights is not None:
        weights = check_weights(weights, ids.shape)

    if offsets is not None:
        offsets = check_offsets(
            offsets, ids.size, include_last_offset=include_last_offset
        )
    if on_host(ids):
        if offsets is None or not include_last_offset:
            check_ids(ids, num_embeddings)
        elif on_host(offsets):
            # Slots past the last offset may hold anything.
            check_ids(ids, num_embeddings, np.arange(ids.size) < offsets[-1])
    return to_index_dtype(ids), offsets, weights


@functools.partial(
    jax.jit,
    static_argnames=(
        "mode",
        "padding_idx",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
        "implementation",
    ),
)
def _pool(
    table: Float[Array, "V D"],
    indices: Int[Array, "*slots"],
    offsets: Int[Array, " ends"] | None,
    weights: Float[Array, "*slots"] | None,
    max_norm: Shaped[Array, ""] | None,
    *,
    mode: str,
    padding_idx: int | None,
    norm_type: float,
    scale_grad_by_freq: bool,
    sparse: bool,
    implementation: str | None,
) -> Float[Array, "B D"]:
    num_embeddings = table.shape[0]
    dtype = accumulation_dtype(table.dtype)
    ids, empty = indices, padding_idx
    if offsets is not None and (
        max_norm is not None
        or scale_grad_by_freq
        or (weights is not None and mode == "sqrtn")
    ):
        # These read the slots past the bags, too: empty them. The largest offset is the
        # last one, unless malformed: then those that are well formed keep their slots.
        outside = jnp.arange(ids.size, dtype=offsets.dtype) >= offsets.max()
        ids = jnp.where(ids < 0, _UNKNOWN, ids)
        if padding_idx is not None:
            outside |= indices == padding_idx
        ids, empty = jnp.where(outside, _EMPTY, ids), _EMPTY
    if weights is not None:
        weights = weights.astype(dtype)
        if empty is not None:
            # What stands beside an empty slot, a NaN say, must not reach the gradient.
            weights = jnp.where(ids == empty, 0, weights)
    options: dict[str, Any] = {"empty": empty, "implementation": implementation}
    value_scale = gradient_scale = None
    if max_norm is not None:
        value_scale = row_scale(table, ids, max_norm, norm_type)
    if scale_grad_by_freq:
        counts = _occurrences(ids, offsets, num_embeddings, dtype, **options)
        gradient_scale = 1 / counts

    bags = (ids, offsets, weights, value_scale, gradient_scale)
    if mode in ("max", "min"):
        out = extremum(table, *bags, largest=mode == "max", sparse=sparse, **options)
    elif weights is None or mode == "sum":
        average = None if mode == "sum" else mode
        out = _product.product_scaled(
            table,
            *bags,
            sparse=sparse,
            average=average,
            dtype=table.dtype,
            **options,
        )
    else:
        out = _product.product_scaled(table, *bags, sparse=sparse, **options)
        out = _divide(
            out,
            ids,
            offsets,
            weights,
            mode=mode,
            num_embeddings=num_embeddings,
            **options,
        )
    return out.astype(table.dtype)


# Ids that name no row, in place of what the caller wrote: one is an empty slot.
_EMPTY = -1
_UNKNOWN = -2


def _divide(
    total: Float[Array, "B D"],
    ids: Int[Array, "*slots"],
    offsets: Int[Array, " ends"] | None,
    weights: Float[Array, "*slots"],
    *,
    mode: str,
    num_embeddings: Size,
    empty: int | None,
    implementation: str | None,
) -> Float[Array, "B D"]:
    """Divide the sums by their weights' sum ("mean") or root of squares ("sqrtn")."""

    def tally(
        chosen: Bool[Array, "*slots"], coefficients: Float[Array, "*slots"] | None
    ) -> Float[Array, "B 1"]:
        """Sum the coefficients of the chosen slots: a table whose one row is one."""
        one = jnp.ones((1, 1), total.dtype)
        rows = jnp.where(chosen, 0, _EMPTY)
        return _product.product(
            one,
            rows,
            offsets,
            coefficients,
            empty=_EMPTY,
            implementation=implementation,
        )

    filled = xla.filled(ids, empty)
    if mode == "mean":
        sizes = tally(filled, weights)
    else:
        sizes = tally(filled, weights * weights)
    is_zero = sizes == 0
    divisors = jnp.where(is_zero, 1, sizes)
    if mode == "sqrtn":
        divisors = jnp.sqrt(divisors)
    strangers = tally(filled & ((ids < 0) | (ids >= num_embeddings)), None)
    nothing = jnp.where(strangers == 0, 0, jnp.nan)
    return jnp.where(is_zero, nothing, total / divisors)


def _occurrences(
    ids: Int[Array, "*slots"],
    offsets: Int[Array, " ends"] | None,
    num_embeddings: Size,
    dtype: jnp.dtype,
    **options: Any,
) -> Float[Array, "*slots"]:
    """Return, for each slot, how many slots name the same row, at least 1."""
    num_bags = ids.shape[0] if offsets is None else offsets.size - 1
    counts = _product.transposed_product(
        jnp.ones((num_bags, 1), dtype),
        ids,
        offsets,
        None,
        num_embeddings=num_embeddings,
        dtype=dtype,
        **options,
    )
    return jnp.maximum(take(counts[:, 0], ids, 1), 1)

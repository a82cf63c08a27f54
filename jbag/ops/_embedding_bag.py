"""`embedding_bag`: checks the arguments and pools."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

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
from jbag.ops._max_norm import check_norm
from jbag.ops._pooling import PoolingOptions, pool
from jbag.ops.kernels import check_implementation
from jbag.ragged._bags import Bags

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
        `Bags`, which has its own offsets and may have weights.
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
      gradient is NaN. Along Explicit axes of a mesh, it is cut as ids [B, L] are, and
      as the columns of the table.

    Raises:
      IndexError: an id on the host (in a list or NumPy array) is outside [0, V), unless
        offsets on a device leave unknown whether it is in a bag.
      TypeError: an argument is of the wrong dtype or type.
      ValueError: an argument is of the wrong shape or value; offsets on the host start
        above 0, decrease, or pass the end of `indices`; `table` is cut by rows along
        Explicit axes of a mesh, or along the axes of `indices`.

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
    check_flag("sparse", sparse)
    table, bags, max_norm, options = check_call(
        table,
        indices,
        offsets,
        mode=mode,
        weights=weights,
        padding_idx=padding_idx,
        include_last_offset=include_last_offset,
        max_norm=max_norm,
        norm_type=norm_type,
        scale_grad_by_freq=scale_grad_by_freq,
        implementation=implementation,
    )
    return pool(table, *bags, max_norm, sparse=bool(sparse), **options)


def check_call(
    table: ArrayLike,
    indices: Integers | Bags,
    offsets: Integers | None,
    *,
    mode: str,
    weights: Floats | None,
    padding_idx: int | None,
    include_last_offset: bool,
    max_norm: Any,
    norm_type: float,
    scale_grad_by_freq: bool,
    implementation: str | None,
) -> tuple[Array, tuple[Any, ...], Array | None, dict[str, Any]]:
    """Check the arguments of `embedding_bag`.

    Returns the table, (ids, offsets, weights), `max_norm`, and the options that are
    known when a program is traced: `how` and `padding_idx`.
    """
    table = check_table(table)
    check_flag("include_last_offset", include_last_offset)
    check_flag("scale_grad_by_freq", scale_grad_by_freq)
    check_mode(mode)
    check_implementation(implementation)
    num_embeddings = table.shape[0]
    if padding_idx is not None:
        padding_idx = check_padding_idx(padding_idx, num_embeddings)
    max_norm, norm_type = check_norm(max_norm, norm_type)
    bags = check_bags(indices, offsets, weights, include_last_offset, num_embeddings)
    how = PoolingOptions(mode, norm_type, bool(scale_grad_by_freq), implementation)
    return table, bags, max_norm, {"how": how, "padding_idx": padding_idx}


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


def check_bags(
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

"""`embedding_bag`: the public function, which checks its arguments."""

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
    check_weights,
    on_host,
    to_index_dtype,
)
from jbag.ops._max_norm import check_norm
from jbag.ops._packed_table import AnyTable, PackedTable, check_stored
from jbag.ops._pooling import PoolingOptions, pool
from jbag.ops.kernels import check_implementation
from jbag.ragged._bags import Bags

MODES = ("sum", "mean", "max", "min", "sqrtn")


def embedding_bag(
    table: ArrayLike | PackedTable,
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

    :math:`e_i` is the row of `table` at the id in slot i, and :math:`w_i` is its weight
    (1 without `weights`). i runs over the slots of bag b that aren't padding:

    ========  ==============================================
    mode      output b
    ========  ==============================================
    "sum"     :math:`\sum w_i e_i`
    "mean"    :math:`\sum w_i e_i / \sum w_i`
    "sqrtn"   :math:`\sum w_i e_i / \sqrt{\sum w_i^2}`
    "max"     the maximum of :math:`w_i e_i`, per feature
    "min"     the minimum of :math:`w_i e_i`, per feature
    ========  ==============================================

    A bag that is empty or has a zero denominator is zero, with zero gradient. 16-bit
    tables accumulate in float32, forward and backward, and round once. In "max" and
    "min", a NaN wins, and the first winning slot gets the whole gradient.

    Args:
      table: [V, D], float32, float64, bfloat16 or float16; or a `PackedTable`.
      indices: ids of rows, integers: [N] with `offsets`; or [B, L], B bags of L slots;
        or a `Bags`, which has its own offsets and may have weights.
      offsets: the first slot of each bag, from 0, non-decreasing: [B], where the last
        bag ends at N; or [B + 1] with `include_last_offset`.
      mode: "sum", "mean", "max", "min" or "sqrtn".
      weights: one per slot, floating, of the shape of `indices`. Differentiable.
      padding_idx: the id that marks padding. Its slots add nothing to values, counts
        and gradients. A negative number counts from the end of the table.
      include_last_offset: whether `offsets` ends with the number of slots in use. Slots
        at or past it are in no bag, so ragged batches share one shape and one
        compilation.
      max_norm: the largest norm of a row, a number at least 0 or a traced scalar. Rows
        of larger norm are scaled down before pooling. The table does not change (see
        `renorm`), and the scale is a constant to autodiff.
      norm_type: p of the p-norm of `max_norm`, above 0; `math.inf` is allowed.
      scale_grad_by_freq: whether to divide each row's gradient by the number of slots
        in the batch that hold its id.
      sparse: whether `jbag.value_and_grad` returns a row-sparse gradient for the table.
        `jax.grad` always returns a dense array.
      implementation: the kernel: "cpu" (C++), "cuda" (experimental: no GPU has run it),
        "sparsecore" and "tensorcore" (Pallas, for TPUs; experimental: no TPU has run
        them), "xla_gpu" (JAX operations in a form for GPUs), "xla" (the reference), or
        None for the best one of the platform.

    Returns:
      [B, D], the dtype of `table`. Data on a device is not checked by value. A bag with
      an id outside [0, V) is NaN; the slot that holds the id gives no gradient to the
      table and a NaN gradient to its weight. A bag with malformed offsets is NaN and
      gives no gradient. On a mesh with Explicit axes, the output is sharded like ids
      [B, L] and like the columns of the table.

    Raises:
      IndexError: an id on the host (in a list or NumPy array) is outside [0, V). Slots
        past the last of B + 1 offsets may hold any id; if these offsets are on a
        device, no id is checked.
      TypeError: an argument has the wrong dtype or type.
      ValueError: an argument has the wrong shape or value; offsets on the host start
        above 0, decrease, or exceed N; `table` is sharded by rows along Explicit axes
        of a mesh, or along the axes of `indices`.

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
    table: ArrayLike | PackedTable,
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
) -> tuple[AnyTable, tuple[Any, ...], Array | None, dict[str, Any]]:
    """Check the arguments of `embedding_bag`.

    Returns the table, (ids, offsets, weights), `max_norm`, and the static options of
    `pool`.
    """
    table = check_stored(table)
    check_flag("include_last_offset", include_last_offset)
    check_flag("scale_grad_by_freq", scale_grad_by_freq)
    check_mode(mode)
    check_implementation(implementation)
    num_embeddings = table.shape[0]
    if padding_idx is not None:
        padding_idx = check_padding_idx(padding_idx, num_embeddings)
    max_norm, norm_type = check_norm(max_norm, norm_type)
    bags = check_bags(indices, offsets, weights, include_last_offset, num_embeddings)
    pooling = PoolingOptions(mode, norm_type, bool(scale_grad_by_freq), implementation)
    return table, bags, max_norm, {"pooling": pooling, "padding_idx": padding_idx}


def check_mode(mode: Any) -> None:
    """Raise ValueError unless `mode` is a pooling mode."""
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(
            f"`mode` must be one of {', '.join(map(repr, MODES))}; got {mode!r}."
        )


def check_padding_idx(padding_idx: Any, num_embeddings: int) -> int:
    """Return `padding_idx` as an id in [0, V); raise if it is out of range."""
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
    """Return ids [N], offsets [B + 1] and weights [N]; or [B, L], None and [B, L]."""
    if isinstance(indices, Bags):
        bags = indices
        if offsets is not None:
            raise ValueError(
                "`offsets` must be None with a Bags, which has its own; got both."
            )
        if weights is not None and bags.weights is not None:
            raise ValueError(
                "`weights` must be None with a Bags that has weights; got both."
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
            # Tail slots may hold any number.
            check_ids(ids, num_embeddings, np.arange(ids.size) < offsets[-1])
    return to_index_dtype(ids), offsets, weights

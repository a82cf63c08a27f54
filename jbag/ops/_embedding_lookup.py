"""`embedding_lookup`: a row of the table for each id, without pooling.

A lookup is the sum over bags of one id, [N, 1], so it has the kernels, derivatives and
row-sparse gradients of `embedding_bag`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Shaped

from jbag._validation import (
    Integers,
    check_flag,
    check_ids,
    check_integers,
    on_host,
    to_index_dtype,
    unsharded,
)
from jbag.ops._embedding_bag import check_bags, check_padding_idx
from jbag.ops._explicit_axes import flatten_slots, unflatten_slots
from jbag.ops._max_norm import check_norm
from jbag.ops._packed_table import AnyTable, PackedTable, check_stored
from jbag.ops._pooling import PoolingOptions, pool
from jbag.ops.kernels import check_implementation
from jbag.ragged._bags import Bags
from jbag.ragged._csr_arrays import (
    PAD_ID,
    Offsets,
    Slots,
    canonicalize_ids,
    slots_of_bags,
)


def embedding_lookup(
    table: ArrayLike | PackedTable,
    ids: Integers | Bags,
    *,
    padding_idx: int | None = None,
    max_norm: Any = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "*slots D"]:
    r"""Look up the row of each id, without pooling.

    .. math:: \text{out}_i = \text{table}_{\text{ids}_i}

    It is `torch.nn.functional.embedding`, with a row-sparse gradient for
    `jbag.value_and_grad`. In float16 and bfloat16, gradients of equal ids are summed in
    float32 and rounded once.

    Args:
      table: [V, D], float32, float64, bfloat16 or float16; or a `PackedTable`.
      ids: ids of rows, integers of any shape, also one id; or a `Bags`, a row for each
        of its N slots.
      padding_idx: the id whose row gets no gradient, as in PyTorch; a negative number
        counts from the end. Its slots have the row of the table. That differs from
        `embedding_bag`, which leaves padding out; the modules initialize the row to
        zero.
      max_norm: the largest norm of a row, a number at least 0 or a traced scalar.
        Larger rows are scaled down. The table does not change (see `renorm`), and the
        scale is a constant to autodiff.
      norm_type: p of the p-norm of `max_norm`, above 0; `math.inf` is allowed.
      scale_grad_by_freq: whether to divide each row's gradient by the number of slots
        that hold its id.
      sparse: whether `jbag.value_and_grad` returns a row-sparse gradient for the table.
        `jax.grad` always returns a dense array.
      implementation: the kernel; see `embedding_bag`.

    Returns:
      ``[*ids.shape, D]``, the dtype of `table`. Of a `Bags`, [N, D]: rows are
      multiplied by its weights, and slots outside the bags are zero. Data on a device
      is not checked by value: the row of an id outside [0, V) is NaN and gives no
      gradient; negative ids do not count from the end. So are the rows of a bag with
      malformed offsets. On a mesh with Explicit axes, the output is sharded like the
      ids and like the columns of the table.

    Raises:
      IndexError: an id on the host (in a list or NumPy array) is outside [0, V).
      TypeError: an argument has the wrong dtype or type.
      ValueError: an argument has the wrong shape or value; `table` is sharded by rows
        along Explicit axes of a mesh, or along the axes of `ids`.

    References:
      PyTorch, `torch.nn.functional.embedding`.

    Example:
      >>> table = jax.numpy.arange(20.0).reshape(10, 2)
      >>> jbag.embedding_lookup(table, [[3, 1], [0, 3]])
      Array([[[6., 7.],
              [2., 3.]],
      <BLANKLINE>
             [[0., 1.],
              [6., 7.]]], dtype=float32)
    """
    table = check_stored(table)
    check_flag("scale_grad_by_freq", scale_grad_by_freq)
    check_flag("sparse", sparse)
    check_implementation(implementation)
    num_embeddings = table.shape[0]
    if padding_idx is not None:
        padding_idx = check_padding_idx(padding_idx, num_embeddings)
    max_norm, norm_type = check_norm(max_norm, norm_type)
    offsets = weights = None
    if isinstance(ids, Bags):
        ids, offsets, weights = check_bags(ids, None, None, True, num_embeddings)
    else:
        ids = check_integers("ids", ids)
        if on_host(ids):
            check_ids(ids, num_embeddings, name="ids")
        ids = to_index_dtype(ids)
    pooling = PoolingOptions("sum", norm_type, bool(scale_grad_by_freq), implementation)
    return _look_up(
        table,
        ids,
        offsets,
        weights,
        max_norm,
        pooling=pooling,
        padding_idx=padding_idx,
        sparse=bool(sparse),
    )


@functools.partial(jax.jit, static_argnames=("pooling", "padding_idx", "sparse"))
def _look_up(
    table: AnyTable,
    ids: Int[Array, "*slots"],
    offsets: Offsets,
    weights: Slots | None,
    max_norm: Shaped[Array, ""] | None,
    *,
    pooling: PoolingOptions,
    padding_idx: int | None,
    sparse: bool,
) -> Float[Array, "*slots D"]:
    named, pad_id, gradient_ids = flatten_slots(ids), None, None
    if offsets is not None:
        slots = slots_of_bags(unsharded(ids), unsharded(offsets))
        named, pad_id = flatten_slots(slots), PAD_ID
    if padding_idx is not None:
        if offsets is None:
            named = canonicalize_ids(named, None, table.shape[0])
        gradient_ids = jnp.where(named == padding_idx, PAD_ID, named)
        pad_id = PAD_ID
    rows = pool(
        table,
        named,
        None,
        None if weights is None else flatten_slots(weights),
        max_norm,
        gradient_ids=gradient_ids,
        pooling=pooling,
        padding_idx=pad_id,
        sparse=sparse,
    )
    return unflatten_slots(rows, ids)

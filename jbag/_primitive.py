"""A kernel operation as a JAX primitive: its types, its lowering and its batching.

Operands are the dense arrays, `ids`, then `offsets` if the layout is ragged, then the
coefficients if there are any. The kernel is chosen when the primitive is lowered: one
traced program may be exported for several platforms and take the best kernel on each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array, Bool, Int

from jbag._kernels import choose, special_platforms, xla


def define(
    name: str, *, dense: Sequence[str], coefficients: bool, outputs: Sequence[str]
):
    """Make the primitive of the kernel operation `name`.

    Args:
      name: of the function in every kernel.
      dense: what indexes each dense operand, "rows" (of the table) or "bags".
      coefficients: whether the operation takes them.
      outputs: what indexes each output, "rows", "bags", or "slots"; "winners" are
        indexed by bags and hold flat slots.
    """
    primitive = Primitive(f"jbag_{name}")
    primitive.multiple_results = several = len(outputs) > 1

    def call(platform: str | None, *operands, implementation, **params):
        arrays, ids, offsets, weights = layout(len(dense), operands)
        structure = (ids, offsets, weights) if coefficients else (ids, offsets)
        operation = getattr(choose(implementation, platform).operations, name)
        return operation(*arrays, *structure, **params)

    @functools.cache
    def compiled(**params):
        return jax.jit(functools.partial(primitive.bind, **params))

    @primitive.def_impl
    def evaluate(*operands, **params):
        # Met under `disable_jit`; choosing a kernel needs a lowering all the same.
        with jax.disable_jit(False):
            return compiled(**params)(*operands)

    @primitive.def_abstract_eval
    def infer(*avals, implementation, **params):
        del implementation
        reference = functools.partial(call, None, implementation="xla", **params)
        inferred = jax.make_jaxpr(reference)(*avals).out_avals
        return inferred if several else inferred[0]

    def lowering(platform: str | None) -> Callable:
        rule = functools.partial(call, platform)
        return mlir.lower_fun(rule, multiple_results=several)

    mlir.register_lowering(primitive, lowering(None))
    for platform in special_platforms():
        mlir.register_lowering(primitive, lowering(platform), platform=platform)

    batching.primitive_batchers[primitive] = functools.partial(
        _batch, primitive, tuple(dense), tuple(outputs)
    )
    return primitive


def bind(primitive: Primitive, dense, ids, offsets, coefficients, **params):
    """Apply a primitive to its operands, None for those that are absent."""
    optional = [x for x in (offsets, coefficients) if x is not None]
    return primitive.bind(*equally_varying(*dense, ids, *optional), **params)


def layout(num_dense: int, operands: Sequence, batch_ndim: int = 0) -> tuple:
    """Split operands into (dense, ids, offsets or None, coefficients or None)."""
    dense, (ids, *rest) = operands[:num_dense], operands[num_dense:]
    offsets = rest.pop(0) if ids.ndim - batch_ndim == 1 else None
    return dense, ids, offsets, rest.pop() if rest else None


def equally_varying(*operands: Array) -> list[Array]:
    """Mark, under `shard_map`, every operand as varying where any of them varies.

    JAX's own operations do so by themselves. The transpose of the mark is the sum over
    devices that the gradient of a replicated table needs.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in operands]
    every = frozenset().union(*varying)
    return [
        jax.lax.pcast(x, tuple(sorted(every - own)), to="varying") if every - own else x
        for x, own in zip(operands, varying, strict=True)
    ]


def _batch(primitive, dense_axes, output_axes, operands, dims, **params):
    """Do K batches of bags over K tables as K * B bags over one table of K * V rows.

    A table that all the batches share stays as it is.
    """
    size = next(
        x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None
    )
    shared_table = dense_axes[0] == "rows" and dims[0] is None

    def stack(x, dim):
        if dim is None:
            return jnp.broadcast_to(x, (size, *x.shape))
        return jnp.moveaxis(x, dim, 0)

    def merge(x):
        return x.reshape(size * x.shape[1], *x.shape[2:])

    first = [operands[0]] if shared_table else []
    stacked = [stack(x, d) for x, d in zip(operands, dims, strict=True)][len(first) :]
    dense, ids, offsets, weights = layout(
        len(dense_axes), first + stacked, batch_ndim=1
    )
    slots = ids[0].size
    malformed = None
    if offsets is not None:
        ids, offsets, malformed = _concatenate(ids, offsets)
    if not shared_table:
        rows = params.get("num_embeddings", dense[0].shape[1])
        if size * rows > jnp.iinfo(ids.dtype).max:
            return _map(primitive, operands, dims, **params)
        if "num_embeddings" in params:
            params["num_embeddings"] = size * rows
        shift = jnp.arange(size, dtype=ids.dtype).reshape(-1, *[1] * (ids.ndim - 1))
        named = jnp.where(ids >= rows, size * rows, ids + shift * rows)
        ids = jnp.where(ids < 0, -1, named)

    outputs = bind(
        primitive,
        first + [merge(x) for x in dense[len(first) :]],
        merge(ids),
        offsets,
        None if weights is None else merge(weights),
        **params,
    )
    outputs = outputs if primitive.multiple_results else [outputs]
    split = []
    for out, axis in zip(outputs, output_axes, strict=True):
        part = out.reshape(size, out.shape[0] // size, *out.shape[1:])
        if axis == "winners":
            own = part - slots * jnp.arange(size, dtype=part.dtype)[:, None, None]
            part = jnp.where(part == size * slots, slots, own)
        if malformed is not None and axis in ("bags", "winners"):
            poison = slots if axis == "winners" else jnp.nan
            part = jnp.where(malformed[..., None], poison, part)
        split.append(part)
    if primitive.multiple_results:
        return split, [0] * len(split)
    return split[0], 0


def _concatenate(
    ids: Int[Array, "K N"], offsets: Int[Array, "K ends"]
) -> tuple[Int[Array, "K N"], Int[Array, " all_ends"], Bool[Array, "K B"]]:
    """Return the offsets of K ragged batches laid end to end, and the malformed bags.

    Slots in no bag, which now lie between bags, become empty slots of the bag before.
    """
    size, capacity = ids.shape
    num_bags = offsets.shape[1] - 1
    bounds, malformed = jax.vmap(lambda o: xla.bag_bounds(o, capacity))(offsets)
    bags = jax.vmap(lambda o: xla.segment_ids(o, capacity))(bounds)
    outside = jnp.pad(malformed, ((0, 0), (0, 1)), constant_values=True)
    ids = jnp.where(jnp.take_along_axis(outside, bags, axis=1), -1, ids)
    shift = capacity * jnp.arange(size, dtype=offsets.dtype)[:, None]
    starts = (bounds[:, :-1] + shift).reshape(-1)
    end = jnp.full(1, size * capacity if num_bags else 0, offsets.dtype)
    return ids, jnp.concatenate([starts, end]), malformed


def _map(primitive, operands, dims, **params):
    """Apply the primitive to one batch after another."""
    mapped = [
        jnp.moveaxis(x, d, 0)
        for x, d in zip(operands, dims, strict=True)
        if d is not None
    ]

    def one(batched):
        batched = iter(batched)
        return primitive.bind(
            *(
                x if d is None else next(batched)
                for x, d in zip(operands, dims, strict=True)
            ),
            **params,
        )

    outputs = jax.lax.map(one, mapped)
    return outputs, [0] * len(outputs) if primitive.multiple_results else 0

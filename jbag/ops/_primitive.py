"""A kernel operation as a JAX primitive: its types, its lowering and its batching.

Operands are the dense arrays, `ids`, then `offsets` if the layout is ragged, then the
coefficients if there are any. The kernel is chosen when the primitive is lowered: one
traced program may be exported for several platforms and take the best kernel on each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Int

from jbag.ops.kernels import KERNELS, Kernel, choose, special_platforms
from jbag.ragged import _csr
from jbag.ragged._csr import PAD_ID, canonicalize_ids, concatenate_ragged, merge_axes


def define(
    name: str, *, dense: Sequence[str], coefficients: bool, outputs: Sequence[str]
) -> Primitive:
    """Make the primitive of the kernel operation `name`.

    Args:
      name: of the function in every kernel.
      dense: what indexes each dense operand, "rows" (of the table) or "bags".
      coefficients: whether the operation takes them.
      outputs: what indexes each output, "rows", "bags", or "slots"; "winners" are
        indexed by bags and hold flat slots.
    """

    def call(kernel: Kernel, *operands: Array, **params: Any) -> Any:
        arrays, ids, offsets, weights = layout(len(dense), operands)
        structure = (ids, offsets, weights) if coefficients else (ids, offsets)
        return getattr(kernel.operations, name)(*arrays, *structure, **params)

    primitive = dispatch(name, call, several=len(outputs) > 1)
    batching.primitive_batchers[primitive] = functools.partial(
        _batch, primitive, tuple(dense), tuple(outputs)
    )
    return primitive


def dispatch(name: str, call: Callable[..., Any], *, several: bool) -> Primitive:
    """Make the primitive `name` that is `call(kernel, *operands, **params)`.

    The kernel is the one of the parameter `implementation`. By default its derivatives
    and its batches are those of the reference.
    """
    primitive = Primitive(f"jbag_{name}")
    primitive.multiple_results = several
    reference = functools.partial(call, KERNELS["xla"])
    evaluate_compiled(primitive)

    @primitive.def_abstract_eval
    def infer(*avals: Any, implementation: str | None, **params: Any) -> Any:
        del implementation

        def typed(*operands: Array) -> Any:
            out = reference(*operands, **params)
            return jax.tree.map(lambda x: _varying_as(x, operands[0]), out)

        inferred = jax.make_jaxpr(typed)(*avals)
        return inferred.out_avals if several else inferred.out_avals[0]

    def lowering(platform: str | None) -> Callable[..., Any]:
        def lower(
            context: mlir.LoweringRuleContext,
            *operands: Any,
            implementation: str | None,
            **params: Any,
        ) -> Any:
            exported = context.module_context.lowering_parameters.for_export
            # The table's: it is the first operand unless the operation makes its rows.
            first: Any = context.avals_in[0]
            rows = params.get("num_embeddings", first.shape[0])
            kernel = choose(implementation, platform, exported=exported, rows=rows)
            rule = functools.partial(call, kernel)
            lowered = mlir.lower_fun(rule, multiple_results=several)
            return lowered(context, *operands, **params)

        return lower

    mlir.register_lowering(primitive, lowering(None))
    for platform in special_platforms():
        mlir.register_lowering(primitive, lowering(platform), platform=platform)

    ad.primitive_jvps[primitive] = functools.partial(_jvp, reference)
    batching.primitive_batchers[primitive] = functools.partial(_vmap, reference)
    return primitive


def evaluate_compiled(primitive: Primitive) -> None:
    """Let a primitive be compiled where it is met outside of a program."""

    @functools.cache
    def compiled(**params: Any) -> Callable[..., Any]:
        return jax.jit(functools.partial(primitive.bind, **params))

    @primitive.def_impl
    def evaluate(*operands: Any, **params: Any) -> Any:  # constants may be NumPy's
        # Met under `disable_jit`; choosing a kernel needs a lowering all the same.
        with jax.disable_jit(False):
            return compiled(**params)(*operands)


def _jvp(
    reference: Callable[..., Any],
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    implementation: str | None,
    **params: Any,
) -> tuple[Any, Any]:
    """Differentiate the reference of an operation with several results."""
    del implementation
    active = [
        not isinstance(moved, ad.Zero) and moved.dtype != jax.dtypes.float0
        for moved in tangents
    ]

    def moved(*active_operands: Array) -> Any:
        rest = iter(active_operands)
        operands = (
            next(rest) if is_active else x
            for x, is_active in zip(primals, active, strict=True)
        )
        return reference(*operands, **params)

    chosen, directions = (
        [x for x, is_active in zip(xs, active, strict=True) if is_active]
        for xs in (primals, tangents)
    )
    out, out_tangents = jax.jvp(moved, chosen, directions)
    float0 = jax.dtypes.float0
    return out, [
        ad.Zero(jax.typeof(x).to_tangent_aval()) if t.dtype == float0 else t
        for x, t in zip(out, out_tangents, strict=True)
    ]


def _vmap(
    reference: Callable[..., Any],
    operands: Sequence[Any],
    dims: Sequence[Any],
    *,
    implementation: str | None,
    **params: Any,
) -> tuple[Any, Any]:
    """Batch the reference."""
    del implementation
    out = jax.vmap(functools.partial(reference, **params), in_axes=tuple(dims))(
        *operands
    )
    return out, jax.tree.map(lambda _: 0, out)


def bind(
    primitive: Primitive,
    dense: Sequence[Array],
    ids: _csr.Ids,
    offsets: _csr.Offsets,
    coefficients: _csr.Slots | None,
    **params: Any,
) -> Any:
    """Apply a primitive to its operands, None for those that are absent."""
    optional = [x for x in (offsets, coefficients) if x is not None]
    return primitive.bind(*equally_varying(*dense, ids, *optional), **params)


def layout(
    num_dense: int, operands: Sequence[Any], batch_ndim: int = 0
) -> tuple[Any, ...]:
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


def _varying_as(x: Array, operand: Array) -> Array:
    """Return x, varying where an operand does: zeros for no slots wouldn't."""
    every = jax.typeof(operand).manual_axis_type.varying
    missing = every - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def _batch(
    primitive: Primitive,
    dense_axes: Sequence[str],
    output_axes: Sequence[str],
    operands: Sequence[Array],
    dims: Sequence[int | None],
    **params: Any,
) -> tuple[Any, Any]:
    """Do K batches of bags over K tables as K * B bags over one table of K * V rows.

    A table that all the batches share stays as it is.
    """
    size = next(
        x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None
    )
    if size == 0:
        return _map(primitive, operands, dims, **params)
    shared = [operands[0]] if dense_axes[0] == "rows" and dims[0] is None else []
    stacked = [
        jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(operands, dims, strict=True)
    ]
    dense, ids, offsets, weights = layout(
        len(dense_axes), shared + stacked[len(shared) :], batch_ndim=1
    )
    slots = ids[0].size
    rows = params.get("num_embeddings", dense[0].shape[0 if shared else 1])
    ids = canonicalize_ids(ids, params["pad_id"], rows)
    params["pad_id"] = PAD_ID
    malformed = None
    if offsets is not None:
        ids, offsets, malformed = concatenate_ragged(ids, offsets)
    if not shared:
        total = size * rows
        # Every kernel takes tables that 32 bits count. A size that is symbolic, under
        # `jax.export`, is taken to fit.
        most = min(jnp.iinfo(ids.dtype).max, jnp.iinfo(jnp.int32).max)
        if isinstance(total, int) and total > most:
            return _map(primitive, operands, dims, **params)
        if "num_embeddings" in params:
            params["num_embeddings"] = total
        ids = _number_rows(ids, rows)

    outputs = bind(
        primitive,
        shared + [merge_axes(x) for x in dense[len(shared) :]],
        merge_axes(ids),
        offsets,
        None if weights is None else merge_axes(weights),
        **params,
    )
    split = []
    for out, axis in zip(
        outputs if primitive.multiple_results else [outputs], output_axes, strict=True
    ):
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


def _number_rows(ids: Int[Array, "K *slots"], rows: int) -> Int[Array, "K *slots"]:
    """Name the rows of K tables of V rows as those of one of K * V."""
    size = ids.shape[0]
    shift = rows * jnp.arange(size, dtype=ids.dtype).reshape(-1, *[1] * (ids.ndim - 1))
    return jnp.where(ids < 0, ids, ids + shift)


def _map(
    primitive: Primitive,
    operands: Sequence[Array],
    dims: Sequence[int | None],
    **params: Any,
) -> tuple[Any, Any]:
    """Apply the primitive to one batch after another."""
    mapped = [
        jnp.moveaxis(x, d, 0)
        for x, d in zip(operands, dims, strict=True)
        if d is not None
    ]

    def one(batched: list[Array]) -> Any:
        rest = iter(batched)
        chosen = [
            x if d is None else next(rest) for x, d in zip(operands, dims, strict=True)
        ]
        return primitive.bind(*chosen, **params)

    outputs = jax.lax.map(one, mapped)
    return outputs, [0] * len(outputs) if primitive.multiple_results else 0

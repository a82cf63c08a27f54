"""Kernel operations as JAX primitives: abstract evaluation, lowering and batching.

The operands are the dense arrays, `ids`, `offsets` if the layout is ragged, and the
optional coefficients. A `PackedTable` is an operand by its lines, and its geometry is
the parameter `packing`. The lowering rule chooses the kernel, so one traced program can
be exported for several platforms with the best kernel of each.
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

from jbag.ops._packed_table import PackedTable, storage
from jbag.ops._packing import Packing
from jbag.ops.kernels import KERNELS, Kernel, choose, special_platforms
from jbag.ragged import _csr_arrays
from jbag.ragged._csr_arrays import (
    PAD_ID,
    canonicalize_ids,
    concatenate_ragged,
    merge_axes,
)


def bind(
    primitive: Primitive,
    dense: Sequence[Array | PackedTable],
    ids: _csr_arrays.Ids,
    offsets: _csr_arrays.Offsets,
    coefficients: _csr_arrays.Slots | None,
    **params: Any,
) -> Any:
    """Bind a primitive to its operands; leave out optional operands that are None."""
    optional = [x for x in (offsets, coefficients) if x is not None]
    if isinstance(dense[0], PackedTable):
        params["packing"] = dense[0].packing
    arrays = map(storage, dense)
    return primitive.bind(*equally_varying(*arrays, ids, *optional), **params)


def layout(
    num_dense: int, operands: Sequence[Any], batch_ndim: int = 0
) -> tuple[Any, ...]:
    """Split operands into (dense, ids, offsets or None, coefficients or None)."""
    dense, (ids, *rest) = operands[:num_dense], operands[num_dense:]
    offsets = rest.pop(0) if ids.ndim - batch_ndim == 1 else None
    return dense, ids, offsets, rest.pop() if rest else None


def equally_varying(*operands: Array) -> list[Array]:
    """Cast all operands to the union of their varying axes under `shard_map`.

    JAX's own operations cast implicitly. The transpose of the cast is the psum that the
    gradient of a replicated table needs.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in operands]
    union = frozenset().union(*varying)
    return [
        jax.lax.pcast(x, tuple(sorted(union - own)), to="varying") if union - own else x
        for x, own in zip(operands, varying, strict=True)
    ]


def define(
    name: str, *, dense: Sequence[str], has_coefficients: bool, outputs: Sequence[str]
) -> Primitive:
    """Define the primitive of the kernel operation `name`.

    Args:
      name: the name of the function in every kernel.
      dense: the first axis of each dense operand, "rows" (of the table) or "bags".
      has_coefficients: whether the operation takes coefficients.
      outputs: the first axis of each output, "rows", "bags" or "slots". "winners" are
        indexed by bags and hold flat slots.
    """

    def call(
        kernel: Kernel, *operands: Array, packing: Packing | None = None, **params: Any
    ) -> Any:
        arrays, ids, offsets, coefficients = layout(len(dense), operands)
        bags = (ids, offsets, coefficients) if has_coefficients else (ids, offsets)
        operation = getattr(kernel.operations, name)
        if packing is None:
            return operation(*arrays, *bags, **params)
        if dense[0] == "rows":
            table = kernel.readable(PackedTable(arrays[0], packing))
            return operation(table, *arrays[1:], *bags, **params)
        if kernel.reads_packed:
            return operation(*arrays, *bags, packing=packing, **params)
        return packing.pack(operation(*arrays, *bags, **params))

    primitive = dispatch(name, call, several=len(outputs) > 1)
    batching.primitive_batchers[primitive] = functools.partial(
        _batch, primitive, tuple(dense), tuple(outputs)
    )
    return primitive


def dispatch(name: str, call: Callable[..., Any], *, several: bool) -> Primitive:
    """Define the primitive `name`, which is `call(kernel, *operands, **params)`.

    The parameter `implementation` names the kernel. Its default JVP and batching rules
    are those of the reference implementation.
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
            # V. An operation without a table among its operands has `num_embeddings`;
            # in all others the table is the first operand.
            first: Any = context.avals_in[0]
            packing = params.get("packing")
            rows = first.shape[0] if packing is None else packing.num_embeddings
            rows = params.get("num_embeddings", rows)
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
    """Evaluate a primitive outside `jit` by compiling it."""

    @functools.cache
    def compiled(**params: Any) -> Callable[..., Any]:
        return jax.jit(functools.partial(primitive.bind, **params))

    @primitive.def_impl
    def evaluate(*operands: Any, **params: Any) -> Any:
        # Also under `disable_jit`, as only a lowering chooses a kernel.
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
    """Differentiate the reference of an operation with several outputs."""
    del implementation
    active = [
        not isinstance(t, ad.Zero) and t.dtype != jax.dtypes.float0 for t in tangents
    ]

    def function(*active_operands: Array) -> Any:
        rest = iter(active_operands)
        operands = (
            next(rest) if is_active else x
            for x, is_active in zip(primals, active, strict=True)
        )
        return reference(*operands, **params)

    active_primals, active_tangents = (
        [x for x, is_active in zip(xs, active, strict=True) if is_active]
        for xs in (primals, tangents)
    )
    out, out_tangents = jax.jvp(function, active_primals, active_tangents)
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
    """Batch the reference implementation."""
    del implementation
    out = jax.vmap(functools.partial(reference, **params), in_axes=tuple(dims))(
        *operands
    )
    return out, jax.tree.map(lambda _: 0, out)


def _varying_as(x: Array, operand: Array) -> Array:
    """Cast x to the varying axes of an operand, which zeros for N = 0 lack."""
    wanted = jax.typeof(operand).manual_axis_type.varying
    missing = wanted - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def _batch(
    primitive: Primitive,
    dense_axes: Sequence[str],
    output_axes: Sequence[str],
    operands: Sequence[Array],
    dims: Sequence[int | None],
    **params: Any,
) -> tuple[Any, Any]:
    """Batch K calls as one call with K * B bags and one table of K * V rows.

    An unbatched table is not repeated.
    """
    size = next(
        x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None
    )
    if size == 0:
        return _map(primitive, operands, dims, **params)
    shared = [operands[0]] if dense_axes[0] == "rows" and dims[0] is None else []
    packing = params.get("packing")
    if packing is not None and not shared:  # blocks of lines can't be concatenated
        return _map(primitive, operands, dims, **params)
    stacked = [
        jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(operands, dims, strict=True)
    ]
    dense, ids, offsets, coefficients = layout(
        len(dense_axes), shared + stacked[len(shared) :], batch_ndim=1
    )
    slots = ids[0].size
    rows = params.get("num_embeddings", dense[0].shape[0 if shared else 1])
    rows = rows if packing is None else packing.num_embeddings
    ids = canonicalize_ids(ids, params["pad_id"], rows)
    params["pad_id"] = PAD_ID
    malformed = None
    if offsets is not None:
        ids, offsets, malformed = concatenate_ragged(ids, offsets)
    if not shared:
        total = size * rows
        # Every kernel takes tables that 32 bits count. A symbolic size, under
        # `jax.export`, is assumed to fit.
        most = min(jnp.iinfo(ids.dtype).max, jnp.iinfo(jnp.int32).max)
        if isinstance(total, int) and total > most:
            return _map(primitive, operands, dims, **params)
        if "num_embeddings" in params:
            params["num_embeddings"] = total
        ids = _shift_ids(ids, rows)

    outputs = bind(
        primitive,
        shared + [merge_axes(x) for x in dense[len(shared) :]],
        merge_axes(ids),
        offsets,
        None if coefficients is None else merge_axes(coefficients),
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
            fill = slots if axis == "winners" else jnp.nan
            part = jnp.where(malformed[..., None], fill, part)
        split.append(part)
    if primitive.multiple_results:
        return split, [0] * len(split)
    return split[0], 0


def _shift_ids(ids: Int[Array, "K *slots"], rows: int) -> Int[Array, "K *slots"]:
    """Convert the ids of K tables of V rows to ids of one table of K * V rows."""
    size = ids.shape[0]
    shift = rows * jnp.arange(size, dtype=ids.dtype).reshape(-1, *[1] * (ids.ndim - 1))
    return jnp.where(ids < 0, ids, ids + shift)


def _map(
    primitive: Primitive,
    operands: Sequence[Array],
    dims: Sequence[int | None],
    **params: Any,
) -> tuple[Any, Any]:
    """Batch K calls as a sequential loop."""
    mapped = [
        jnp.moveaxis(x, d, 0)
        for x, d in zip(operands, dims, strict=True)
        if d is not None
    ]

    def call(batched: list[Array]) -> Any:
        rest = iter(batched)
        arguments = [
            x if d is None else next(rest) for x, d in zip(operands, dims, strict=True)
        ]
        return primitive.bind(*arguments, **params)

    outputs = jax.lax.map(call, mapped)
    return outputs, [0] * len(outputs) if primitive.multiple_results else 0

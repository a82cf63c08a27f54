"""`value_and_grad` and `grad`: JAX's, with row-sparse gradients of sparse tables.

The steps from `sparse=True` to an updated row:

1. `ops._sparse_marks` inserts identity primitives, which mark the table and the pooled
   rows.
2. `value_and_grad` traces the loss. `_jaxpr_analysis.find_marked_bags` returns a
   `PooledCall` for each marked bag whose table is an argument that the loss uses in no
   other way.
3. `_jaxpr_interpreter.run` evaluates the jaxpr with zeros added to the pooled rows and
   the tables held constant. JAX differentiates with respect to these zeros.
4. `_pullback.pull_back`, as in `jbag.sparse.pool`, makes a `RowSparse` of each
   cotangent: a `FactoredGradient`, A.T @ cotangent, which is not multiplied. Its
   `Placement` is the layout over a mesh. `_sealed_leaves` protects its leaves.
5. The optimizers of `jbag.optim` call `RowSparse.update_table`, which sums rows and
   applies an update rule in place. `AppliedUpdate` gives `optax.apply_updates` the new
   table.

No array of size V * D or N * D is formed.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jbag._validation import check_flag
from jbag.sparse._jaxpr_analysis import Path, PooledCall, find_marked_bags
from jbag.sparse._jaxpr_interpreter import run
from jbag.sparse._pullback import pull_back
from jbag.sparse._row_sparse import RowSparse


class DenseGradientWarning(UserWarning):
    """Warns that a table pooled with `sparse=True` gets a dense gradient [V, D].

    Example:
      >>> warnings.simplefilter("ignore", jbag.DenseGradientWarning)  # doctest: +SKIP
    """


def value_and_grad(
    loss: Callable[..., Any],
    argnums: Any = 0,
    has_aux: bool = False,
    *,
    allow_dense: bool | None = None,
) -> Callable[..., Any]:
    """Return a function that computes the value and the gradient of a loss.

    It is `jax.value_and_grad`, except that the gradient of a table pooled with
    `sparse=True` is a `RowSparse`, whose cost and size don't depend on V. The tables
    may be any leaves of the arguments: of dicts, Linen variables or NNX states. With
    NNX modules it calls `jbag.nnx.value_and_grad`, which also updates their state.

    The loss may pool under `jax.jit`, `jax.checkpoint`, `jax.vmap` over bags, `scan`
    and `cond`. The gradient is a dense array [V, D], and correct, if the loss

    - also uses the table in another way (tied weights);
    - pools a function of the table (a cast);
    - pools in a function with custom derivatives, or in `shard_map`;
    - carries the table through a loop; or
    - uses references (`jax.new_ref`).

    Leaves that aren't floating get zeros of dtype float0.

    Args:
      loss: a function that returns a scalar, or (scalar, auxiliary data) with
        `has_aux`.
      argnums: the positional arguments to differentiate: a position, or a sequence of
        positions; with NNX modules also `nnx.DiffState`.
      has_aux: whether the loss returns auxiliary data.
      allow_dense: the response to a dense gradient of a table pooled with
        `sparse=True`: None warns with `DenseGradientWarning`, True allows it, False
        raises.

    Returns:
      A function of the arguments of `loss` that returns (value, gradient), where value
      is (scalar, auxiliary data) with `has_aux`. The gradient has the structure of the
      argument; it is a tuple if `argnums` is a sequence.

    Raises:
      TypeError: an argument has no floating leaf, or the loss isn't a scalar.
      ValueError: a gradient is dense and `allow_dense` is False.

    Example:
      >>> def loss(params, bags):
      ...     pooled = jbag.embedding_bag(params["table"], bags, sparse=True)
      ...     return (pooled @ params["head"]).sum()
      >>> params = {"table": jnp.ones((1000, 2)), "head": jnp.ones((2, 1))}
      >>> bags = jbag.Bags.from_lists([[7, 8], [7]])
      >>> value, gradient = jax.jit(jbag.value_and_grad(loss))(params, bags)
      >>> gradient["table"].coalesce().indices
      Array([   7,    8, 1000], dtype=int32)
    """
    if not callable(loss):
        raise TypeError(f"`loss` must be a function; got {loss!r}.")
    check_flag("has_aux", has_aux)
    if allow_dense is not None:
        check_flag("allow_dense", allow_dense)

    @functools.wraps(loss)
    def differentiated(*args: Any, **kwargs: Any) -> Any:
        if _has_nnx_objects((argnums, args, kwargs)):
            both = importlib.import_module("jbag.nnx").value_and_grad
            both = both(loss, argnums, has_aux, allow_dense=allow_dense)
            return both(*args, **kwargs)
        positions = _positions(argnums, len(args))
        chosen = [args[position] for position in positions]
        leaves, tree = jax.tree.flatten(chosen)
        differentiable = [k for k, leaf in enumerate(leaves) if _is_floating(leaf)]
        named = jax.tree.leaves_with_path(dict(zip(positions, chosen, strict=True)))
        paths = [
            f"argument {jax.tree_util.keystr(named[k][0])}" for k in differentiable
        ]
        _check_differentiable(positions, chosen)
        aux: list[Any] = []  # the static parts of the auxiliary data, set by tracing

        def traced(arrays: list[Array]) -> Any:
            merged = list(leaves)
            for k, array in zip(differentiable, arrays, strict=True):
                merged[k] = array
            full = list(args)
            for position, arg in zip(
                positions, jax.tree.unflatten(tree, merged), strict=True
            ):
                full[position] = arg
            out = loss(*full, **kwargs)
            if not has_aux:
                if not _is_array(out):
                    raise TypeError(f"The loss must return a scalar; got {out!r}.")
                return out, []
            if not isinstance(out, tuple | list) or len(out) != 2:
                raise TypeError(
                    "With `has_aux`, the loss must return (scalar, auxiliary data); "
                    f"got {type(out).__name__}."
                )
            parts, structure = jax.tree.flatten(out[1])
            is_array = [_is_array(part) for part in parts]
            kept = [None if a else p for p, a in zip(parts, is_array, strict=True)]
            aux[:] = [structure, is_array, kept]
            return out[0], [p for p, a in zip(parts, is_array, strict=True) if a]

        value, arrays, gradients = _differentiate(
            traced,
            [jnp.asarray(leaves[k]) for k in differentiable],
            functools.partial(_check_dense, allow_dense, paths),
        )
        found = dict(zip(differentiable, gradients, strict=True))
        result = [
            found[k] if k in found else _no_gradient(leaf)
            for k, leaf in enumerate(leaves)
        ]
        gradient = jax.tree.unflatten(tree, result)
        gradient = gradient[0] if _is_position(argnums) else tuple(gradient)
        if not has_aux:
            return value, gradient
        structure, is_array, kept = aux
        rest = iter(arrays)
        parts = [next(rest) if a else k for a, k in zip(is_array, kept, strict=True)]
        return (value, jax.tree.unflatten(structure, parts)), gradient

    return differentiated


def grad(
    loss: Callable[..., Any],
    argnums: Any = 0,
    has_aux: bool = False,
    *,
    allow_dense: bool | None = None,
) -> Callable[..., Any]:
    """Return a function that computes the gradient of a loss.

    Args:
      loss: as in `value_and_grad`.
      argnums: as in `value_and_grad`.
      has_aux: as in `value_and_grad`.
      allow_dense: as in `value_and_grad`.

    Returns:
      A function of the arguments of `loss` that returns the gradient, or (gradient,
      auxiliary data) with `has_aux`.

    Raises:
      TypeError, ValueError: as `value_and_grad`.

    Example:
      >>> table = jnp.ones((1000, 2))
      >>> loss = lambda table: jbag.embedding_bag(table, [[7, 8]], sparse=True).sum()
      >>> jbag.grad(loss)(table).coalesce().values
      Array([[0.5, 0.5],
             [0.5, 0.5]], dtype=float32)
    """
    both = value_and_grad(loss, argnums, has_aux, allow_dense=allow_dense)

    @functools.wraps(loss)
    def differentiated(*args: Any, **kwargs: Any) -> Any:
        value, gradient = both(*args, **kwargs)
        return (gradient, value[1]) if has_aux else gradient

    return differentiated


def _has_nnx_objects(tree: Any) -> bool:
    """Return whether the tree has NNX objects; an `nnx.State` is a plain pytree."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return False
    objects = (nnx.Pytree, nnx.Variable, nnx.DiffState)
    leaves = jax.tree.leaves(tree, lambda x: isinstance(x, (*objects, nnx.State)))
    return any(isinstance(leaf, objects) for leaf in leaves)


def _is_position(argnums: Any) -> bool:
    return isinstance(argnums, int | np.integer) and not isinstance(argnums, bool)


def _positions(argnums: Any, num_args: int) -> list[int]:
    given = [argnums] if _is_position(argnums) else list(argnums)
    for position in given:
        if not _is_position(position) or not -num_args <= position < num_args:
            raise ValueError(
                f"`argnums` must be positions of the {num_args} positional arguments; "
                f"got {argnums!r}."
            )
    return [int(position) % num_args for position in given]


def _check_dense(allow_dense: bool | None, paths: list[str], dense: list[int]) -> None:
    if not dense or allow_dense:
        return
    message = (
        f"The gradient of {', '.join(paths[k] for k in dense)} is a dense array, "
        "though the table is pooled with `sparse=True`: the loss also uses the table "
        "in another way, or pools it where no row-sparse gradient is supported (see "
        "`jbag.value_and_grad`). `allow_dense=True` allows it."
    )
    if allow_dense is False:
        raise ValueError(message)
    warnings.warn(message, DenseGradientWarning, stacklevel=4)


def _is_array(x: Any) -> bool:
    try:
        jax.typeof(x)
    except TypeError:
        return False
    return True


def _is_floating(leaf: Any) -> bool:
    return _is_array(leaf) and jnp.issubdtype(jax.typeof(leaf).dtype, jnp.inexact)


def _check_differentiable(positions: list[int], chosen: list[Any]) -> None:
    for position, arg in zip(positions, chosen, strict=True):
        leaves = jax.tree.leaves(arg)
        if leaves and not any(map(_is_floating, leaves)):
            raise TypeError(
                "A gradient needs floating arrays; "
                f"argument {position} has none: {arg!r}."
            )


def _no_gradient(leaf: Any) -> Any:
    if not _is_array(leaf):
        return None
    return np.zeros(np.shape(leaf), jax.dtypes.float0)


def _differentiate(
    function: Callable[..., Any],
    leaves: list[Array],
    check_dense: Callable[[list[int]], None],
) -> tuple[Array, list[Array], list[Any]]:
    """Return the value of `function(leaves)`, its auxiliary data and its gradients.

    `check_dense` is called with the positions of the leaves that are pooled with
    `sparse=True` and get a dense gradient.
    """
    closed = jax.make_jaxpr(function)(leaves)
    found = find_marked_bags(closed)
    pooled = {call.leaf for call in found.calls.values()} - found.dense
    if found.has_refs or not closed.jaxpr.outvars:  # values may flow through references
        pooled = set()
    check_dense(sorted(found.requested - pooled))
    if not pooled:
        (value, rest), gradients = jax.value_and_grad(function, has_aux=True)(leaves)
        return value, rest, gradients
    calls = {path: call for path, call in found.calls.items() if call.leaf in pooled}
    tables = {path: leaf for path, leaf in found.tables.items() if leaf in pooled}
    found = found._replace(calls=calls, tables=tables)
    differentiable = [k for k in range(len(leaves)) if k not in pooled]

    def with_zeros(zeros: dict[Path, Array], arrays: list[Array]) -> Any:
        merged = list(leaves)
        for k, array in zip(differentiable, arrays, strict=True):
            merged[k] = array
        (value, *rest), bags = run(closed, merged, found, zeros, leaves)
        return value, (rest, bags)

    zeros = {path: call.zeros() for path, call in calls.items()}
    (value, (rest, bags)), (cotangents, to_leaves) = jax.value_and_grad(
        with_zeros, argnums=(0, 1), has_aux=True
    )(zeros, [leaves[k] for k in differentiable])
    gradients = dict(zip(differentiable, to_leaves, strict=True))
    for path, call in calls.items():
        table = leaves[call.leaf]
        rows = _pull_back(value, cotangents[path], bags[path], call, table)
        before = gradients.get(call.leaf)
        gradients[call.leaf] = rows if before is None else before + rows
    return value, rest, [gradients[k] for k in range(len(leaves))]


def _pull_back(
    value: Float[Array, ""],
    cotangent: Float[Array, "*loops B D"],
    bags: tuple[Any, ...],
    call: PooledCall,
    table: Float[Array, "V D"],
) -> RowSparse:
    """Return the gradient of the table from the cotangent of the pooled rows."""
    winners, ids, offsets, coefficients = jax.tree.map(jnp.asarray, bags)
    if offsets is None:
        ids = _depend_on(value, ids)
    else:
        offsets = _depend_on(value, offsets)
    options = {k: x for k, x in call.equation.params.items() if k != "has_winners"}
    pullback: Callable[..., Any] = functools.partial(
        pull_back,
        shape=options["placement"].table_shape(jnp.shape(table)),
        dtype=jax.typeof(table).dtype,
        **options,
    )
    for _ in call.loops:
        pullback = jax.vmap(pullback)
    return pullback(cotangent, ids, offsets, coefficients, winners).sum()


def _depend_on(value: Float[Array, ""], x: Int[Array, "..."]) -> Int[Array, "..."]:
    """Return x, with a data dependency on the value of the loss.

    XLA copies a table instead of updating it in place if the update doesn't depend on
    the reads of the table, as with a linear loss. XLA does not simplify the condition,
    which is always true: no number has more than 64 bits.
    """
    dtype = jnp.dtype(f"uint{8 * value.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(value, dtype)
    return jnp.where(jax.lax.population_count(bits) <= 64, x, 0)

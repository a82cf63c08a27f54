"""`value_and_grad` and `grad`: like JAX's, but row-sparse where `sparse=True`.

From `sparse=True` to a row that an optimizer moved:

1. `ops._sparse_marks`: a sparse bag marks its table and its result; both marks are
   identities.
2. The loss is traced. `_jaxpr_analysis.find_marked_bags` returns a `PooledCall` for
   each bag that pools from a leaf of the arguments that the loss uses in no other
   way.
3. `_jaxpr_interpreter.run` runs the program with zeros added to what each of them
   pooled, the tables held constant; JAX differentiates it with respect to these zeros.
4. `_pullback.pull_back`, as in `jbag.sparse.pool`, makes a `RowSparse` of each of these
   gradients: a `FactoredGradient`, A.T @ cotangent, that isn't multiplied out. Its
   `Placement` knows how a table lies over a mesh; `_guard` guards its leaves.
5. `RowSparse.move`, called by the optimizers of `jbag.optim`, sums the rows and moves
   them by a rule, in place; a `RowUpdate` hands the moved table to `apply_updates`.

Nothing of the table's size is made, nor of (ids, features).
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
    """A table that is pooled with `sparse=True` gets a dense gradient, V * D numbers.

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
    """Return a function that gives the loss and its gradient.

    It is `jax.value_and_grad`, except that the gradient of a table that is pooled with
    `sparse=True` is a `RowSparse`: its cost and its size don't depend on the table's.
    Tables are found by themselves among the arrays of the arguments, be they those of a
    dict, of Linen's variables, or of an NNX state. Given NNX modules, it is
    `jbag.nnx.value_and_grad`: state that the loss changes is changed.

    Bags are found through `jax.jit`, `jax.checkpoint`, `jax.vmap` over bags, `scan`
    and `cond`. The gradient of a table is an array of V * D numbers, and right, where
    it can't be row-sparse: if the loss uses the table otherwise, too (tied weights),
    pools what was computed of it (a cast, say), pools it in a function with derivatives
    of its own or in `shard_map`, carries it through a loop, or writes to JAX's
    references.
    Leaves that aren't floating get zeros of dtype float0.

    Args:
      loss: returns a scalar, or (scalar, auxiliary data) with `has_aux`.
      argnums: which positional arguments to differentiate with respect to: a position
        or a sequence of such; with NNX modules, `nnx.DiffState`s, too.
      has_aux: whether the loss returns auxiliary data.
      allow_dense: what happens where a table that is pooled with `sparse=True` gets an
        array: None warns with `DenseGradientWarning`, True allows it, False raises.

    Returns:
      A function of the arguments of `loss`, that returns (value, gradient); value is
      (scalar, auxiliary data) with `has_aux`. The gradient is like the argument, or a
      tuple of such if `argnums` is a sequence.

    Raises:
      TypeError: an argument holds nothing to differentiate; the loss isn't a scalar.
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
        if _holds_nnx_objects((argnums, args, kwargs)):
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
        aux: list[Any] = []  # the structure of what was traced, without its arrays

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
    """Return a function that gives the gradient of the loss; see `value_and_grad`.

    With `has_aux` it gives (gradient, auxiliary data), as `jax.grad` does.

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


def _holds_nnx_objects(tree: Any) -> bool:
    """Return whether Flax NNX must split the tree: an `nnx.State` is a plain one."""
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
        "though the table is pooled with `sparse=True`: the loss uses it otherwise, "
        "too, or where rows can't be followed (see `jbag.value_and_grad`). "
        "`allow_dense=True` allows it."
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
    """Return the value of `function(leaves)`, what comes with it, and its gradient.

    `check_dense` is called with the numbers of the leaves that are pooled with
    `sparse=True` and get a dense gradient all the same.
    """
    closed = jax.make_jaxpr(function)(leaves)
    found = find_marked_bags(closed)
    pooled = {call.leaf for call in found.calls.values()} - found.dense
    if (
        found.has_refs or not closed.jaxpr.outvars
    ):  # what flows through them is JAX's to follow
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
    """Return the gradient of the table from the gradient of what was pooled."""
    winners, ids, offsets, coefficients = jax.tree.map(jnp.asarray, bags)
    if offsets is None:
        ids = _after(value, ids)
    else:
        offsets = _after(value, offsets)
    options = {k: x for k, x in call.equation.params.items() if k != "has_winners"}
    one: Callable[..., Any] = functools.partial(
        pull_back, shape=jnp.shape(table), dtype=jax.typeof(table).dtype, **options
    )
    for _ in call.loops:
        one = jax.vmap(one)
    return one(cotangent, ids, offsets, coefficients, winners).sum()


def _after(value: Float[Array, ""], x: Int[Array, "..."]) -> Int[Array, "..."]:
    """Return x, when the value is known and so the tables have been read.

    XLA copies a table that is to be updated in place if nothing makes the update wait
    for what reads the table, as with a loss that is linear. It can't see that no number
    has more than 64 bits.
    """
    dtype = jnp.dtype(f"uint{8 * value.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(value, dtype)
    return jnp.where(jax.lax.population_count(bits) <= 64, x, 0)

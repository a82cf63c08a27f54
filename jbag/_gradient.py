"""`value_and_grad` and `grad`: like JAX's, but row-sparse for tables that ask for it.

The loss is traced to a program, in which sparse bags have left their marks. The program
is run with a zero "tap" added to what each of them pooled, its table held constant, and
differentiated with respect to the taps: with the bags, the gradient of a tap is the
gradient of the table, not yet multiplied out. Nothing of the table's size is made, nor
of (ids, features).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jbag import _program
from jbag._kernels import xla
from jbag._kernels.xla import Ids, Offsets, Slots
from jbag._rows import RowSparse
from jbag._terms import Term
from jbag._validation import check_flag


def value_and_grad(
    loss: Callable, argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable:
    """Return a function that gives the loss and its gradient.

    It is `jax.value_and_grad`, except that the gradient of a table that is pooled with
    `sparse=True` is a `RowSparse`: its cost and its size don't depend on the table's.
    Tables are found by themselves among the arrays of the arguments, be they those of a
    dict, of Linen's variables, or of an NNX module or state.

    The gradient of a table is an array, and right, where it can't be row-sparse: if the
    loss uses the table otherwise, too (tied weights), pools what was computed of it (a
    cast, say), or pools it in the body of a `scan`, of a `cond` or of a function with
    derivatives of its own. Leaves that aren't floating get zeros of dtype float0.

    Args:
      loss: returns a scalar, or (scalar, auxiliary data) with `has_aux`.
      argnums: which positional arguments to differentiate with respect to.
      has_aux: whether the loss returns auxiliary data.

    Returns:
      A function of the arguments of `loss`, that returns (value, gradient); value is
      (scalar, auxiliary data) with `has_aux`. The gradient is like the argument, or a
      tuple of such if `argnums` is a sequence.

    Raises:
      TypeError: an argument holds nothing to differentiate; the loss isn't a scalar.

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

    @functools.wraps(loss)
    def differentiated(*args: Any, **kwargs: Any) -> Any:
        positions = _positions(argnums, len(args))
        chosen = [args[position] for position in positions]
        leaves, tree = jax.tree.flatten(chosen)
        moving = [k for k, leaf in enumerate(leaves) if _is_floating(leaf)]
        _check_moving(positions, chosen)
        aux: list[Any] = []  # the structure of what was traced, without its arrays

        def traced(arrays: list[Array]) -> Any:
            merged = list(leaves)
            for k, array in zip(moving, arrays, strict=True):
                merged[k] = array
            full = list(args)
            for position, arg in zip(
                positions, jax.tree.unflatten(tree, merged), strict=True
            ):
                full[position] = arg
            out = loss(*full, **kwargs)
            if not has_aux:
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
            traced, [jnp.asarray(leaves[k]) for k in moving]
        )
        found = dict(zip(moving, gradients, strict=True))
        result = [
            found[k] if k in found else _no_gradient(leaf)
            for k, leaf in enumerate(leaves)
        ]
        gradient = jax.tree.unflatten(tree, result)
        gradient = gradient[0] if isinstance(argnums, int) else tuple(gradient)
        if not has_aux:
            return value, gradient
        structure, is_array, kept = aux
        rest = iter(arrays)
        parts = [next(rest) if a else k for a, k in zip(is_array, kept, strict=True)]
        return (value, jax.tree.unflatten(structure, parts)), gradient

    return differentiated


def grad(
    loss: Callable, argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable:
    """Return a function that gives the gradient of the loss; see `value_and_grad`.

    With `has_aux` it gives (gradient, auxiliary data), as `jax.grad` does.

    Example:
      >>> table = jnp.ones((1000, 2))
      >>> loss = lambda table: jbag.embedding_bag(table, [[7, 8]], sparse=True).sum()
      >>> jbag.grad(loss)(table).coalesce().values
      Array([[0.5, 0.5],
             [0.5, 0.5]], dtype=float32)
    """
    both = value_and_grad(loss, argnums, has_aux)

    @functools.wraps(loss)
    def differentiated(*args: Any, **kwargs: Any) -> Any:
        value, gradient = both(*args, **kwargs)
        return (gradient, value[1]) if has_aux else gradient

    return differentiated


def _positions(argnums: Any, num_args: int) -> list[int]:
    given = [argnums] if isinstance(argnums, int) else list(argnums)
    for position in given:
        if not isinstance(position, int) or not -num_args <= position < num_args:
            raise ValueError(
                f"`argnums` must be positions of the {num_args} positional arguments; "
                f"got {argnums!r}."
            )
    return [position % num_args for position in given]


def _is_array(x: Any) -> bool:
    try:
        jax.typeof(x)
    except TypeError:
        return False
    return True


def _is_floating(leaf: Any) -> bool:
    return _is_array(leaf) and jnp.issubdtype(jax.typeof(leaf).dtype, jnp.inexact)


def _check_moving(positions: list[int], chosen: list[Any]) -> None:
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
    function: Callable, leaves: list[Array]
) -> tuple[Array, list[Array], list[Any]]:
    """Return the value of `function(leaves)`, what comes with it, and its gradient."""
    closed = jax.make_jaxpr(function)(leaves)
    program, constants = _program.inline(closed)
    plan = _program.plan(program)
    pooled = {tap.leaf for tap in plan.taps.values()}
    moving = [k for k in range(len(leaves)) if k in plan.dense or k not in pooled]

    def tapped(zeros: dict[int, Array], arrays: list[Array]) -> Any:
        merged = list(leaves)
        for k, array in zip(moving, arrays, strict=True):
            merged[k] = array
        environment = constants | dict(zip(program.ins, merged, strict=True))
        (value, *rest), bags = _program.run(program, environment, plan, zeros, leaves)
        return value, (rest, bags)

    zeros = {place: tap.zeros() for place, tap in plan.taps.items()}
    (value, (rest, bags)), (to_taps, to_leaves) = jax.value_and_grad(
        tapped, argnums=(0, 1), has_aux=True
    )(zeros, [leaves[k] for k in moving])
    gradients: list[Any] = [None] * len(leaves)
    for k, gradient in zip(moving, to_leaves, strict=True):
        gradients[k] = gradient
    for k in sorted(pooled):
        terms = tuple(
            _term(value, to_taps[place], *bags[place], **tap.equation.params)
            for place, tap in plan.taps.items()
            if tap.leaf == k
        )
        rows = RowSparse(terms, jnp.shape(leaves[k]), jax.typeof(leaves[k]).dtype)
        gradients[k] = rows if gradients[k] is None else gradients[k] + rows
    return value, rest, gradients


def _term(
    value: Float[Array, ""],
    cotangent: Float[Array, "B D"],
    winners: Int[Array, "B D"] | None,
    ids: Ids,
    offsets: Offsets,
    coefficients: Slots | None,
    *,
    has_winners: bool,
    **options: Any,
) -> Term:
    """Return the gradient of a table from the gradient of what was pooled."""
    del has_winners
    if offsets is None:
        ids = _after(value, ids)
    else:
        offsets = _after(value, offsets)
    wide = cotangent.astype(xla.accumulation_dtype(cotangent.dtype))
    return Term(wide, ids, offsets, coefficients, winners=winners, **options)


def _after(value: Float[Array, ""], x: Int[Array, "..."]) -> Int[Array, "..."]:
    """Return x, when the value is known and so the tables have been read.

    XLA copies a table that is to be updated in place if nothing makes the update wait
    for what reads the table, as with a loss that is linear. It can't see that no number
    has more than 64 bits.
    """
    dtype = jnp.dtype(f"uint{8 * value.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(value, dtype)
    return jnp.where(jax.lax.population_count(bits) <= 64, x, 0)

"""`value_and_grad` and `grad` for functions of NNX modules.

All arguments are split at once, so that what they share is seen. The states that are to
be differentiated go through `jbag.value_and_grad` as plain arrays; the states that the
loss changed come back as auxiliary data, and are merged into the caller's objects.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jbag.sparse import _gradient

Argnum = int | np.integer | nnx.DiffState
_TAG = "jbag.grad"  # of the context in which Flax relates objects inside and outside


def value_and_grad(
    loss: Callable[..., Any],
    argnums: Argnum | Sequence[Argnum] = 0,
    has_aux: bool = False,
    *,
    allow_dense: bool | None = None,
) -> Callable[..., Any]:
    """Return a function that gives the loss and its gradient.

    It is `flax.nnx.value_and_grad` in graph mode, except that the gradient of a table
    that is pooled with `sparse=True` is a `RowSparse`, in the place of the array. State
    that the loss changes (statistics, counts of random numbers) is changed in the
    caller's objects. A module that is reached on several paths, in one argument or in
    several that are differentiated, gets its whole gradient once, on the first path.
    `jbag.value_and_grad` calls this function if an argument holds an NNX object.

    `flax.nnx.Optimizer` takes such gradients with the optimizers of `jbag.optim`. The
    labels of `optax.partition` must then be an `nnx.State`, as the gradients are: Optax
    raises on a dict. `nnx.State(labels)` makes one of a dict, as in the example.

    Args:
      loss: returns a scalar, or (scalar, auxiliary data) with `has_aux`.
      argnums: which positional arguments to differentiate with respect to, and within
        an argument which variables: a position means its `nnx.Param` variables, and
        `nnx.DiffState(position, filter)` those that the filter selects. Arrays outside
        of NNX objects, and bare variables, are always differentiated.
      has_aux: whether the loss returns auxiliary data.
      allow_dense: as in `jbag.value_and_grad`.

    Returns:
      A function of the arguments of `loss`, that returns (value, gradient); value is
      (scalar, auxiliary data) with `has_aux`. The gradient of a module is an
      `nnx.State`, that of other arguments is like the argument. It is a tuple if
      `argnums` is a sequence.

    Raises:
      TypeError: `argnums` isn't such positions; the loss isn't a scalar.
      ValueError: `loss` is a bound method of a module; a position is out of range or
        repeated; a variable is to be differentiated on one path, and not on another.

    Example:
      >>> from flax import nnx
      >>> class Model(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.bag = jbag.nnx.EmbeddingBag(1000, 2, sparse=True, rngs=rngs)
      ...         self.dropout = nnx.Dropout(0.5, rngs=rngs)
      ...         self.head = nnx.Linear(2, 1, rngs=rngs)
      ...
      ...     def __call__(self, ids):
      ...         return self.head(self.dropout(self.bag(ids)))
      >>> model = Model(nnx.Rngs(0))
      >>> parts = {"rows": jbag.optim.rowwise_adagrad(0.1), "rest": optax.adam(0.1)}
      >>> labels = nnx.State({"bag": "rows", "head": "rest"})
      >>> tx = optax.partition(parts, labels)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> loss = lambda model, ids: (model(ids) ** 2).sum()
      >>> value, gradient = jbag.nnx.value_and_grad(loss)(model, [[7, 8], [7, 9]])
      >>> gradient["bag"]["embedding"][...].coalesce().indices
      Array([   7,    8,    9, 1000], dtype=int32)
      >>> int(model.dropout.rngs.count[...])
      1
      >>> updates = optimizer.update(model, gradient)
    """
    if not callable(loss):
        raise TypeError(f"`loss` must be a function; got {loss!r}.")
    if _is_bound_method(loss):
        raise ValueError(
            "`loss` must not be a bound method of a module, which would not be "
            "differentiated. Pass the module as an argument: "
            "value_and_grad(Model.loss)(model, ...)."
        )
    given: Any = argnums
    single = not isinstance(argnums, Sequence)
    chosen = [_diff_state(x) for x in ([given] if single else given)]

    @functools.wraps(loss)
    @nnx.update_context(_TAG)
    def differentiated(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _bind(loss, args, kwargs)
        filters = _by_position(chosen, len(args))
        parts, options = nnx.to_tree(
            (args, kwargs),
            prefix=(tuple(map(filters.get, range(len(args)))), None),
            split_fn=_split,
            ctxtag=_TAG,
        )
        outer = jax.tree.leaves((parts, options))
        differentiable = [
            jax.tree.flatten(_first_states(part)) if position in filters else ([], None)
            for position, part in enumerate(parts)
        ]
        structure: list[Any] = []

        def pure(*leaves: list[Any]) -> Any:
            merged = (
                tuple(
                    part if tree is None else _replace(part, tree.unflatten(x))
                    for part, (_, tree), x in zip(
                        parts, differentiable, leaves, strict=True
                    )
                ),
                options,
            )
            inner = jax.tree.leaves(merged)
            inside = nnx.from_tree(merged, ctxtag=_TAG, is_inner=True)
            value, aux = _result(loss(*inside[0], **inside[1]), has_aux)
            inside, aux = nnx.to_tree((inside, aux), ctxtag=_TAG)
            out, tree = jax.tree.flatten((_only_nodes(inside), aux))
            # A table that is merely handed through must not become a result.
            same = {
                id(x): number
                for number, (x, y) in enumerate(zip(inner, outer, strict=True))
                if isinstance(y, jax.Array)
            }
            origins = [same.get(id(x)) for x in out]
            structure[:] = [tree, origins]
            return value, [
                x for x, origin in zip(out, origins, strict=True) if origin is None
            ]

        both = _gradient.value_and_grad(
            pure, tuple(filters), has_aux=True, allow_dense=allow_dense
        )
        (value, changed), gradients = both(*(leaves for leaves, _ in differentiable))
        tree, origins = structure
        new = iter(changed)
        out = tree.unflatten([next(new) if k is None else outer[k] for k in origins])
        _, aux = nnx.from_tree(out, ctxtag=_TAG, is_inner=False)
        gradient = tuple(
            differentiable[position][1].unflatten(leaves)
            for position, leaves in zip(filters, gradients, strict=True)
        )
        value = (value, aux) if has_aux else value
        return value, gradient[0] if single else gradient

    return differentiated


def grad(
    loss: Callable[..., Any],
    argnums: Argnum | Sequence[Argnum] = 0,
    has_aux: bool = False,
    *,
    allow_dense: bool | None = None,
) -> Callable[..., Any]:
    """Return a function that gives the gradient of the loss; see `value_and_grad`.

    With `has_aux` it gives (gradient, auxiliary data), as `flax.nnx.grad` does.

    Example:
      >>> bag = jbag.nnx.EmbeddingBag(10, 2, sparse=True, rngs=flax.nnx.Rngs(0))
      >>> gradient = jbag.nnx.grad(lambda bag: bag([[7, 8]]).sum())(bag)
      >>> gradient["embedding"].get_value().coalesce().values
      Array([[0.5, 0.5],
             [0.5, 0.5]], dtype=float32)
    """
    both = value_and_grad(loss, argnums, has_aux, allow_dense=allow_dense)

    @functools.wraps(loss)
    def differentiated(*args: Any, **kwargs: Any) -> Any:
        value, gradient = both(*args, **kwargs)
        return (gradient, value[1]) if has_aux else gradient

    return differentiated


def _is_bound_method(loss: Any) -> bool:
    while isinstance(loss, functools.partial):
        loss = loss.func
    return inspect.ismethod(loss) and isinstance(loss.__self__, nnx.Module)


def _diff_state(argnum: Any) -> nnx.DiffState:
    if isinstance(argnum, nnx.DiffState):
        return argnum
    try:
        return nnx.DiffState(operator.index(argnum), nnx.Param)
    except TypeError:
        raise TypeError(
            f"`argnums` must be positions or `nnx.DiffState`s; got {argnum!r}."
        ) from None


def _bind(
    loss: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments, by position where they can be; as NNX does."""
    if isinstance(loss, functools.partial):
        return args, kwargs
    bound = inspect.signature(loss).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.args, bound.kwargs


def _by_position(
    chosen: list[nnx.DiffState], num_args: int
) -> dict[int, nnx.DiffState]:
    """Return what to differentiate by position.

    The same filter on two arguments is then equal, as NNX compares it.
    """
    found: dict[int, nnx.DiffState] = {}
    for state in chosen:
        if not -num_args <= state.argnum < num_args:
            raise ValueError(
                f"`argnums` must be positions of the {num_args} positional arguments; "
                f"got {state.argnum}."
            )
        position = state.argnum % num_args
        if position in found:
            raise ValueError(f"`argnums` repeats the position {position}.")
        found[position] = nnx.DiffState(-1, state.filter)
    return found


def _split(
    context: nnx.SplitContext, path: Any, prefix: nnx.DiffState | None, node: Any
) -> nnx.NodeStates:
    """Split a graph node: its first state is what is differentiated."""
    del path
    if prefix is None or isinstance(node, nnx.Variable):
        return nnx.NodeStates.from_split(*context.split(node))
    return nnx.NodeStates.from_split(*context.split(node, prefix.filter, ...))


def _is_split(x: Any) -> bool:
    return isinstance(x, nnx.NodeStates)


def _first_states(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: x.states[0] if _is_split(x) else x, tree, is_leaf=_is_split
    )


def _replace(tree: Any, states: Any) -> Any:
    """Undo `_first_states`."""
    return jax.tree.map(
        lambda x, new: x.replace(states=(new, *x.states[1:])) if _is_split(x) else new,
        tree,
        states,
        is_leaf=_is_split,
    )


def _only_nodes(tree: Any) -> Any:
    return jax.tree.map(lambda x: x if _is_split(x) else None, tree, is_leaf=_is_split)


def _result(out: Any, has_aux: bool) -> tuple[Any, Any]:
    """Return the loss and its auxiliary data."""
    aux = None
    if has_aux:
        if not isinstance(out, tuple | list) or len(out) != 2:
            raise TypeError(
                "With `has_aux`, the loss must return (scalar, auxiliary data); "
                f"got {type(out).__name__}."
            )
        out, aux = out
    if not jax.tree_util.all_leaves([out]):
        raise TypeError(f"The loss must return a scalar; got {type(out).__name__}.")
    return out, aux

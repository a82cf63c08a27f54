"""`reset_rows`: new values for rows of a table and of its optimizer's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from jbag._validation import check_table
from jbag.ops._packed_table import packs
from jbag.vocabulary._row_keys import row_keys

_CHUNK = 1024  # rows that are drawn at once


def _itself(params: Any) -> Any:
    return params


def reset_rows(
    rows: Int32[Array, " M"],
    params: Any,
    opt_state: Any = None,
    *,
    key: Array,
    initializer: Callable[..., Array],
    optimizer: Any = None,
    table: Callable[[Any], Any] = _itself,
) -> tuple[Any, Any]:
    """Draw rows of a table anew, and reset them in the optimizer's state.

    A row becomes `initializer(row_key, (1, D), dtype)[0]`, where `row_key` is a
    function of `key` and the row alone: the result doesn't depend on the other rows.
    The bits of a `row_key` are cheaper than those of JAX's own keys. The optimizer's
    states of the row become those that `optimizer.init` gives to the new row. The time
    is that of the rows below V, not that of M. Under `jax.jit` with donated parameters
    and states, both are changed in place.

    Args:
      rows: [M], rows of the table, each at most once, before entries of V or more,
        which are ignored: from `Vocabulary.new_rows`.
      params: the table [V, D], or a pytree that has it.
      opt_state: the state of `optimizer`, or None.
      key: a key of `jax.random`. Fold the step into it, or a row gets the same values
        each time.
      initializer: one of `jax.nn.initializers`, or a function with its arguments.
      optimizer: the `optax.GradientTransformation` of `opt_state`: of `jbag.optim` or
        of Optax. Its states of the table have the shape [V, ...].
      table: a function that selects the table from `params`, such as
        `lambda params: params["table"]`.

    Returns:
      (params, opt_state) with the new rows.

    Raises:
      TypeError: `opt_state` is given without `optimizer` or the reverse; the table is
        not floating, or is a `PackedTable`.
      ValueError: the table is not a matrix; `table` doesn't select a leaf of `params`;
        `opt_state` is not a state of `optimizer` for `params`, or it has a state of the
        table of another shape than [V, ...].

    Example:
      >>> optimizer = jbag.optim.rowwise_adagrad(0.1)
      >>> table = jnp.ones((4, 2))
      >>> table, opt_state = jbag.vocabulary.reset_rows(
      ...     jnp.array([1, 3, 4, 4]), table, optimizer.init(table),
      ...     optimizer=optimizer, key=jax.random.key(0),
      ...     initializer=jax.nn.initializers.zeros,
      ... )
      >>> table[:, 0]
      Array([1., 0., 1., 0.], dtype=float32)
    """
    if (opt_state is None) != (optimizer is None):
        raise TypeError("`opt_state` and `optimizer` must be given together.")
    tree: Any
    state_tree: Any
    leaves, tree = jax.tree.flatten(params, is_leaf=packs)
    number = table(tree.unflatten(range(len(leaves))))
    if not isinstance(number, int):
        raise ValueError(
            f"`table` must select a leaf of `params`, the table; got {number!r}."
        )
    if packs(leaves[number]):
        raise TypeError("The table must be an array [V, D]; got a PackedTable.")
    old_table = check_table(leaves[number])
    (V, D), dtype = old_table.shape, old_table.dtype

    def with_table(x: Any) -> Any:
        return tree.unflatten([*leaves[:number], x, *leaves[number + 1 :]])

    state_leaves, state_tree = jax.tree.flatten(opt_state)
    of_table: list[int] = []
    if optimizer is not None:
        of_table = _states_of_table(
            optimizer, state_leaves, state_tree, with_table, old_table
        )
    rows = jnp.asarray(rows, jnp.int32)
    num_chunks = -(-(rows < V).sum(dtype=jnp.int32) // _CHUNK)
    rows = jnp.concatenate([rows, jnp.full(_CHUNK, V, jnp.int32)])

    def draw(row_key: Array) -> Array:
        return initializer(row_key, (1, D), dtype)[0]

    def reset(i: Array, arrays: list[Array]) -> list[Array]:
        chunk = jax.lax.dynamic_slice_in_dim(rows, i * _CHUNK, _CHUNK)
        fresh = [jax.vmap(draw)(row_keys(key, chunk))]
        if of_table:
            fresh_state = jax.tree.leaves(optimizer.init(with_table(fresh[0])))
            fresh += [fresh_state[k] for k in of_table]
        return [
            x.at[chunk].set(y, mode="drop", indices_are_sorted=True)
            for x, y in zip(arrays, fresh, strict=True)
        ]

    arrays = [old_table, *(jnp.asarray(state_leaves[k]) for k in of_table)]
    new_table, *states = jax.lax.fori_loop(0, num_chunks, reset, arrays)
    for k, state in zip(of_table, states, strict=True):
        state_leaves[k] = state
    return with_table(new_table), state_tree.unflatten(state_leaves)


def _states_of_table(
    optimizer: Any,
    leaves: list[Any],
    tree: Any,
    with_table: Callable[[Any], Any],
    table: Array,
) -> list[int]:
    """Return the positions of the states that have a row for each row of the table."""
    V, D = table.shape

    def shapes(rows: int) -> tuple[list[tuple[int, ...]], Any]:
        taller = jax.ShapeDtypeStruct((rows, D), table.dtype)
        state = jax.eval_shape(optimizer.init, with_table(taller))
        own, structure = jax.tree.flatten(state)
        return [x.shape for x in own], structure

    (now, structure), (taller, _) = shapes(V), shapes(V + 1)
    if structure != tree or now != [jnp.shape(x) for x in leaves]:
        raise ValueError("`opt_state` must be a state of `optimizer` for `params`.")
    found = [k for k, shape in enumerate(now) if shape != taller[k]]
    for k in found:
        if now[k][0] != V or taller[k] != (V + 1, *now[k][1:]):
            raise ValueError(
                f"The states of the table must have the shape [{V}, ...]; "
                f"`opt_state` has one of shape {now[k]}."
            )
    return found

"""`catch_up`: rows of optimizers that aren't lazy, brought to the last step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from jbag._validation import is_sharded, to_index_dtype
from jbag.ops._factored_gradient import ONE_DEVICE, FactoredGradient
from jbag.ops._packed_table import pack_lines, packs, unpack_lines
from jbag.ops._packing import Packing
from jbag.ops._row_gather import accumulation_dtype
from jbag.ops.kernels.stochastic_rounding import round_stochastically
from jbag.ops.kernels.update_rules import step
from jbag.optim._missed_steps import catch_up_rule, catch_up_scalars
from jbag.optim._rule_optimizer import CatchUpState, noise_of
from jbag.ragged._bags import Bags
from jbag.ragged._csr_arrays import PAD_ID
from jbag.sparse._row_sparse import RowSparse, is_rows


def catch_up(params: Any, opt_state: Any, reads: Any = None) -> tuple[Any, Any]:
    r"""Apply the steps that rows have missed, of optimizers with `lazy=False`.

    Call it before each use of the parameters: with the rows that a batch reads before
    its loss, and with all rows before an evaluation or a checkpoint. Rows that are read
    in the step become what they are with dense gradients, and so do their states. In a
    jitted step that is donated parameters and state, tables change in place::

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, opt_state, batch):
            reads = jbag.grad(loss)(params, batch)
            params, opt_state = jbag.optim.catch_up(params, opt_state, reads)
            value, gradient = jbag.value_and_grad(loss)(params, batch)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, value

    XLA removes the unused part of `reads`, its values. Each call also sweeps some other
    rows, at most 257 or V / 16383, so that no row misses more steps than the state has
    records of. Call it in every step.

    The result is exact but for rounding, except that the moves of Adam in missed steps
    are the result of a quadrature. With the default moments its error is below 1e-4
    times the learning rate, where the root of v is as small as :math:`\epsilon`, and
    far smaller elsewhere.

    Args:
      params: the parameters.
      opt_state: the state of an optimizer, of any structure around that of optimizers
        of `jbag.optim`.
      reads: what is read of the parameters. None for all rows; or a tree of the
        structure of `params`, or of its upper part, of

        - None, for all rows;
        - ids, an array of any shape, or `Bags`;
        - `RowSparse`, the gradient of a table: all rows that its bags name, and it
          tells how the table is sharded over a mesh;
        - dense gradients, which tell that the gradient of every step is dense.

    Returns:
      (params, opt_state).

    Raises:
      TypeError: a leaf of `reads` is none of these.
      ValueError: `opt_state` has no state of an optimizer with `lazy=False`, `reads`
        has no entry for a parameter, or ids are given for what isn't a table.

    Example:
      >>> optimizer = jbag.optim.sgd(0.5, momentum=0.5, lazy=False)
      >>> table, reads = jnp.zeros((5, 1)), jnp.array([3])
      >>> rows = jbag.RowSparse.from_rows(reads, jnp.ones((1, 1)), num_embeddings=5)
      >>> state = optimizer.init(table)
      >>> for gradient in (rows, 0 * rows, 0 * rows):
      ...     table, state = jbag.optim.catch_up(table, state, reads)
      ...     updates, state = optimizer.update(gradient, state, table)
      ...     table = optax.apply_updates(table, updates)
      >>> table[3]
      Array([-0.875], dtype=float32)
    """
    leaves: list[Any]
    tree: Any
    leaves, tree = jax.tree.flatten(params, is_leaf=packs)
    paths = [path for path, _ in _with_paths(params)]
    positions = {path: k for k, path in enumerate(paths)}
    read_of = dict(_with_paths(reads))
    outer: Any
    own: Any
    parts, outer = jax.tree.flatten(opt_state, is_leaf=_is_catch_up_state)
    if not any(map(_is_catch_up_state, parts)):
        raise ValueError(
            "`opt_state` must have the state of an optimizer with `lazy=False`; "
            "got none."
        )
    for n, state in enumerate(parts):
        if not _is_catch_up_state(state):
            continue
        rule = catch_up_rule(state.states)
        names = list(state.missed.keys() & state.states.keys())
        names.sort(key=list(state.states).index)
        steps, own = jax.tree.flatten(state.steps, is_leaf=packs)
        columns = [own.flatten_up_to(state.states[name]) for name in names]
        for i, (path, _) in enumerate(_with_paths(state.steps)):
            if path not in positions:
                raise ValueError(
                    "`params` must have the structure that `opt_state` was made for, "
                    "and each parameter one optimizer with `lazy=False`; "
                    f"got none, or several, for `{jax.tree_util.keystr(path)}`."
                )
            k = positions.pop(path)
            before = (leaves[k], *(column[i] for column in columns), steps[i])
            after = _catch_up_leaf(state, rule, k, before, _find(read_of, path))
            leaves[k], steps[i] = after[0], after[-1]
            for column, new in zip(columns, after[1:-1], strict=True):
                column[i] = new
        new_states = {
            name: own.unflatten(column)
            for name, column in zip(names, columns, strict=True)
        }
        parts[n] = state._replace(
            states=state.states | new_states, steps=own.unflatten(steps)
        )
    return tree.unflatten(leaves), outer.unflatten(parts)


def _catch_up_leaf(
    state: CatchUpState, rule: str, number: int, stored: tuple[Any, ...], read: Any
) -> tuple[Any, ...]:
    """Return a parameter, its states and its steps, with the rows that are read."""
    packing = stored[0].packing if packs(stored[0]) else None
    table, *states = (jax.tree.leaves(x)[0] for x in stored)
    read = jax.tree.leaves(read, is_leaf=is_rows)[0] if packs(read) else read
    # A dense gradient leaves no row behind.
    if _is_dense(read) or jnp.ndim(table) == 0:
        return stored
    dtype = accumulation_dtype(table.dtype)
    scalars = catch_up_scalars(state.missed, state.count, rule, dtype)
    seed = None
    if state.seed is not None and table.dtype == jnp.bfloat16:
        seed = noise_of(state.seed, number, ~state.count)
    if read is None:
        after = _catch_up_all(rule, table, tuple(states), scalars, seed, packing)
    else:
        if not is_rows(read):
            read = _rows_of_ids(read, table, packing)
        if not read.fits(table):
            raise ValueError(
                f"A gradient of `reads` must have the shape of its table, "
                f"{table.shape}; got {read.shape}."
            )
        num_steps = state.missed["row"].size
        rows = _with_sweep(read, state.count, num_steps, dtype)
        after = rows.update_table(table, states, scalars, seed, rule=rule)
    return tuple(
        jax.tree.map(lambda _, new=new: new, old)
        for old, new in zip(stored, after, strict=True)
    )


def _is_dense(read: Any) -> bool:
    """Return whether a leaf of `reads` is a dense gradient."""
    if read is None or is_rows(read) or isinstance(read, Bags):
        return False
    dtype = jnp.result_type(read)
    if jnp.issubdtype(dtype, jnp.floating):
        return True
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"A leaf of `reads` must be None, ids, Bags or a gradient; got {read!r}."
        )
    return False


def _catch_up_all(
    rule: str,
    table: Array,
    states: tuple[Array, ...],
    scalars: Array,
    seed: Array | None,
    packing: Packing | None,
) -> tuple[Array, ...]:
    """Bring all rows up to date, element by element, so that XLA keeps the sharding."""
    arrays = (table, *states)

    def unpacked(x: Array) -> Array:
        is_packed = packing is not None and x.shape == packing.shape
        return unpack_lines(packing, x) if is_packed else x

    def packed(x: Array) -> Array:
        return x if packing is None or x.ndim != 2 else pack_lines(packing, x)

    def run(arrays: tuple[Array, ...], scalars: Array) -> tuple[Array, ...]:
        rows, *own = map(unpacked, arrays)
        rows = rows.astype(scalars.dtype)
        delta, after = step(rule, rows, jnp.zeros_like(rows), own, scalars)
        rows += delta
        if seed is not None and rows.ndim == 2:
            rows = round_stochastically(rows, seed, jnp.arange(rows.shape[0]))
        return tuple(map(packed, (rows.astype(table.dtype), *after)))

    meshes = [jax.typeof(x).sharding.mesh for x in arrays if is_sharded(x)]
    if not meshes:
        return run(arrays, scalars)
    out = tuple(NamedSharding(meshes[0], jax.typeof(x).sharding.spec) for x in arrays)
    axes = meshes[0].explicit_axes
    return jax.sharding.auto_axes(run, axes=axes, out_sharding=out)(arrays, scalars)


def _rows_of_ids(read: Any, table: Array, packing: Packing | None) -> RowSparse:
    """Return rows that ids name."""
    ids = jnp.asarray(to_index_dtype(read.indices if isinstance(read, Bags) else read))
    if table.ndim != 2:
        raise ValueError(
            f"`reads` must have ids for tables [V, D] only; got some for {table.shape}."
        )
    placement = ONE_DEVICE if packing is None else ONE_DEVICE.of_packed(packing)
    shape = placement.table_shape(table.shape)
    cotangent = jnp.zeros((1, shape[1]), accumulation_dtype(table.dtype))
    term = FactoredGradient(
        cotangent, ids.reshape(1, -1), pad_id=PAD_ID, placement=placement
    )
    return RowSparse((term,), shape, table.dtype)


def _with_sweep(
    rows: RowSparse, count: Int[Array, ""], num_steps: int, dtype: Any
) -> RowSparse:
    """Return zeros at the rows of a gradient's bags, and at those of the sweep.

    The sweep takes one step less than there are records of.
    """
    rows = rows.sum() if rows.batch_shape else rows
    placements = {term.placement for term in rows.terms} - {ONE_DEVICE}
    placement = next(iter(placements), ONE_DEVICE)  # `update_table` takes no others
    blocks = placement.num_blocks
    height = -(-rows.shape[0] // blocks)
    size = -(-height // (num_steps - 1))
    phase = count % (num_steps - 1)
    own = phase * size + jnp.arange(size, dtype=jnp.int32)
    swept = own + height * jnp.arange(blocks, dtype=jnp.int32)[:, None]
    swept = jnp.where(own < height, swept, PAD_ID).reshape(-1)
    if not placement.over_mesh:
        # One bag, whose cotangent isn't read, takes no memory.
        parts = [_flat_ids(term) for term in rows.terms]
        index_dtype = jnp.result_type(jnp.int32, *parts)
        ids = jnp.concatenate([x.astype(index_dtype) for x in (*parts, swept)])
        implementation = rows.terms[0].implementation if rows.terms else None
        zeros = jnp.zeros((1, rows.shape[1]), dtype)
        terms = [
            FactoredGradient(
                zeros,
                ids[None],
                pad_id=PAD_ID,
                implementation=implementation,
                placement=placement,
            )
        ]
    else:
        terms = [
            dataclasses.replace(
                term,
                cotangent=placement.zeros(term.cotangent.shape, dtype),
                coefficients=None,
                winners=None,
                average=None,
            )
            for term in rows.terms
        ]
        ids = placement.place_ids(swept[:, None].astype(terms[0].ids.dtype))
        zeros = placement.zeros((swept.size, rows.shape[1]), dtype)
        terms.append(
            dataclasses.replace(
                terms[0], cotangent=zeros, ids=ids, offsets=None, pad_id=PAD_ID
            )
        )
    return RowSparse(terms, rows.shape, rows.dtype)


def _flat_ids(term: FactoredGradient) -> Array:
    """Return the ids, those of empty slots as `PAD_ID`."""
    ids = term.ids.reshape(-1)
    return ids if term.pad_id is None else jnp.where(ids == term.pad_id, PAD_ID, ids)


def _is_catch_up_state(x: Any) -> bool:
    return isinstance(x, CatchUpState)


def _is_read(x: Any) -> bool:
    return x is None or is_rows(x) or isinstance(x, Bags) or packs(x)


def _with_paths(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_read)[0]


def _find(read_of: dict[Any, Any], path: tuple[Any, ...]) -> Any:
    """Return the entry for a parameter: at its path, or above."""
    for length in range(len(path), -1, -1):
        if path[:length] in read_of:
            return read_of[path[:length]]
    raise ValueError(
        "`reads` must have an entry for each parameter; "
        f"got none for `{jax.tree_util.keystr(path)}`."
    )

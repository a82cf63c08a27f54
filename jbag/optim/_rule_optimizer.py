"""Optimizers from update rules, for `RowSparse` and dense gradients."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int, UInt32

from jbag._validation import check_flag, check_integer
from jbag.ops._packed_table import pack_lines, packs, unpack_lines
from jbag.ops._packing import Packing
from jbag.ops._row_gather import accumulation_dtype
from jbag.ops.kernels.huge_pages import to_huge_pages
from jbag.ops.kernels.update_rules import RULES, STEP_PERIOD, rule_of, step
from jbag.optim._missed_steps import (
    Missed,
    bias_correction,
    extend,
    init_missed,
)
from jbag.sparse._applied_update import AppliedUpdate
from jbag.sparse._row_sparse import RowSparse, is_rows

Rate = float | Array | Callable[[Int[Array, ""]], Any]


class RowState(NamedTuple):
    """The state of an optimizer of `jbag.optim`.

    Attributes:
      count: the number of completed steps.
      states: by name, trees of the structure of the parameters, in the accumulation
        dtype. For a table [V, D], a state has the shape [V, D], or [V] if it is
        row-wise.

    Example:
      >>> state = jbag.optim.adam(0.1).init(jnp.ones((5, 2)))
      >>> {name: x.shape for name, x in state.states.items()}
      {'mu': (5, 2), 'nu': (5, 2)}
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # named as in Optax's states
    states: dict[str, Any]


jax.export.register_namedtuple_serialization(
    RowState, serialized_name="jbag.optim.RowState"
)


class CatchUpState(NamedTuple):
    """The state of an optimizer of `jbag.optim` with `lazy=False`.

    `catch_up` brings rows and their states to the last completed step. See
    `jbag.unpack` for checkpoints of packed tables.

    Attributes:
      count: the number of completed steps.
      states: as in `RowState`.
      steps: a tree of the structure of the parameters. For a table [V, D], the number
        of steps that each row has been through, [V], modulo 2 ** 24.
      missed: by name, arrays [R] of what rows have missed since each of the last R
        steps; 1024 to 16384.
      seed: of `stochastic_rounding`, or None.

    Example:
      >>> state = jbag.optim.adam(0.1, lazy=False).init(jnp.ones((5, 2)))
      >>> state.steps.shape
      (5,)
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # named as in Optax's states
    states: dict[str, Any]
    steps: Any
    missed: Missed
    seed: UInt32[Array, ""] | None


jax.export.register_namedtuple_serialization(
    CatchUpState, serialized_name="jbag.optim.CatchUpState"
)


def optimizer_from_rule(
    rule: str,
    learning_rate: Rate,
    constants: dict[str, Any],
    weight_decay: float,
    seed: int | None,
    initial: dict[str, Any] | None = None,
    lazy: bool = True,
) -> optax.GradientTransformation:
    """Return the optimizer of an update rule."""
    check_flag("lazy", lazy)
    own_rule = rule if lazy else f"checked_{rule}"
    per_row = RULES[rule].per_row
    first = {name: (initial or {}).get(name, 0.0) for name in RULES[rule].states}
    check_at_least_zero(**constants, weight_decay=weight_decay)
    for start in first.values():
        if not callable(start):
            check_at_least_zero(initial_accumulator_value=start)
    _check_below_one(**{k: x for k, x in constants.items() if k in ("b1", "b2")})
    if not lazy:
        _check_decays(constants)
    if not callable(learning_rate):
        _check_number("learning_rate", learning_rate)
    if seed is not None:
        seed = _check_seed(seed)

    def init(params: Any) -> RowState | CatchUpState:
        def start(name: str, packing: Packing | None, parameter: Array) -> Array:
            dtype = accumulation_dtype(jnp.asarray(parameter).dtype)
            if name == "steps":
                return rows_of(packing, parameter, 0, jnp.int32)
            initial = first[name]
            if callable(initial):
                parameter = jnp.asarray(parameter)
                if packing is None:
                    return initial(parameter.astype(dtype))
                table = unpack_lines(packing, parameter).astype(dtype)
                return pack_lines(packing, initial(table))
            if name in per_row:
                return rows_of(packing, parameter, initial, dtype)
            return jnp.full_like(parameter, initial, dtype)

        def rows_of(
            packing: Packing | None, parameter: Array, value: Any, dtype: Any
        ) -> Array:
            shape = jnp.shape(parameter)[:-1] if packing is None else packing[:1]
            return jnp.full(shape, value, dtype, device=_device_of_rows(parameter))

        def start_all(name: str) -> Any:
            def one(x: Any) -> Any:
                packing = x.packing if packs(x) else None
                return jax.tree.map(functools.partial(start, name, packing), x)

            return jax.tree.map(one, params, is_leaf=packs)

        count = jnp.zeros((), jnp.int32)
        states = to_huge_pages({name: start_all(name) for name in first})
        if lazy:
            return RowState(count, states)
        missed = init_missed(rule, params)
        own_seed = None if seed is None else jnp.asarray(seed, jnp.uint32)
        steps = to_huge_pages(start_all("steps"))
        return CatchUpState(count, states, steps, missed, own_seed)

    def update(updates: Any, state: RowState | CatchUpState, params: Any = None) -> Any:
        tree: Any
        gradients, tree = jax.tree.flatten(updates, is_leaf=is_rows)
        parameters: list[Any] = [None] * len(gradients)
        if params is not None:
            parameters = tree.flatten_up_to(params)
        elif RULES[rule].reads_rows or not is_zero(weight_decay):
            raise ValueError("`params` must be given to `update`; got None.")
        columns = [tree.flatten_up_to(state.states[name]) for name in first]
        if isinstance(state, CatchUpState):
            columns.append(tree.flatten_up_to(state.steps))
        numbers_of = functools.partial(
            _numbers, state.count, learning_rate, weight_decay, constants, lazy
        )
        results: list[tuple[Any, tuple[Array, ...]]] = []
        for k, gradient in enumerate(gradients):
            states = tuple(column[k] for column in columns)
            dtype = accumulation_dtype(jnp.dtype(gradient.dtype))
            scalars = _scalars(own_rule, state.count, numbers_of(dtype))
            parameter = parameters[k]
            if not is_rows(gradient):
                results.append(
                    _update_dense(own_rule, gradient, parameter, states, scalars)
                )
                continue
            if parameter is None:
                results.append(
                    _compute_delta(own_rule, gradient, None, states, scalars)
                )
                continue
            at_random = seed is not None and parameter.dtype == jnp.bfloat16
            noise = noise_of(seed, k, state.count) if at_random else None
            results.append(
                _update_rows(own_rule, gradient, parameter, states, scalars, noise)
            )
        new_states = {
            name: tree.unflatten([states[i] for _, states in results])
            for i, name in enumerate(first)
        }
        count = optax.safe_increment(state.count)
        deltas = tree.unflatten([delta for delta, _ in results])
        if not isinstance(state, CatchUpState):
            return deltas, RowState(count, new_states)
        steps = tree.unflatten([states[-1] for _, states in results])
        missed = extend(state.missed, count, numbers_of(state.missed["row"].dtype))
        return deltas, CatchUpState(count, new_states, steps, missed, state.seed)

    return optax.GradientTransformation(init, update)


def _update_rows(
    rule: str,
    gradient: RowSparse,
    table: Array,
    states: tuple[Array, ...],
    scalars: list[Array],
    noise: Array | None,
) -> tuple[RowSparse, tuple[Array, ...]]:
    """Update rows and states in place; return the update and the states."""
    table, states = jnp.asarray(table), tuple(map(jnp.asarray, states))
    if not gradient.fits(table):
        raise ValueError(
            f"A gradient must have the shape of its table, {table.shape}; "
            f"got {gradient.shape}."
        )
    new_table, *new_states = gradient.update_table(
        table, states, scalars, noise, rule=rule
    )

    def difference() -> RowSparse:
        delta, _ = _compute_delta(rule, gradient, table, states, scalars)
        if noise is None:
            return delta
        old, new = (delta.rows_of(x).astype(jnp.float32) for x in (table, new_table))
        return delta.with_values(new - old)

    return AppliedUpdate(table, new_table, gradient.shape, difference), tuple(
        new_states
    )


def _compute_delta(
    rule: str,
    gradient: RowSparse,
    table: Array | None,
    states: tuple[Array, ...],
    scalars: list[Array],
) -> tuple[RowSparse, tuple[Array, ...]]:
    """Return the update of the rows, and the states."""
    gradient = gradient.coalesce()
    indices, values = gradient.indices, gradient.values
    rows = jnp.zeros_like(values)
    if table is not None:
        rows = gradient.rows_of(table).astype(values.dtype)
    before = [gradient.rows_of(state) for state in states]
    delta, after = step(rule, rows, values, before, jnp.stack(scalars))
    delta = jnp.where((indices < gradient.shape[0])[:, None], delta, 0)
    new_states = tuple(gradient.put(x, y) for x, y in zip(states, after, strict=True))
    return gradient.with_values(delta), new_states


def _update_dense(
    rule: str,
    gradient: Array,
    parameter: Array | None,
    states: tuple[Array, ...],
    scalars: list[Array],
) -> tuple[Array, tuple[Array, ...]]:
    """Return the update of a dense parameter, and the states."""
    dtype = scalars[0].dtype
    values = gradient.astype(dtype)
    rows = jnp.zeros_like(values) if parameter is None else parameter.astype(dtype)
    shape = values.shape
    if not shape:  # a scalar is one row with one feature
        values, rows = values[None], rows[None]
        num_per_element = len(rule_of(rule).per_element)
        states = tuple(
            x[None] if i < num_per_element else x for i, x in enumerate(states)
        )
    delta, new_states = step(rule, rows, values, states, jnp.stack(scalars))
    if not shape:
        new_states = tuple(x.reshape(()) for x in new_states)
    return delta.reshape(shape).astype(gradient.dtype), new_states


def _device_of_rows(parameter: Any) -> NamedSharding | None:
    """Return the sharding of a row-wise state of a parameter on a mesh, else None."""
    if not isinstance(parameter, jax.Array) or isinstance(parameter, jax.core.Tracer):
        return None
    sharding = parameter.sharding
    if not isinstance(sharding, NamedSharding):
        return None
    spec = (*sharding.spec, *[None] * parameter.ndim)[: max(parameter.ndim - 1, 0)]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _numbers(
    count: Int[Array, ""],
    learning_rate: Rate,
    weight_decay: Any,
    constants: dict[str, Any],
    lazy: bool,
    dtype: jnp.dtype,
) -> dict[str, Array]:
    """Return the numbers of a rule for this step, by name."""
    values = {k: jnp.asarray(x, dtype) for k, x in constants.items()}
    values["rate"] = rate = rate_at(learning_rate, count, dtype)
    values["decay"] = rate * jnp.asarray(weight_decay, dtype)
    if not lazy and "b2" in values:
        # Optax weighs gradients by 1 - b, rounded; the rule by 1 - b of the rounded b,
        # for b2 = 0.999 5e-5 more. So moments are too large by these factors.
        root = math.sqrt(_excess(constants["b2"], dtype))
        values["rate"] *= root / _excess(constants["b1"], dtype)
        values["eps"] *= root
    return values


def _excess(b: Any, dtype: jnp.dtype) -> float:
    return float(1 - dtype.type(b)) / (1 - b) if _is_known(b) else 1.0


def _scalars(rule: str, count: Int[Array, ""], values: dict[str, Array]) -> list[Array]:
    """Return the scalars of a rule for this step, in order."""
    values = dict(values)
    dtype = values["rate"].dtype
    steps = (count + 1).astype(dtype)
    is_checked = "count" in rule_of(rule).scalars
    values["count"] = (count % STEP_PERIOD).astype(dtype)
    if "b2" in values:  # corrects the bias of moments initialized to zero
        root = jnp.sqrt(bias_correction(values["b2"], steps))
        values["rate"] *= root
        values["eps"] *= root if is_checked else 1
    if "b1" in values:
        values["rate"] /= bias_correction(values["b1"], steps)
    return [values[name] for name in rule_of(rule).scalars]


def rate_at(learning_rate: Rate, count: Int[Array, ""], dtype: jnp.dtype) -> Array:
    rate = learning_rate(count) if callable(learning_rate) else learning_rate
    return jnp.asarray(rate, dtype)


def noise_of(seed: Any, number: int, count: Int[Array, ""]) -> Array:
    """Return the seed of one table, by its position in the tree, for one step."""
    shift = number * 0x9E3779B9 % 2**32
    own = jnp.asarray(seed, jnp.uint32) + jnp.uint32(shift)
    return jnp.stack([own, count.astype(jnp.uint32)])


def _check_seed(seed: Any) -> Any:
    if isinstance(seed, jax.Array):  # from `optax.inject_hyperparams`
        return seed
    return check_integer("stochastic_rounding", seed) % 2**32


def is_zero(x: Any) -> bool:
    """Return whether a number is 0; False for a traced one."""
    return _is_known(x) and x == 0


def check_at_least_zero(**named: Any) -> None:
    """Raise if a number is negative or not a number; traced values are not checked."""
    for name, number in named.items():
        _check_number(name, number)
        if _is_known(number) and not number >= 0:
            raise ValueError(f"`{name}` must be at least 0; got {number}.")


def _check_decays(constants: dict[str, Any]) -> None:
    """Raise if missed moves of Adam would grow."""
    b1, b2 = (constants.get(k, 0.0) for k in ("b1", "b2"))
    if "b2" in constants and _is_known(b1) and _is_known(b2) and b1**2 > b2:
        raise ValueError(
            f"`b2` must be at least `b1` ** 2, {b1**2:.6g}, with `lazy=False`; "
            f"got {b2}."
        )


def _check_below_one(**named: Any) -> None:
    for name, number in named.items():
        if _is_known(number) and not number < 1:
            raise ValueError(f"`{name}` must be below 1; got {number}.")


def _check_number(name: str, number: Any) -> None:
    # `optax.inject_hyperparams` passes arrays.
    is_array = isinstance(number, jax.Array | np.ndarray)
    if isinstance(number, bool) or not (_is_known(number) or is_array):
        raise TypeError(f"`{name}` must be a number; got {number!r}.")


def _is_known(number: Any) -> bool:
    return isinstance(number, numbers.Real)

"""Interpreter of a jaxpr that adds zeros to the pooled rows of its marked bags."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jaxtyping import Array

from jbag.ops._sparse_marks import read
from jbag.sparse._jaxpr_analysis import (
    CHECKPOINTS,
    COND,
    SCAN,
    MarkedBags,
    Path,
    body,
    scan_sizes,
)


def run(
    closed: core.ClosedJaxpr,
    operands: Sequence[Any],
    found: MarkedBags,
    zeros: dict[Path, Array],
    tables: Sequence[Array],
) -> tuple[list[Any], dict[Path, Any]]:
    """Evaluate a program with zeros added to the pooled rows of its marked bags.

    Args:
      closed: the program.
      operands: the operands of the program.
      found: the marked bags.
      zeros: by path, the array to add to the pooled rows.
      tables: the operands with which the marks of tables are replaced, by position.

    Returns:
      The outputs, and by path the winners, ids, offsets and coefficients of each bag.
    """
    runner = _Runner(found, tables)
    return runner.run(closed.jaxpr, closed.consts, operands, (), zeros)


class _Runner(NamedTuple):
    found: MarkedBags
    tables: Sequence[Array]

    def run(
        self,
        jaxpr: core.Jaxpr,
        consts: Sequence[Any],
        operands: Sequence[Any],
        path: Path,
        zeros: dict[Path, Array],
    ) -> tuple[list[Any], dict[Path, Any]]:
        values = dict(zip(jaxpr.constvars, map(_as_array, consts), strict=True))
        values |= zip(jaxpr.invars, operands, strict=True)
        bags: dict[Path, Any] = {}

        def read_all(variables: Sequence[Any]) -> list[Any]:
            return [
                _as_array(v.val) if isinstance(v, core.Literal) else values[v]
                for v in variables
            ]

        for number, equation in enumerate(jaxpr.eqns):
            equation_path = (*path, number)
            ins = read_all(equation.invars)
            outs, inner = self._run_equation(
                equation,
                ins,
                equation_path,
                _within(equation_path, zeros),
                jaxpr.debug_info,
            )
            bags |= inner
            values |= zip(equation.outvars, outs, strict=True)
        return read_all(jaxpr.outvars), bags

    def _run_equation(
        self,
        equation: core.JaxprEqn,
        ins: list[Any],
        path: Path,
        zeros: dict[Path, Array],
        debug_info: Any,
    ) -> tuple[list[Any], dict[Path, Any]]:
        if path in self.found.tables:
            return [self.tables[self.found.tables[path]]], {}
        if path in self.found.calls:
            return [ins[0] + zeros[path]], {path: read(ins, **equation.params)}
        name, params = equation.primitive.name, equation.params
        if not (_within(path, self.found.calls) or _within(path, self.found.tables)):
            return _evaluate(equation, ins, debug_info), {}
        if name == SCAN:
            return self._run_scan(params, ins, path, zeros)
        if name == COND:
            return self._run_cond(params, ins, path, zeros)
        called, consts = body(equation)

        def call(ins: list[Any], zeros: dict[Path, Array]) -> Any:
            return self.run(called, consts, ins, path, zeros)

        if name in CHECKPOINTS:
            options = {k: params[k] for k in ("prevent_cse", "policy")}
            call = jax.checkpoint(call, **options)
        return call(ins, zeros)

    def _run_scan(
        self,
        params: dict[str, Any],
        ins: list[Any],
        path: Path,
        zeros: dict[Path, Array],
    ) -> tuple[list[Any], dict[Path, Any]]:
        step_body = params["jaxpr"]
        num_consts, num_carry = scan_sizes(params)
        consts, rest = ins[:num_consts], ins[num_consts:]

        def step(carry: list[Any], x: Any) -> Any:
            own, zeros = x
            outs, bags = self.run(
                step_body.jaxpr, step_body.consts, [*consts, *carry, *own], path, zeros
            )
            return outs[:num_carry], (outs[num_carry:], bags)

        carry, (stacked, bags) = jax.lax.scan(
            step,
            rest[:num_carry],
            (rest[num_carry:], zeros),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *stacked], bags

    def _run_cond(
        self,
        params: dict[str, Any],
        ins: list[Any],
        path: Path,
        zeros: dict[Path, Array],
    ) -> tuple[list[Any], dict[Path, Any]]:
        index, *operands = ins

        def branch(
            k: int, operands: list[Any], zeros: dict[Path, Array]
        ) -> tuple[list[Any], dict[Path, Any]]:
            closed = params["branches"][k]
            return self.run(closed.jaxpr, closed.consts, operands, (*path, k), zeros)

        branches = [
            functools.partial(branch, k) for k in range(len(params["branches"]))
        ]
        bags: dict[Path, Any] = {}
        for function in branches:
            bags |= jax.eval_shape(function, operands, zeros)[1]

        def with_all_bags(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(operands: list[Any], zeros: dict[Path, Array]) -> Any:
                outs, own = function(operands, zeros)
                others = {p: x for p, x in bags.items() if p not in own}
                return outs, own | jax.tree.map(_no_bags, others)

            return call

        index = jnp.asarray(index, jnp.int32)
        return jax.lax.switch(
            index, [with_all_bags(x) for x in branches], operands, zeros
        )


def _no_bags(x: Any) -> Array:
    """Return a placeholder for the bags of a branch not taken: ids out of range."""
    return jnp.full(x.shape, -2 if jnp.issubdtype(x.dtype, jnp.integer) else 0, x.dtype)


def _within(path: Path, places: dict[Path, Any]) -> dict[Path, Any]:
    return {p: x for p, x in places.items() if p[: len(path)] == path}


def _as_array(x: Any) -> Any:
    """Return a constant as a JAX array; leave numbers."""
    return x if isinstance(x, numbers.Number | np.generic) else jnp.asarray(x)


def _evaluate(
    equation: core.JaxprEqn, operands: list[Any], debug_info: Any
) -> list[Any]:
    """Evaluate an equation as a program of its own."""
    variables: dict[Any, Any] = {
        v: x
        for v, x in zip(equation.invars, operands, strict=True)
        if not isinstance(v, core.Literal)
    }
    names = {
        "arg_names": ("",) * len(variables),
        "result_paths": ("",) * len(equation.outvars),
    }
    jaxpr = core.Jaxpr(
        (),
        list(variables),
        equation.outvars,
        [equation],
        equation.effects,
        debug_info=debug_info._replace(**names),
    )
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))(*variables.values())

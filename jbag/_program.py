"""A traced program as steps, in which sparse bags can be found and tapped."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jaxtyping import Array

from jbag._marks import pooled_mark, read, table_mark

# The calls that are seen through, by name, and the parameter that holds their program.
# Those of the second kind stay calls, as how they are differentiated is their meaning.
_INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr"}
_CHECKPOINTS = {"checkpoint": "jaxpr", "remat2": "jaxpr"}

# Where a value is kept: a number, or the value itself where it is a literal.
Place = Any


class Step(NamedTuple):
    """An equation; a checkpoint has a body."""

    equation: core.JaxprEqn
    ins: tuple[Place, ...]
    outs: tuple[int, ...]
    body: Program | None


class Program(NamedTuple):
    """Steps, from the places of the operands to those of the results."""

    ins: tuple[int, ...]
    steps: list[Step]
    outs: tuple[Place, ...]
    debug_info: Any


class Tap(NamedTuple):
    """What is pooled, in an equation, from the leaf of this number."""

    leaf: int
    equation: core.JaxprEqn

    def zeros(self) -> Array:
        """Return zeros like what is pooled."""
        pooled: Any = self.equation.outvars[0].aval
        placement = self.equation.params["placement"]
        if placement is not None:
            return placement.zeros(pooled.shape, pooled.dtype)
        zeros = jnp.zeros(pooled.shape, pooled.dtype)
        varying = pooled.manual_axis_type.varying  # under `shard_map`
        return jax.lax.pcast(zeros, tuple(varying), to="varying") if varying else zeros


def inline(closed: core.ClosedJaxpr) -> tuple[Program, dict[int, Any]]:
    """Return the program, calls that hold marks replaced by their steps; and constants.

    A constant is kept at its place.
    """
    new_place = itertools.count()
    constants: dict[int, Any] = {}

    def build(jaxpr: core.Jaxpr, consts: Sequence, ins: tuple[Place, ...]) -> Program:
        places: dict[Any, Place] = dict(zip(jaxpr.invars, ins, strict=True))
        for variable, value in zip(jaxpr.constvars, consts, strict=True):
            places[variable] = next(new_place)
            constants[places[variable]] = _as_array(value)

        def read(variables: Sequence) -> tuple[Place, ...]:
            return tuple(v if _is_literal(v) else places[v] for v in variables)

        steps: list[Step] = []
        for equation in jaxpr.eqns:
            operands, body = read(equation.invars), None
            inner = _marked(equation, _INLINED)
            if inner is not None:
                called = build(inner.jaxpr, inner.consts, operands)
                steps += called.steps
                places |= zip(equation.outvars, called.outs, strict=True)
                continue
            inner = _marked(equation, _CHECKPOINTS)
            if inner is not None:
                body = build(inner, (), tuple(next(new_place) for _ in inner.invars))
            results = tuple(next(new_place) for _ in equation.outvars)
            places |= zip(equation.outvars, results, strict=True)
            steps.append(Step(equation, operands, results, body))
        return Program(ins, steps, read(jaxpr.outvars), jaxpr.debug_info)

    ins = tuple(next(new_place) for _ in closed.jaxpr.invars)
    return build(closed.jaxpr, closed.consts, ins), constants


def _is_literal(x: Any) -> bool:
    return isinstance(x, core.Literal)


def _as_array(x: Any) -> Any:
    """Return what a program holds as NumPy's array as one of JAX's."""
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def _marked(equation: core.JaxprEqn, calls: dict[str, str]) -> Any:
    """Return the program that an equation calls, if it is of these and holds marks."""
    name = equation.primitive.name
    called = equation.params[calls[name]] if name in calls else None
    return called if called is not None and _has_marks(called) else None


def _has_marks(jaxpr: Any) -> bool:
    return any(
        equation.primitive is table_mark
        or _marked(equation, _INLINED | _CHECKPOINTS) is not None
        for equation in jaxpr.eqns
    )


class Plan(NamedTuple):
    """What is to be differentiated, and how.

    Attributes:
      taps: where leaves, the program's operands, are pooled, by place of the result.
      cuts: the places behind the mark of a table, and the number of its leaf.
      dense: the leaves on which the first result depends by any other way.
    """

    taps: dict[int, Tap]
    cuts: dict[int, int]
    dense: set[int]


def plan(program: Program) -> Plan:
    """Find what is pooled from marked leaves, and which leaves are used otherwise.

    A table that goes round its mark, as in a derivative that the loss itself takes, is
    an ordinary array: cut off, it would lose a part of its gradient.
    """
    leaf_of = {place: number for number, place in enumerate(program.ins)}
    cuts: dict[int, int] = {}
    taps: dict[int, Tap] = {}
    # What each place depends on, as far as derivatives go: leaves, and cuts.
    sources: dict[Place, frozenset] = {
        place: frozenset([("leaf", number)]) for place, number in leaf_of.items()
    }

    def source(place: Place) -> frozenset:
        return frozenset() if _is_literal(place) else sources.get(place, frozenset())

    def leaf(place: Place) -> int | None:
        return None if _is_literal(place) else leaf_of.get(place)

    def visit(program: Program) -> None:
        for equation, ins, outs, body in program.steps:
            if body is not None:
                for inner, outer in zip(body.ins, ins, strict=True):
                    sources[inner] = source(outer)
                    if leaf(outer) is not None:
                        leaf_of[inner] = leaf_of[outer]
                visit(body)
                sources.update(
                    (outer, source(inner))
                    for inner, outer in zip(body.outs, outs, strict=True)
                )
                continue
            if equation.primitive.name == "stop_gradient":
                continue
            reached = frozenset().union(*map(source, ins))
            if equation.primitive is table_mark and leaf(ins[0]) is not None:
                cuts[outs[0]] = leaf_of[ins[0]]
                reached = frozenset([("cut", outs[0])])
            elif equation.primitive is pooled_mark:
                # Its other operands are there to be read, not to be differentiated.
                reached = source(ins[0])
                if not _is_literal(ins[1]) and ins[1] in cuts:
                    reached -= {("cut", ins[1])}
                    taps[outs[0]] = Tap(cuts[ins[1]], equation)
            for out, variable in zip(outs, equation.outvars, strict=True):
                dtype = getattr(variable.aval, "dtype", jnp.int32)
                if jnp.issubdtype(dtype, jnp.inexact):
                    sources[out] = reached

    visit(program)
    reached = source(program.outs[0])
    around = {cuts[x] for kind, x in reached if kind == "cut"}
    return Plan(
        {place: tap for place, tap in taps.items() if tap.leaf not in around},
        {place: leaf for place, leaf in cuts.items() if leaf not in around},
        around | {x for kind, x in reached if kind == "leaf"},
    )


def run(
    program: Program,
    environment: dict[int, Any],
    plan: Plan,
    zeros: dict[int, Array],
    tables: Sequence[Array],
) -> tuple[list[Any], dict[int, Any]]:
    """Run the program with zeros added at the taps; return results, and the taps' bags.

    Args:
      program: to run.
      environment: the values of its operands, and constants, by place.
      plan: of the program.
      zeros: to add, by place.
      tables: by number, the leaves as they are pooled where the plan cuts.
    """
    environment = dict(environment)
    bags: dict[int, Any] = {}

    def read_all(places: Sequence[Place]) -> list[Any]:
        return [_as_array(x.val) if _is_literal(x) else environment[x] for x in places]

    for equation, ins, outs, body in program.steps:
        operands = read_all(ins)
        if body is not None:
            results, inner_bags = _run_checkpoint(
                equation, body, operands, environment, plan, zeros, tables
            )
            bags |= inner_bags
        elif outs[:1] and outs[0] in plan.cuts:
            results = [tables[plan.cuts[outs[0]]]]
        elif outs[:1] and outs[0] in plan.taps:
            results = [operands[0] + zeros[outs[0]]]
            bags[outs[0]] = read(operands, **equation.params)
        else:
            results = _evaluate(equation, operands, program.debug_info)
        environment.update(zip(outs, results, strict=True))
    return read_all(program.outs), bags


def _run_checkpoint(
    equation: core.JaxprEqn,
    body: Program,
    operands: list[Any],
    environment: dict[int, Any],
    plan: Plan,
    zeros: dict[int, Array],
    tables: Sequence[Array],
) -> tuple[list[Any], dict[int, Any]]:
    @functools.partial(
        jax.checkpoint,
        prevent_cse=equation.params["prevent_cse"],
        policy=equation.params["policy"],
    )
    def call(operands: list[Any], zeros: dict[int, Array]) -> Any:
        inner = environment | dict(zip(body.ins, operands, strict=True))
        return run(body, inner, plan, zeros, tables)

    inside = {out for step in body.steps for out in step.outs}
    return call(operands, {p: x for p, x in zeros.items() if p in inside})


def _evaluate(
    equation: core.JaxprEqn, operands: list[Any], debug_info: Any
) -> list[Any]:
    """Evaluate an equation as a program of its own."""
    variables: dict[Any, Any] = {
        v: x
        for v, x in zip(equation.invars, operands, strict=True)
        if not _is_literal(v)
    }
    jaxpr = core.Jaxpr(
        (),
        list(variables),
        equation.outvars,
        [equation],
        equation.effects,
        debug_info=debug_info,
    )
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))(*variables.values())

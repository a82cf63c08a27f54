"""Analysis of a jaxpr: finds the marked bags and their tables.

It enters calls, checkpoints, `scan` and `cond` that contain marks; any other equation
is opaque. `_jaxpr_interpreter` enters the same equations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array

from jbag.ops._sparse_marks import pooled_mark, table_mark

# The primitives that the analysis enters, by name, and the parameter with their jaxpr.
# An exported program has `closed_call` in place of `jit`.
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr"}
CHECKPOINTS = {"checkpoint": "jaxpr", "remat2": "jaxpr"}
SCAN, COND, STOP_GRADIENT = "scan", "cond", "stop_gradient"

# The position of an equation in its jaxpr, after the positions of enclosing equations.
Path = tuple[int, ...]


class PooledCall(NamedTuple):
    """A marked bag whose table is an operand of the program.

    Attributes:
      leaf: the position of the operand.
      equation: the mark of the pooled rows.
      loops: the lengths of the enclosing scans, outermost first.
    """

    leaf: int
    equation: core.JaxprEqn
    loops: tuple[int, ...]

    def zeros(self) -> Array:
        """Return zeros of the shape of the pooled rows in all iterations."""
        pooled: Any = self.equation.outvars[0].aval
        placement = self.equation.params["placement"]
        zeros = placement.zeros((*self.loops, *pooled.shape), pooled.dtype)
        if placement.over_mesh:
            return zeros
        varying = pooled.manual_axis_type.varying  # under `shard_map`
        return jax.lax.pcast(zeros, tuple(varying), to="varying") if varying else zeros


class MarkedBags(NamedTuple):
    """The result of the analysis.

    Attributes:
      calls: by path, the marked bags whose gradient can be row-sparse.
      tables: by path, the marks of tables, and the position of the operand.
      dense: the operands on which the first output depends in any other way.
      requested: the operands that marked bags pool, also those in `dense`.
      has_refs: whether the program has references; then the analysis is not valid.
    """

    calls: dict[Path, PooledCall]
    tables: dict[Path, int]
    dense: frozenset[int]
    requested: frozenset[int]
    has_refs: bool


class _Value(NamedTuple):
    """The dependencies of a variable.

    Attributes:
      sources: the positions of operands, and the paths of marks of tables, that its
        derivative depends on.
      leaf: the operand that it is equal to, or None.
      table: the path of the table's mark whose output it is, or None.
    """

    sources: frozenset[Any] = frozenset()
    leaf: int | None = None
    table: Path | None = None


def find_marked_bags(closed: core.ClosedJaxpr) -> MarkedBags:
    """Find the marked bags of a program, and the operands with other uses."""
    search = _Search()
    operands = [_Value(frozenset([k]), k) for k in range(len(closed.jaxpr.invars))]
    results = search.visit(closed.jaxpr, operands, (), ())
    first = results[0] if results else _Value()
    # If the output depends on a table's mark other than through pooled rows, as with a
    # derivative inside the loss, the table needs its full dense gradient.
    bypassed = {search.tables[x] for x in first.sources if isinstance(x, tuple)}
    dense = bypassed | {x for x in first.sources if isinstance(x, int)}
    return MarkedBags(
        {p: call for p, call in search.calls.items() if call.leaf not in bypassed},
        {p: leaf for p, leaf in search.tables.items() if leaf not in bypassed},
        frozenset(dense),
        frozenset(search.requested),
        search.has_refs,
    )


@dataclasses.dataclass
class _Search:
    calls: dict[Path, PooledCall] = dataclasses.field(default_factory=dict)
    tables: dict[Path, int] = dataclasses.field(default_factory=dict)
    requested: set[int] = dataclasses.field(default_factory=set)
    has_refs: bool = False

    def visit(
        self,
        jaxpr: core.Jaxpr,
        operands: Sequence[_Value],
        path: Path,
        loops: tuple[int, ...],
    ) -> list[_Value]:
        """Return the dependencies of the outputs."""
        known = dict(zip(jaxpr.invars, operands, strict=True))

        def of(variable: Any) -> _Value:
            if isinstance(variable, core.Literal):
                return _Value()
            return known.get(variable, _Value())

        for number, equation in enumerate(jaxpr.eqns):
            ins = [of(variable) for variable in equation.invars]
            outs = self._visit_equation(equation, ins, (*path, number), loops)
            for variable, value in zip(equation.outvars, outs, strict=True):
                self.has_refs |= not _is_array_type(variable.aval)
                if jnp.issubdtype(_dtype(variable), jnp.inexact):
                    known[variable] = value
            self.has_refs |= not all(_is_array_type(x.aval) for x in equation.invars)
        return [of(variable) for variable in jaxpr.outvars]

    def _visit_equation(
        self,
        equation: core.JaxprEqn,
        ins: list[_Value],
        path: Path,
        loops: tuple[int, ...],
    ) -> list[_Value]:
        name, params = equation.primitive.name, equation.params
        reached = frozenset().union(*(value.sources for value in ins))
        if equation.primitive is table_mark:
            self.requested |= {x for x in ins[0].sources if isinstance(x, int)}
            if ins[0].leaf is not None:
                self.tables[path] = ins[0].leaf
                reached = frozenset([path])
            return [_Value(reached, table=path if path in self.tables else None)]
        if equation.primitive is pooled_mark:
            # The output depends only on the first operand, the pooled rows.
            table = ins[1].table
            over_mesh = params["placement"].over_mesh
            if table is None or (over_mesh and loops):
                return [_Value(ins[0].sources)]
            self.calls[path] = PooledCall(self.tables[table], equation, loops)
            return [_Value(ins[0].sources - {table})]
        if name == STOP_GRADIENT:
            return [_Value() for _ in equation.outvars]
        if not _has_marks(equation):
            return [_Value(reached) for _ in equation.outvars]
        if name in CALLS or name in CHECKPOINTS:
            called, _ = body(equation)
            return self.visit(called, ins, path, loops)
        if name == SCAN:
            return self._visit_scan(equation, ins, path, loops)
        if name == COND:
            return self._visit_cond(equation, ins, path, loops)
        self.requested |= {x for x in reached if isinstance(x, int)} & set(
            _marked_operands(equation, ins)
        )
        return [_Value(reached) for _ in equation.outvars]

    def _visit_scan(
        self,
        equation: core.JaxprEqn,
        ins: list[_Value],
        path: Path,
        loops: tuple[int, ...],
    ) -> list[_Value]:
        body = equation.params["jaxpr"].jaxpr
        num_consts, num_carry = scan_sizes(equation.params)
        loops = (*loops, equation.params["length"])
        consts, changing = ins[:num_consts], ins[num_consts:]
        changing = [_Value(value.sources) for value in changing]
        while True:
            outs = self.visit(body, [*consts, *changing], path, loops)
            carry = [
                _Value(before.sources | after.sources)
                for before, after in zip(
                    changing[:num_carry], outs[:num_carry], strict=True
                )
            ]
            if carry == changing[:num_carry]:
                return [_Value(value.sources) for value in outs]
            changing[:num_carry] = carry

    def _visit_cond(
        self,
        equation: core.JaxprEqn,
        ins: list[_Value],
        path: Path,
        loops: tuple[int, ...],
    ) -> list[_Value]:
        branches = [
            self.visit(branch.jaxpr, ins[1:], (*path, k), loops)
            for k, branch in enumerate(equation.params["branches"])
        ]
        return [
            _Value(frozenset().union(*(value.sources for value in values)))
            for values in zip(*branches, strict=True)
        ]


def scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """Return the numbers of constants and carried values of a scan."""
    if "num_consts" in params:  # before JAX 0.12
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def body(equation: core.JaxprEqn) -> tuple[core.Jaxpr, Sequence[Any]]:
    """Return the jaxpr of a call, and its constants."""
    called = equation.params[(CALLS | CHECKPOINTS)[equation.primitive.name]]
    closed = isinstance(called, core.ClosedJaxpr)
    return (called.jaxpr, called.consts) if closed else (called, ())


def _marked_operands(equation: core.JaxprEqn, ins: list[_Value]) -> Iterator[int]:
    """Yield the operands that marked bags in an opaque equation may pool."""
    for jaxpr in core.jaxprs_in_params(equation.params):
        corresponds = len(jaxpr.invars) == len(ins)
        inner = _Search()
        operands = [_Value(frozenset([k]), k) for k in range(len(jaxpr.invars))]
        inner.visit(jaxpr, operands, (), ())
        for k, value in enumerate(ins):
            if not corresponds or k in inner.requested:
                yield from (x for x in value.sources if isinstance(x, int))


def _has_marks(equation: core.JaxprEqn) -> bool:
    return any(
        inner.primitive is table_mark or _has_marks(inner)
        for jaxpr in core.jaxprs_in_params(equation.params)
        for inner in jaxpr.eqns
    )


def _is_array_type(aval: Any) -> bool:
    return isinstance(aval, jax.core.ShapedArray)


def _dtype(variable: Any) -> Any:
    return getattr(variable.aval, "dtype", jnp.int32)

"""The implementations by name, and which one a platform gets.

A kernel is a module with the six operations of `contract`.
"""

from __future__ import annotations

import dataclasses

from jbag.ops.kernels import cpu, xla
from jbag.ops.kernels.contract import Operations
from jbag.ragged._csr import Size


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One implementation: its operations, and the platforms it runs on (None: all).

    `missing` says why this installation doesn't have it. One that is not `portable`
    runs only where jbag itself is loaded, which an exported program can't count on.
    `max_rows` is the largest number of rows that a table may have (None: any).
    """

    operations: Operations  # a module
    platforms: tuple[str, ...] | None = None
    missing: str | None = None
    portable: bool = False
    max_rows: int | None = None

    def runs_on(self, platform: str | None) -> bool:
        """Whether it runs on a platform; None is any that no kernel is made for."""
        return self.platforms is None or platform in self.platforms

    def holds(self, rows: Size) -> bool:
        """Whether a table may have so many rows; a symbolic number is taken to fit."""
        fits = self.max_rows is None or not isinstance(rows, int)
        return fits or rows <= self.max_rows


# The best first: a platform gets the first that runs on it.
KERNELS: dict[str, Kernel] = {
    "cpu": Kernel(cpu, platforms=("cpu",), missing=cpu.MISSING, max_rows=cpu.MAX_ROWS),
    "xla": Kernel(xla, portable=True),
}


def check_implementation(implementation: object) -> None:
    """Raise ValueError unless `implementation` is None or names an available kernel."""
    known = implementation is None or isinstance(implementation, str)
    if not known or (implementation is not None and implementation not in KERNELS):
        raise ValueError(
            f"`implementation` must be None or one of {', '.join(map(repr, KERNELS))}; "
            f"got {implementation!r}."
        )
    if isinstance(implementation, str):
        missing = KERNELS[implementation].missing
        if missing is not None:
            raise ValueError(
                f"`implementation` {implementation!r} is not available: {missing}."
            )


def choose(
    implementation: str | None,
    platform: str | None,
    *,
    exported: bool = False,
    rows: Size = 0,
) -> Kernel:
    """Return the named kernel, or the best one; `platform` None is any other platform.

    The best one for a program that is `exported` is portable: it runs elsewhere. It
    takes a table of so many `rows`.

    Raises:
      ValueError: the named kernel doesn't run on `platform`, or takes fewer rows.
    """
    if implementation is None:
        return next(
            kernel
            for kernel in KERNELS.values()
            if kernel.runs_on(platform)
            and kernel.missing is None
            and (kernel.portable or not exported)
            and kernel.holds(rows)
        )
    kernel = KERNELS[implementation]
    if not kernel.runs_on(platform):
        raise ValueError(
            f"`implementation` {implementation!r} runs on {kernel.platforms}, "
            f"not on {platform or 'this platform'}."
        )
    if not kernel.holds(rows):
        raise ValueError(
            f"`implementation` {implementation!r} takes tables of at most "
            f"{kernel.max_rows} rows; got {rows}."
        )
    return kernel


def special_platforms() -> set[str]:
    """Return the platforms that some kernel is made for."""
    return {p for kernel in KERNELS.values() for p in kernel.platforms or ()}

"""The table of kernels, and the choice of one for a platform.

A kernel is a module that implements the six operations of `contract`.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from jaxtyping import Array, Shaped

from jbag.ops._packed_table import PackedTable
from jbag.ops.kernels import cpu, cuda, xla, xla_gpu
from jbag.ops.kernels.contract import Operations
from jbag.ragged._csr_arrays import Size


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An implementation of the operations.

    Attributes:
      module: a module with the six operations; or its name, to import it on use.
      platforms: the platforms that it runs on; None means all.
      preferred_on: the platforms that get it by default: none of them if empty, all of
        `platforms` if None.
      missing: why the kernel is not installed, or None.
      portable: whether an exported program runs without jbag.
      max_rows: the largest number of rows of a table; None means any.
      reads_packed: whether the operations take a `PackedTable`; else it is unpacked.
    """

    module: Operations | str
    platforms: tuple[str, ...] | None = None
    preferred_on: tuple[str, ...] | None = None
    missing: str | None = None
    portable: bool = False
    max_rows: int | None = None
    reads_packed: bool = False

    @property
    def operations(self) -> Operations:
        """The module with the six operations."""
        module: Any = self.module
        return importlib.import_module(module) if isinstance(module, str) else module

    def readable(self, table: Shaped[Array, "V ..."] | PackedTable) -> Any:
        """Return a table, or a state of an optimizer, that the operations take."""
        if self.reads_packed or not isinstance(table, PackedTable):
            return table
        return table.packing.unpack(table.lines)

    def runs_on(self, platform: str | None) -> bool:
        """Return whether the kernel runs on a platform.

        None stands for a platform that no kernel lists.
        """
        return self.platforms is None or platform in self.platforms

    def is_preferred_on(self, platform: str | None) -> bool:
        """Return whether a platform may get the kernel by default."""
        preferred = self.preferred_on is None or platform in self.preferred_on
        return preferred and self.runs_on(platform)

    def holds(self, rows: Size) -> bool:
        """Return whether a table may have so many rows; a symbolic number may."""
        fits = self.max_rows is None or not isinstance(rows, int)
        return fits or rows <= self.max_rows


# In order of preference.
KERNELS: dict[str, Kernel] = {
    "cpu": Kernel(cpu, platforms=("cpu",), missing=cpu.MISSING, max_rows=cpu.MAX_ROWS),
    # No GPU has run it yet.
    "cuda": Kernel(
        cuda,
        platforms=("cuda",),
        missing=cuda.MISSING,
        max_rows=cuda.MAX_ROWS,
        preferred_on=(),
    ),
    # No TPU has run these two yet. Pallas takes a second to import.
    "sparsecore": Kernel(
        "jbag.ops.kernels.sparsecore",
        platforms=("tpu",),
        preferred_on=(),
        max_rows=2**31 - 1,  # the indices of a stream have 32 bits
        reads_packed=True,
    ),
    "tensorcore": Kernel(
        "jbag.ops.kernels.tensorcore",
        platforms=("tpu",),
        preferred_on=(),
        portable=True,
        max_rows=2**31 - 1,  # SMEM holds ids of 32 bits
        reads_packed=True,
    ),
    "xla_gpu": Kernel(xla_gpu, preferred_on=("cuda", "rocm"), portable=True),
    "xla": Kernel(xla, portable=True, reads_packed=True),
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
    """Return the named kernel, or by default the first of `KERNELS` that fits.

    A kernel fits if it is installed, is preferred on `platform`, takes a table with
    `rows` rows and, for an `exported` program, is portable. A `platform` of None stands
    for all platforms that no kernel lists.

    Raises:
      ValueError: the named kernel doesn't run on `platform`, or takes fewer rows.
    """
    if implementation is None:
        return next(
            kernel
            for kernel in KERNELS.values()
            if kernel.is_preferred_on(platform)
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
    """Return the platforms that the kernels list."""
    return {
        platform
        for kernel in KERNELS.values()
        for platform in (*(kernel.platforms or ()), *(kernel.preferred_on or ()))
    }

"""Tables in Markdown, their place in README.md, and figures, for every benchmark."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import jbag

README = Path(__file__).with_name("README.md")

Row = dict[str, str]  # the cells by the names of their columns


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine(*distributions: str) -> str:
    """Return a line with the processor, the number of cores and the versions."""
    info = Path("/proc/cpuinfo")
    found = re.search("model name.*: (.*)", info.read_text() if info.exists() else "")
    cpu = found[1] if found else platform.processor() or platform.machine()
    names = ("jbag", "jax", "jaxlib", *distributions)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    return f"{cpu}; {count_cores()} cores; {', '.join(versions)}."


def table(rows: Sequence[Row], names: int = 1) -> list[str]:
    """Return the lines of a table whose first `names` columns are no numbers."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    # Names have a minimum width, to align rows that are printed one by one.
    least = [16 if i < names else 3 for i in range(len(rows[0]))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths = [max(pair) for pair in zip(widths, least, strict=True)]
    rule = ["-" * width for width in widths[:names]]
    rule += ["-" * (width - 1) + ":" for width in widths[names:]]
    lines.insert(1, rule)
    for line in lines:
        for i, width in enumerate(widths):
            line[i] = line[i].ljust(width) if i < names else line[i].rjust(width)
    return [f"| {' | '.join(line)} |" for line in lines]


def write(
    program: str,
    rows: Sequence[Row],
    statement: str,
    names: int = 1,
    path: Path = README,
) -> None:
    """Replace the table between the comments `program` and `end of program`.

    The statement of the machine comes before the table. Rows with other names stay if
    they have the same columns and the same statement.
    """
    text = path.read_text(encoding="utf-8")
    first, last = f"<!-- {program} -->\n", f"<!-- end of {program} -->\n"
    before, begins, rest = text.partition(first)
    old, ends, after = rest.partition(last)
    if not begins or not ends:
        sys.exit(f"{path}: there must be {first.strip()} and then {last.strip()}.")
    lines = [line for line in old.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    kept = []
    if cells and cells[0] == list(rows[0]) and statement in old.splitlines():
        kept = [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]
    merged = {tuple(row.values())[:names]: row for row in (*kept, *rows)}
    made = "\n".join(["", statement, "", *table([*merged.values()], names), "", ""])
    with jbag.atomic_write(path) as temporary:
        temporary.write_text(before + first + made + last + after, encoding="utf-8")


def plot(rows: Sequence[Row], label: str, path: str, names: int = 1) -> None:
    """Draw the ratios, the columns "x ...", as bars from 1, one panel a first name."""
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.ticker import LogLocator

    panels: dict[str, list[Row]] = {}
    for row in rows:
        title = next(iter(row.values())) if names > 1 else ""
        panels.setdefault(title, []).append(row)
    peers = [column for column in rows[0] if column.startswith("x ")]
    height = 1.2 + 0.5 * len(panels) + 0.2 * len(rows) * len(peers)
    figure = Figure((8, height), layout="constrained")
    sizes = [len(own) for own in panels.values()]
    grid = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=sizes)
    for axes, (title, own) in zip(grid[:, 0], panels.items(), strict=True):
        axes.use_sticky_edges = False  # margins on both sides of 1
        for i, peer in enumerate(peers):
            cells = [row[peer] if row[peer] != "-" else "nan" for row in own]
            at = np.arange(len(own)) + 0.8 * ((i + 0.5) / len(peers) - 0.5)
            lengths = np.array(cells, float) - 1
            bars = axes.barh(at, lengths, 0.8 / len(peers), left=1, label=peer)
            shown = [cell if cell != "nan" else "" for cell in cells]
            axes.bar_label(bars, shown, fontsize=7, padding=2)
        axes.set_yticks(range(len(own)), [[*row.values()][names - 1] for row in own])
        axes.set_title(title, loc="left")  # beside the legend
        axes.set(xscale="log", xmargin=0.1)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.invert_yaxis()
        axes.axvline(1, color="black", linewidth=0.8)
    grid[-1, 0].set_xlabel(label)
    if len(peers) > 1:
        handles = grid[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", ncols=len(peers))
    with jbag.atomic_write(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:] or "png")

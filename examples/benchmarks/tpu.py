"""Measure pooling, gradients and training steps on a TPU; print a table in Markdown.

    python examples/benchmarks/tpu.py --write        # everything, in some ten minutes
    python examples/benchmarks/tpu.py --workload main --measure sum "step Adam"
    python examples/benchmarks/tpu.py --quick        # small, to see that it runs

The sides are jbag's default on a table that is packed, as modules have it ("jbag"), on
an array ("array"), and the kernels for TPUs by name, on the packed table. Times are
those of `gpu.py`: of calls that are queued together, each with other ids. "x array" is
how many times as fast as on the array the fastest of the others is.

"of HBM" is the rate at which the fastest side moves the bytes that have to be moved
(rows once, and what is written) as a share of the memory's bandwidth: that of Google's
data sheets, or of a copied array on an unknown device. "copies" is the memory that the
default's program takes beside its operands and results, in tables: 1 or more says that
a call copies the table. Tables have 1 GiB.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
from tqdm import tqdm

import gpu
import jbag
import report
from gpu import Measurement, Workload
from jbag.ops.kernels import KERNELS

TABLE = 1 << 28  # numbers in a float32 table
WORKLOADS = (
    Workload("main", V=TABLE // 128),
    Workload("bfloat16", V=TABLE // 64, dtype="bfloat16"),
    Workload("Zipf", V=TABLE // 128, ids="Zipf"),
    Workload("bags of 1", V=TABLE // 128, B=524_288, mean_length=1),
    Workload("D = 16", V=TABLE // 16, D=16),
    Workload("D = 64", V=TABLE // 64, D=64),
    Workload("D = 300", V=TABLE // 300, D=300),
)
MEASUREMENTS = tuple(
    each
    for each in gpu.MEASUREMENTS
    if each.name not in ("mean", "weighted sum", "step Adagrad")
)
# Bytes a second by the device's name in JAX (Google Cloud, TPU architecture).
HBM_BANDWIDTH = {
    "TPU v4": 1228e9,
    "TPU v5 lite": 819e9,
    "TPU v5": 2765e9,
    "TPU v6 lite": 1640e9,
    "TPU7x": 7380e9,
}


@dataclass
class Figures:
    """The milliseconds of each side, and what the default's program takes."""

    times: dict[str, float] = field(default_factory=dict)
    temporary_bytes: int | None = None


@dataclass(frozen=True)
class Side:
    """A kernel by name, or the default; and whether the table is packed."""

    implementation: str | None
    packed: bool


def available_sides() -> dict[str, Side]:
    """Return the sides that this machine has."""
    platform = jax.default_backend()
    kernels = {
        name: Side(name, packed=True)
        for name, kernel in KERNELS.items()
        if kernel.missing is None and platform in (kernel.platforms or ())
    }
    return {"jbag": Side(None, True), "array": Side(None, False)} | kernels


def measure(
    workload: Workload, what: Measurement, sides: dict[str, Side], rounds: int
) -> Figures:
    """Measure each side; those that fail say why."""
    batches = list(gpu.make_batches(workload))
    found = Figures()
    for name, side in sides.items():
        try:
            function, table = gpu.jbag_program(
                workload, what, side.implementation, side.packed
            )
            compiled = function.lower(table, *batches[0]).compile()
            if name == "jbag":
                memory = compiled.memory_analysis()
                found.temporary_bytes = memory.temp_size_in_bytes
            trains = bool(what.optimizer)
            call = gpu.jbag_call(compiled, table, batches, trains=trains)
            del table  # Or a step's first table would be held beside the others.
            found.times[name] = gpu.milliseconds(call, rounds)
        # What doesn't fit a device, or a kernel, is no reason to lose other figures.
        except (RuntimeError, ValueError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            tqdm.write(f"{workload.name}, {what.name}, {name}: {reason}", sys.stderr)
    return found


def make_row(
    workload: Workload,
    what: Measurement,
    found: Figures,
    sides: dict[str, Side],
    bandwidth: float,
) -> report.Row:
    """Return the cells of a case."""
    times = found.times
    row = {"workload": workload.name, "measurement": what.name}
    for side in sides:
        row[f"{side} (ms)"] = f"{times[side]:.3f}" if side in times else "-"
    others = [time for side, time in times.items() if side != "array"]
    both = others and "array" in times
    row["x array"] = f"{times['array'] / min(others):.2f}" if both else "-"
    moved = gpu.least_bytes(workload, what, next(gpu.make_batches(workload)))
    share = moved / (min(times.values()) / 1e3) / bandwidth if times else 0
    row["of HBM"] = f"{share:.0%}" if times else "-"
    size = workload.V * workload.D * jax.numpy.dtype(workload.dtype).itemsize
    temporary = found.temporary_bytes
    row["copies"] = "-" if temporary is None else f"{temporary / size:.2f}"
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = gpu.parse_arguments(argv, __doc__ or "", WORKLOADS, MEASUREMENTS)
    workloads = [each for each in WORKLOADS if each.name in args.workload]
    measurements = [each for each in MEASUREMENTS if each.name in args.measure]
    if args.quick:
        args.rounds = 1
        workloads = [replace(w, V=w.V // 1000, B=w.B // 256) for w in workloads]
    sides = available_sides()
    device = jax.devices()[0].device_kind
    copies = gpu.copy_bandwidth(2**20 if args.quick else 2**30, args.rounds)
    bandwidth = HBM_BANDWIDTH.get(device, copies)
    statement = (
        f"{device}, {bandwidth / 1e12:.3g} TB/s, copies {copies / 1e12:.3g} TB/s; "
        f"{report.machine()}"
    )
    print(f"{statement}\n")
    rows: list[report.Row] = []
    results = []
    cases = [(each, what) for each in workloads for what in measurements]
    for workload, what in tqdm(cases, unit="case", disable=None):
        found = measure(workload, what, sides, args.rounds)
        rows.append(make_row(workload, what, found, sides, bandwidth))
        results.append(
            {
                **rows[-1],
                "milliseconds": found.times,
                "temporary_bytes": found.temporary_bytes,
            }
        )
        for line in report.table(rows[-1:], names=2)[2 * (len(rows) > 1) :]:
            tqdm.write(line, file=sys.stdout)
    if args.plot:
        report.plot(rows, "times as fast as on an array", args.plot, names=2)
    if args.write:
        report.write("tpu.py", rows, statement, names=2)
    if args.json:
        with jbag.atomic_write(args.json) as temporary:
            temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

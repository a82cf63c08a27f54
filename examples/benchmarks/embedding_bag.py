"""Measure the embedding bag on CPU against its peers; print a table in Markdown.

    python examples/benchmarks/embedding_bag.py
    python examples/benchmarks/embedding_bag.py --quick
    python examples/benchmarks/embedding_bag.py --workload "long bags" --measure sum max
    python examples/benchmarks/embedding_bag.py --plot speed.png --json speed.json
    python examples/benchmarks/embedding_bag.py --write

The sides are `jbag.embedding_bag`, the same on a table that lies on huge pages, its
portable implementation (the reference), `torch.nn.functional.embedding_bag` where
PyTorch is installed, and the product with JAX's sparse CSR matrix. A time is the median
of many calls, each on ids that it hasn't just seen, the sides taking turns. Each may
use all the process's cores: `taskset -c 0-3 python ...` leaves four.

"x torch" is how many times as fast as torch jbag is. "of gather bandwidth" is the rate
at which jbag reads rows, as a share of the highest at which this machine can read
random rows of such a table (gather_bandwidth.cc; it takes a C++ compiler). Where few
rows make up most of the ids, caches hold them, and the share may pass 100%.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse
from tqdm import tqdm

import jbag
import report

RING = 24  # batches made beforehand, so that ids come back late
TURN = 5  # timed calls of a side before the next side's
COMPILE = ("c++", "-std=c++17", "-O3", "-march=native", "-pthread")
to_huge_pages: Any = getattr(jbag, "to_huge_pages", None)


@dataclass(frozen=True)
class Workload:
    """A table, [V, D], and batches of B bags that are pooled from it."""

    name: str
    V: int
    D: int
    B: int
    mean_length: int
    user: str
    ids: str = "uniform"  # or "Zipf"; or "few", of 64 rows
    one_huge_bag: bool = False  # of half of all ids


@dataclass(frozen=True)
class Measurement:
    """What is done with a batch."""

    name: str
    mode: str = "sum"
    weighted: bool = False
    dtype: str = "float32"
    gradient: bool = False  # forward, and the dense gradient of the table


WIDE = (1_000_000, 64, 4096, 20)
WORKLOADS = (
    Workload("wide vocabulary", *WIDE, "a recommender's items"),
    Workload("long bags", 100_000, 128, 1024, 50, "words of documents"),
    Workload("narrow rows", 1_000_000, 16, 16384, 10, "hashed categories of clicks"),
    Workload("text classifier", 1_000_000, 10, 4096, 20, "n-grams, as in fastText"),
    Workload("word vectors", 100_000, 300, 1024, 20, "pretrained, one bag a sentence"),
    Workload("Zipf ids", *WIDE, "few items are popular", ids="Zipf"),
    Workload("one huge bag", *WIDE, "half of all ids in it", one_huge_bag=True),
    Workload("64 rows", *WIDE, "all ids are of 64 rows", ids="few"),
)
MEASUREMENTS = (
    Measurement("sum"),
    Measurement("mean", mode="mean"),
    Measurement("weighted sum", weighted=True),
    Measurement("max", mode="max"),
    Measurement("bfloat16 sum", dtype="bfloat16"),
    Measurement("sum and gradient", gradient=True),
)

Batch = tuple[np.ndarray, ...]  # ids [N], offsets [B + 1] and weights [N]
Result = dict[str, Any]  # names, milliseconds and shares of the gather bandwidth
Call = Callable[[int], Any]  # does the work of a batch, by number, to its end


class Case(NamedTuple):
    """A measurement of a workload."""

    workload: Workload
    measurement: Measurement
    batches: list[Batch]

    def table(self) -> jax.Array:
        """Return the table, each time in new memory."""
        return uniform(self.workload.V, self.workload.D, self.measurement.dtype)


# Not from NumPy, whose large arrays lie on huge pages, as parameters don't.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def uniform(rows: int, columns: int, dtype: str = "float32") -> jax.Array:
    """Return numbers between -1 and 1, each time the same."""
    return jax.random.uniform(jax.random.key(0), (rows, columns), dtype, -1, 1)


def make_batches(workload: Workload) -> Iterator[Batch]:
    """Yield ragged batches, each of B times the mean length ids: no slot is unused."""
    rng = np.random.default_rng(0)
    V, B, N = workload.V, workload.B, workload.B * workload.mean_length
    rows = rng.permutation(V)  # Popular ones aren't neighbours.
    popularity = np.cumsum(1 / np.arange(1, V + 1))
    huge = N // 2 if workload.one_huge_bag else 0
    for _ in range(RING):
        if workload.ids == "Zipf":
            ranks = np.searchsorted(popularity, rng.uniform(0, popularity[-1], N))
        else:
            ranks = rng.integers(64 if workload.ids == "few" else V, size=N)
        # Lengths of Poisson, given their total, are multinomial.
        lengths = rng.multinomial(N - huge, np.full(B, 1 / B))
        lengths[B // 2] += huge
        offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
        yield rows[ranks].astype(np.int32), offsets, rng.random(N, np.float32)


def jax_call(case: Case, table: jax.Array, pool: Callable[..., jax.Array]) -> Call:
    """Jit `pool`, or it and its gradient."""
    ring = [jax.device_put(batch) for batch in case.batches]
    if not case.measurement.gradient:
        forward = jax.jit(pool)
        return lambda k: forward(table, *ring[k % RING]).block_until_ready()

    def loss(table: jax.Array, cotangent: jax.Array, *batch: jax.Array) -> jax.Array:
        return jnp.sum(pool(table, *batch) * cotangent)

    both = jax.jit(jax.value_and_grad(loss))
    cotangent = uniform(case.workload.B, case.workload.D)
    return lambda k: jax.block_until_ready(both(table, cotangent, *ring[k % RING]))


def jbag_pool(case: Case, implementation: str | None = None) -> Any:
    """Return this library's embedding bag: the best kernel, or the one of that name."""
    return lambda table, ids, offsets, weights: jbag.embedding_bag(
        table,
        ids,
        offsets,
        mode=case.measurement.mode,
        weights=weights if case.measurement.weighted else None,
        include_last_offset=True,
        implementation=implementation,
    )


def torch_call(case: Case) -> Call:
    """Use PyTorch, on a table in memory that it allocates."""
    import torch  # Not everyone has it.

    table = torch.from_dlpack(case.table()).clone()
    table.requires_grad_(case.measurement.gradient)
    cotangent = torch.from_dlpack(uniform(case.workload.B, case.workload.D))
    # 32-bit ids: PyTorch takes them as they are, and there is less to read.
    ring = [tuple(map(torch.tensor, batch)) for batch in case.batches]

    def call(k: int) -> Any:
        ids, offsets, weights = ring[k % RING]
        out = torch.nn.functional.embedding_bag(
            ids,
            table,
            offsets,
            mode=case.measurement.mode,
            per_sample_weights=weights if case.measurement.weighted else None,
            include_last_offset=True,
        )
        if not case.measurement.gradient:
            return out
        table.grad = None
        loss = (out * cotangent).sum()
        loss.backward()
        return loss, table.grad

    return call


def csr_call(case: Case) -> Call | None:
    """Use JAX's product of a sparse matrix and a dense one."""
    what = case.measurement
    # For the rest JAX has no CSR kernel, and expands the product to [N, D].
    if what.mode != "sum" or what.dtype != "float32":
        return None

    def pool(table: jax.Array, *batch: jax.Array) -> jax.Array:
        ids, offsets, weights = batch
        data = weights if what.weighted else jnp.ones_like(weights)
        shape = (offsets.size - 1, table.shape[0])
        return sparse.BCSR((data, ids, offsets), shape=shape) @ table

    return jax_call(case, case.table(), pool)


# A side returns None for a case that isn't for it.
SIDES: dict[str, Callable[[Case], Call | None]] = {
    "jbag": lambda case: jax_call(case, case.table(), jbag_pool(case)),
    "jbag, huge pages": lambda case: jax_call(
        case, to_huge_pages(case.table()), jbag_pool(case)
    ),
    "reference": lambda case: jax_call(case, case.table(), jbag_pool(case, "xla")),
    "torch": torch_call,
    "JAX's CSR": csr_call,
}
FORWARD_ONLY = {"jbag, huge pages", "JAX's CSR"}


def check_agreement(case: Case, calls: dict[str, Call]) -> None:
    """Compile the sides; exit unless all compute the same."""
    found = {}
    for side, call in calls.items():
        result = call(0)
        values = result[1] if case.measurement.gradient else result
        found[side] = np.array(values[:256].tolist())
        # Far more than rounding makes.
        if not np.allclose(found[side], found["jbag"], rtol=0.03, atol=0.03):
            sys.exit(f"{side} and jbag differ: {case.workload}, {case.measurement}")


def time_in_turns(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of a call of each side."""
    seconds: dict[str, list[float]] = {side: [] for side in calls}
    for first in range(0, rounds * (TURN + 1), TURN + 1):
        for side, call in calls.items():
            call(first)  # Untimed: caches and threads are still the last side's.
            for k in range(first + 1, first + 1 + TURN):
                start = time.perf_counter()
                call(k)  # And free what it returns: large memory has its price.
                seconds[side].append(time.perf_counter() - start)
    return {side: 1e3 * statistics.median(times) for side, times in seconds.items()}


@functools.cache
def run(*command: str) -> str | None:
    """Return what a command prints; print why it can't. Once for each command."""
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.PIPE)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or error
        tqdm.write(f"No gather bandwidth: {reason}\n", file=sys.stdout)
        return None


def measure(case: Case, sides: list[str], gather: list[str], rounds: int) -> Result:
    """Time the sides on a case; `gather` is the command of gather_bandwidth.cc."""
    workload, measurement = case.workload, case.measurement
    skipped = FORWARD_ONLY if measurement.gradient else set()
    made = {side: SIDES[side](case) for side in sides if side not in skipped}
    calls = {side: call for side, call in made.items() if call is not None}
    check_agreement(case, calls)
    times = time_in_turns(calls, rounds)
    width = workload.D * jnp.dtype(measurement.dtype).itemsize
    shares: dict[str, float] = {}
    for side, options in (("jbag", []), ("jbag, huge pages", ["--huge-pages"])):
        if gather and side in calls and not measurement.gradient:
            printed = run(*gather, str(workload.V), str(width), *options)
            rate = workload.B * workload.mean_length * width / times[side] / 1e6
            shares |= {side: rate / float(printed)} if printed else {}
    result = {"workload": workload.name, "measurement": measurement.name}
    return {**result, "milliseconds": times, "gather_bandwidth": shares}


def cells(result: Result, sides: list[str]) -> dict[str, str]:
    """Return a row of the table, by the names of its columns."""
    times, shares = result["milliseconds"], result["gather_bandwidth"]
    row = {name: result[name] for name in ("workload", "measurement")}
    for side in sides:
        row[f"{side} (ms)"] = f"{times[side]:.2f}" if side in times else "-"
    for peer in [side for side in ("torch", "reference") if side in sides]:
        row[f"x {peer}"] = f"{times[peer] / times['jbag']:.2f}"
    for side in [side for side in sides if side.startswith("jbag")]:
        column = "of gather bandwidth" + side.removeprefix("jbag")
        row[column] = f"{shares[side]:.0%}" if side in shares else "-"
    return row


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    names = [workload.name for workload in WORKLOADS]
    add("--workload", nargs="+", choices=names, default=names, help="which (all)")
    names = [measurement.name for measurement in MEASUREMENTS]
    add("--measure", nargs="+", choices=names, default=names, help="what (all)")
    add("--rounds", type=int, default=5, help=f"turns of {TURN} calls a side (5)")
    add("--quick", action="store_true", help="small and short, to see that it runs")
    add("--plot", metavar="PNG", help="draw how fast jbag is beside the peers")
    add("--json", metavar="FILE", help="write the results as JSON, too")
    add("--write", action="store_true", help="write the table to README.md")
    args = parser.parse_args(argv)
    if args.write and args.quick:
        parser.error("--write takes no results of --quick")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1; got {args.rounds}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = parse_arguments(argv)
    threads = report.count_cores()
    sides = list(SIDES)
    if to_huge_pages is None:
        sides.remove("jbag, huge pages")
    if importlib.util.find_spec("torch"):
        importlib.import_module("torch").set_num_threads(threads)
    else:
        sides.remove("torch")
        print("There is no column of torch: it isn't installed.\n")
    workloads = [each for each in WORKLOADS if each.name in args.workload]
    measurements = [each for each in MEASUREMENTS if each.name in args.measure]
    if args.quick:
        args.rounds = 1
        workloads = [replace(w, V=w.V // 100, B=w.B // 32) for w in workloads]
    statement = report.machine(*[side for side in sides if side == "torch"])
    print(f"{statement} Every side uses all cores.\n")
    for each in workloads:
        bags = f"{each.B} bags of {each.mean_length} ids on average"
        print(f"- {each.name}: {each.user}; table {each.V} x {each.D}, {bags}")
    print()
    cases = [(each, what) for each in workloads for what in measurements]
    results: list[Result] = []
    rows: list[report.Row] = []
    with tempfile.TemporaryDirectory() as folder, jax.default_device("cpu"):
        program = f"{folder}/gather"
        source = Path(__file__).with_name("gather_bandwidth.cc")
        built = run(*COMPILE, str(source), "-o", program) is not None
        gather = [program, str(threads)] if built else []
        for workload, measurement in tqdm(cases, unit="case", disable=None):
            case = Case(workload, measurement, list(make_batches(workload)))
            results.append(measure(case, sides, gather, args.rounds))
            rows.append(cells(results[-1], sides))
            for line in report.table(rows[-1:], names=2)[2 * (len(rows) > 1) :]:
                tqdm.write(line, file=sys.stdout)
    if args.plot:
        report.plot(rows, "times as fast as the peer", args.plot, names=2)
    if args.write:
        report.write("embedding_bag.py", rows, statement, names=2)
    if args.json:
        with jbag.atomic_write(args.json) as temporary:
            temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

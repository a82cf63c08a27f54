"""Measure pooling, gradients and training steps on a GPU; print a table in Markdown.

    python examples/benchmarks/gpu.py
    python examples/benchmarks/gpu.py --workload main Zipf --measure sum "step Adam"
    python examples/benchmarks/gpu.py --quick        # small, to see that it runs

The sides are jbag's default ("jbag"), its kernel for CUDA by name ("cuda"), the
reference ("xla"), and PyTorch where it is installed with CUDA. A time is that of many
calls that are queued without waiting, divided by their number, and the least of several
such runs: the device's time, as long as a call takes longer than its launch. Each call
takes other ids, and all calls together read more rows than the L2 cache holds.

"x torch" is how many times as fast as torch the faster of "jbag" and "cuda" is. "of
copy" is the rate at which it moves the bytes that have to be moved (rows once, and what
is written) as a share of the rate at which the device copies an array. Without a GPU
the program runs on what there is.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jbag
import report

RING = 8  # batches made beforehand
CALLS = 24  # queued at once
RATE = 0.01  # of learning


@dataclass(frozen=True)
class Workload:
    """A table, [V, D], and batches of B bags that are pooled from it."""

    name: str
    V: int = 10_000_000
    D: int = 128
    B: int = 16_384
    mean_length: int = 32
    dtype: str = "float32"
    ids: str = "uniform"  # or "Zipf", or "hot": half of them are of one row


@dataclass(frozen=True)
class Measurement:
    """What is done with a batch: a forward pass, its gradient too, or a step."""

    name: str
    mode: str = "sum"
    weighted: bool = False
    gradient: bool = False
    optimizer: str = ""  # of jbag.optim
    peer: str = ""  # of torch.optim
    states: int = 0  # arrays of the table's shape that a step reads and writes


WORKLOADS = (
    Workload("main"),
    Workload("bfloat16", dtype="bfloat16"),
    Workload("Zipf", ids="Zipf"),
    Workload("one hot row", ids="hot"),
    Workload("bags of 1", B=524_288, mean_length=1),
    Workload("bags of 500", B=1024, mean_length=500),
    Workload("D = 16", D=16),
    Workload("D = 64", D=64),
    Workload("D = 256", D=256),
    Workload("V = 1 M", V=1_000_000),
    Workload("V = 100 M", V=100_000_000, D=64),
    # FBGEMM's published workload, ten tables of 1.68 million rows, as one.
    Workload("FBGEMM's", V=16_800_000, B=1_050_000, mean_length=1, ids="Zipf"),
)
MEASUREMENTS = (
    Measurement("sum"),
    Measurement("mean", mode="mean"),
    Measurement("weighted sum", weighted=True),
    Measurement("max", mode="max"),
    Measurement("sum and gradient", gradient=True),
    Measurement("step SGD", optimizer="sgd", peer="SGD"),
    Measurement("step Adagrad", optimizer="adagrad", peer="Adagrad", states=1),
    Measurement("step row-wise Adagrad", optimizer="rowwise_adagrad", peer="Adagrad"),
    Measurement("step Adam", optimizer="adam", peer="SparseAdam", states=2),
)

Batch = tuple[np.ndarray, ...]  # ids [N], offsets [B + 1] and weights [N]
Call = Callable[[int], Any]  # queues the work of a batch, by number


def make_batches(workload: Workload) -> Iterator[Batch]:
    """Yield ragged batches, each of B times the mean length ids: no slot is unused."""
    rng = np.random.default_rng(0)
    V, B, N = workload.V, workload.B, workload.B * workload.mean_length
    for _ in range(RING):
        ids = rng.integers(V, size=N)
        if workload.ids == "Zipf":  # of exponent 1; multiplied, so as not to be sorted
            ids = (V ** rng.random(N)).astype(np.int64) * 7919 % V
        if workload.ids == "hot":
            ids[rng.random(N) < 0.5] = V // 2
        lengths = np.ones(B, np.int64)
        if workload.mean_length > 1:
            lengths = rng.multinomial(N, np.full(B, 1 / B))
        offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
        yield ids.astype(np.int32), offsets, rng.random(N, np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def uniform(rows: int, columns: int, dtype: str) -> jax.Array:
    """Return numbers between -1 and 1, each time the same."""
    return jax.random.uniform(jax.random.key(0), (rows, columns), dtype, -1, 1)


def jbag_program(
    workload: Workload,
    what: Measurement,
    implementation: str | None,
    packed: bool = False,
) -> tuple[Any, Any]:
    """Return a function of a table and a batch, and the table; both with the states.

    It uses the kernel of a name, or the default. The states are an optimizer's. The
    table is an array, or packed.
    """
    table = uniform(workload.V, workload.D, workload.dtype)
    if packed:
        table = jbag.pack(table, always=True)
    cotangent = uniform(workload.B, workload.D, workload.dtype)

    def pool(table: jax.Array, *batch: jax.Array) -> jax.Array:
        ids, offsets, weights = batch
        return jbag.embedding_bag(
            table,
            ids,
            offsets,
            mode=what.mode,
            weights=weights.astype(table.dtype) if what.weighted else None,
            include_last_offset=True,
            sparse=bool(what.optimizer),
            implementation=implementation,
        )

    def loss(table: jax.Array, *batch: jax.Array) -> jax.Array:
        return jnp.vdot(pool(table, *batch), cotangent).astype(jnp.float32)

    if not what.optimizer:
        return jax.jit(jax.grad(loss) if what.gradient else pool), table

    optimizer = getattr(jbag.optim, what.optimizer)(RATE)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(trained: Any, *batch: jax.Array) -> Any:
        table, state = trained
        gradient = jbag.grad(loss)(table, *batch)
        updates, state = optimizer.update(gradient, state, table)
        return optax.apply_updates(table, updates), state

    return step, (table, optimizer.init(table))


def jbag_call(
    function: Callable[..., Any],
    table: Any,
    batches: Sequence[Batch],
    *,
    trains: bool,
) -> Call:
    """Call a function of `jbag_program`; a step's result is the next one's table."""
    ring = [jax.device_put(batch) for batch in batches]

    def call(k: int) -> Any:
        nonlocal table
        result = function(table, *ring[k % RING])
        if trains:
            table = result
        return jax.tree.leaves(result)[0]

    return call


def torch_call(
    workload: Workload, what: Measurement, batches: Sequence[Batch]
) -> Call | None:
    """Use PyTorch on its device for CUDA; None if it has no equal."""
    import torch  # Not everyone has it.

    dtype = getattr(torch, workload.dtype)
    shape = workload.V, workload.D
    table = torch.empty(shape, device="cuda", dtype=dtype).uniform_(-1, 1)
    table.requires_grad_(bool(what.gradient or what.optimizer))
    cotangent = torch.rand(workload.B, workload.D, device="cuda", dtype=dtype)
    ring = [[torch.tensor(x, device="cuda") for x in batch] for batch in batches]
    optimizer = None
    if what.optimizer:
        optimizer = getattr(torch.optim, what.peer)([table], lr=RATE)

    def call(k: int) -> Any:
        ids, offsets, weights = ring[k % RING]
        table.grad = None
        out = torch.nn.functional.embedding_bag(
            ids,
            table,
            offsets,
            mode=what.mode,
            per_sample_weights=weights.to(dtype) if what.weighted else None,
            include_last_offset=True,
            sparse=optimizer is not None,
        )
        if table.requires_grad:
            (out * cotangent).sum().backward()
        if optimizer is not None:
            optimizer.step()
        return out

    return call


def wait(result: Any) -> None:
    """Wait for what was queued last."""
    if isinstance(result, jax.Array):
        result.block_until_ready()
    else:
        import torch

        torch.cuda.synchronize()


def milliseconds(call: Call, rounds: int) -> float:
    """Return the least mean time of calls that are queued together."""
    for k in range(RING):  # compiles, and warms up
        result = call(k)
    wait(result)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for k in range(CALLS):
            result = call(k)
        wait(result)
        times.append((time.perf_counter() - start) / CALLS)
    return 1e3 * min(times)


def copy_bandwidth(size: int, rounds: int) -> float:
    """Return the bytes a second at which the device copies: reads and writes both."""
    copy = jax.jit(lambda x: x + 1)
    x = jnp.zeros(size // 4, jnp.float32)
    return 2 * size / (milliseconds(lambda _: copy(x), rounds) / 1e3)


def least_bytes(workload: Workload, what: Measurement, batch: Batch) -> int:
    """Return the bytes that a call reads and writes at least."""
    width = workload.D * jnp.dtype(workload.dtype).itemsize
    pooled = workload.B * width
    if what.optimizer:
        # The cotangents, and the rows of the table and its states there and back.
        touched = len(np.unique(batch[0])) * width
        forward = batch[0].size * width + pooled
        return forward + pooled + 2 * touched * (1 + what.states)
    if what.gradient:  # every row of the gradient is written
        return pooled + workload.V * width
    return batch[0].size * width + pooled


def measure(
    workload: Workload, what: Measurement, sides: Sequence[str], rounds: int
) -> dict[str, float]:
    """Return the milliseconds of each side; those that fail say why."""
    batches = list(make_batches(workload))
    names = {"jbag": None, "cuda": "cuda", "xla": "xla"}
    times = {}
    for side in sides:
        try:
            if side == "torch":
                call = torch_call(workload, what, batches)
            else:
                program = jbag_program(workload, what, names[side])
                call = jbag_call(*program, batches, trains=bool(what.optimizer))
            if call is not None:
                times[side] = milliseconds(call, rounds)
        # A table that doesn't fit a device is no reason to lose the other figures.
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            tqdm.write(f"{workload.name}, {what.name}, {side}: {reason}", sys.stderr)
    return times


def parse_arguments(
    argv: Sequence[str] | None,
    description: str,
    workloads: Sequence[Workload],
    measurements: Sequence[Measurement],
) -> argparse.Namespace:
    """Return the options, checked."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    add = parser.add_argument
    names = [workload.name for workload in workloads]
    add("--workload", nargs="+", choices=names, default=names, help="which (all)")
    names = [measurement.name for measurement in measurements]
    add("--measure", nargs="+", choices=names, default=names, help="what (all)")
    add("--rounds", type=int, default=5, help="runs, of which the least counts (5)")
    add("--quick", action="store_true", help="small and short, to see that it runs")
    add("--plot", metavar="PNG", help="draw the ratios, the columns x ...")
    add("--json", metavar="FILE", help="write the results as JSON, too")
    add("--write", action="store_true", help="write the table to README.md")
    args = parser.parse_args(argv)
    if args.write and args.quick:
        parser.error("--write takes no results of --quick")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1; got {args.rounds}")
    return args


def available_sides() -> list[str]:
    """Return the sides that this machine has."""
    sides = ["jbag", "xla"]
    if jax.default_backend() == "gpu":
        sides.insert(1, "cuda")
    if importlib.util.find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            sides.append("torch")
    return sides


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = parse_arguments(argv, __doc__ or "", WORKLOADS, MEASUREMENTS)
    workloads = [each for each in WORKLOADS if each.name in args.workload]
    measurements = [each for each in MEASUREMENTS if each.name in args.measure]
    if args.quick:
        args.rounds = 1
        workloads = [replace(w, V=w.V // 10_000, B=w.B // 256) for w in workloads]
    sides = available_sides()
    bandwidth = copy_bandwidth(2**20 if args.quick else 2**31, args.rounds)
    device = jax.devices()[0].device_kind
    statement = f"{device}, copies {bandwidth / 1e12:.3g} TB/s; {report.machine()}"
    print(f"{statement}\n")
    rows: list[report.Row] = []
    results = []
    cases = [(each, what) for each in workloads for what in measurements]
    for workload, what in tqdm(cases, unit="case", disable=None):
        times = measure(workload, what, sides, args.rounds)
        own = [times[side] for side in ("jbag", "cuda") if side in times]
        row = {"workload": workload.name, "measurement": what.name}
        for side in sides:
            row[f"{side} (ms)"] = f"{times[side]:.3f}" if side in times else "-"
        for peer in ("xla", "torch"):
            ratio = f"{times[peer] / min(own):.2f}" if own and peer in times else "-"
            row[f"x {peer}"] = ratio
        moved = least_bytes(workload, what, next(make_batches(workload)))
        share = moved / (min(own) / 1e3) / bandwidth if own else 0
        row["of copy"] = f"{share:.0%}" if own else "-"
        rows.append(row)
        results.append({**row, "milliseconds": times, "least_bytes": moved})
        for line in report.table(rows[-1:], names=2)[2 * (len(rows) > 1) :]:
            tqdm.write(line, file=sys.stdout)
    if args.plot:
        report.plot(rows, "times as fast as the peer", args.plot, names=2)
    if args.write:
        report.write("gpu.py", rows, statement, names=2)
    if args.json:
        with jbag.atomic_write(args.json) as temporary:
            temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

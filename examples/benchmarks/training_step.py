"""Measure steps of training a table on CPU against peers; print a table in Markdown.

    python examples/benchmarks/training_step.py
    python examples/benchmarks/training_step.py --quick
    python examples/benchmarks/training_step.py --workload step --optimizer SGD Adam
    python examples/benchmarks/training_step.py --plot speed.png --write

A step pools a batch in mode "sum", takes as its loss the inner product with a constant,
differentiates that, and moves the table.

- jbag: `jbag.value_and_grad`, `jbag.optim` and `optax.apply_updates`, in one jitted
  step to which the table and the optimizer's state are donated;
- torch: `torch.nn.functional.embedding_bag` with `sparse=True`, and `torch.optim`;
- fbgemm: `SplitTableBatchedEmbeddingBagsCodegen`, which moves the table in its backward
  pass (`pip install --no-deps fbgemm-gpu-cpu`);
- optax: the same as jbag, but with dense gradients, and Optax's optimizers;
- linen and nnx: the same as jbag, but through Flax's modules, `TrainState` and
  `nnx.Optimizer`. What they take beyond jbag's time is their overhead.

A time is the median of many steps, each on ids that the side hasn't just seen, the
sides taking turns. Each may use all the process's cores: `taskset -c 0-3 python ...`
leaves four. Other programs on these cores slow the sides unequally.

"x peer" is how many times as fast as the faster of torch and fbgemm jbag is; "extra" is
the memory that XLA plans for jbag's step beyond the batch, the table and its state.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState
from tqdm import tqdm

import jbag
import report

RING = 24  # batches made beforehand, so that ids come back late
TURN = 5  # timed steps of a side before the next side's,
PATIENCE = 2.0  # or fewer, if they take so many seconds
RATE = 0.01  # of learning


@dataclass(frozen=True)
class Workload:
    """A table, [V, D], and batches of B bags of uniform ids that it is trained on."""

    name: str
    V: int
    D: int
    flax: bool = False  # whether through Flax, too
    B: int = 4096
    mean_length: int = 20


@dataclass(frozen=True)
class Optimizer:
    """An optimizer as the sides have it; nothing where one hasn't."""

    name: str
    torch: str
    fbgemm: str
    jbag: Any
    optax: Any


WORKLOADS = (
    Workload("step", 1_000_000, 64, flax=True),
    Workload("small table", 100_000, 32),
    Workload("large table", 10_000_000, 32),
)
# The other libraries' accumulators start from 0, and add far smaller an epsilon.
ADAGRAD = optax.adagrad(RATE, initial_accumulator_value=0, eps=1e-20)
BY_ROW = jbag.optim.rowwise_adagrad(RATE)
OPTIMIZERS = (
    Optimizer("SGD", "SGD", "EXACT_SGD", jbag.optim.sgd(RATE), optax.sgd(RATE)),
    Optimizer("Adagrad", "Adagrad", "EXACT_ADAGRAD", jbag.optim.adagrad(RATE), ADAGRAD),
    Optimizer("row-wise Adagrad", "", "EXACT_ROWWISE_ADAGRAD", BY_ROW, None),
    Optimizer("Adam", "SparseAdam", "", jbag.optim.adam(RATE), optax.adam(RATE)),
)
OPTIONS: dict[str, Any] = {"mode": "sum", "include_last_offset": True}

Batch = tuple[np.ndarray, np.ndarray]  # ids [N] and offsets [B + 1]
Result = dict[str, Any]  # names, milliseconds and bytes
Call = Callable[[int], Any]  # makes a step, on the batch of a number; gives the table


class Case(NamedTuple):
    """An optimizer on a workload."""

    workload: Workload
    optimizer: Optimizer
    batches: list[Batch]

    def uniform(self, rows: int) -> jax.Array:
        """Return [rows, D] between -1 and 1: the same, in new memory, at each call."""
        shape = rows, self.workload.D
        return jax.random.uniform(jax.random.key(0), shape, minval=-1)


def make_batches(workload: Workload) -> Iterator[Batch]:
    """Yield ragged batches, each of B times the mean length ids: no slot is unused."""
    rng = np.random.default_rng(0)
    B, N = workload.B, workload.B * workload.mean_length
    for _ in range(RING):
        # Lengths of Poisson, given their total, are multinomial.
        lengths = rng.multinomial(N, np.full(B, 1 / B))
        offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
        yield rng.integers(workload.V, size=N, dtype=np.int32), offsets


def jax_call(
    case: Case, step: Callable[..., Any], state: Any, table_of: Callable[..., Any]
) -> Call:
    """Step from state to state; `step` takes one, which it is donated, and a batch."""
    ring = [jax.device_put(batch) for batch in case.batches]
    cotangent = case.uniform(case.workload.B)

    def call(k: int) -> Any:
        nonlocal state
        state, loss = step(state, cotangent, *ring[k % RING])
        loss.block_until_ready()  # and the state, which is of the same computation
        return table_of(state)

    return call


@functools.cache
def make_step(optimizer: optax.GradientTransformation, sparse: bool) -> Any:
    """Return the step of jbag, or that with the dense gradient, as JAX gives it."""
    value_and_grad = jbag.value_and_grad if sparse else jax.value_and_grad

    def loss(table: jax.Array, cotangent: jax.Array, *batch: jax.Array) -> jax.Array:
        pooled = jbag.embedding_bag(table, *batch, sparse=sparse, **OPTIONS)
        return jnp.vdot(pooled, cotangent)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(trained: Any, *batch: jax.Array) -> Any:
        table, state = trained
        value, gradient = value_and_grad(loss)(table, *batch)
        updates, state = optimizer.update(gradient, state, table)
        return (optax.apply_updates(table, updates), state), value

    return step


def array_call(case: Case, sparse: bool) -> Call:
    """Use jbag's optimizer, or Optax's, on a table that is an array."""
    optimizer = case.optimizer.jbag if sparse else case.optimizer.optax
    table = case.uniform(case.workload.V)
    trained = table, optimizer.init(table)
    return jax_call(case, make_step(optimizer, sparse), trained, lambda t: t[0])


def extra_bytes(case: Case) -> int:
    """Return how much memory jbag's step takes beyond the batch, table and state."""
    V, D, B = case.workload.V, case.workload.D, case.workload.B
    table, cotangent = (jax.ShapeDtypeStruct((n, D), jnp.float32) for n in (V, B))
    trained = table, jax.eval_shape(case.optimizer.jbag.init, table)
    step = make_step(case.optimizer.jbag, sparse=True)
    plan = step.lower(trained, cotangent, *case.batches[0]).compile().memory_analysis()
    new = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return plan.temp_size_in_bytes + new


def linen_call(case: Case) -> Call:
    """Use jbag's module for Linen, and Flax's train state."""
    bag = jbag.EmbeddingBag(case.workload.V, case.workload.D, sparse=True, **OPTIONS)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, cotangent: jax.Array, *batch: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.vdot(state.apply_fn({"params": params}, *batch), cotangent)

        value, gradient = jbag.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradient), value

    params = {"embedding": case.uniform(case.workload.V)}
    state = TrainState.create(apply_fn=bag.apply, params=params, tx=case.optimizer.jbag)
    return jax_call(case, step, state, lambda state: state.params["embedding"])


def nnx_call(case: Case) -> Call:
    """Use jbag's module for NNX, and NNX's optimizer; `nnx.jit` splits every time."""
    table = case.uniform(case.workload.V)
    bag = jbag.nnx.EmbeddingBag.from_pretrained(table, False, sparse=True, **OPTIONS)
    optimizer = nnx.Optimizer(bag, case.optimizer.jbag, wrt=nnx.Param)
    graph, state = nnx.split((bag, optimizer))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, cotangent: jax.Array, *batch: jax.Array) -> Any:
        bag, optimizer = nnx.merge(graph, state)

        def loss(bag: Any) -> jax.Array:
            return jnp.vdot(bag(*batch), cotangent)

        value, gradient = jbag.value_and_grad(loss)(bag)
        optimizer.update(bag, gradient)
        return nnx.state((bag, optimizer)), value

    return jax_call(case, step, state, lambda state: state[0]["embedding"])


def torch_call(case: Case) -> Call:
    """Use PyTorch, on a table in memory that it allocates."""
    import torch  # Not everyone has it.
    from torch.nn import functional

    table = torch.from_dlpack(case.uniform(case.workload.V)).clone().requires_grad_()
    cotangent = torch.from_dlpack(case.uniform(case.workload.B))
    optimizer = getattr(torch.optim, case.optimizer.torch)([table], lr=RATE)
    # 32-bit ids: PyTorch takes them as they are, and there is less to read.
    ring = [tuple(map(torch.tensor, batch)) for batch in case.batches]

    def call(k: int) -> Any:
        ids, offsets = ring[k % RING]
        optimizer.zero_grad()
        pooled = functional.embedding_bag(ids, table, offsets, sparse=True, **OPTIONS)
        (pooled * cotangent).sum().backward()
        optimizer.step()
        return table

    return call


def fbgemm_call(case: Case) -> Call:
    """Use FBGEMM's module on a table in memory that it allocates."""
    import torch
    from fbgemm_gpu import split_embedding_configs as configs
    from fbgemm_gpu import split_table_batched_embeddings_ops_training as training

    host = training.EmbeddingLocation.HOST, training.ComputeDevice.CPU
    bag = training.SplitTableBatchedEmbeddingBagsCodegen(
        [(case.workload.V, case.workload.D, *host)],
        optimizer=configs.EmbOptimType[case.optimizer.fbgemm],
        learning_rate=RATE,
        device="cpu",
    )
    (table,) = bag.split_embedding_weights()
    table.copy_(torch.from_dlpack(case.uniform(case.workload.V)))
    cotangent = torch.from_dlpack(case.uniform(case.workload.B))
    # 64-bit ids: what the module is made for unless told otherwise.
    ring = [[torch.tensor(x).long() for x in batch] for batch in case.batches]

    def call(k: int) -> Any:
        (bag(*ring[k % RING]) * cotangent).sum().backward()
        return table

    return call


# By the names of the optimizers' fields; without one, through Flax.
SIDES: dict[str, Callable[[Case], Call]] = {
    "jbag": lambda case: array_call(case, sparse=True),
    "torch": torch_call,
    "fbgemm": fbgemm_call,
    "optax": lambda case: array_call(case, sparse=False),
    "linen": linen_call,
    "nnx": nnx_call,
}
PEERS = {"torch": "torch", "fbgemm": "fbgemm_gpu"}  # and their modules


def check_agreement(case: Case, calls: dict[str, Call]) -> None:
    """Make the first step; exit unless all sides move the rows to the same place."""
    rows = case.batches[0][0][:64].astype(np.int64)
    found = {}
    for side, call in calls.items():
        found[side] = np.array(call(0)[rows].tolist())
        # Far more than rounding makes, and less than a step.
        if not np.allclose(found[side], found["jbag"], rtol=0, atol=RATE / 10):
            sys.exit(f"{side} and jbag differ: {case.workload}, {case.optimizer.name}")


def time_in_turns(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of a step of each side."""
    seconds: dict[str, list[float]] = {side: [] for side in calls}
    for first in range(1, 1 + rounds * (TURN + 1), TURN + 1):
        for side, call in calls.items():
            call(first)  # Untimed: caches and threads are still the last side's.
            until = time.perf_counter() + PATIENCE
            for k in range(first + 1, first + 1 + TURN):
                start = time.perf_counter()
                call(k)
                seconds[side].append(time.perf_counter() - start)
                if start + seconds[side][-1] > until:
                    break
    return {side: 1e3 * statistics.median(times) for side, times in seconds.items()}


def measure(case: Case, sides: list[str], rounds: int) -> Result:
    """Time the sides on a case."""
    available = [getattr(case.optimizer, side, case.workload.flax) for side in sides]
    calls = {side: SIDES[side](case) for side in itertools.compress(sides, available)}
    check_agreement(case, calls)
    return {
        "workload": case.workload.name,
        "optimizer": case.optimizer.name,
        "milliseconds": time_in_turns(calls, rounds),
        "extra_bytes": extra_bytes(case),
    }


def cells(result: Result, sides: list[str]) -> dict[str, str]:
    """Return a row of the table, by the names of its columns."""
    times = result["milliseconds"]
    row = {name: result[name] for name in ("workload", "optimizer")}
    for side in sides:
        row[f"{side} (ms)"] = f"{times[side]:.2f}" if side in times else "-"
    peers = [times[side] for side in PEERS if side in times]
    row["x peer"] = f"{min(peers) / times['jbag']:.2f}" if peers else "-"
    dense = times.get("optax")
    row["x optax"] = f"{dense / times['jbag']:.1f}" if dense else "-"
    row["extra (MB)"] = f"{result['extra_bytes'] / 1e6:.2f}"
    return row


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    names = [workload.name for workload in WORKLOADS]
    add("--workload", nargs="+", choices=names, default=names, help="which (all)")
    names = [optimizer.name for optimizer in OPTIMIZERS]
    add("--optimizer", nargs="+", choices=names, default=names, help="which (all)")
    add("--rounds", type=int, default=5, help=f"turns of {TURN} steps a side (5)")
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
    for side, module in PEERS.items():
        if not importlib.util.find_spec(module):
            sides.remove(side)
            print(f"There is no column of {side}: it isn't installed.\n")
    if "torch" in sides:
        importlib.import_module("torch").set_num_threads(threads)
    workloads = [each for each in WORKLOADS if each.name in args.workload]
    optimizers = [each for each in OPTIMIZERS if each.name in args.optimizer]
    if args.quick:
        args.rounds = 1
        workloads = [replace(w, V=w.V // 100, B=w.B // 32) for w in workloads]
    peers = [{"fbgemm": "fbgemm-gpu-cpu"}.get(x, x) for x in sides if x in PEERS]
    statement = report.machine("optax", "flax", *peers)
    print(f"{statement} Every side uses all cores.\n")
    for each in workloads:
        bags = f"{each.B} bags of {each.mean_length} ids on average"
        print(f"- {each.name}: table {each.V} x {each.D}, {bags}")
    print()
    cases = [(each, optimizer) for each in workloads for optimizer in optimizers]
    results: list[Result] = []
    rows: list[report.Row] = []
    with jax.default_device("cpu"):
        for workload, optimizer in tqdm(cases, unit="case", disable=None):
            case = Case(workload, optimizer, list(make_batches(workload)))
            results.append(measure(case, sides, args.rounds))
            rows.append(cells(results[-1], sides))
            for line in report.table(rows[-1:], names=2)[2 * (len(rows) > 1) :]:
                tqdm.write(line, file=sys.stdout)
    if args.plot:
        report.plot(rows, "times as fast as the peer", args.plot, names=2)
    if args.write:
        report.write("training_step.py", rows, statement, names=2)
    if args.json:
        with jbag.atomic_write(args.json) as temporary:
            temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

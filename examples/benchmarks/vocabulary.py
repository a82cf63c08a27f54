"""Measure a vocabulary on CPU: rows of new and old ids, inside a training step.

    python examples/benchmarks/vocabulary.py
    python examples/benchmarks/vocabulary.py --quick
    python examples/benchmarks/vocabulary.py --probes 32 128 --write

A vocabulary of a million rows is filled to 95 %. A batch is 82,000 ids, of which 30 %
are new. A time is the median of many calls in one program, each on ids that it hasn't
seen, the sides taking turns:

- lookup: `Vocabulary.lookup`;
- assign: `Vocabulary.assign` with a donated state; new ids evict the least recently
  seen of their probes;
- step: pooling of rows that are known, the gradient and row-wise Adagrad, on a table of
  64 features;
- assign and step: the same, on the rows that `assign` gives in the same program;
- assign, reset and step: `reset_rows` too draws the new rows from a uniform
  distribution, and resets them in the optimizer's state.

"reference" is the portable implementation of `assign`. "extra" is the memory of the
last program beside the state, the table and the batch.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jbag
import report
from jbag.vocabulary import SplitIds, Vocabulary, VocabularyState

SHARE_OF_NEW_IDS = 0.3
FULL = 0.95
BAGS = 4096
WIDTH = 64
OPTIMIZER = jbag.optim.rowwise_adagrad(0.01)
Trained = Any  # a table, its optimizer's state and the vocabulary's state


@dataclass(frozen=True)
class Workload:
    """A vocabulary of V rows, and batches of N ids."""

    V: int = 1_000_000
    N: int = 82_000
    num_probes: int = 32

    def vocabulary(self, implementation: str | None = None) -> Vocabulary:
        """Return the options of the vocabulary."""
        options: dict[str, Any] = {"implementation": implementation}
        return Vocabulary(self.V, num_probes=self.num_probes, **options)


def new_ids(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return ids that no batch has had, but for a chance of one in millions."""
    return rng.integers(2**64, size=count, dtype=np.uint64)


def fill(workload: Workload, rng: np.random.Generator) -> VocabularyState:
    """Return the state of a vocabulary that is 95 % full."""
    vocabulary, N = workload.vocabulary(), workload.N
    assign = jax.jit(vocabulary.assign, donate_argnums=0)
    state, wanted = vocabulary.init(), int(FULL * vocabulary.capacity)
    for step in range(1000):
        missing = wanted - int(vocabulary.statistics(state).size)
        if missing <= wanted // 10_000:
            break
        where = np.arange(N) < missing
        words = jbag.vocabulary.split_ids(new_ids(rng, N))
        _, state = assign(state, words, step, where=where)
    return state


def make_batch(
    workload: Workload, state: VocabularyState, rng: np.random.Generator
) -> SplitIds:
    """Return ids of the state and new ones, in random order, on the device."""
    num_new = int(SHARE_OF_NEW_IDS * workload.N)
    rows = rng.choice(np.flatnonzero(np.array(state.counts)), workload.N - num_new)
    high, low = (np.array(x)[rows].astype(np.uint64) for x in (state.high, state.low))
    ids = np.concatenate([high << np.uint64(32) | low, new_ids(rng, num_new)])
    return jax.device_put(jbag.vocabulary.split_ids(rng.permutation(ids)))


def train(table: jax.Array, opt_state: Any, rows: jax.Array) -> tuple[Any, Any]:
    """Return the table and the optimizer's state after a step."""
    offsets = jnp.arange(BAGS, dtype=jnp.int32) * (rows.size // BAGS)

    def loss(table: jax.Array) -> jax.Array:
        return jbag.embedding_bag(table, rows, offsets, mode="sum", sparse=True).sum()

    gradient = jbag.grad(loss)(table)
    updates, opt_state = OPTIMIZER.update(gradient, opt_state, table)
    return optax.apply_updates(table, updates), opt_state


def make_sides(workload: Workload) -> dict[str, Callable[..., Any]]:
    """Return programs of (trained, ids, step) that return (trained, rows)."""
    vocabulary = workload.vocabulary()

    def lookup(trained: Trained, ids: SplitIds, step: Any) -> Any:
        del step
        return trained, vocabulary.lookup(trained[2], ids)

    def assign(trained: Trained, ids: SplitIds, step: Any, how: Any = None) -> Any:
        rows, state = (how or vocabulary).assign(trained[2], ids, step)
        return (*trained[:2], state), rows

    def only_train(trained: Trained, ids: SplitIds, step: Any) -> Any:
        del step
        # The ids' hashes take the place of rows: they cost nothing.
        rows = (ids.low % np.uint32(workload.V)).astype(jnp.int32)
        table, opt_state, state = trained
        return (*train(table, opt_state, rows), state), rows

    def assign_and_train(
        trained: Trained, ids: SplitIds, step: Any, resets: bool = False
    ) -> Any:
        (table, opt_state, state), rows = assign(trained, ids, step)
        if resets:
            table, opt_state = jbag.vocabulary.reset_rows(
                vocabulary.new_rows(state, rows.size),
                table,
                opt_state,
                optimizer=OPTIMIZER,
                key=jax.random.fold_in(jax.random.key(0), step),
                initializer=jax.nn.initializers.uniform(0.1),
            )
        return (*train(table, opt_state, rows), state), rows

    return {
        "lookup": lookup,
        "assign": assign,
        "reference": functools.partial(assign, how=workload.vocabulary("xla")),
        "step": only_train,
        "assign and step": assign_and_train,
        "assign, reset and step": functools.partial(assign_and_train, resets=True),
    }


def measure(workload: Workload, rounds: int) -> report.Row:
    """Return a row of the table: milliseconds by side."""
    rng = np.random.default_rng(0)
    table = jax.random.uniform(jax.random.key(0), (workload.V, WIDTH))
    state = fill(workload, rng)
    trained = (jbag.to_huge_pages(table), OPTIMIZER.init(table), state)
    del table, state
    batch = make_batch(workload, trained[2], rng)
    compiled = {
        name: jax.jit(side, donate_argnums=0).lower(trained, batch, 0).compile()
        for name, side in make_sides(workload).items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    step = 1000
    for _ in range(rounds):
        for name, program in compiled.items():
            batch = make_batch(workload, trained[2], rng)
            jax.block_until_ready((trained, batch))
            start = time.perf_counter()
            trained, rows = program(trained, batch, step)
            rows.block_until_ready()
            jax.block_until_ready(trained)
            seconds[name].append(time.perf_counter() - start)
            step += 1
    row = {"probes": str(workload.num_probes)}
    for name, times in seconds.items():
        row[f"{name} (ms)"] = f"{1e3 * statistics.median(times):.2f}"
    plan: Any = compiled["assign, reset and step"].memory_analysis()
    extra = plan.temp_size_in_bytes
    extra += plan.output_size_in_bytes - plan.alias_size_in_bytes
    return row | {"extra (MB)": f"{extra / 1e6:.2f}"}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--probes", nargs="+", type=int, default=[16, 32, 128], help="(16 32 128)")
    add("--rounds", type=int, default=40, help="calls of a side (40)")
    add("--quick", action="store_true", help="small and short, to see that it runs")
    add("--write", action="store_true", help="write the table to README.md")
    args = parser.parse_args(argv)
    if args.write and args.quick:
        parser.error("--write takes no results of --quick")
    if args.rounds < 1 or min(args.probes) < 1:
        parser.error("--rounds and --probes must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = parse_arguments(argv)
    size = {"V": 65_536, "N": 4096} if args.quick else {}
    rounds = 2 if args.quick else args.rounds
    statement = report.machine("optax")
    print(f"{statement}\n")
    rows: list[report.Row] = []
    with jax.default_device("cpu"):
        for num_probes in tqdm(args.probes, unit="case", disable=None):
            rows.append(measure(Workload(num_probes=num_probes, **size), rounds))
    print("\n".join(report.table(rows)))
    if args.write:
        report.write("vocabulary.py", rows, statement)


if __name__ == "__main__":
    main()

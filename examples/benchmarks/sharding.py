"""Measure tables over a mesh of CPU devices, and many tables beside one; in Markdown.

    python examples/benchmarks/sharding.py
    python examples/benchmarks/sharding.py --quick
    python examples/benchmarks/sharding.py --devices 4 --rows 4000000
    python examples/benchmarks/sharding.py --plot steps.png --write

The first table is of training steps on one table: pool a batch in mode "sum", take the
squares of what it pools as the loss, move the table by row-wise Adagrad. The sides:

- row_wise, column_wise, data_parallel: `jbag.sharding.embedding_bag`, by the table's
  spec;
- jit, rows: `jbag.embedding_bag` on a table of which each device has some rows, left to
  JAX's compiler, with the row-sparse gradient;
- jit, dense: the same with JAX's dense gradient, and plain SGD.

"sent" is what a device sends to others, read in the compiled program: all devices are
one process's, so that nothing here tells how long it takes on a network. "extra" is the
memory that XLA plans for a device's step beyond table, state and batch. "x row_wise" is
how many times as long as the first side a step takes; the sides take turns.

The second table is of the loads of owners: how many of a batch's distinct ids the
busiest owner has, as a multiple of the mean, in a vocabulary sorted by frequency.

The third is of 26 tables as one collection, beside one table of their total size and
the same ids, on one device.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import jbag
import report

RING = 4  # batches made beforehand
TABLES = 26
OPTIMIZER = jbag.optim.rowwise_adagrad(0.01)
SPECS = {"row_wise": P("x", None), "column_wise": P(None, "x"), "data_parallel": P()}
COLLECTIVE = r"= (.*?) (all-to-all|all-gather|all-reduce|reduce-scatter)(?:-start)?\("

Step = Callable[..., Any]  # of (table, state, batch); returns the first two moved
Side = tuple[str, Any, list[Any]]  # a name, a compiled step, table and state


def bytes_sent(text: str, devices: int) -> float:
    """Return what a device sends to others in a compiled program."""
    total = 0.0
    for shapes, name in re.findall(COLLECTIVE, text):
        size = sum(
            4 * math.prod(int(n) for n in dims.split(",") if n)
            for dims in re.findall(r"[fs]32\[([\d,]*)\]", shapes)
        )
        times = {"all-reduce": 2, "reduce-scatter": devices}.get(name, 1)
        total += times * size * (devices - 1) / devices
    return total


def make_step(pool: Callable[..., jax.Array], dense: bool) -> Step:
    """Return a step of training, `pool` being a function of the table and ids."""

    def step(table: jax.Array, state: Any, ids: jax.Array) -> tuple[Any, Any]:
        def loss(table: jax.Array) -> jax.Array:
            return jnp.square(pool(table, ids)).sum()

        if dense:
            return table - 0.01 * jax.grad(loss)(table), state
        updates, state = OPTIMIZER.update(jbag.grad(loss)(table), state, table)
        return optax.apply_updates(table, updates), state

    return step


def sides_of(args: argparse.Namespace, mesh: Any, ids: jax.Array) -> Iterator[Side]:
    """Yield the sides, their tables made where they lie."""
    layout = jbag.sharding.Layout(args.rows)
    cases: list[tuple[str, P, int, Callable[..., jax.Array], bool]] = []
    for name, spec in SPECS.items():

        def pool(table: jax.Array, ids: jax.Array, spec: P = spec) -> jax.Array:
            options: Any = {"spec": spec, "mesh": mesh, "layout": layout}
            return jbag.sharding.embedding_bag(
                table, ids, mode="sum", sparse=True, **options
            )

        cases.append((name, spec, layout.num_rows, pool, False))
    for name, dense in {"jit, rows": False, "jit, dense": True}.items():

        def plain(table: jax.Array, ids: jax.Array, dense: bool = dense) -> jax.Array:
            # The compiler can't cut calls of a C++ kernel.
            options: Any = {"sparse": not dense, "implementation": "xla"}
            return jbag.embedding_bag(table, ids, mode="sum", **options)

        cases.append((name, SPECS["row_wise"], layout.num_rows, plain, dense))
    for name, spec, rows, pooled, dense in cases:
        sharding = NamedSharding(mesh, spec)
        per_row = NamedSharding(mesh, P(*spec[:1]))
        draw = jax.jit(
            lambda key, rows=rows: jax.random.normal(key, (rows, args.features)),
            out_shardings=sharding,
        )
        table = draw(jax.random.key(0, impl="rbg"))
        start = jax.eval_shape(OPTIMIZER.init, table)
        where = jax.tree.map(lambda x, s=per_row: s if x.ndim else None, start)
        state = jax.jit(OPTIMIZER.init, out_shardings=where)(table)
        step = jax.jit(
            make_step(pooled, dense),
            donate_argnums=(0, 1),
            out_shardings=(sharding, jax.tree.map(lambda x: x.sharding, state)),
        )
        yield name, step.lower(table, state, ids).compile(), [table, state]


def measure_steps(args: argparse.Namespace) -> list[dict[str, str]]:
    """Return the rows of the first table."""
    mesh = jax.sharding.Mesh(jax.devices("cpu")[: args.devices], ("x",))
    rng = np.random.default_rng(0)
    cut = NamedSharding(mesh, P("x"))
    batches = [
        jax.device_put(
            rng.integers(0, args.rows, (args.batch_size, args.length), np.int32), cut
        )
        for _ in range(RING)
    ]
    compiled = sides_of(args, mesh, batches[0])
    bar = {"leave": False, "disable": None}
    sides = list(tqdm(compiled, total=len(SPECS) + 2, unit="side", **bar))
    times: dict[str, list[float]] = {name: [] for name, _, _ in sides}
    rounds = range(args.rounds + 1)
    for number in tqdm(rounds, desc="steps", unit="round", **bar):
        for name, step, held in sides:
            start = time.perf_counter()
            held[:] = jax.block_until_ready(step(*held, batches[number % RING]))
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(own[1:]) for name, own in times.items()}
    rows = []
    for name, step, _ in sides:
        extra = step.memory_analysis().temp_size_in_bytes
        rows.append(
            {
                "side": name,
                "step (ms)": f"{1e3 * medians[name]:.1f}",
                "x row_wise": f"{medians[name] / medians['row_wise']:.2f}",
                "sent (MB)": f"{bytes_sent(step.as_text(), args.devices) / 1e6:.2f}",
                "extra (MB)": f"{extra / 1e6:.2f}",
            }
        )
    return rows


def measure_loads(args: argparse.Namespace) -> list[dict[str, str]]:
    """Return the rows of the second table."""
    rng = np.random.default_rng(0)
    layout = jbag.sharding.Layout(args.rows)
    weights = 1 / np.arange(1, args.rows + 1)
    share = np.cumsum(weights / weights.sum())
    ids = np.searchsorted(share, rng.random(16 * args.batch_size * args.length))
    ids = np.unique(np.minimum(ids, args.rows - 1))
    rows = []
    for owners in (2, 4, 8, 12, 16, 32, 64):
        row = {"owners": str(owners)}
        for name, placed in {"dealt": layout.place(ids), "in order": ids}.items():
            length = layout.num_rows if name == "dealt" else args.rows
            owner = placed // -(-length // owners)
            loads = np.bincount(owner, minlength=owners)
            row[name] = f"{loads.max() / loads.mean():.3f}"
        rows.append(row)
    return rows


def measure_collection(args: argparse.Namespace) -> list[dict[str, str]]:
    """Return the rows of the third table."""
    rng = np.random.default_rng(0)
    each, width = args.rows // TABLES, args.features
    names = [f"t{number}" for number in range(TABLES)]
    collection = jbag.EmbeddingBagCollection(
        tables={name: jbag.Table(each, width) for name in names},
        features={name: jbag.Feature(name, mode="sum") for name in names},
        sparse=True,
    )
    one = jbag.EmbeddingBag(TABLES * each, width, mode="sum", sparse=True)
    size = max(args.batch_size // 2, 1)

    def pool_one(params: Any, ids: Any) -> list[jax.Array]:
        pooled: Any = one.apply(params, ids)
        return jnp.split(pooled, TABLES)

    def pool_all(params: Any, batch: Any) -> list[jax.Array]:
        pooled: Any = collection.apply(params, batch)
        return list(pooled.values())

    rows = []
    for length in (1, 8):
        ids = rng.integers(0, each, (RING, TABLES, size, length), np.int32)
        first = each * np.arange(TABLES, dtype=np.int32)[:, None, None]
        together = [jnp.asarray((x + first).reshape(-1, length)) for x in ids]
        apart = [dict(zip(names, map(jnp.asarray, x), strict=True)) for x in ids]
        calls = {}
        for side, module, pool, batches in (
            ("one", one, pool_one, together),
            ("collection", collection, pool_all, apart),
        ):
            params = module.init(jax.random.key(0, impl="rbg"), batches[0])
            forward = jax.jit(pool)
            step = jax.jit(
                make_step(lambda t, b, f=pool: jnp.stack(f(t, b)), dense=False),
                donate_argnums=(0, 1),
            )
            held = [jbag.to_huge_pages(params), OPTIMIZER.init(params)]
            calls[side] = (forward, step, held, batches)
        times: dict[Any, list[float]] = {}
        rounds = range(args.rounds + 1)
        bar = {"unit": "round", "leave": False, "disable": None}
        for number in tqdm(rounds, desc=f"{TABLES} tables, {length} ids", **bar):
            for side, (forward, step, held, batches) in calls.items():
                batch = batches[number % RING]
                start = time.perf_counter()
                jax.block_until_ready(forward(held[0], batch))
                between = time.perf_counter()
                held[:] = jax.block_until_ready(step(*held, batch))
                end = time.perf_counter()
                times.setdefault((side, "forward"), []).append(between - start)
                times.setdefault((side, "step"), []).append(end - between)
        for what in ("forward", "step"):
            ours, theirs = (
                1e3 * statistics.median(times[side, what][1:])
                for side in ("collection", "one")
            )
            rows.append(
                {
                    "ids a bag": str(length),
                    "measurement": what,
                    f"{TABLES} tables (ms)": f"{ours:.2f}",
                    "one table (ms)": f"{theirs:.2f}",
                    "x one": f"{ours / theirs:.2f}",
                }
            )
    return rows


def show(rows: list[dict[str, str]]) -> None:
    """Print a table in Markdown."""
    print(*report.table(rows), "", sep="\n", flush=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--devices", type=int, default=8, help="of the mesh (8)")
    add("--rows", type=int, default=1 << 20, help="of the table (1048576)")
    add("--features", type=int, default=64, help="of the table (64)")
    add("--batch-size", type=int, default=4096, help="bags a step (4096)")
    add("--length", type=int, default=16, help="ids a bag (16)")
    add("--rounds", type=int, default=15, help="timed steps a side (15)")
    add("--quick", action="store_true", help="small and short, to see that it runs")
    add("--plot", metavar="PNG", help="draw the times of the steps")
    add("--write", action="store_true", help="write the first table to README.md")
    args = parser.parse_args(argv)
    if args.write and args.quick:
        parser.error("--write takes no results of --quick")
    if args.quick:
        args.rows, args.features, args.batch_size, args.rounds = 20_000, 16, 64, 1
    for name in ("devices", "rows", "features", "batch_size", "length", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.batch_size % args.devices or args.features % args.devices:
        parser.error("--batch-size and --features must be multiples of --devices")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = parse_arguments(argv)
    if argv is None:  # as a program: no device has been asked for
        jax.config.update("jax_num_cpu_devices", args.devices)
    statement = (
        f"{report.machine()} A table of {args.rows} x {args.features}, "
        f"{args.batch_size} bags of {args.length} uniform ids, {args.devices} devices "
        "of one process."
    )
    print(statement, end="\n\n")
    with jax.default_device("cpu"):
        steps = measure_steps(args)
        show(steps)
        show(measure_loads(args))
        show(measure_collection(args))
    if args.plot:
        report.plot(steps, "time of a step, in times that of row_wise", args.plot)
    if args.write:
        report.write("sharding.py", steps, statement)


if __name__ == "__main__":
    main()

"""Train a click model (DLRM) over embedding tables; the largest has 640 MB.

The model is that of Naumov et al., "Deep Learning Recommendation Model for
Personalization and Recommendation Systems" (2019). Each categorical feature is a bag of
ids, pooled to a vector. A bottom MLP maps the dense features to a vector. A top MLP
maps the dot products of all pairs of vectors to the log-odds of a click.

    python examples/train_recommender.py
    python examples/train_recommender.py --optimizer ftrl --rows 1000000
    python examples/train_recommender.py --steps 20000 --batch-size 8192

With several devices, the large table is sharded (see --strategy), the small tables are
data parallel, and each device trains on a part of each batch. --devices sets the number
of CPU devices per process. Start several processes with one command each:

    python examples/train_recommender.py --devices 8
    python examples/train_recommender.py --processes 2 --process 0
    python examples/train_recommender.py --processes 2 --process 1

On several machines, pass --coordinator HOST:PORT, the address of process 0. Examples,
losses and checkpoints do not depend on the number of devices and processes. If a
process dies, the others stop at once; if a process hangs, they stop after --heartbeat
seconds. After a restart, training resumes from the last checkpoint, also with another
number of processes or devices or another strategy:

    python examples/train_recommender.py --checkpoint /tmp/clicks --save-every 500

The clicks are synthetic: a teacher model with known probabilities generates them. The
program prints the metrics of the model and of the teacher, an upper bound, on new
examples.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import jbag
import plots

CATEGORIES, COUNTRIES, TAGS, DENSE = 997, 200, 5000, 13
HISTORY_LENGTH, TAGS_LENGTH = 9, 3  # on average
PART = 1024  # examples per random seed, independent of the number of processes
# The optimizers of the tables, and their initial learning rates.
LEARNING_RATES = {
    "sgd": 200.0,
    "adagrad": 0.2,
    "rowwise_adagrad": 0.2,
    "adam": 0.01,
    "rowwise_adam": 0.01,
    "ftrl": 0.2,
}
# The sharding strategies of the large table.
STRATEGIES = {
    "row_wise": P("x", None),
    "column_wise": P(None, "x"),
    "data_parallel": P(),
}


class Batch(NamedTuple):
    """B examples: an item shown to a user, and whether the user clicked on it."""

    item: Any  # [B, 1]: the shown item
    category: Any  # [B, 1]: the category of the item
    history: Any  # `Bags`: the items that the user viewed before
    tags: Any  # `Bags`: the user's interests
    country: Any  # [B, 1]: the country of the user
    dense: Any  # [B, DENSE]: the dense features of the user
    clicks: Any  # [B]: 0 or 1
    log_odds: Any  # [B]: the teacher's log-odds, for evaluation only


class History(NamedTuple):
    """The course of training, from step `first` on."""

    first: int
    losses: list[float]  # of each step
    aucs: list[tuple[int, float]]  # steps, and the AUC after them


class Teacher(NamedTuple):
    """Latent factors of items and users; their dot products are the log-odds."""

    rows: int  # the number of items
    items: np.ndarray  # [4096, K]; item i has row i modulo 4096
    categories: np.ndarray  # [CATEGORIES, K]
    tags: np.ndarray  # [TAGS, K]
    countries: np.ndarray  # [COUNTRIES, K]
    dense: np.ndarray  # [DENSE, K]
    every_item: np.ndarray  # [1, K]
    every_user: np.ndarray  # [1, K]


def small(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Initialize embeddings uniformly in [-0.1, 0.1)."""
    return jax.random.uniform(key, shape, dtype, -0.1, 0.1)


def mlp(x: Any, hidden: int, features: int) -> jax.Array:
    """Apply an MLP with one hidden layer."""
    return nn.Dense(features)(nn.relu(nn.Dense(hidden)(x)))


def make_tables(args: argparse.Namespace, mesh: Mesh) -> jbag.EmbeddingBagCollection:
    """Return the collection of tables and features; the large table is sharded."""

    def table(rows: int, group: str) -> jbag.Table:
        return jbag.Table(rows, args.features, group=group, embedding_init=small)

    return jbag.EmbeddingBagCollection(
        tables={
            "items": table(args.rows, "large"),
            "categories": table(CATEGORIES, "small"),
            "tags": table(TAGS, "small"),
            "countries": table(COUNTRIES, "small"),
        },
        # Shown and viewed items share a table.
        features={
            "item": jbag.Feature("items"),
            "history": jbag.Feature("items"),
            "category": jbag.Feature("categories"),
            "tags": jbag.Feature("tags", mode="sum"),
            "country": jbag.Feature("countries"),
        },
        specs={"large": STRATEGIES[args.strategy], "small": P()},
        mesh=mesh,
        # Row-sparse gradients: a step reads and writes only the rows of the batch.
        sparse=True,
    )


class Recommender(nn.Module):
    """Predict the log-odds of a click for each example of a batch."""

    tables: jbag.EmbeddingBagCollection

    @nn.compact
    def __call__(self, batch: Batch) -> jax.Array:
        """Return the log-odds, [B]."""
        pooled = self.tables(
            {name: getattr(batch, name) for name in self.tables.features}
        )
        vectors = [mlp(batch.dense, 64, pooled["item"].shape[1]), *pooled.values()]
        dots = [jnp.sum(a * b, axis=1) for a, b in itertools.combinations(vectors, 2)]
        top = jnp.concatenate([vectors[0], jnp.stack(dots, axis=1)], axis=1)
        return mlp(top, 64, 1)[:, 0]


def make_teacher(rows: int, seed: int, num_factors: int = 3) -> Teacher:
    """Return a teacher with this number of items."""
    rng = np.random.default_rng(seed)
    # The scales give items the largest share of the log-odds.
    sizes = [4096, CATEGORIES, TAGS, COUNTRIES, DENSE, 1, 1]
    scales = [0.9, 0.7, 0.4, 0.4, 0.15, 0.3, 0.5]
    factors = [
        scale * rng.standard_normal((size, num_factors))
        for size, scale in zip(sizes, scales, strict=True)
    ]
    return Teacher(rows, *factors)


def draw_ids(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """Draw ids from a power law: rank r has a frequency of about (r + 50)^-1.4.

    The first 230 ranks have half of the mass, the ranks from 16,000 on a tenth.
    """
    tail, head = (np.array([rows, 0]) + 50.0) ** -0.4
    ranks = (tail + (head - tail) * rng.random(size)) ** -2.5 - 50
    ranks = np.minimum(ranks.astype(np.int64), rows - 1)
    # Multiplication by a prime above `rows` permutes the ranks.
    return (ranks * 2_654_435_761 % rows).astype(np.int32)


def draw_bags(
    rng: np.random.Generator, rows: int, size: int, mean_length: int
) -> jbag.Bags:
    """Draw bags of such ids, with geometric lengths."""
    lengths = rng.geometric(1 / (mean_length + 1), size) - 1
    return jbag.Bags.from_lengths(draw_ids(rng, rows, lengths.sum()), lengths)


def sum_bags(factors: np.ndarray, bags: jbag.Bags) -> np.ndarray:
    """Sum the factors of each bag, in NumPy, independently of jbag."""
    ids = np.asarray(bags.indices[: bags.offsets[-1]]) % len(factors)
    sums = np.cumsum(factors[ids], axis=0)
    sums = np.pad(sums, ((1, 0), (0, 0)))
    return sums[bags.offsets[1:]] - sums[bags.offsets[:-1]]


def draw_part(teacher: Teacher, size: int, seed: Sequence[int]) -> Batch:
    """Draw examples, with clicks from the teacher."""
    rng = np.random.default_rng(seed)
    item = draw_ids(rng, teacher.rows, size)
    category = item % CATEGORIES
    history = draw_bags(rng, teacher.rows, size, HISTORY_LENGTH)
    tags = draw_bags(rng, TAGS, size, TAGS_LENGTH)
    country = draw_ids(rng, COUNTRIES, size)
    dense = rng.standard_normal((size, DENSE), np.float32)
    shown = teacher.every_item + teacher.items[item % len(teacher.items)]
    shown += teacher.categories[category]
    user = teacher.every_user + teacher.countries[country]
    user += np.tanh(2 * dense) @ teacher.dense
    user += sum_bags(teacher.tags, tags)
    user += sum_bags(teacher.items, history) / np.maximum(history.lengths, 1)[:, None]
    log_odds = np.sum(user * shown, axis=1) - 1
    clicks = rng.random(size) < 1 / (1 + np.exp(-log_odds))
    return Batch(
        item[:, None],
        category[:, None],
        history,
        tags,
        country[:, None],
        dense,
        clicks.astype(np.float32),
        log_odds.astype(np.float32),
    )


def join(parts: Sequence[Any], own: slice) -> Any:
    """Concatenate parts, which are arrays or `Bags`; return a slice of the examples."""
    if not isinstance(parts[0], jbag.Bags):
        return np.concatenate(parts)[own]
    ids = np.concatenate([bags.indices for bags in parts])
    lengths = np.concatenate([bags.lengths for bags in parts])
    first = lengths[: own.start].sum()
    last = first + lengths[own].sum()
    return jbag.Bags.from_lengths(ids[first:last], lengths[own])


def draw_batch(
    teacher: Teacher, size: int, seed: Sequence[int], own: range | None = None
) -> Batch:
    """Draw a batch of `size` examples, or the examples `own` of one process."""
    own = own or range(size)
    starts = range(own.start // PART * PART, own.stop, PART)
    parts = [
        draw_part(teacher, min(PART, size - start), (*seed, start // PART))
        for start in starts
    ]
    kept = slice(own.start - starts[0], own.stop - starts[0])
    return Batch(*(join(field, kept) for field in zip(*parts, strict=True)))


def capacity_of(size: int, mean_length: int) -> int:
    """Return a capacity for the ids of `size` bags.

    It must be equal in all processes and steps, so it cannot depend on the batch. One
    of 10^10 batches exceeds it, by Bernstein's inequality.
    """
    deviation = math.sqrt(size * mean_length * (mean_length + 1))
    return math.ceil(size * mean_length + 7 * deviation + 25 * (mean_length + 1))


def make_blocks(mesh: Mesh, size: int) -> jbag.sharding.Blocks:
    """Return the `Blocks` that builds global batches from those of the processes."""
    each = size // mesh.size
    capacity = {
        "history": capacity_of(each, HISTORY_LENGTH),
        "tags": capacity_of(each, TAGS_LENGTH),
    }
    return jbag.sharding.Blocks(mesh, batch_size=size, capacity=capacity)


def place(blocks: jbag.sharding.Blocks, own: Batch) -> Batch:
    """Return the global batch, from this process's part of it."""
    bags = {"history": own.history, "tags": own.tags}
    bags, rest = blocks(bags, own._replace(history=None, tags=None))
    return rest._replace(**bags)


def batches(
    teacher: Teacher,
    blocks: jbag.sharding.Blocks,
    size: int,
    stream: tuple[int, int],
    numbers: range,
    ahead: int = 4,
) -> Iterator[Batch]:
    """Yield global batches, of which each process draws its part.

    A thread draws batches ahead. `Blocks` communicates only for the first batch, while
    the caller waits for it; later batches need no collective.
    """
    own = range(blocks.positions[0], blocks.positions[-1] + 1)

    def draw(number: int) -> Batch:
        return place(blocks, draw_batch(teacher, size, (*stream, number), own))

    drawn: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for number in numbers:
            drawn.append(pool.submit(draw, number))
            if len(drawn) > ahead:
                yield drawn.popleft().result()
        while drawn:
            yield drawn.popleft().result()


def log(line: str) -> None:
    """Print a line, once for all processes."""
    if jax.process_index() == 0:
        tqdm.write(line)


def auc(clicks: np.ndarray, scores: np.ndarray) -> float:
    """Return the probability that a click scores above a non-click; ties count half."""
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[
        places
    ]  # from 1; ties have their mean rank
    positive = int(clicks.sum())
    if positive in (0, clicks.size):
        return math.nan
    above = ranks[clicks > 0].sum() - positive * (positive + 1) / 2
    return float(above / (positive * (clicks.size - positive)))


def log_loss(clicks: np.ndarray, log_odds: np.ndarray) -> float:
    """Return the mean of -log(probability of the observed outcome)."""
    return float(np.mean(np.logaddexp(0.0, log_odds) - clicks * log_odds))


def make_optimizer(args: argparse.Namespace) -> optax.GradientTransformation:
    """Return one optimizer for the tables, and one for the networks."""
    rate = args.learning_rate or LEARNING_RATES[args.optimizer]
    options = {}
    if args.optimizer.endswith(("adagrad", "ftrl")):
        # An example adds about 0.4 / B to a row's gradient. Start the accumulator with
        # one such gradient, so that the first step of a rare row is small.
        options["initial_accumulator_value"] = (0.4 / args.batch_size) ** 2
    make: Callable[..., Any] = getattr(jbag.optim, args.optimizer)
    optimizers = {
        "tables": make(optax.linear_schedule(rate, 0.0, args.steps), **options),
        "networks": optax.adam(optax.linear_schedule(0.01, 0.0, args.steps)),
    }

    def labels(params: dict[str, Any]) -> dict[str, str]:
        return {name: name if name == "tables" else "networks" for name in params}

    return optax.partition(optimizers, labels)


class Checkpoints:
    """Save and restore the training state, on any devices."""

    def __init__(self, args: argparse.Namespace) -> None:
        # The options that must match; devices, processes and strategy may differ.
        names = ("rows", "features", "steps", "batch_size", "optimizer")
        self.run = {name: getattr(args, name) for name in names}
        self.run |= {"learning_rate": args.learning_rate, "seed": args.seed}
        self.path = args.checkpoint.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            # The next step donates the tables, so the save must finish first.
            enable_async_checkpointing=False,
        )
        self.manager = ocp.CheckpointManager(self.path, options=options)

    @property
    def latest(self) -> int | None:
        """The step of the last checkpoint, or None."""
        return self.manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Save the state; each process writes the shards of its devices."""
        own = ocp.args.StandardSave(state)
        parts = ocp.args.Composite(state=own, run=ocp.args.JsonSave(self.run))
        self.manager.save(step, args=parts)
        log(f"Saved after step {step:,}")

    def restore(self, shapes: TrainState, shardings: Any) -> TrainState:
        """Return the last saved state with these shardings."""

        def read(**parts: Any) -> Any:
            return self.manager.restore(self.latest, args=ocp.args.Composite(**parts))

        run = read(run=ocp.args.JsonRestore()).run
        if run != self.run:
            sys.exit(f"{self.path} is of another run, {run}; this run is {self.run}.")
        empty = jax.tree.map(
            lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own),
            shapes,
            shardings,
        )
        log(f"Resuming after step {self.latest:,}, from {self.path}")
        return read(state=ocp.args.StandardRestore(empty)).state


def make_state(
    args: argparse.Namespace,
    tables: jbag.EmbeddingBagCollection,
    batch: Batch,
    saved: Checkpoints | None,
) -> TrainState:
    """Return the initial training state, or the last saved one."""
    model, tx = Recommender(tables), make_optimizer(args)

    def init(batch: Batch) -> TrainState:
        # "rbg" is faster than JAX's default generator.
        key = jax.random.key(args.seed, impl="rbg")
        params = nn.meta.unbox(model.init(key, batch))["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    shapes = jax.eval_shape(init, batch)
    shardings = tables.shardings(shapes)
    if saved is not None and saved.latest is not None:
        state = saved.restore(shapes, shardings)
    else:
        # jit removes the forward pass and initializes each shard on its device.
        state = jax.jit(init, out_shardings=shardings)(batch)
    return jbag.to_huge_pages(state)  # faster random reads


# Donation updates the tables in place, without a copy of ten million rows.
@jax.jit(donate_argnums=0)
def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
    """Take a gradient step on the mean cross-entropy."""

    def mean_loss(params: Any) -> jax.Array:
        log_odds = state.apply_fn({"params": params}, batch)
        return optax.sigmoid_binary_cross_entropy(log_odds, batch.clicks).mean()

    loss, gradient = jbag.value_and_grad(mean_loss)(state.params)
    return state.apply_gradients(grads=gradient), loss


def predict(state: TrainState, batch: Batch) -> jax.Array:
    """Return the clicks, and the log-odds of the model and of the teacher, [3, B]."""
    log_odds = state.apply_fn({"params": state.params}, batch)
    return jnp.stack([batch.clicks, log_odds, batch.log_odds])


def append_loss(args: argparse.Namespace, step: int, loss: float) -> None:
    """Append a line to the file of losses, if --losses is given."""
    if args.losses and jax.process_index() == 0:
        with args.losses.open("a") as file:
            file.write(f"{step} {loss:.9g}\n")


def train(
    args: argparse.Namespace, teacher: Teacher, mesh: Mesh
) -> tuple[TrainState, History]:
    """Train on new examples in every step; print the speed.

    With --plot, measure the AUC ten times, each on a tenth of the test examples.
    """
    size, stream = args.batch_size, (args.seed, 1)
    blocks = make_blocks(mesh, size)
    saved = Checkpoints(args) if args.checkpoint else None
    example = next(batches(teacher, blocks, size, stream, range(1)))
    state = make_state(args, make_tables(args, mesh), example, saved)
    first = int(state.step)
    history = History(first, [], [])
    losses, times = history.losses, []
    start = time.perf_counter()
    with tqdm(
        total=args.steps * size,
        initial=first * size,
        unit=" examples",
        unit_scale=True,
        disable=jax.process_index() > 0 or None,  # None: where there is no terminal
    ) as bar:
        drawn = batches(teacher, blocks, size, stream, range(first, args.steps))
        for step, batch in enumerate(drawn, first + 1):
            before = time.perf_counter()
            state, loss = train_step(state, batch)
            losses.append(float(loss))  # blocks until the step ends
            times.append(time.perf_counter() - before)
            append_loss(args, step, losses[-1])
            if saved and (step % args.save_every == 0 or step == args.steps):
                saved.save(step, state)
            if args.plot and step % math.ceil(args.steps / 10) == 0:
                clicks, model, _ = predict_new(args, teacher, mesh, state, share=0.1)
                history.aucs.append((step, auc(clicks, model)))
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}", refresh=False)
            bar.update(size)
    if times:
        seconds = time.perf_counter() - start
        count = len(times) * size
        log(f"{count:,} examples in {seconds:.1f} s, {count / seconds:,.0f} per second")
        # The median excludes the first step, which compiles.
        median = 1e3 * statistics.median(times)
        log(f"{median:.1f} ms per step of {size} examples (median)")
    return state, history


def predict_new(
    args: argparse.Namespace,
    teacher: Teacher,
    mesh: Mesh,
    state: TrainState,
    share: float = 1.0,
) -> np.ndarray:
    """Return what `predict` does for a share of the test examples, [3, n]."""
    count = math.ceil(share * args.test_examples / args.batch_size)
    blocks = make_blocks(mesh, args.batch_size)
    drawn = batches(teacher, blocks, args.batch_size, (args.seed, 2), range(count))
    bar = tqdm(
        drawn,
        total=count,
        desc="evaluation",
        unit=" batches",
        leave=False,
        delay=1,
        disable=jax.process_index() > 0 or None,
    )
    # Replicate the outputs, so that every process can read them.
    predict_replicated = jax.jit(predict, out_shardings=NamedSharding(mesh, P()))
    return np.concatenate([predict_replicated(state, batch) for batch in bar], axis=1)


def evaluate(clicks: np.ndarray, **log_odds: np.ndarray) -> list[float]:
    """Print the metrics of the model and the teacher; return their AUCs."""
    log(f"{clicks.size:,} new examples:")
    log(f"{'':20}  {'AUC':>6}  {'log loss':>8}")
    aucs = [auc(clicks, own) for own in log_odds.values()]
    for (name, own), reached in zip(log_odds.items(), aucs, strict=True):
        log(f"{name:20}  {reached:6.4f}  {log_loss(clicks, own):8.4f}")
    return aucs


def plot(
    history: History, clicks: np.ndarray, model: np.ndarray, best: float, path: Path
) -> None:
    """Draw the losses, the AUCs beside the teacher's, and the calibration."""
    mosaic = [["loss", "AUC", "calibration"], ["loss", "AUC", "counts"]]
    axes = plots.make_axes(mosaic, 14, 5, height_ratios=[3, 1])
    if history.losses:  # not of a run that had ended
        plots.draw_loss(axes["loss"], history.losses, "nats", history.first)
    steps, aucs = zip(*history.aucs, strict=True) if history.aucs else ((), ())
    axes["AUC"].plot(steps, aucs, marker="o", label="model")
    axes["AUC"].axhline(best, color="gray", linestyle="--", label="teacher")
    axes["AUC"].set(title="AUC on new examples", xlabel="step", ylabel="AUC")
    axes["AUC"].legend()
    probabilities = 1 / (1 + np.exp(-model))
    plots.draw_calibration(axes["calibration"], axes["counts"], clicks, probabilities)
    plots.save(axes, path)


def export(args: argparse.Namespace, mesh: Mesh, state: TrainState) -> None:
    """Write each table to an .npz file, its rows in the order of the ids."""
    # On the host, because the large table may not fit on one device.
    arrays = jax.tree.map(np.asarray, state.params["tables"])
    tables: dict[str, Any] = make_tables(args, mesh).export_tables(arrays)
    with jbag.atomic_write(args.export) as temporary, temporary.open("wb") as file:
        np.savez(file, **tables)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--rows", type=int, default=10_000_000, help="number of items (10000000)")
    add("--features", type=int, default=16, help="width of an embedding (16)")
    add("--steps", type=int, default=1500, help="training steps (1500)")
    add("--batch-size", type=int, default=4096, help="examples per step (4096)")
    add("--test-examples", type=int, default=200_000, help="test examples (200000)")
    add("--optimizer", choices=LEARNING_RATES, default="rowwise_adagrad")
    add("--learning-rate", type=float, help="initial rate of the tables")
    add("--seed", type=int, default=0, help="of teacher, examples and model (0)")
    add("--strategy", choices=STRATEGIES, default="row_wise", help="of the large table")
    add("--devices", type=int, help="CPU devices per process (default: JAX's)")
    add("--processes", type=int, default=1, help="number of processes (1)")
    add("--process", type=int, default=0, help="index of this process (0)")
    add("--coordinator", default="127.0.0.1:12355", help="HOST:PORT of process 0")
    add("--heartbeat", type=int, default=100, help="timeout in seconds (100)")
    add("--checkpoint", type=Path, help="directory of checkpoints")
    add("--save-every", type=int, default=500, help="steps between checkpoints (500)")
    add("--losses", type=Path, help="file to append the losses to")
    add("--export", type=Path, help=".npz file for the trained tables")
    add("--plot", type=Path, help="plot the losses, AUCs and calibration")
    args = parser.parse_args(argv)
    least = dict.fromkeys(("rows", "features", "steps", "batch_size"), 1)
    least |= dict.fromkeys(("test_examples", "devices", "processes"), 1)
    least |= {"process": 0, "heartbeat": 1, "save_every": 1, "seed": 0}
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and value < low:
            parser.error(
                f"--{name.replace('_', '-')} must be at least {low}; got {value}"
            )
    if args.rows >= 1 << 31:
        parser.error(f"--rows must be below 2147483648; got {args.rows}")
    if args.learning_rate is not None and not 0 < args.learning_rate < math.inf:
        parser.error(f"--learning-rate must be above 0; got {args.learning_rate}")
    if args.process >= args.processes:
        parser.error(f"--process must be below {args.processes}; got {args.process}")
    if args.export and args.processes > 1:
        parser.error("--export takes one process; it can resume from --checkpoint")
    return args


def find_devices(args: argparse.Namespace) -> Mesh:
    """Return the mesh of all devices of all processes."""
    if args.devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices)
    if args.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            args.coordinator,
            args.processes,
            args.process,
            heartbeat_timeout_seconds=args.heartbeat,
            # A process that dies before it connects is detected by this timeout.
            initialization_timeout=max(30, args.heartbeat),
        )
    return jax.make_mesh((jax.device_count(),), ("x",))


def stop(args: argparse.Namespace, error: BaseException) -> NoReturn:
    """Print why this process stopped, and exit without JAX's shutdown."""
    traceback.print_exception(error)
    lines = [
        f"Process {args.process} of {args.processes} stopped with the error above, "
        "which may result from another process that stopped."
    ]
    if args.checkpoint and args.checkpoint.exists():
        # Incomplete checkpoints have names that are not numbers.
        names = [path.name for path in args.checkpoint.iterdir()]
        latest = max([int(name) for name in names if name.isdigit()], default=0)
        lines.append(
            f"The last checkpoint in {args.checkpoint} is of step {latest:,}. "
            "Restart all processes to resume from it."
            if latest
            else f"There is no checkpoint in {args.checkpoint} yet."
        )
    print(*lines, sep="\n", file=sys.stderr, flush=True)
    if args.process == 0:
        time.sleep(2)  # let the others print: JAX ends them without process 0
    # Not sys.exit: JAX's shutdown would wait for a process that has stopped.
    os._exit(1)


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Run the program; return the AUCs of the model and of the teacher."""
    args = parse_arguments(argv)
    mesh = find_devices(args)
    try:
        teacher = make_teacher(args.rows, args.seed)
        state, history = train(args, teacher, mesh)
        clicks, model, best = predict_new(args, teacher, mesh, state)
        reached, bound = evaluate(clicks, model=model, teacher=best)
        if args.plot and jax.process_index() == 0:
            plot(history, clicks, model, bound, args.plot)
        if args.export:
            export(args, mesh, state)
    except (Exception, KeyboardInterrupt) as error:
        if args.processes == 1:
            raise
        stop(args, error)
    return reached, bound


if __name__ == "__main__":
    main()

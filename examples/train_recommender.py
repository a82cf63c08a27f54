"""Train a recommender: a click model over embedding tables, the largest of 640 MB.

The model of Naumov et al., "Deep Learning Recommendation Model for Personalization and
Recommendation Systems" (2019). Each categorical feature is a bag of ids, pooled to a
vector; a small network turns the dense features into one more; the dot products of all
pairs of vectors, through a second network, give the log-odds of a click.

    python examples/train_recommender.py
    python examples/train_recommender.py --optimizer ftrl --rows 1000000
    python examples/train_recommender.py --steps 20000 --batch-size 8192

The clicks are made up, by a teacher whose probabilities are known. The best that any
model could do is known, too, and printed beside what this one does on new examples.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from tqdm import tqdm

import jbag

CATEGORIES, COUNTRIES, TAGS, DENSE = 997, 200, 5000, 13
# How the tables can be trained, and the learning rate that each way starts from.
LEARNING_RATES = {
    "sgd": 200.0,
    "adagrad": 0.2,
    "rowwise_adagrad": 0.2,
    "adam": 0.01,
    "rowwise_adam": 0.01,
    "ftrl": 0.2,
}


class Batch(NamedTuple):
    """Examples: an item was shown to a user, who clicked on it or didn't."""

    item: np.ndarray  # [B, 1]: the item shown
    category: np.ndarray  # [B, 1]: of the item
    history: jbag.Bags  # the items that the user had looked at before
    tags: jbag.Bags  # the user's interests
    country: np.ndarray  # [B, 1]: of the user
    dense: np.ndarray  # [B, DENSE]: of the user
    clicks: np.ndarray  # [B]: 0 or 1
    log_odds: np.ndarray  # [B]: what the teacher knows, and the model isn't told


class Teacher(NamedTuple):
    """The hidden factors of items and users, whose dot products are the log-odds."""

    rows: int  # how many items there are
    items: np.ndarray  # [4096, K]; an item's are those of its id modulo 4096
    categories: np.ndarray  # [CATEGORIES, K]
    tags: np.ndarray  # [TAGS, K]
    countries: np.ndarray  # [COUNTRIES, K]
    dense: np.ndarray  # [DENSE, K]
    every_item: np.ndarray  # [1, K]
    every_user: np.ndarray  # [1, K]


def small(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Start embeddings small: what training hasn't met says little."""
    return jax.random.uniform(key, shape, dtype, -0.1, 0.1)


def mlp(x: Any, hidden: int, features: int) -> jax.Array:
    """Return a network of two layers, applied to x."""
    return nn.Dense(features)(nn.relu(nn.Dense(hidden)(x)))


class Recommender(nn.Module):
    """Score how likely each example of a batch is a click."""

    rows: int
    features: int

    @nn.compact
    def __call__(self, batch: Batch) -> jax.Array:
        """Return the log-odds, [B]."""
        bag = functools.partial(
            jbag.EmbeddingBag, features=self.features, embedding_init=small
        )
        # One table for the items shown and those looked at. A batch holds few of its
        # rows: only they have a gradient, and only they are read and written.
        items = bag(self.rows, sparse=True, name="items")
        vectors = [
            mlp(batch.dense, 64, self.features),
            items(batch.item),
            items(batch.history),
            bag(CATEGORIES, name="categories")(batch.category),
            bag(TAGS, mode="sum", name="tags")(batch.tags),
            bag(COUNTRIES, name="countries")(batch.country),
        ]
        dots = [jnp.sum(a * b, axis=1) for a, b in itertools.combinations(vectors, 2)]
        top = jnp.concatenate([vectors[0], jnp.stack(dots, axis=1)], axis=1)
        return mlp(top, 64, 1)[:, 0]


def make_teacher(rows: int, seed: int, num_factors: int = 3) -> Teacher:
    """Return a teacher of that many items."""
    rng = np.random.default_rng(seed)
    # Scaled so that items count for the most, and no feature for nearly all.
    sizes = [4096, CATEGORIES, TAGS, COUNTRIES, DENSE, 1, 1]
    scales = [0.9, 0.7, 0.4, 0.4, 0.15, 0.3, 0.5]
    factors = [
        scale * rng.standard_normal((size, num_factors))
        for size, scale in zip(sizes, scales, strict=True)
    ]
    return Teacher(rows, *factors)


def draw_ids(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """Draw ids, the r-th most popular of them with a share of about (r + 50)^-1.4.

    The first 230 are half of what is drawn, and all past the first 16,000 a tenth.
    """
    tail, head = (np.array([rows, 0]) + 50.0) ** -0.4
    ranks = (tail + (head - tail) * rng.random(size)) ** -2.5 - 50
    ranks = np.minimum(ranks.astype(np.int64), rows - 1)
    # A prime above `rows` takes each rank to a row of its own, far from the next one's.
    return (ranks * 2_654_435_761 % rows).astype(np.int32)


def draw_bags(
    rng: np.random.Generator, rows: int, size: int, mean_length: int
) -> jbag.Bags:
    """Draw bags of such ids: many short ones, some of them empty, and a few long."""
    lengths = rng.geometric(1 / (mean_length + 1), size) - 1
    ids = draw_ids(rng, rows, lengths.sum())
    # The same capacity for all batches, as each is compiled once: six standard
    # deviations of their sizes above the mean.
    usual = size * mean_length + 6 * math.sqrt(size * mean_length * (mean_length + 1))
    capacity = jbag.bucket(max(len(ids), math.ceil(usual)))
    return jbag.Bags.from_lengths(ids, lengths).pad_to(capacity)


def sum_bags(factors: np.ndarray, bags: jbag.Bags) -> np.ndarray:
    """Sum the factors of each bag, in NumPy: the teacher owes nothing to jbag."""
    ids = np.asarray(bags.indices[: bags.offsets[-1]]) % len(factors)
    sums = np.cumsum(factors[ids], axis=0)
    sums = np.pad(sums, ((1, 0), (0, 0)))
    return sums[bags.offsets[1:]] - sums[bags.offsets[:-1]]


def draw_batch(teacher: Teacher, size: int, seed: Sequence[int]) -> Batch:
    """Draw examples, and let the teacher click."""
    rng = np.random.default_rng(seed)
    item = draw_ids(rng, teacher.rows, size)
    category = item % CATEGORIES
    history = draw_bags(rng, teacher.rows, size, mean_length=9)
    tags = draw_bags(rng, TAGS, size, mean_length=3)
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


def batches(
    teacher: Teacher, size: int, stream: tuple[int, int], count: int, ahead: int = 4
) -> Iterator[Batch]:
    """Yield batches, drawn by another thread while the caller works on earlier ones."""
    drawn: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for number in range(count + ahead):
            if number < count:
                drawn.append(pool.submit(draw_batch, teacher, size, (*stream, number)))
            if number >= ahead:
                yield drawn.popleft().result()


def auc(clicks: np.ndarray, scores: np.ndarray) -> float:
    """Return how likely a click scores above a non-click; a tie is worth a half."""
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # from 1; ties share theirs
    positive = int(clicks.sum())
    if positive in (0, clicks.size):
        return math.nan
    above = ranks[clicks > 0].sum() - positive * (positive + 1) / 2
    return float(above / (positive * (clicks.size - positive)))


def log_loss(clicks: np.ndarray, log_odds: np.ndarray) -> float:
    """Return the mean of -log(the probability given to what happened)."""
    return float(np.mean(np.logaddexp(0.0, log_odds) - clicks * log_odds))


def make_state(args: argparse.Namespace, batch: Batch) -> TrainState:
    """Return the model before its first step."""
    model = Recommender(args.rows, args.features)
    # Compiled, it doesn't run the model. Of JAX's generators, "rbg" is the fast one.
    params = jax.jit(model.init)(jax.random.key(args.seed, impl="rbg"), batch)["params"]
    rate = args.learning_rate or LEARNING_RATES[args.optimizer]
    options = {}
    if args.optimizer.endswith(("adagrad", "ftrl")):
        # An example adds some 0.4 / B to a row's gradient. As if each row had met one
        # already, rare rows don't take the full step when they are first met.
        options["initial_accumulator_value"] = (0.4 / args.batch_size) ** 2
    make: Callable[..., Any] = getattr(jbag.optim, args.optimizer)
    optimizers = {
        "tables": make(optax.linear_schedule(rate, 0.0, args.steps), **options),
        "networks": optax.adam(optax.linear_schedule(0.01, 0.0, args.steps)),
    }
    labels = jax.tree.map_with_path(
        lambda path, _: "tables" if path[-1].key == "embedding" else "networks", params
    )
    tx = optax.partition(optimizers, labels)
    params = jbag.to_huge_pages(params)  # Rows are read at random: faster from there.
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


# Donated, the tables are updated where they are: ten million rows are never copied.
@jax.jit(donate_argnums=0)
def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
    """Take a step down the cross-entropy."""

    def mean_loss(params: Any) -> jax.Array:
        log_odds = state.apply_fn({"params": params}, batch)
        return optax.sigmoid_binary_cross_entropy(log_odds, batch.clicks).mean()

    loss, gradient = jbag.value_and_grad(mean_loss)(state.params)
    return state.apply_gradients(grads=gradient), loss


@jax.jit
def predict(state: TrainState, batch: Batch) -> jax.Array:
    """Return the log-odds of a click, [B]."""
    return state.apply_fn({"params": state.params}, batch)


def train(args: argparse.Namespace, teacher: Teacher) -> TrainState:
    """Train on new examples in every step; print how fast it went."""
    size, stream = args.batch_size, (args.seed, 1)
    state = make_state(args, next(batches(teacher, size, stream, 1)))
    met = np.zeros(args.rows, bool)
    losses: list[float] = []
    times: list[float] = []
    start = time.perf_counter()
    with tqdm(total=args.steps * size, unit=" examples", unit_scale=True) as bar:
        for batch in batches(teacher, size, stream, args.steps):
            before = time.perf_counter()
            state, loss = train_step(state, batch)
            losses.append(float(loss))  # Waits for the step to end.
            times.append(time.perf_counter() - before)
            met[batch.item] = met[batch.history.indices] = True
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}", refresh=False)
            bar.update(size)
    seconds = time.perf_counter() - start
    count = args.steps * size
    print(f"{count:,} examples in {seconds:.1f} s, {count / seconds:,.0f} a second")
    # The median: steps that were compiled first took longer.
    print(f"{1e3 * statistics.median(times):.1f} ms a step of {size} examples (median)")
    print(f"{met.sum():,} of {args.rows:,} items met")
    return state


def evaluate(
    args: argparse.Namespace, teacher: Teacher, state: TrainState
) -> tuple[float, float]:
    """Print how the model and its teacher do on new examples; return their AUCs."""
    count = math.ceil(args.test_examples / args.batch_size)
    test = list(batches(teacher, args.batch_size, (args.seed, 2), count))
    clicks = np.concatenate([batch.clicks for batch in test])
    model = np.concatenate([predict(state, batch) for batch in test])
    best = np.concatenate([batch.log_odds for batch in test])
    print(f"{clicks.size:,} new examples:")
    print(f"{'':20}  {'AUC':>6}  {'log loss':>8}")
    for name, log_odds in {"the model": model, "the best there is": best}.items():
        loss = log_loss(clicks, log_odds)
        print(f"{name:20}  {auc(clicks, log_odds):6.4f}  {loss:8.4f}")
    return auc(clicks, model), auc(clicks, best)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--rows", type=int, default=10_000_000, help="items there are (10000000)")
    add("--features", type=int, default=16, help="of an embedding (16)")
    add("--steps", type=int, default=1500, help="batches to train on (1500)")
    add("--batch-size", type=int, default=4096, help="examples a step (4096)")
    add("--test-examples", type=int, default=200_000, help="new examples (200000)")
    add("--optimizer", choices=LEARNING_RATES, default="rowwise_adagrad")
    add("--learning-rate", type=float, help="of the tables, at first (see the program)")
    add("--seed", type=int, default=0, help="of the teacher, examples and model (0)")
    args = parser.parse_args(argv)
    for name in ("rows", "features", "steps", "batch_size", "test_examples"):
        value = getattr(args, name)
        if value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; got {value}")
    if args.rows >= 1 << 31:
        parser.error(f"--rows must be below 2147483648; got {args.rows}")
    if args.learning_rate is not None and not 0 < args.learning_rate < math.inf:
        parser.error(f"--learning-rate must be above 0; got {args.learning_rate}")
    if args.seed < 0:
        parser.error(f"--seed must be at least 0; got {args.seed}")
    return args


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Run the program; return the AUC of the model, and the best there is."""
    args = parse_arguments(argv)
    teacher = make_teacher(args.rows, args.seed)
    return evaluate(args, teacher, train(args, teacher))


if __name__ == "__main__":
    main()

"""Train a text classifier: an embedding bag (mean) and a dense layer.

The model is that of Joulin et al., "Bag of Tricks for Efficient Text Classification"
(2016): the mean of the embeddings of words and hashed n-grams, and a linear layer.

    python examples/train_text_classifier.py
    python examples/train_text_classifier.py --train news.train --test news.test
    python examples/train_text_classifier.py --train news.csv --save model --plot a.png
    python examples/train_text_classifier.py --load model --test news.test
    python examples/train_text_classifier.py --load model --predict < lines.txt
    python examples/train_text_classifier.py --load fasttext.bin --test news.test

Without files, it classifies docstrings by package of the standard library. Files are in
fastText's format, `__label__x text`, or CSV with the label first.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import functools
import itertools
import json
import math
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

import jbag
import plots

# Only on a terminal, and only of what takes more than a second.
progress = functools.partial(tqdm, unit_scale=True, disable=None, delay=1)

LABEL = "__label__"
LABEL_COLUMNS = {"label", "labels", "class", "class index", "category", "target"}


class Examples(NamedTuple):
    """Texts and their labels."""

    labels: list[str]
    texts: list[str]


class Classifier(NamedTuple):
    """A trained model with its labels, encoder and training history."""

    labels: list[str]
    encoder: jbag.text.Encoder
    features: int
    losses: list[float]  # of the training steps
    accuracies: list[float]  # on held-out texts, by epoch
    params: Any


class TextClassifier(nn.Module):
    """Compute the logits of the classes for each bag."""

    rows: int
    features: int
    num_classes: int

    @nn.compact
    def __call__(self, bags: jbag.Bags) -> jax.Array:
        """Return the logits, [B, num_classes]."""
        bag = jbag.EmbeddingBag(self.rows, self.features, sparse=True, name="bag")
        return nn.Dense(self.num_classes, name="head")(bag(bags))


def init_params(model: TextClassifier, seed: int) -> dict[str, dict[str, jax.Array]]:
    """Return a table drawn uniformly from [-0.1, 0.1), and a head of zeros.

    NumPy draws the table, because JAX's generator takes seconds to compile on a CPU.
    """
    drawn = np.random.default_rng(seed).random((model.rows, model.features), np.float32)
    drawn -= 0.5
    drawn *= 0.2
    table = jax.device_put(drawn).block_until_ready()
    del drawn  # before the next copy
    kernel = jnp.zeros((model.features, model.num_classes))
    head = {"kernel": kernel, "bias": jnp.zeros(model.num_classes)}
    table = jbag.pack(jbag.to_huge_pages(table))  # as TPUs and CPUs read it fastest
    return {"bag": {"embedding": table}, "head": head}


def read_docstrings(num_classes: int = 20) -> Examples:
    """Return the docstrings of the packages of the standard library with the most."""
    root = Path(sysconfig.get_path("stdlib"))
    # Tests, installed packages, programs, and packages that newer Pythons removed.
    skipped = {"test", "tests", "site-packages", "dist-packages"}
    skipped |= {"idlelib", "distutils", "lib2to3"}
    packages: dict[str, str] = {}
    paths = sorted(root.rglob("*.py"))
    for path in progress(paths, desc="docstrings", unit=" files"):
        parts = path.relative_to(root).parts
        if skipped.intersection(parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue  # a template, not a module
        for node in ast.walk(tree):
            documented = (
                ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            )
            if isinstance(node, documented):
                text = " ".join((ast.get_docstring(node) or "").split())
                packages.setdefault(text, parts[0].removesuffix(".py"))
    packages.pop("", None)
    kept = dict(Counter(packages.values()).most_common(num_classes))
    pairs = [(package, text) for text, package in packages.items() if package in kept]
    return Examples([package for package, _ in pairs], [text for _, text in pairs])


def read_examples(path: str) -> Examples:
    """Read a file in fastText's format or CSV."""
    # Only "\n" ends a line: a text may contain other line breaks.
    with Path(path).open(encoding="utf-8-sig", errors="replace", newline="\n") as file:
        first = next((line for line in file if line.strip()), "")
        read = read_fasttext if first.lstrip().startswith(LABEL) else read_csv
        if first and read is read_csv and not path.lower().endswith(".csv"):
            sys.exit(f"{path}: neither CSV by its name nor {LABEL} on its first line.")
        file.seek(0)
        examples = Examples([], [])
        buffer: Any = file.buffer
        size = Path(path).stat().st_size
        with progress(total=size, desc=Path(path).name, unit="B") as bar:
            for number, (label, text) in enumerate(read(path, file)):
                examples.labels.append(label)
                examples.texts.append(text)
                if number % 1024 == 0:
                    bar.update(buffer.tell() - bar.n)
            bar.update(size - bar.n)
    return examples if examples.texts else sys.exit(f"{path}: the file has no texts.")


def read_fasttext(path: str, file: TextIO) -> Iterator[tuple[str, str]]:
    """Yield the first label of each line, and the text without labels."""
    for number, line in enumerate(file, 1):
        label, text = (*line.split(maxsplit=1), "", "")[:2]
        if (
            not label.startswith(LABEL) or LABEL in text
        ):  # more than one label, or none first
            words = line.split()
            label = next((word for word in words if word.startswith(LABEL)), LABEL)
            text = " ".join(word for word in words if not word.startswith(LABEL))
        label = label.removeprefix(LABEL).rstrip(",")
        if label:
            yield label, text.rstrip("\r\n")
        elif line.strip():
            sys.exit(f"{path}:{number}: a line must have a label, {LABEL}x.")


def read_csv(path: str, file: TextIO) -> Iterator[tuple[str, str]]:
    """Yield the label, in the first column or by the header, and the other columns."""
    csv.field_size_limit(1 << 30)
    rows = csv.reader(file)
    column = None
    for cells in filter(any, ([cell.strip() for cell in row] for row in rows)):
        if column is None:
            names = [cell.lower() in LABEL_COLUMNS for cell in cells]
            column = names.index(True) if any(names) else 0
            if any(names):
                continue
        if len(cells) < max(2, column + 1) or not cells[column]:
            sys.exit(f"{path}:{rows.line_num}: a row must have a label and a text.")
        yield cells.pop(column), " ".join(cells)


def hold_out(examples: Examples, seed: int) -> tuple[Examples, Examples]:
    """Split off a tenth of the examples."""
    order = np.random.default_rng(seed).permutation(len(examples.texts)).tolist()
    tenth = max(1, len(order) // 10)

    def choose(positions: list[int]) -> Examples:
        return Examples(*([column[i] for i in positions] for column in examples))

    return choose(order[tenth:]), choose(order[:tenth])


def make_optimizer(
    learning_rate: float, steps: int, slots: float
) -> optax.GradientTransformation:
    """Return Adagrad for the table and Adam for the head, with linear decay to 0.

    A slot adds about 1 / slots to the gradient of its row. The accumulator starts with
    one such gradient, so that the first step of a rare row is small.
    """
    rate = optax.linear_schedule(learning_rate, 0.0, steps)
    table = jbag.optim.rowwise_adagrad(rate, initial_accumulator_value=slots**-2)
    head = optax.adam(optax.linear_schedule(0.05, 0.0, steps))
    return optax.partition({"bag": table, "head": head}, {"bag": "bag", "head": "head"})


def mean_loss(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the weighted mean of the cross-entropy; zero if all weights are zero."""
    # One-hot, because the gradient of an index is a scatter, which is slow on CPUs.
    classes = jax.nn.one_hot(targets, logits.shape[1])
    losses = optax.softmax_cross_entropy(logits, classes)
    return (losses * weights).sum() / jnp.maximum(weights.sum(), 1e-9)


def train_step(state: TrainState, batch: jbag.data.Batch) -> tuple[Any, jax.Array]:
    """Take a gradient step on the mean loss of a batch; padding has weight zero."""
    targets, weights = batch.arrays

    def loss(params: Any) -> jax.Array:
        logits = state.apply_fn({"params": params}, batch.bags)
        return mean_loss(logits, targets, weights)

    value, gradient = jbag.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=gradient), value


@jax.jit(donate_argnums=0)
def train_steps(state: TrainState, stack: jbag.data.Batch) -> tuple[Any, jax.Array]:
    """Take a step for each batch of a stack; return their losses."""
    return jax.lax.scan(train_step, state, stack)


@jax.jit(static_argnums=0)
def log_probabilities(model: TextClassifier, params: Any, bags: jbag.Bags) -> jax.Array:
    """Return the log probabilities of the classes, [B, num_classes]."""
    logits: Any = model.apply({"params": params}, bags)
    return jax.nn.log_softmax(logits)


def predict(classifier: Classifier, texts: Sequence[str], size: int = 1024) -> Any:
    """Return the log probabilities of the classes for each text, [n, num_classes]."""
    encoder, num_classes = classifier.encoder, len(classifier.labels)
    model = TextClassifier(max(1, encoder.num_rows), classifier.features, num_classes)
    parts, capacity = [], 1024
    bar = progress(total=len(texts), desc="prediction", unit=" texts", leave=False)
    for start in range(0, len(texts), size):
        chunk = texts[start : start + size]
        bags = encoder.encode(chunk)
        # Each capacity compiles once, so it only grows.
        capacity = max(capacity, jbag.bucket(bags.capacity))
        part = log_probabilities(model, classifier.params, bags.pad_to(capacity, size))
        parts.append((part, len(chunk)))  # JAX computes it while the next is encoded
        bar.update(len(chunk))
    bar.close()
    return np.concatenate([np.asarray(part)[:count] for part, count in parts])


def train(
    args: argparse.Namespace, examples: Examples, held_out: Examples
) -> Classifier:
    """Train on `examples`; measure each epoch on `held_out`, if there are any.

    With --patience, stop early by the loss on `held_out`.
    """
    started = time.perf_counter()
    labels = sorted(set(examples.labels))
    if len(labels) < 2:
        sys.exit("The texts must have at least two classes.")
    # fewer buckets for small data
    tokens = sum(map(str.count, examples.texts, itertools.repeat(" ")))
    buckets = min(args.buckets, 1 << tokens.bit_length()) if args.ngrams > 1 else 0
    encoder, bags = jbag.text.Encoder.fit_encode(
        examples.texts,
        min_count=args.min_count,
        max_words=args.words,
        ngrams=args.ngrams,
        buckets=buckets,
    )
    examples.texts.clear()  # to free memory for training
    print(f"{len(labels)} classes, {len(encoder.words)} words, {bags.capacity} ids")
    class_of = {label: i for i, label in enumerate(labels)}
    targets = np.array([class_of[label] for label in examples.labels], np.int32)
    weights = np.ones(len(targets), np.float32)
    if args.balance:  # equal total weight per class
        shares = np.bincount(targets) * len(labels) / len(targets)
        weights = (1 / shares).astype(np.float32)[targets]
    # More than a hundred batches per epoch; more epochs for small data.
    size = args.batch_size or min(256, max(16, len(targets) // 128))
    num_batches = math.ceil(len(targets) / size)
    epochs = args.epochs or max(2, min(20, round(256 / num_batches)))
    slots = max(1.0, size * bags.capacity / len(targets))  # per batch, on average
    most = max(1, min(64, int(2**19 / slots)))  # batches per scan, to bound its memory
    steps = math.ceil(num_batches / math.ceil(num_batches / most))
    stream = jbag.data.batches(
        bags,
        (targets, weights),
        batch_size=size,
        seed=args.seed,
        steps=steps,
        prefetch=1,
    )
    features = args.dim or max(10, min(64, len(labels)))
    model = TextClassifier(max(1, encoder.num_rows), features, len(labels))
    optimizer = make_optimizer(args.learning_rate, epochs * len(stream) * steps, slots)
    params = init_params(model, args.seed)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)
    classifier = Classifier(labels, encoder, features, [], [], None)
    best, best_loss, waited = None, math.inf, 0
    bar = progress(total=epochs * len(targets), desc="training", unit=" texts")
    for epoch in range(epochs):
        losses = []
        for stack in stream.at(epoch):
            state, values = train_steps(state, stack)
            losses.append(values)
            for done in losses[-2:-1]:  # waits, to bound the number of pending batches
                bar.set_postfix(loss=f"{np.asarray(done).mean():.4f}", refresh=False)
            bar.update(len(targets) / len(stream))
        own = np.concatenate(losses)[:num_batches].tolist()
        classifier.losses.extend(own)
        line = f"epoch {epoch + 1}: loss {np.mean(own):.4f}"
        if held_out.texts:
            now = classifier._replace(params=state.params)
            loss, accuracy = measure(now, held_out)
            classifier.accuracies.append(accuracy)
            line += f", held-out loss {loss:.4f}, accuracy {accuracy:.4f}"
            waited += 1
            if args.patience and loss < best_loss:  # copy: the next step donates them
                best = jax.tree.map(jnp.copy, state.params)
                best_loss, waited = loss, 0
        bar.set_postfix(loss=f"{np.mean(own):.4f}", refresh=False)
        bar.write(f"{line}, {time.perf_counter() - started:.2f} s")
        if args.patience and waited == args.patience:
            break
    bar.close()
    return classifier._replace(params=state.params if best is None else best)


def measure(classifier: Classifier, held_out: Examples) -> tuple[float, float]:
    """Return the mean loss, without labels unseen in training, and the accuracy."""
    scores = predict(classifier, held_out.texts)
    class_of = {label: i for i, label in enumerate(classifier.labels)}
    targets = np.array([class_of.get(label, -1) for label in held_out.labels])
    accuracy = float((scores.argmax(1) == targets).mean())
    known = np.flatnonzero(targets >= 0)
    losses = -scores[known, targets[known]]
    return float(losses.mean()) if known.size else math.inf, accuracy


def class_scores(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the precision, recall and F1 of each class, by the confusion matrix."""
    right = counts.diagonal()
    precision = right / np.maximum(counts.sum(0), 1)
    recall = right / np.maximum(counts.sum(1)[:-1], 1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    return precision, recall, f1


def evaluate(classifier: Classifier, test: Examples) -> tuple[float, np.ndarray]:
    """Print the metrics; return the accuracy and the confusion matrix.

    The matrix [classes + 1, classes] has true labels by predicted labels; the last row
    is for labels unseen in training.
    """
    started = time.perf_counter()
    scores = predict(classifier, test.texts)
    seconds = time.perf_counter() - started
    labels, predicted = classifier.labels, scores.argmax(1)
    class_of = {label: i for i, label in enumerate(labels)}
    true = np.array([class_of.get(label, len(labels)) for label in test.labels])
    counts = np.zeros((len(labels) + 1, len(labels)), np.int64)
    np.add.at(counts, (true, predicted), 1)
    accuracy = float(counts.trace() / len(true))
    unseen = sorted(set(test.labels).difference(labels))
    if unseen:
        print(f"always wrong, because unseen in training: {', '.join(unseen[:5])}")
    print(f"accuracy {accuracy:.4f} on {len(true)} texts, {seconds:.1f} s\n")
    scores_by_class = class_scores(counts)
    print("precision  recall     F1   texts  label")
    rows = zip(*scores_by_class, counts.sum(1)[:-1], labels, strict=True)
    for *shares, texts, label in itertools.islice(rows, 50):
        print("   {:6.4f}  {:6.4f} {:6.4f}".format(*shares), f"{texts:7d}  {label}")
    means = (x.mean() for x in scores_by_class)
    print("   {:6.4f}  {:6.4f} {:6.4f}".format(*means), f"{len(true):7d}  mean\n")
    print("some predictions (probability, predicted label, true label, text):")
    for i in range(0, len(true), math.ceil(len(true) / 5)):
        mark = " " if predicted[i] == true[i] else "!"
        guess = f"{math.exp(scores[i].max()):.2f}  {labels[predicted[i]]}"
        print(f"{mark} {guess}  {test.labels[i]}  {test.texts[i].strip()[:60]}")
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    names = [*labels, "(unseen)"]
    print(
        "\nmost confused (count, true -> predicted):" if wrong.any() else "\nno errors"
    )
    for pair in np.argsort(-wrong, axis=None, kind="stable")[:10]:
        i, j = np.unravel_index(pair, wrong.shape)
        if wrong[i, j]:
            print(f"{wrong[i, j]:6d}  {names[i]} -> {names[j]}")
    return accuracy, counts


def predict_lines(classifier: Classifier, lines: Iterable[bytes], size: int) -> None:
    """Print the label, probability and text of each line, `size` lines at a time."""
    texts = (line.decode("utf-8-sig", "replace").rstrip("\r\n") for line in lines)
    while chunk := list(itertools.islice(texts, size)):
        for text, row in zip(chunk, predict(classifier, chunk, size), strict=True):
            label, probability = classifier.labels[row.argmax()], math.exp(row.max())
            print(label, f"{probability:.4f}", text, sep="\t")


def save(classifier: Classifier, path: Path) -> None:
    """Write the classifier to one safetensors file, atomically."""
    rest = classifier._asdict()
    params = jbag.unpack(rest.pop("params"))  # a TPU has the table packed
    parts = {"encoder": rest.pop("encoder").to_arrays(), "params": params}
    arrays = flatten_dict(jax.device_get(parts), sep="/")
    metadata = {"classifier": json.dumps(rest)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with jbag.atomic_write(path) as temporary:
            save_file(arrays, temporary, metadata)
    except (OSError, SafetensorError) as error:
        sys.exit(f"{path}: the classifier cannot be saved: {error}")


def load(path: Path) -> Classifier:
    """Read a classifier of `save`, or a fastText model."""
    if path.suffix in (".bin", ".ftz"):
        return load_fasttext(path)
    try:
        with safe_open(path, framework="numpy") as file:
            rest = json.loads(file.metadata()["classifier"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        parts = unflatten_dict(arrays, sep="/")
        encoder = jbag.text.Encoder.from_arrays(parts["encoder"])
        classifier = Classifier(**rest, encoder=encoder, params=parts["params"])
        predict(classifier, [""])  # checks the shapes
    except Exception as error:  # A damaged file raises many types.
        sys.exit(f"{path}: the file holds no saved classifier ({error}).")
    return classifier


def load_fasttext(path: Path) -> Classifier:
    """Read a fastText model with softmax loss, which has the same layers."""
    try:
        model = jbag.fasttext.load(path)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if (model.kind, model.loss) != ("supervised", "softmax"):
        sys.exit(
            f"{path}: the loss must be softmax; got {model.loss}. Use jbag.fasttext."
        )
    labels = [label.removeprefix(LABEL) for label in model.labels]
    head = {"kernel": model.output.T, "bias": jnp.zeros(len(labels))}
    params = {"bag": {"embedding": model.table}, "head": head}
    return Classifier(labels, model.encoder, model.table.shape[1], [], [], params)


def plot(classifier: Classifier, counts: np.ndarray, path: str) -> None:
    """Draw the losses, the held-out accuracy, the confusion matrix and F1."""
    labels, accuracies = classifier.labels, classifier.accuracies
    side = min(16.0, max(4.5, 0.36 * len(labels)))
    mosaic, heights = [["confusion", "F1"]], [side]
    if classifier.losses:  # not with fastText's models
        right = "accuracy" if accuracies else "loss"
        mosaic, heights = [["loss", right], *mosaic], [3, side]
    sizes = {"width_ratios": (side + 1, 4), "height_ratios": heights}
    axes = plots.make_axes(mosaic, side + 5, sum(heights), **sizes)
    if classifier.losses:
        plots.draw_loss(axes["loss"], classifier.losses, "nats per text")
    if accuracies:  # not if it was trained without --plot and --patience
        epochs = range(1, len(accuracies) + 1)
        axes["accuracy"].plot(epochs, accuracies, marker="o")
        axes["accuracy"].set(title="held-out accuracy", xlabel="epoch")
        axes["accuracy"].set(ylabel="share of texts")
        axes["accuracy"].xaxis.get_major_locator().set_params(integer=True)
    plots.draw_confusion(axes["confusion"], counts[:-1], labels)
    plots.draw_f1(axes["F1"], class_scores(counts)[2], labels)
    plots.save(axes, path)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--train", metavar="FILE", help="training texts; only the first label counts")
    add("--test", metavar="FILE", help="test texts (default: a tenth is held out)")
    add("--valid", metavar="FILE", help="texts for --patience (default: a tenth)")
    add("--epochs", type=int, help="passes over the texts (default: 2 to 20, by size)")
    add("--patience", type=int, help="stop after this many epochs without improvement")
    add("--balance", action="store_true", help="give each class the same total weight")
    add("--dim", type=int, help="width of an embedding (10 to 64, by classes)")
    add("--ngrams", type=int, default=2, help="maximum length of word n-grams (2)")
    add("--buckets", type=int, default=1 << 21, help="rows for n-grams (2097152)")
    add("--words", type=int, help="maximum number of words (default: all)")
    add("--min-count", type=int, default=1, help="minimum occurrences of a word (1)")
    add("--batch-size", type=int, help="texts per step (default: 16 to 256, by size)")
    add(
        "--learning-rate", type=float, default=1.0, help="initial rate of the table (1)"
    )
    add("--seed", type=int, default=0, help="of the split, the table and the order (0)")
    add("--save", metavar="FILE", help="file for the classifier")
    add("--load", metavar="PATH", help="use a saved classifier or a fastText .bin file")
    add("--predict", action="store_true", help="predict the labels of standard input")
    add("--plot", metavar="PNG", help="plot the losses, accuracy, confusion and F1")
    args = parser.parse_args(argv)
    numbers = "epochs", "patience", "batch_size", "dim", "ngrams", "buckets", "words"
    for name in numbers:
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; got {value}")
    if not 0 < args.learning_rate < math.inf:
        parser.error(f"--learning-rate must be above 0; got {args.learning_rate}")
    if args.seed < 0:
        parser.error(f"--seed must be at least 0; got {args.seed}")
    if args.load and (args.train or args.save or not (args.test or args.predict)):
        parser.error("--load goes with --test or --predict, without --train or --save")
    if args.test and not (args.train or args.load):
        parser.error("--test needs --train or --load")
    if args.valid and not args.patience:
        parser.error("--valid needs --patience")
    if args.plot and args.load and not args.test:
        parser.error("--plot of a loaded classifier needs --test")
    return args


def main(argv: Sequence[str] | None = None) -> float | None:
    """Run the program; return the accuracy on the test texts, or None."""
    args = parse_arguments(argv)
    test = read_examples(args.test) if args.test else None
    # With --predict, standard output has only the predictions.
    with contextlib.redirect_stdout(sys.stderr if args.predict else sys.stdout):
        if args.load:
            classifier = load(Path(args.load))
        else:
            examples = read_examples(args.train) if args.train else read_docstrings()
            valid = read_examples(args.valid) if args.valid else Examples([], [])
            if not test:
                examples, test = hold_out(examples, args.seed)
            if args.patience and not args.valid:
                examples, valid = hold_out(examples, args.seed)
            sizes = [len(part.texts) for part in (examples, test, valid)]
            print(
                "{} training texts, {} test texts, {} validation texts".format(*sizes)
            )
            # Without validation texts, the plot has the accuracy on the test texts.
            watched = test if args.plot and not args.patience else valid
            classifier = train(args, examples, watched)
        if args.save:
            save(classifier, Path(args.save))
        if test:
            accuracy, counts = evaluate(classifier, test)
            if args.plot:
                plot(classifier, counts, args.plot)
    if args.predict:
        # On a terminal, predict after each line.
        predict_lines(classifier, sys.stdin.buffer, 1 if sys.stdin.isatty() else 256)
    return accuracy if test else None


if __name__ == "__main__":
    try:
        main()
    except (OSError, csv.Error) as failure:
        sys.exit(f"error: {failure}")

"""Train a text classifier: an embedding bag (mean) and a dense layer.

The model of Joulin et al., "Bag of Tricks for Efficient Text Classification" (2016):
the mean of the embeddings of a text's words and hashed n-grams, and a linear layer.

    python examples/train_text_classifier.py
    python examples/train_text_classifier.py --train news.train --test news.test
    python examples/train_text_classifier.py --train news.csv --save model --plot a.png
    python examples/train_text_classifier.py --load model --test news.test
    python examples/train_text_classifier.py --load model --predict < lines.txt

Without files it learns which package of the standard library a docstring comes from.
Files are in fastText's format, `__label__x text`, or CSV with the label first.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import itertools
import json
import math
import re
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO
from unicodedata import category

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

import jbag

Examples = list[tuple[str, str]]  # of (label, text)
Encoded = list[np.ndarray]  # the rows of each text
Batch = tuple[np.ndarray, jbag.Bags]  # positions of texts, and their rows
Pairs = Counter[tuple[str, str]]  # of (true, predicted) labels

LABEL = "__label__"
LABEL_COLUMNS = {"label", "labels", "class", "class index", "category", "target"}
# Vowel signs and accents aren't in \w. Scripts written without spaces (Thai, Lao,
# Burmese, Khmer, kana, Han) are taken character by character: n-grams make their words.
MARKS = "".join(c for c in map(chr, range(1 << 16)) if category(c)[0] == "M")
SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
TOKEN = re.compile(rf"[{SPACELESS}]|(?:(?![{SPACELESS}])[\w{MARKS}])+|[^\w\s]")


class TextClassifier(nn.Module):
    """Score the classes of each bag of rows."""

    rows: int
    features: int
    num_classes: int

    @nn.compact
    def __call__(self, bags: jbag.Bags) -> jax.Array:
        """Return the logits, [B, num_classes]."""
        # Small at first, so that rows that training hasn't met say little.
        init = nn.initializers.normal(0.1)
        bag = jbag.EmbeddingBag(self.rows, self.features, embedding_init=init)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros)(bag(bags))


class Classifier(NamedTuple):
    """A trained model, and all it takes to use it."""

    labels: list[str]
    vocabulary: dict[str, int]  # word -> row
    ngrams: int
    sizes: dict[str, Any]  # what TextClassifier takes
    history: list[tuple[float, float]]  # loss and accuracy of each epoch
    params: Any


def read_docstrings(num_classes: int = 20) -> Examples:
    """Return the docstrings of the standard library's best documented packages."""
    root = Path(sysconfig.get_path("stdlib"))
    # Neither tests, installed packages and programs, nor what only old Pythons have.
    skipped = {"test", "tests", "site-packages", "dist-packages"}
    skipped |= {"idlelib", "distutils", "lib2to3"}
    packages: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if skipped.intersection(parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue  # A template, not a module.
        for node in ast.walk(tree):
            documented = (
                ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            )
            if isinstance(node, documented):
                text = " ".join((ast.get_docstring(node) or "").split())
                packages.setdefault(text, parts[0].removesuffix(".py"))
    packages.pop("", None)
    kept = dict(Counter(packages.values()).most_common(num_classes))
    return [(package, text) for text, package in packages.items() if package in kept]


def read_examples(path: str) -> Examples:
    """Read a file in fastText's format or CSV."""
    # Only "\n" ends a line: other line breaks may stand within a text.
    with Path(path).open(encoding="utf-8-sig", errors="replace", newline="\n") as file:
        first = next((line for line in file if line.strip()), "")
        read = read_fasttext if first.lstrip().startswith(LABEL) else read_csv
        if first and read is read_csv and not path.lower().endswith(".csv"):
            sys.exit(f"{path}: neither CSV by its name nor {LABEL} on its first line.")
        file.seek(0)
        examples = list(read(path, file))
    return examples or sys.exit(f"{path}: there are no texts in it.")


def read_fasttext(path: str, file: TextIO) -> Iterator[tuple[str, str]]:
    """Yield the first label of each line, and its words that aren't labels."""
    for number, words in enumerate(map(str.split, file), 1):
        labels = [word.rstrip(",") for word in words if word.startswith(LABEL)]
        if labels and labels[0] != LABEL:
            text = " ".join(word for word in words if not word.startswith(LABEL))
            yield labels[0].removeprefix(LABEL), text
        elif words:
            sys.exit(f"{path}:{number}: a line must have a label, {LABEL}x.")


def read_csv(path: str, file: TextIO) -> Iterator[tuple[str, str]]:
    """Yield the label, in the first column or where a header says, and the rest."""
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


def encode(classifier: Classifier, texts: Iterable[str]) -> Encoded:
    """Return the rows of each text: its known words and hashed n-grams."""
    vocabulary = classifier.vocabulary
    buckets = classifier.sizes["rows"] - len(vocabulary)
    encoded = []
    for text in texts:
        words = TOKEN.findall(text.lower())
        rows = [np.array([vocabulary[w] for w in words if w in vocabulary], np.int32)]
        # Not Python's hash(), which differs from run to run.
        hashes = [zlib.crc32(word.encode(errors="replace")) for word in words]
        word_hashes = grams = np.array(hashes, np.uint64)
        for n in range(2, classifier.ngrams + 1):
            # fastText's rolling hash; unsigned arithmetic wraps around.
            grams = grams[:-1] * np.uint64(116049371) + word_hashes[n - 1 :]
            hashed = (grams % np.uint64(buckets)).astype(np.int32)
            rows.append(len(vocabulary) + hashed)
        encoded.append(np.concatenate(rows))
    return encoded


def batches(encoded: Encoded, order: np.ndarray, size: int) -> Iterator[Batch]:
    """Yield positions and their bags; the last batch is filled up with empty bags."""
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        rows = [encoded[i] for i in chosen]
        # Few capacities, as each is compiled once.
        capacity = jbag.bucket(sum(map(len, rows)), minimum=1024)
        yield chosen, jbag.Bags.from_lists(rows, capacity=capacity, num_bags=size)


@jax.jit(donate_argnums=0)
def train_step(state: TrainState, bags: jbag.Bags, labels: Any) -> tuple[Any, Any]:
    """Take a step down the cross-entropy; a label of -1 is that of no text."""

    def mean_loss(params: Any) -> jax.Array:
        logits = state.apply_fn({"params": params}, bags)
        targets = jax.nn.one_hot(labels, logits.shape[1])  # zeros for -1
        return optax.softmax_cross_entropy(logits, targets).sum() / targets.sum()

    loss, gradient = jax.value_and_grad(mean_loss)(state.params)
    return state.apply_gradients(grads=gradient), loss


@jax.jit(static_argnums=0)
def probabilities(model: TextClassifier, params: Any, bags: jbag.Bags) -> jax.Array:
    """Return the probability of each class, [B, num_classes]."""
    logits: Any = model.apply({"params": params}, bags)
    return jax.nn.softmax(logits)


def predict(classifier: Classifier, encoded: Encoded, size: int = 256) -> np.ndarray:
    """Return the probability of each class for each text."""
    model = TextClassifier(**classifier.sizes)
    parts = []
    for chosen, bags in batches(encoded, np.arange(len(encoded)), size):
        part = probabilities(model, classifier.params, bags)
        parts.append(np.asarray(part)[: len(chosen)])
    return np.concatenate(parts)


def train(args: argparse.Namespace, examples: Examples, test: Examples) -> Classifier:
    """Train on `examples`; print the accuracy on `test` after each epoch."""
    labels = sorted({label for label, _ in examples})
    if len(labels) < 2:
        sys.exit("There must be two classes or more to learn from.")
    counts = Counter(w for _, text in examples for w in TOKEN.findall(text.lower()))
    words = [w for w, n in counts.most_common(args.words) if n >= args.min_count]
    # Small data has few n-grams. Unigrams need no buckets, but a table needs a row.
    buckets = min(args.buckets, 1 << counts.total().bit_length())
    rows = len(words) + (buckets if args.ngrams > 1 else 1)
    sizes = {"rows": rows, "features": args.dim, "num_classes": len(labels)}
    texts = f"{len(examples)} + {len(test)} texts (to train on + to test on)"
    print(f"{texts}, {len(labels)} classes, {len(words)} words")
    vocabulary = {word: row for row, word in enumerate(words)}
    classifier = Classifier(labels, vocabulary, args.ngrams, sizes, [], None)
    encoded = encode(classifier, (text for _, text in examples))
    encoded_test = encode(classifier, (text for _, text in test))
    class_of = {label: i for i, label in enumerate(labels)}
    targets = np.array([class_of[label] for label, _ in examples], np.int32)
    test_targets = np.array([class_of.get(label, -1) for label, _ in test])
    # Over a hundred batches an epoch, and five epochs; more epochs for small data.
    size = args.batch_size or min(1024, max(16, len(examples) // 128))
    num_batches = math.ceil(len(examples) / size)
    epochs = args.epochs or max(5, min(20, math.ceil(600 / num_batches)))
    # Each slot of a batch adds about 1 / slots to its row's gradient. Adagrad starts as
    # if every row had met one: rare rows move less, whatever the lengths and batches.
    slots = max(1.0, size * float(np.mean([len(rows) for rows in encoded])))
    rate = optax.linear_schedule(args.learning_rate, 0.0, epochs * num_batches)
    optimizer = optax.adagrad(rate, initial_accumulator_value=slots**-2, eps=1e-30)
    model = TextClassifier(**sizes)
    params = model.init(jax.random.key(args.seed), jbag.Bags.from_lists([[]]))["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)
    rng = np.random.default_rng(args.seed)
    with tqdm(total=epochs * num_batches, unit="batch", mininterval=0.5) as bar:
        for epoch in range(1, epochs + 1):
            total = 0.0
            for chosen, bags in batches(encoded, rng.permutation(len(encoded)), size):
                wanted = np.full(size, -1, np.int32)
                wanted[: len(chosen)] = targets[chosen]
                state, mean = train_step(state, bags, wanted)
                total += float(mean) * len(chosen)
                bar.update()
            classifier = classifier._replace(params=state.params)
            hits = predict(classifier, encoded_test).argmax(1) == test_targets
            classifier.history.append((total / len(encoded), float(hits.mean())))
            line = "epoch {}: loss {:.4f}, accuracy {:.4f}"
            bar.write(line.format(epoch, *classifier.history[-1]), file=sys.stdout)
    return classifier


def evaluate(classifier: Classifier, test: Examples) -> tuple[float, Pairs]:
    """Print how well it does; return the accuracy and the counts of label pairs."""
    classes = predict(classifier, encode(classifier, (text for _, text in test)))
    predicted = [classifier.labels[i] for i in classes.argmax(1)]
    pairs = Counter(zip((label for label, _ in test), predicted, strict=True))
    accuracy = sum(n for (a, b), n in pairs.items() if a == b) / len(test)
    unseen = sorted({label for label, _ in test}.difference(classifier.labels))
    if unseen:
        print(f"wrong for certain, being unseen in training: {', '.join(unseen[:5])}")
    print(f"accuracy {accuracy:.4f} on {len(test)} texts\n")
    print("some predictions (probability, predicted label, true label, text):")
    for i in range(0, len(test), math.ceil(len(test) / 5)):
        label, text = test[i]
        mark = " " if predicted[i] == label else "!"
        print(f"{mark} {classes[i].max():.2f}  {predicted[i]}  {label}  {text[:60]}")
    wrong = Counter({pair: n for pair, n in pairs.items() if pair[0] != pair[1]})
    print("\nmost confused (count, true -> predicted):" if wrong else "\nall are right")
    for (label, other), count in wrong.most_common(10):
        print(f"{count:6d}  {label} -> {other}")
    return accuracy, pairs


def predict_lines(classifier: Classifier, lines: Iterable[bytes], size: int) -> None:
    """Print label, probability and text of each line, `size` lines at a time."""
    texts = (line.decode("utf-8-sig", "replace").rstrip("\r\n") for line in lines)
    while chunk := list(itertools.islice(texts, size)):
        classes = predict(classifier, encode(classifier, chunk), size)
        for text, row in zip(chunk, classes, strict=True):
            print(classifier.labels[row.argmax()], f"{row.max():.4f}", text, sep="\t")


def save(classifier: Classifier, path: Path) -> None:
    """Write the parameters and, as JSON, the rest."""
    path.mkdir(parents=True, exist_ok=True)
    arrays = jax.device_get(classifier.params)
    save_file(flatten_dict(arrays, sep="/"), path / "params.safetensors")
    rest = classifier._replace(params=None)._asdict()
    (path / "classifier.json").write_text(json.dumps(rest), encoding="utf-8")


def load(path: Path) -> Classifier:
    """Read what `save` wrote."""
    try:
        rest = json.loads((path / "classifier.json").read_text(encoding="utf-8"))
        params = unflatten_dict(load_file(path / "params.safetensors"), sep="/")
        classifier = Classifier(**rest)._replace(params=params)
        predict(classifier, encode(classifier, [""]))  # Do the shapes fit?
    except Exception as error:  # A damaged file fails in any of many ways.
        sys.exit(f"{path}: there is no saved classifier in it ({error}).")
    return classifier


def plot(classifier: Classifier, pairs: Pairs, path: str) -> None:
    """Draw loss, accuracy and the confusion matrix."""
    from matplotlib.figure import Figure  # Slow to import, and of use to few runs.

    labels = classifier.labels
    counts = np.array([[pairs[a, b] for b in labels] for a in labels], float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(16.0, max(4.5, 0.22 * len(labels)))
    figure = Figure(figsize=(8 + side, side), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(3.5, 3.5, side))
    losses, accuracies = zip(*classifier.history, strict=True)
    epochs = range(1, len(losses) + 1)
    axes[0].plot(epochs, losses, marker="o")
    axes[0].set(title="training loss", xlabel="epoch")
    axes[1].plot(epochs, accuracies, marker="o")
    axes[1].set(title="test accuracy", xlabel="epoch")
    figure.colorbar(axes[2].imshow(shares, cmap="Blues", vmin=0, vmax=1))
    axes[2].set(title="share of each true class", xlabel="predicted", ylabel="true")
    # Names too many to read are left out; a dollar sign would start mathematics.
    names = [a[:20].replace("$", r"\$") if len(labels) <= 100 else "" for a in labels]
    fontsize = 9 if len(labels) <= 30 else 6
    axes[2].set_xticks(range(len(labels)), names, rotation=90, fontsize=fontsize)
    axes[2].set_yticks(range(len(labels)), names, fontsize=fontsize)
    figure.savefig(path)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--train", metavar="FILE", help="texts to learn; of several labels, the first")
    add("--test", metavar="FILE", help="texts to test on; else a tenth is held out")
    add("--epochs", type=int, help="passes over the texts (default: 5 to 20, by size)")
    add("--dim", type=int, default=32, help="features of an embedding (32)")
    add("--ngrams", type=int, default=2, help="the longest word n-grams (2)")
    add("--buckets", type=int, default=1 << 17, help="rows for n-grams (131072)")
    add("--words", type=int, default=1 << 16, help="most words that get a row (65536)")
    add("--min-count", type=int, default=1, help="occurrences a word must have (1)")
    add("--batch-size", type=int, help="texts a step (default: 16 to 1024, by size)")
    add("--learning-rate", type=float, default=0.3, help="of Adagrad, at first (0.3)")
    add("--seed", type=int, default=0, help="of the split, the table and the order (0)")
    add("--save", metavar="DIR", help="write the classifier there")
    add("--load", metavar="DIR", help="use a saved classifier instead of training one")
    add("--predict", action="store_true", help="label the lines of standard input")
    add("--plot", metavar="PNG", help="draw loss, accuracy and confusion matrix")
    args = parser.parse_args(argv)
    for name in ("epochs", "batch_size", "dim", "ngrams", "buckets", "words"):
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
    if args.plot and args.load and not args.test:
        parser.error("--plot of a loaded classifier needs --test")
    return args


def main(argv: Sequence[str] | None = None) -> float | None:
    """Run the program; return the accuracy on the test texts, if there are any."""
    args = parse_arguments(argv)
    test = read_examples(args.test) if args.test else []
    # With --predict, standard output is for the predictions alone.
    with contextlib.redirect_stdout(sys.stderr if args.predict else sys.stdout):
        if args.load:
            classifier = load(Path(args.load))
        else:
            examples = read_examples(args.train) if args.train else read_docstrings()
            if not test:
                np.random.default_rng(args.seed).shuffle(examples)
                tenth = max(1, len(examples) // 10)
                test, examples = examples[:tenth], examples[tenth:]
            classifier = train(args, examples, test)
        if args.save:
            save(classifier, Path(args.save))
        accuracy, pairs = evaluate(classifier, test) if test else (None, Counter())
        if args.plot:
            plot(classifier, pairs, args.plot)
    if args.predict:
        # Someone who types wants an answer to each line.
        predict_lines(classifier, sys.stdin.buffer, 1 if sys.stdin.isatty() else 256)
    return accuracy


if __name__ == "__main__":
    try:
        main()
    except (OSError, csv.Error) as failure:
        sys.exit(f"error: {failure}")

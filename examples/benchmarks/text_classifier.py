"""Measure `train_text_classifier.py` beside fastText, on the same files.

    python examples/benchmarks/text_classifier.py --train a.train --test a.test \
        --fasttext /path/to/an/environment/bin/python --name "AG News, bigrams" --write

The Python named there has `fasttext` installed (0.9.3 needs NumPy 1 to predict);
without it, jbag is measured alone. Every run is a process of its own, the two sides
take turns, and medians are printed. Training starts with the file and ends with the
model, JAX's compilation included; a process includes its imports, too, and the test.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import report

EXAMPLES = Path(__file__).parent.parent
COLUMNS = {
    "accuracy": "{:.4f}",
    "training (s)": "{:.2f}",
    "process (s)": "{:.2f}",
    "trained (M tokens/s)": "{:.1f}",
    "predicted (texts/s)": "{:,.0f}",
    "memory (MB)": "{:.0f}",
}

# Runs where jbag isn't installed.
FASTTEXT = """
import contextlib, json, sys, time
import fasttext

fasttext.FastText.eprint = lambda *_: None
train, test, ngrams, dim, epochs, rate, buckets = sys.argv[1:]


def fit(epochs):
    start = time.perf_counter()
    model = fasttext.train_supervised(
        train, dim=int(dim), epoch=epochs, lr=float(rate), wordNgrams=int(ngrams),
        bucket=int(buckets), thread=THREADS, verbose=0,
    )
    return model, time.perf_counter() - start


model, seconds = fit(int(epochs))
accuracy = model.test(test)[1]
figures = {"accuracy": accuracy, "training (s)": seconds}
if MORE:
    with open(test, encoding="utf-8") as file:
        lines = [line.split() for line in file]
    texts = [" ".join(w for w in line if w[:9] != "__label__") for line in lines]
    start = time.perf_counter()
    model.predict(texts)
    figures["predicted (texts/s)"] = len(texts) / (time.perf_counter() - start)
    with open(train, encoding="utf-8") as file:
        tokens = sum(len(line.split()) for line in file)
    for _ in range(9):
        with contextlib.suppress(RuntimeError):  # NaN, by memory that isn't cleared
            more = seconds - fit(1)[1]
            figures["trained (M tokens/s)"] = tokens * (int(epochs) - 1) / more / 1e6
            break
print(json.dumps(figures))
"""


def measure_jbag(args: argparse.Namespace, more: bool) -> dict[str, float]:
    """Run the example in this process."""
    sys.path.insert(0, str(EXAMPLES))
    example = importlib.import_module("train_text_classifier")
    own = ["--train", args.train, "--test", args.test, "--seed", str(args.seed)]
    own += ["--ngrams", str(args.ngrams)]
    own += ["--epochs", str(args.epochs)] if args.epochs else []
    own += ["--learning-rate", str(args.learning_rate)]
    options = example.parse_arguments(own)
    printed = io.StringIO()
    start = time.perf_counter()
    with contextlib.redirect_stdout(printed):
        examples = example.read_examples(args.train)
        tokens = sum(map(len, map(str.split, examples.texts))) if more else 0
        classifier = example.train(options, examples, example.Examples([], []))
    figures = {"training (s)": time.perf_counter() - start}
    test = example.read_examples(args.test)
    with contextlib.redirect_stdout(io.StringIO()):
        figures["accuracy"] = example.evaluate(classifier, test)[0]
    if more:
        del figures["training (s)"]  # tokens were counted in it
        times = [
            float(t) for t in re.findall(r", ([\d.]+) s$", printed.getvalue(), re.M)
        ]
        if len(times) > 1:
            rate = tokens * (len(times) - 1) / (times[-1] - times[0])
            figures["trained (M tokens/s)"] = rate / 1e6
        start = time.perf_counter()
        scores = example.predict(classifier, test.texts)
        [classifier.labels[i] for i in scores.argmax(1)]
        seconds = time.perf_counter() - start
        figures["predicted (texts/s)"] = len(test.texts) / seconds
    return figures


def run(command: Sequence[str], more: bool) -> dict[str, float]:
    """Run a process that prints its figures last; add its time and its memory."""
    start = time.perf_counter()
    # fastText leaves the memory of a matrix as it comes: zeros, if straight from Linux.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command[0]} failed")
    figures: dict[str, float] = json.loads(printed.splitlines()[-1])
    if not more:
        figures["process (s)"] = time.perf_counter() - start
        figures["memory (MB)"] = usage.ru_maxrss / 1e3
    return figures


def measure(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Let the sides take turns; return the figures of each."""
    sides: dict[str, dict[str, list[float]]] = {}
    total = args.runs * (4 if args.fasttext else 2)
    with tqdm(total=total, unit="process", disable=None) as bar:
        for seed, more in itertools.product(range(args.runs), (False, True)):
            own = [sys.executable, __file__, "--child", "more" if more else "once"]
            own += ["--train", args.train, "--test", args.test, "--seed", str(seed)]
            own += ["--ngrams", str(args.ngrams)]
            own += ["--epochs", str(args.epochs)] if args.epochs else []
            own += ["--learning-rate", str(args.learning_rate)]
            commands = {"jbag": own}
            if args.fasttext:
                script = f"THREADS, MORE = {os.cpu_count()}, {more}\n{FASTTEXT}"
                numbers = (args.ngrams, 10, 5, args.fasttext_rate, 2_000_000)
                peer = [args.fasttext, "-c", script, args.train, args.test]
                commands["fastText"] = peer + [str(number) for number in numbers]
            for side, command in commands.items():
                bar.set_description(side)
                figures = sides.setdefault(side, {})
                for name, value in run(command, more).items():
                    if name != "accuracy" or not more:
                        figures.setdefault(name, []).append(value)
                bar.update()
    return sides


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--train", metavar="FILE", required=True, help="texts in fastText's format")
    add("--test", metavar="FILE", required=True, help="texts in fastText's format")
    add("--fasttext", metavar="PYTHON", help="a Python that has fastText")
    add("--fasttext-rate", type=float, default=0.25, help="its learning rate (0.25)")
    add("--ngrams", type=int, default=2, help="the longest word n-grams (2)")
    add("--epochs", type=int, help="of jbag (default: the example's)")
    add("--learning-rate", type=float, default=1.0, help="of jbag (1)")
    add("--runs", type=int, default=3, help="how often, each with its seed (3)")
    add("--name", help="of the texts, in the table (default: the file's)")
    add("--plot", metavar="PNG", help="draw how fast jbag is beside fastText")
    add("--write", action="store_true", help="write the rows to README.md")
    add("--seed", type=int, default=0, help=argparse.SUPPRESS)
    add("--child", choices=("once", "more"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.plot and not args.fasttext:
        parser.error("--plot needs --fasttext")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Print a row for each side; return their medians."""
    args = parse_arguments(argv)
    if args.child:
        with contextlib.redirect_stderr(io.StringIO()):  # no progress of the example
            figures: dict[str, Any] = measure_jbag(args, args.child == "more")
        print(json.dumps(figures))
        return figures
    statement = report.machine()
    print(statement, end="\n\n")
    rows, medians = [], {}
    for side, values in measure(args).items():
        medians[side] = {name: statistics.median(own) for name, own in values.items()}
        row = {"texts": args.name or Path(args.train).name, "side": side}
        for name, form in COLUMNS.items():
            row[name] = form.format(medians[side][name]) if name in values else "-"
        rows.append(row)
    print(*report.table(rows, names=2), sep="\n")
    if args.write:
        report.write("text_classifier.py", rows, statement, names=2)
    if args.plot:
        ours, theirs = medians["jbag"], medians["fastText"]
        ratios = [
            {"measurement": name, "x fastText": f"{theirs[name] / ours[name]:.2f}"}
            for name in ("training (s)", "process (s)")
        ]
        report.plot(ratios, "times as fast as fastText", args.plot)
    return medians


if __name__ == "__main__":
    main()

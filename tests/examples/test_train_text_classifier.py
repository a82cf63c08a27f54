"""The example that trains a text classifier, run as a user would."""

import io
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from programs import Terminal, load_program

pytestmark = pytest.mark.standard_promotion
PATH = Path(__file__).parents[2] / "examples" / "train_text_classifier.py"
WORDS = {"fruit": "apple pear plum grape", "metal": "iron zinc tin lead"}


@pytest.fixture(scope="module")
def example():
    with load_program(PATH) as module:
        yield module


@pytest.fixture
def train_file(tmp_path):
    return write_texts(tmp_path / "made.train", count=200, seed=0)


def write_texts(path, count, seed):
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        label = rng.choice(sorted(WORDS))
        words = rng.choices([*WORDS[label].split(), "the", "of"], k=rng.randint(3, 9))
        lines.append(f"__label__{label} {' '.join(words)} {WORDS[label].split()[0]}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def lines_of_stdin(monkeypatch, text):
    stream = SimpleNamespace(buffer=io.BytesIO(text.encode()), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", stream)


def test_fasttext_format_is_read(example, tmp_path):
    path = tmp_path / "a.txt"
    text = (
        "\ufeff__label__a One two\r\n\r\n__label__b, __label__c x\u2028y\n__label__d\n"
    )
    path.write_bytes(text.encode())
    labels, texts = example.read_examples(str(path))
    assert labels == ["a", "b", "d"]
    assert [text.split() for text in texts] == [["One", "two"], ["x", "y"], []]


def test_labels_may_stand_anywhere_in_a_line(example, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(
        "__label__a\tx\n  __label__b y\nx __label__c y __label__d\n__label__e\n"
        "__label__f see__label__g\n",
        encoding="utf-8",
    )
    labels, texts = example.read_examples(str(path))
    assert labels == ["a", "b", "c", "e", "f"]
    words = [["x"], ["y"], ["x", "y"], [], ["see__label__g"]]
    assert [text.split() for text in texts] == words


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            '"3","A ""title""","one, two"\n"1","b","c\nd"\n',
            [("3", 'A "title" one, two'), ("1", "b c\nd")],
        ),
        (
            "\ufeffClass Index,Title,Description\r\n1,a,b\r\n\r\n2,c,d\r\n",
            [("1", "a b"), ("2", "c d")],
        ),
        ("text,label\nhello,en\nhallo,de\n", [("en", "hello"), ("de", "hallo")]),
        ("en,hello\nde,hallo\n", [("en", "hello"), ("de", "hallo")]),
        ("en,\nde,hallo\n", [("en", ""), ("de", "hallo")]),
    ],
    ids=["AG News", "header, BOM, CRLF", "label last", "no header", "no text"],
)
def test_csv_is_read(example, tmp_path, content, expected):
    path = tmp_path / "a.csv"
    path.write_bytes(content.encode())
    labels, texts = example.read_examples(str(path))
    assert list(zip(labels, texts, strict=True)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.txt",
            "__label__a one\n\nno label\n",
            r"a\.txt:3: a line must have a label",
        ),
        ("a.txt", "__label__ one\n", r"a\.txt:1: a line must have a label"),
        ("a.txt", "one two\n", "neither CSV"),
        ("a.txt", "\n \n", "no texts"),
        ("a.csv", "", "no texts"),
        ("a.csv", "a,one\nb\n", r"a\.csv:2: a row must have a label and a text"),
        ("a.csv", ",one\n", r"a\.csv:1: a row must have a label and a text"),
        ("a.csv", "a,one\na,two\na,three\n", "two classes"),
    ],
)
def test_bad_files_are_named(example, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        example.main(["--train", str(path)])


def test_missing_file_exits_without_a_traceback(tmp_path):
    command = [sys.executable, str(PATH), "--train", str(tmp_path / "none.csv")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 1
    assert "none.csv" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        ["--load", "a"],
        ["--load", "a", "--train", "b"],
        ["--test", "a"],
        ["--dim", "0"],
        ["--patience", "0"],
        ["--valid", "a"],
    ],
    ids=" ".join,
)
def test_options_that_make_no_sense_are_refused(example, options, capsys):
    with pytest.raises(SystemExit):
        example.main(options)
    assert "error: " in capsys.readouterr().err


@pytest.mark.slow
def test_docstrings_make_twenty_classes(example):
    labels, texts = example.read_docstrings()
    assert len(labels) == len(texts) >= 2000
    assert len(set(labels)) == 20
    assert len(set(texts)) == len(texts)
    assert all(texts)


def test_saved_classifier_predicts_as_the_trained_one(
    example, train_file, tmp_path, capsys, monkeypatch
):
    saved = str(tmp_path / "model")
    test_file = write_texts(tmp_path / "made.test", count=50, seed=1)
    lines = "tin zinc\r\n\nApple pie\nunknown words\n" * 70
    lines_of_stdin(monkeypatch, lines)
    trained = example.main(
        ["--train", train_file, "--test", test_file, "--save", saved, "--predict"]
    )
    first = capsys.readouterr()
    assert trained >= 0.95
    assert "some predictions" in first.err
    assert ("no errors" if trained == 1 else "most confused") in first.err
    assert "epoch 2: loss" in first.err

    lines_of_stdin(monkeypatch, lines)
    assert example.main(["--load", saved, "--predict"]) is None
    second = capsys.readouterr()
    assert second.out == first.out
    rows = [line.split("\t") for line in second.out.splitlines()]
    assert len(rows) == 280
    assert [row[0] for row in rows[:3:2]] == ["metal", "fruit"]
    assert [row[2] for row in rows[:3]] == ["tin zinc", "", "Apple pie"]

    assert example.main(["--load", saved, "--test", test_file]) == trained


def run(*options, limit="unlimited"):
    """Run the program where no file may be larger than so many blocks."""
    command = f'ulimit -f {limit}; exec "$0" "$@"'
    return subprocess.run(
        ["bash", "-c", command, sys.executable, PATH, *options],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_full_disk_leaves_the_saved_classifier(train_file, tmp_path):
    saved = tmp_path / "models" / "model"
    own, other = write_texts(tmp_path / "other", count=40, seed=3), str(saved)
    assert run("--train", train_file, "--save", other).returncode == 0
    before = saved.read_bytes()
    failed = run("--train", own, "--dim", "64", "--save", other, limit=8)
    assert failed.returncode == 1
    line = failed.stderr.splitlines()[-1]
    assert line.startswith(f"{saved}: the classifier cannot be saved: ")
    assert "Traceback" not in failed.stderr
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("name", ["", "made.train/model"])
def test_a_path_that_no_file_can_have_is_an_error_of_a_line(
    example, train_file, tmp_path, name
):
    with pytest.raises(
        SystemExit, match=r"cannot be saved: .*([Dd]irectory|File exists)"
    ):
        example.main(["--train", train_file, "--save", str(tmp_path / name)])


def test_a_damaged_classifier_is_an_error_of_a_line(
    example, train_file, tmp_path, monkeypatch
):
    saved = tmp_path / "model"
    example.main(["--train", train_file, "--epochs", "1", "--save", str(saved)])
    data = saved.read_bytes()
    for damaged in (b"", data[:100], data[:-100], b"x" + data[1:], data + b"x"):
        saved.write_bytes(damaged)
        lines_of_stdin(monkeypatch, "")
        with pytest.raises(SystemExit, match="holds no saved classifier"):
            example.main(["--load", str(saved), "--predict"])


def test_tenth_is_held_out_without_a_test_file(example, train_file, capsys):
    assert example.main(["--train", train_file, "--ngrams", "1"]) >= 0.9
    assert "on 20 texts" in capsys.readouterr().out


def test_labels_unseen_in_training_count_as_wrong(
    example, train_file, tmp_path, capsys
):
    test = tmp_path / "made.test"
    test.write_text("__label__fruit apple pear\n__label__gas argon\n", encoding="utf-8")
    accuracy = example.main(["--train", train_file, "--test", str(test)])
    assert accuracy == 0.5
    assert "unseen in training: gas" in capsys.readouterr().out


def test_precision_and_recall_are_printed_for_each_class(example, capsys):
    scores = np.log([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    classifier = example.Classifier(["a", "b"], None, 1, [], [], None)
    test = example.Examples(["a", "b", "b", "c"], ["one", "two", "three", "four"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "predict", lambda *_: scores)
        accuracy, counts = example.evaluate(classifier, test)
    assert accuracy == 0.5
    assert counts.tolist() == [[1, 0], [1, 1], [1, 0]]
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["0.3333", "1.0000", "0.5000", "1", "a"] in printed
    assert ["1.0000", "0.5000", "0.6667", "2", "b"] in printed
    assert ["0.6667", "0.7500", "0.5833", "4", "mean"] in printed


def test_training_stops_when_it_no_longer_helps(example, tmp_path, capsys):
    # Labels at random: every epoch after the first learns noise.
    rng = random.Random(0)
    lines = [
        f"__label__{rng.choice('ab')} {' '.join(rng.choices('uvwxyz', k=9))}"
        for _ in range(300)
    ]
    train, valid = tmp_path / "train", tmp_path / "valid"
    train.write_text("\n".join(lines[:200]), encoding="utf-8")
    valid.write_text("\n".join(lines[200:]), encoding="utf-8")
    options = ["--train", str(train), "--test", str(valid), "--epochs", "15"]
    example.main([*options, "--patience", "2", "--valid", str(valid)])
    printed = capsys.readouterr().out
    losses = [
        float(line.split("held-out loss ")[1].split(",")[0])
        for line in printed.splitlines()
        if "held-out loss" in line
    ]
    assert len(losses) < 15
    assert min(losses) not in losses[-2:]
    example.main([*options, "--patience", "15"])
    assert "epoch 15" in capsys.readouterr().out


def test_balance_raises_the_recall_of_a_rare_class(example, tmp_path):
    rng = random.Random(0)
    lines = []
    for _ in range(600):
        rare = rng.random() < 0.1
        signs = rng.choices("uv", [3, 2] if rare else [2, 3], k=3)
        lines.append(f"__label__{'rare' if rare else 'usual'} {' '.join(signs)}")
    train, test = tmp_path / "train", tmp_path / "test"
    train.write_text("\n".join(lines), encoding="utf-8")
    test.write_text("__label__rare u u u\n" * 9, encoding="utf-8")
    options = ["--train", str(train), "--test", str(test), "--ngrams", "1"]
    assert example.main(options) == 0.0
    assert example.main([*options, "--balance"]) == 1.0


def test_few_texts_are_enough_to_run(example, tmp_path):
    train = tmp_path / "made.csv"
    train.write_text("a,one\nb,two\na,\n", encoding="utf-8")
    test = tmp_path / "test.csv"
    test.write_text("a,one\nb,two\n", encoding="utf-8")
    assert example.main(["--train", str(train), "--test", str(test)]) == 1.0


def test_progress_is_shown_on_a_terminal_only(example, train_file, monkeypatch, capsys):
    options = ["--train", train_file, "--epochs", "2"]
    monkeypatch.setitem(example.progress.keywords, "delay", 0)
    example.main(options)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stderr", Terminal())
    example.main(options)
    shown = sys.stderr.getvalue()
    assert "training: 100%" in shown
    assert "loss=" in shown
    assert "made.train: 100%" in shown
    assert "prediction: " in shown


def test_plot_has_every_step_and_every_epoch(
    example, train_file, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib", reason="plots are made with matplotlib")
    figures, save = [], example.plots.save
    monkeypatch.setattr(
        example.plots, "save", lambda *args: figures.append(args[0]) or save(*args)
    )
    path, model = tmp_path / "plot.png", str(tmp_path / "model")
    options = ["--train", train_file, "--epochs", "3", "--batch-size", "16"]
    accuracy = example.main([*options, "--plot", str(path), "--save", model])
    assert path.read_bytes().startswith(b"\x89PNG")
    test = write_texts(tmp_path / "made.test", count=50, seed=1)
    example.main(["--load", model, "--test", test, "--plot", str(path)])
    for axes, num_texts in zip(figures, (20, 50), strict=True):
        steps, losses = axes["loss"].lines[0].get_data()
        assert list(steps) == list(range(1, 1 + 3 * math.ceil(180 / 16)))
        assert losses[0] > losses[-1]
        epochs, accuracies = axes["accuracy"].lines[0].get_data()
        assert list(epochs) == [1, 2, 3]
        assert accuracies[-1] == pytest.approx(accuracy)
        counts = [int(text.get_text()) for text in axes["confusion"].texts]
        assert sum(counts) == num_texts
        assert len(axes["F1"].patches) == 2


@pytest.mark.parametrize("losses", [[], [0.7, 0.6]], ids=["fastText's", "saved"])
def test_plot_leaves_out_what_was_not_measured(example, tmp_path, losses):
    pytest.importorskip("matplotlib", reason="plots are made with matplotlib")
    path = tmp_path / "plot.png"
    classifier = example.Classifier(["a", "b"], None, 1, losses, [], None)
    example.plot(classifier, np.array([[1, 0], [1, 2], [0, 0]]), str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_bars_of_f1_are_sorted(example):
    pytest.importorskip("matplotlib", reason="plots are made with matplotlib")
    axes = example.plots.make_axes([["F1"]], 4, 4)["F1"]
    example.plots.draw_f1(axes, np.array([0.5, 0.9, 0.1]), ["a", "b", "$c"])
    assert [bar.get_width() for bar in axes.patches] == [0.1, 0.5, 0.9]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [r"\$c", "a", "b"]


def test_directory_without_a_classifier_is_named(example, tmp_path, monkeypatch):
    lines_of_stdin(monkeypatch, "")
    with pytest.raises(SystemExit, match="no saved classifier"):
        example.main(["--load", str(tmp_path / "none"), "--predict"])
    (tmp_path / "classifier.json").write_text('{"labels": []}', encoding="utf-8")
    with pytest.raises(SystemExit, match="no saved classifier"):
        example.main(["--load", str(tmp_path), "--predict"])

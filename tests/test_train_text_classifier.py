"""The example that trains a text classifier, run as a user would."""

import importlib.util
import io
import itertools
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

PATH = Path(__file__).parent.parent / "examples" / "train_text_classifier.py"
WORDS = {"fruit": "apple pear plum grape", "metal": "iron zinc tin lead"}


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location(PATH.stem, PATH)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses, and so Flax, look up the module of a class by its name.
    sys.modules[PATH.stem] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[PATH.stem]


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
    assert example.read_examples(str(path)) == [
        ("a", "One two"),
        ("b", "x y"),
        ("d", ""),
    ]


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
    assert example.read_examples(str(path)) == expected


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
    [["--load", "a"], ["--load", "a", "--train", "b"], ["--test", "a"], ["--dim", "0"]],
    ids=" ".join,
)
def test_options_that_make_no_sense_are_refused(example, options, capsys):
    with pytest.raises(SystemExit):
        example.main(options)
    assert "error: " in capsys.readouterr().err


def test_words_keep_their_vowel_signs_and_han_is_split(example):
    find = example.TOKEN.findall
    assert find("isn't naïve, 3rd") == ["isn", "'", "t", "naïve", ",", "3rd"]
    assert find("हिन्दी में") == ["हिन्दी", "में"]
    assert find("abc北京x") == ["abc", "北", "京", "x"]
    assert find("🙂🙂") == ["🙂", "🙂"]


def test_hashes_are_stable(example):
    classifier = example.Classifier(
        ["x", "y"], {"a": 0, "b": 1}, 3, {"rows": 2 + 1000}, [], None
    )
    one, empty, lone = example.encode(classifier, ["A b c", "", "c"])
    hashes = [0xE8B7BE43, 0x71BEEFF9, 0x06B9DF6F]  # CRC-32 of a, b, c
    pairs = [(a * 116049371 + b) % 2**64 for a, b in itertools.pairwise(hashes)]
    triple = (pairs[0] * 116049371 + hashes[2]) % 2**64
    assert one.tolist() == [0, 1, *(2 + gram % 1000 for gram in (*pairs, triple))]
    assert empty.size == lone.size == 0
    assert {rows.dtype for rows in (one, empty, lone)} == {np.dtype(np.int32)}


def test_docstrings_make_twenty_classes(example):
    examples = example.read_docstrings()
    assert len(examples) >= 2000
    assert len({label for label, _ in examples}) == 20
    assert len({text for _, text in examples}) == len(examples)
    assert all(text for _, text in examples)


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
    assert ("all are right" if trained == 1 else "most confused") in first.err
    assert "batch/s" in first.err

    lines_of_stdin(monkeypatch, lines)
    assert example.main(["--load", saved, "--predict"]) is None
    second = capsys.readouterr()
    assert second.out == first.out
    rows = [line.split("\t") for line in second.out.splitlines()]
    assert len(rows) == 280
    assert [row[0] for row in rows[:3:2]] == ["metal", "fruit"]
    assert [row[2] for row in rows[:3]] == ["tin zinc", "", "Apple pie"]

    assert example.main(["--load", saved, "--test", test_file]) == trained


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


def test_few_texts_are_enough_to_run(example, tmp_path):
    train = tmp_path / "made.csv"
    train.write_text("a,one\nb,two\na,\n", encoding="utf-8")
    test = tmp_path / "test.csv"
    test.write_text("a,one\nb,two\n", encoding="utf-8")
    assert example.main(["--train", str(train), "--test", str(test)]) == 1.0


def test_plot_is_a_picture(example, train_file, tmp_path):
    pytest.importorskip("matplotlib", reason="plots are made with matplotlib")
    path = tmp_path / "plot.png"
    example.main(["--train", train_file, "--epochs", "2", "--plot", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_directory_without_a_classifier_is_named(example, tmp_path, monkeypatch):
    lines_of_stdin(monkeypatch, "")
    with pytest.raises(SystemExit, match="no saved classifier"):
        example.main(["--load", str(tmp_path / "none"), "--predict"])
    (tmp_path / "classifier.json").write_text('{"labels": []}', encoding="utf-8")
    with pytest.raises(SystemExit, match="no saved classifier"):
        example.main(["--load", str(tmp_path), "--predict"])

"""fastText itself as a peer: models that it trains here, and what it predicts."""

import functools
import re

import numpy as np
import pytest
from fasttext_files import EXAMPLE, model

import jbag

fasttext = pytest.importorskip("fasttext", reason="fastText is not installed")

RNG = np.random.default_rng(0)
WORDS = [
    *("caf\u00e9", "\u0434\u043e\u043c", "\u65e5\u672c\u8a9e", "\U0001f44d\U0001f3fd"),
    *("</s>", "<", ">", "<a", "a>", "."),
    *(
        "".join(RNG.choice(list("abcdefgh\u00e9"), RNG.integers(1, 9)))
        for _ in range(300)
    ),
]
UNKNOWN = ["unknown", "\u00fcber", "\u672c", "x", "__label__", "__label__x", "#x"]
NUM_LABELS = 6
THREADS = 11  # Of fewer, fastText starts from a table that memory's leftovers are in.
SPACES = [" ", "  ", "\t", "\r", "\v", "\f", "\0", "\u00a0", "\u2003"]


def texts(num, seed, prefix):
    """Make texts up: known and unknown words, labels; empty ones, and other spaces."""
    rng = np.random.default_rng(seed)
    labels = [f"{prefix}{i}" for i in range(3)]
    words = [*WORDS, *WORDS, *UNKNOWN * 8, *labels * 4]
    made = []
    for _ in range(num):
        chosen = rng.choice(words, rng.integers(0, 20))
        made.append(
            "".join(w + rng.choice(SPACES, p=[0.92, *[0.01] * 8]) for w in chosen)
        )
    return ["", " ", "</s>", "a </s> b", *labels, *UNKNOWN, *made]


@functools.cache
def labelled_lines(prefix, num_labels):
    rng = np.random.default_rng(1)
    numbers = num_labels * rng.random(1500) ** 2  # some more often than others
    return "".join(
        " ".join([f"{prefix}{int(n)}", *rng.choice(WORDS, rng.integers(1, 12))]) + "\n"
        for n in numbers
    )


def train(path, *, prefix="__label__", num_labels=NUM_LABELS, **options):
    """Make a model of numbers drawn at random, and save it."""
    data = path.with_suffix(".txt")
    data.write_text(labelled_lines(prefix, num_labels))
    defaults = {"dim": 8, "epoch": 1, "lr": 0.1, "thread": THREADS, "verbose": 0}
    options = {"label": prefix, **defaults, **options}
    peer = fasttext.train_supervised(str(data), **options)
    draw_numbers(peer)
    peer.save_model(str(path))
    return peer


def draw_numbers(peer):
    """Give the model numbers that are the same each time, as its threads' aren't."""
    rng = np.random.default_rng(2)
    shapes = peer.get_input_matrix().shape, peer.get_output_matrix().shape
    table, output = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    peer.set_matrices(table, 3 * output)


def check(path, peer, *, prefix="__label__", **options):
    """Compare what is predicted, and the rows that it is predicted from."""
    found = jbag.fasttext.load(path, **options)
    given = texts(300, 2, prefix)
    lines = [text + "\n" for text in given]
    for k, threshold in ((1, 0.0), (-1, 0.05)):
        labels, probabilities = found.predict(given, k, threshold)
        expected, p = peer.f.multilinePredict(lines, k, threshold, "strict")
        assert labels == list(map(list, expected))
        for own, others in zip(probabilities, p, strict=True):
            np.testing.assert_allclose(own, others, rtol=2e-5, atol=1e-7)
    vectors = [peer.get_sentence_vector(text) for text in given]
    np.testing.assert_allclose(
        found.sentence_vectors(given), vectors, rtol=1e-5, atol=1e-5
    )
    assert found.encoder.words == tuple(peer.get_words())
    assert found.labels == tuple(peer.get_labels())
    words = [word for word in WORDS + UNKNOWN if not word.startswith(prefix)]
    vectors = [peer.get_word_vector(word) for word in words]
    np.testing.assert_allclose(found.word_vectors(words), vectors, rtol=1e-5, atol=1e-5)
    return found


OPTIONS = {
    "softmax": {},
    "ova": {"loss": "ova"},
    "ns": {"loss": "ns"},
    "hs": {"loss": "hs"},
    "bigrams": {"wordNgrams": 2, "bucket": 1000},
    "trigrams": {"wordNgrams": 3, "bucket": 1 << 10, "loss": "ova"},
    "subwords": {"minn": 2, "maxn": 4, "bucket": 1000},
    "subwords and bigrams": {"minn": 1, "maxn": 3, "wordNgrams": 2, "bucket": 777},
    "rare words left out": {"minCount": 30, "minn": 3, "maxn": 3, "bucket": 99},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_predictions_and_vectors_equal_fasttext(name, tmp_path):
    path = tmp_path / "model.bin"
    train(path, **OPTIONS[name])
    check(path, fasttext.load_model(str(path)))


QUANTISATIONS = {
    "input": ({}, {}),
    "with norms": ({}, {"qnorm": True}),
    "parts of three columns": ({}, {"dsub": 3}),
    "pruned": ({"wordNgrams": 2, "bucket": 900}, {"cutoff": 500}),
    "pruned with norms": (
        {"minn": 2, "maxn": 3, "bucket": 900},
        {"cutoff": 600, "qnorm": True},
    ),
    "output, too": ({"num_labels": 300}, {"qout": True, "qnorm": True}),
}


@pytest.mark.parametrize("name", QUANTISATIONS)
def test_quantised_models_predict_as_fasttext(name, tmp_path):
    options, quantisation = QUANTISATIONS[name]
    path = tmp_path / "model.ftz"
    peer = train(path, **options)
    peer.quantize(**quantisation)
    peer.save_model(str(path))
    found = check(path, fasttext.load_model(str(path)))
    assert (found.encoder.bucket_rows is not None) == ("cutoff" in quantisation)


@pytest.mark.parametrize("subwords", [{}, {"minn": 2, "maxn": 3, "bucket": 100}])
def test_models_of_another_prefix_predict_as_fasttext(subwords, tmp_path):
    path = tmp_path / "model.bin"
    trained = train(path, prefix="#", **subwords)
    check(path, fasttext.load_model(str(path)), prefix="#")
    # The one that was trained still knows the prefix.
    check(path, trained, prefix="#", label_prefix="#")


@pytest.mark.parametrize("kind", ["cbow", "skipgram"])
@pytest.mark.parametrize("subwords", [(0, 0), (2, 4)])
def test_vectors_of_unsupervised_models_equal_fasttext(kind, subwords, tmp_path):
    path = tmp_path / "model.bin"
    data = tmp_path / "texts.txt"
    data.write_text("\n".join(text.replace("\0", " ") for text in texts(500, 3, "#")))
    options = {"minn": subwords[0], "maxn": subwords[1], "bucket": 500, "minCount": 2}
    options |= {"dim": 8, "epoch": 1, "thread": THREADS, "verbose": 0}
    trained = fasttext.train_unsupervised(str(data), model=kind, **options)
    draw_numbers(trained)
    trained.save_model(str(path))
    peer = fasttext.load_model(str(path))
    found = jbag.fasttext.load(path)
    assert found.kind == kind
    words = [word for word in WORDS + UNKNOWN if not word.startswith("__label__")]
    vectors = [peer.get_word_vector(word) for word in words]
    np.testing.assert_allclose(found.word_vectors(words), vectors, rtol=1e-5, atol=1e-6)
    # Of a label that it knows, fastText returns some bucket's row.
    given = [re.sub("\0|__label__", " ", text) for text in texts(50, 4, "#")]
    vectors = [peer.get_sentence_vector(text) for text in given]
    np.testing.assert_allclose(
        found.sentence_vectors(given), vectors, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("loss", ["ova", "softmax"])
@pytest.mark.parametrize("num_labels", [2, 7, 40])
def test_equal_labels_come_in_the_order_of_fasttext(loss, num_labels, tmp_path):
    rng = np.random.default_rng(num_labels)
    path = tmp_path / "model.bin"
    output = rng.integers(-2, 3, (num_labels, 2)) * 3
    labels = [(f"__label__{i}", num_labels - i) for i in range(num_labels)]
    changes = {"loss": loss, "output": output, "labels": labels}
    path.write_bytes(model(**{**EXAMPLE, **changes}))
    peer, found = fasttext.load_model(str(path)), jbag.fasttext.load(path)
    given = ["fine", "so", "poor dull", "", "fine so", "so so so", "dull so"]
    lines = [text + "\n" for text in given]
    for k in (1, 4, -1):
        for threshold in (0.0, 0.1):
            expected, _ = peer.f.multilinePredict(lines, k, threshold, "strict")
            assert found.predict(given, k, threshold)[0] == list(map(list, expected))

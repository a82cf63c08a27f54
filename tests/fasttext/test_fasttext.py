"""fastText's files: hand-made ones, and what is computed of them by hand."""

import itertools
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fasttext_files import EXAMPLE, LABELS, OUTPUT, TABLE, WORDS, Quantised, model

import jbag
from jbag.text._tokenizer_choice import TOKENIZERS


def load(tmp_path, name="model.bin", label_prefix="__label__", **changes):
    (tmp_path / name).write_bytes(model(**{**EXAMPLE, **changes}))
    return jbag.fasttext.load(tmp_path / name, label_prefix=label_prefix)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, float)))


def test_softmax_predicts_as_computed_by_hand(tmp_path):
    loaded = load(tmp_path)
    # "fine" and the end of the text: (2 + 0) / 2 = 1, and the logits 1 and -1.
    labels, probabilities = loaded.predict(["fine", "so poor", ""], k=2)
    assert labels == [
        ["__label__good", "__label__bad"],
        ["__label__bad", "__label__good"],
        ["__label__bad", "__label__good"],  # fastText's heap: of equals the last first
    ]
    p = sigmoid(2)
    expected = np.array([[p, 1 - p], [p, 1 - p], [0.5, 0.5]]) + 1e-5
    np.testing.assert_allclose(probabilities, expected, rtol=1e-6)


def test_a_model_is_its_parts(tmp_path):
    loaded = load(tmp_path)
    assert (loaded.kind, loaded.loss) == ("supervised", "softmax")
    assert loaded.encoder.words == tuple(word for word, _ in WORDS)
    assert loaded.encoder.counts.tolist() == [count for _, count in WORDS]
    assert loaded.labels == ("__label__good", "__label__bad")
    assert loaded.label_counts.tolist() == [5, 4]
    np.testing.assert_array_equal(loaded.table, TABLE)
    np.testing.assert_array_equal(loaded.output, OUTPUT)
    bags = loaded.encode(["dull __label__good fine\tso", "</s> fine", "unknown"])
    assert bags.to_lists() == [[4, 1, 2, 0], [0], [0]]


def test_probabilities_are_a_function_of_the_bags(tmp_path):
    for loss in ("softmax", "ova", "ns", "hs"):
        loaded = load(tmp_path, loss=loss)
        bags = loaded.encode(["fine", "so poor", "dull"])
        p = jax.jit(loaded.probabilities)(bags)
        np.testing.assert_allclose(p, loaded.probabilities(bags), rtol=1e-6)
        shown = np.array(loaded.predict(["fine", "so poor", "dull"], k=2)[1])
        np.testing.assert_allclose(-np.sort(-p), shown, atol=3e-5)


@pytest.mark.parametrize("loss", ["ova", "ns"])
def test_independent_losses_read_the_sigmoid_from_a_table(loss, tmp_path):
    output = np.array([[1.01, 0], [-1, 0], [1.0, 0], [9, 0]])
    labels = [(f"__label__{i}", 4 - i) for i in range(4)]
    loaded = load(tmp_path, loss=loss, output=output, labels=labels)
    # The logits 1.01 and 1 are of one step of 1 / 32; fastText's heap has the order.
    labels, probabilities = loaded.predict(["fine"], k=4)
    assert labels == [["__label__3", "__label__0", "__label__2", "__label__1"]]
    expected = np.array([1, sigmoid(1), sigmoid(1), sigmoid(-1)]) + 1e-5
    np.testing.assert_allclose(probabilities[0], expected, rtol=1e-6)
    assert loaded.predict(["fine"], k=1)[0] == [["__label__3"]]
    assert loaded.predict(["dull"], k=-1)[0][0][-1] == "__label__3"
    found = loaded.predict(["fine", "so poor"], k=-1, threshold=0.7)
    # Of equals, those that the heap was left with decide.
    assert found[0] == [["__label__3", "__label__2", "__label__0"], ["__label__1"]]
    assert list(map(len, found[1])) == [3, 1]


def test_hierarchical_softmax_walks_the_tree(tmp_path):
    # Of the counts 3, 2, 1 the two smallest are joined by node 0, and that and the
    # largest one by node 1; the last one is its node's left child.
    labels = [("__label__a", 3), ("__label__b", 2), ("__label__c", 1)]
    output = np.array([[0.7, 0], [0.4, 0], [5, 5]])
    loaded = load(tmp_path, loss="hs", labels=labels, output=output)
    labels, probabilities = loaded.predict(["fine"], k=-1)
    p0, p1 = sigmoid([0.7, 0.4])
    p = {"a": p1 + 1e-5, "b": (1 - p1 + 1e-5) * (p0 + 1e-5)}
    p["c"] = (1 - p1 + 1e-5) * (1 - p0 + 1e-5)
    assert labels == [["__label__a", "__label__b", "__label__c"]]
    np.testing.assert_allclose(probabilities[0], list(p.values()), rtol=1e-6)
    assert loaded.predict(["fine"], k=-1, threshold=0.2)[0] == [labels[0][:2]]


def test_hierarchical_softmax_of_one_label_is_certain(tmp_path):
    loaded = load(tmp_path, loss="hs", labels=LABELS[:1], output=OUTPUT[:1])
    labels, probabilities = loaded.predict(["fine"])
    assert labels == [["__label__good"]]
    assert probabilities[0] == 1


def test_texts_without_rows_have_no_labels(tmp_path):
    loaded = load(tmp_path, words=WORDS[1:], table=TABLE[1:])
    labels, probabilities = loaded.predict(["unknown", "fine", "", "__label__good"])
    assert labels == [[], ["__label__good"], [], []]
    assert list(map(len, probabilities)) == [0, 1, 0, 0]
    assert loaded.predict([]) == ([], [])


def test_many_texts_are_predicted_in_batches(tmp_path):
    loaded = load(tmp_path)
    texts = ["fine", "so poor", "dull"] * 3000
    labels, probabilities = loaded.predict(texts)
    assert labels == loaded.predict(texts[:3])[0] * 3000
    assert len(probabilities) == 9000


def test_subwords_and_pruned_buckets_have_rows(tmp_path):
    changes = {"buckets": 50, "subwords": (2, 3), "ngrams": 2}
    every = load(tmp_path, table=np.ones((55, 2)), **changes)
    ids = every.encode(["fine unknown"]).to_lists()[0]
    kept = sorted({i - 5 for i in ids if i >= 5})[:3]
    quantised = Quantised(np.arange(8)[:, None], [np.ones((256, 2))])
    pairs = [(bucket, row) for row, bucket in enumerate(reversed(kept))]
    pruned = load(tmp_path, table=quantised, pruned=pairs, **changes)
    rows = {5 + bucket: 5 + row for bucket, row in pairs}
    expected = [rows.get(i, i) for i in ids if i < 5 or i in rows]
    assert pruned.encode(["fine unknown"]).to_lists() == [expected]
    none = Quantised(quantised.codes[:5], quantised.centroids)
    words = load(tmp_path, table=none, pruned=[], **changes)
    assert words.encode(["fine unknown"]).to_lists() == [[1, 0]]


@pytest.mark.parametrize("norms", [False, True])
def test_quantised_matrices_are_expanded(norms, tmp_path):
    rng = np.random.default_rng(0)
    widths = [2, 2, 1]
    tables = []
    for rows in (5, 2):
        codes = rng.integers(0, 256, (rows, 3))
        centroids = [rng.normal(size=(256, w)).astype(np.float32) for w in widths]
        own = (rng.integers(0, 256, rows), rng.normal(size=256).astype(np.float32))
        tables.append(Quantised(codes, centroids, own if norms else None))
    loaded = load(tmp_path, table=tables[0], output=tables[1])
    for found, (codes, centroids, own) in zip(
        (loaded.table, loaded.output), tables, strict=True
    ):
        parts = [c[codes[:, i]] for i, c in enumerate(centroids)]
        expected = np.concatenate(parts, axis=1)
        if norms:
            expected *= own[1][own[0], None]
        np.testing.assert_array_equal(found, expected)


def test_old_supervised_models_have_no_subwords(tmp_path):
    changes = {"buckets": 3, "subwords": (3, 6), "table": np.ones((8, 2))}
    assert load(tmp_path, version=11, **changes).encoder.subwords == (0, 0)
    assert load(tmp_path, version=12, **changes).encoder.subwords == (3, 6)
    kind = {"kind": "cbow", "labels": [], "output": TABLE}
    assert load(tmp_path, version=11, **changes, **kind).encoder.subwords == (3, 6)


def test_words_of_any_bytes_are_found(tmp_path):
    words = [*WORDS[:4], ("caf\udce9", 1)]
    loaded = load(tmp_path, words=words)
    assert loaded.encoder.words[-1] == "caf\udce9"
    assert loaded.encode(["caf\udce9"]).to_lists() == [[4, 0]]


def test_labels_of_another_prefix_are_left_out(tmp_path):
    labels = [("#good", 5), ("#bad", 4)]
    words = [*WORDS[:4], ("__label__word", 1)]
    text = ["#good fine #other __label__word __label__other"]
    # As fastText does that has loaded the file, which says nothing of the prefix ...
    table = np.concatenate([TABLE, np.zeros((9, 2))])
    more = {"table": table, "buckets": 9, "subwords": (1, 1)}
    loaded = load(tmp_path, labels=labels, words=words, **more)
    assert loaded.predict(["fine"])[0] == [["#good"]]
    kept = ["fine", "#other", "__label__word"]
    slots = sum(map(len, kept)) + 3  # letters, and the two words and the end
    assert len(loaded.encode(text).to_lists()[0]) == slots
    # ... and as it does that has trained the model.
    told = load(tmp_path, label_prefix="#", labels=labels, words=words)
    assert told.encode(text).to_lists() == [[1, 4, 0]]


def test_word_and_sentence_vectors_of_an_unsupervised_model(tmp_path):
    changes = {"kind": "skipgram", "loss": "ns", "labels": [], "output": TABLE}
    loaded = load(tmp_path, **changes)
    np.testing.assert_array_equal(
        loaded.word_vectors(["fine", "unknown", "so"]), [[2, 0], [0, 0], [0, 3]]
    )
    found = loaded.sentence_vectors(["fine so unknown", "unknown", "", "poor poor"])
    np.testing.assert_array_equal(found, [[0.5, 0.5], [0, 0], [0, 0], [-1, 0]])
    assert loaded.sentence_vectors([]).shape == (0, 2)
    with pytest.raises(ValueError, match="this one is of kind 'skipgram'"):
        loaded.predict(["fine"])
    with pytest.raises(ValueError, match="this one is of kind 'skipgram'"):
        loaded.probabilities(loaded.encode(["fine"]))


def test_wrong_arguments_are_errors(tmp_path):
    loaded = load(tmp_path)
    for method in (loaded.encode, loaded.predict, loaded.word_vectors):
        with pytest.raises(TypeError, match="must be a list of strings; got 'fine'"):
            method("fine")
        with pytest.raises(TypeError, match="must hold strings; got 3 at 1"):
            method(["fine", 3])
    with pytest.raises(ValueError, match="`k` must be at least 1; got 0"):
        loaded.predict(["fine"], k=0)
    for word in ("", "so poor"):
        with pytest.raises(ValueError, match=f"without spaces; got '{word}' at 1"):
            loaded.word_vectors(["fine", word])
    with pytest.raises(TypeError, match="`label_prefix` must be a string; got None"):
        load(tmp_path, label_prefix=None)
    with pytest.raises(ValueError, match="`label_prefix` must not be empty"):
        load(tmp_path, label_prefix="")
    nan = load(tmp_path, table=np.full((5, 2), np.nan))
    with pytest.raises(ValueError, match="got NaN"):
        nan.predict(["fine"])


def test_every_truncated_file_is_an_error(tmp_path):
    quantised = Quantised(
        np.zeros((5, 1), int), [np.ones((256, 2))], (np.zeros(5, int), np.ones(256))
    )
    path = tmp_path / "model.bin"
    for table, pruned in ((TABLE, None), (quantised, [])):
        whole = model(**{**EXAMPLE, "table": table}, pruned=pruned, buckets=4)[:-1]
        for size in (*range(400), *range(400, len(whole), 97)):
            path.write_bytes(whole[: min(size, len(whole))])
            with pytest.raises(ValueError, match=r"model\.bin is not a fastText model"):
                jbag.fasttext.load(path)


def test_broken_files_are_errors_that_say_what_was_found(tmp_path):
    def check(match, **changes):
        with pytest.raises(ValueError, match=match):
            load(tmp_path, **changes)

    check(r"must begin with 793712314 and the version 11 or 12; got 5 and 12", magic=5)
    check(r"got 793712314 and 13", version=13)
    check(r"must have rows for 5 words and 1 buckets; got 5", buckets=1)
    check(r"buckets must be at least 1 with n-grams; got 0", ngrams=2)
    check(r"it is pruned, but not quantised", pruned=[])
    check(r"a supervised model must have labels", labels=[], output=OUTPUT[:0])
    check(r"output matrix must have the shape \(2, 2\); got \(3, 2\)", output=TABLE[:3])
    check(r"words must have no line feeds", words=[*WORDS[:4], ("so\nso", 1)])
    quantised = Quantised(np.zeros((6, 1), int), [np.ones((256, 2))])
    pruned = {"table": quantised, "buckets": 4}
    check(r"each kept bucket must be in \[0, 4\); got 4", pruned=[(4, 0)], **pruned)
    check(r"each kept row must be in \[0, 1\); got 1", pruned=[(0, 1)], **pruned)


def test_sizes_that_cannot_be_are_no_reason_to_allocate(tmp_path):
    whole = bytearray(model(**EXAMPLE))
    path = tmp_path / "model.bin"
    table_at = whole.index(struct.pack("<qq", 5, 2))
    for at, value in itertools.chain(
        itertools.product((64, 68, 72), (-1, 2**31 - 1)),
        itertools.product((table_at, table_at + 4, table_at + 12), (-1, 2**31 - 1)),
    ):
        broken = whole.copy()
        broken[at : at + 4] = struct.pack("<i", value)
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="is not a fastText model, or is broken"):
            jbag.fasttext.load(path)
    rng = np.random.default_rng(0)
    for _ in range(500):  # Whatever a byte becomes, it is a model or an error.
        broken = whole.copy()
        broken[rng.integers(len(broken))] = rng.integers(256)
        path.write_bytes(broken)
        try:
            jbag.fasttext.load(path)
        except ValueError as error:
            assert "model.bin" in str(error)  # noqa: PT017  (it may be a model, too)


def test_vectors_are_read_with_a_first_line_or_without(tmp_path):
    lines = ["to 1 -2.5 3e-2", "caf\u00e9 4 5 6", "be 7 8 9"]
    expected = np.array([[1, -2.5, 0.03], [4, 5, 6], [7, 8, 9]], np.float32)
    path = tmp_path / "vectors.vec"
    for first, end in itertools.product(("3 3\n", ""), ("\n", "", " \n\n")):
        for space in (" \n", "\n", "\r\n"):
            path.write_text(first + space.join(lines) + end, newline="")
            words, table = jbag.fasttext.load_vectors(path)
            assert words == ("to", "caf\u00e9", "be")
            np.testing.assert_array_equal(table, expected)
            assert table.dtype == np.float32
            words, table = jbag.fasttext.load_vectors(path, max_words=2)
            assert words == ("to", "caf\u00e9")
            np.testing.assert_array_equal(table, expected[:2])


def test_vectors_of_strange_words_are_read(tmp_path):
    path = tmp_path / "vectors.txt"
    # Bytes that are no UTF-8, a word with spaces (GloVe's), one twice, a wide space.
    words = [b"\xff\xfe", b". . .", b"to", b"a b", b"to", "\u2003".encode(), b"3"]
    path.write_bytes(b"".join(w + b" %d %d\n" % (i, i) for i, w in enumerate(words)))
    found, table = jbag.fasttext.load_vectors(path)
    assert found == ("\udcff\udcfe", ". . .", "to", "a b", "\u2003", "3")
    np.testing.assert_array_equal(table[:, 0], [0, 1, 2, 3, 5, 6])


def test_vectors_longer_than_a_block_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("jbag.fasttext._vector_reader._BLOCK", 256)
    table = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    text = "".join(
        f"w{i} " + " ".join(map(str, row.tolist())) + "\n"
        for i, row in enumerate(table)
    )
    for first in ("", "50 7\n"):
        (tmp_path / "vectors.vec").write_text(first + text)
        words, found = jbag.fasttext.load_vectors(tmp_path / "vectors.vec")
        assert words == tuple(f"w{i}" for i in range(50))
        np.testing.assert_array_equal(found, table)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_numbers_of_any_notation_are_read(name):
    if TOKENIZERS[name].MISSING:
        pytest.skip(TOKENIZERS[name].MISSING)
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=3000) * 10.0 ** rng.integers(-40, 38, 3000)
    formats = ["%.5g", "%.9g", "%r", "%.4f", "%.17g", "%.25e", "%+.3E", "%d"]
    written = [formats[i % 8] % float(x) for i, x in enumerate(drawn)]
    written += ["0", "-0.0", ".5", "5.", "1e-999", "1e30", "nan", "-inf", "007"]
    for chosen in (written, [x for x in written if x not in ("nan", "-inf")]):
        for space in (" ", "  ", "\t", "\n"):
            found = TOKENIZERS[name].numbers(space.join(chosen).encode(), len(chosen))
            expected = np.array(list(map(float, chosen)), np.float64)
            np.testing.assert_array_equal(found, expected.astype(np.float32))
    for wrong in ("1", "1 2 3", "1 x", "1 2x", "1 -", "1 .", "1 2e", "1 2e+", "1 2 ."):
        assert TOKENIZERS[name].numbers(wrong.encode(), 2) is None
    assert TOKENIZERS[name].numbers(b" 1 2 ", 2).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "must begin with the numbers of words"),
        ("3 1\nword 1\n", "must hold 3 words, as its first line says; got 1"),
        ("1 2\na 1 2\nb 1 2\n", "must hold 1 words, as its first line says; got"),
        ("999999999 300\na 1 2\n", "must hold 999999999 words of 300 numbers"),
        ("1 2\na 1 x\n", "a word and 2 numbers in each line; got b'a 1 x' for word 0"),
        ("a 1 2\nb 1\n", "got b'b 1' for word 1"),
    ],
)
def test_other_vectors_are_errors(text, match, tmp_path):
    (tmp_path / "vectors.vec").write_text(text)
    with pytest.raises(ValueError, match=match):
        jbag.fasttext.load_vectors(tmp_path / "vectors.vec")


def test_a_model_goes_into_flax(tmp_path):
    import flax.linen as nn

    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, bags):
            return nn.Dense(2)(jbag.EmbeddingBag(5, 2)(bags))

    loaded = load(tmp_path)
    params = {
        "EmbeddingBag_0": {"embedding": loaded.table},
        "Dense_0": {"kernel": loaded.output.T, "bias": jnp.zeros(2)},
    }
    bags = loaded.encode(["fine", "so poor"])
    logits = Classifier().apply({"params": params}, bags)
    np.testing.assert_allclose(
        jax.nn.softmax(logits), loaded.probabilities(bags), rtol=1e-6
    )

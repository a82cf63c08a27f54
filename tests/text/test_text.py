"""Texts become the bags of rows that fastText's hashes and numbers make of them."""

import copy
import gc
import os
import pickle
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
import text_oracle

import jbag
from jbag.text import Encoder
from jbag.text._tokenizer_choice import TOKENIZERS

PIECES = [
    "a", "b", "cat", "Cat", "CAFÉ", "é", "ñandú", "日本語", "ไทย", "e\u0301", "#$", "ß",
    "\u3000", " ", "  ", "\n", "\t", "\0", "\x1c", "\x85", "!", "_x", "3rd", "x\u00a0y",
    "</s>", "__label__a", "😀", "\udc80", "İ", "हिन्दी", "\U000e0100", "\U00020000",
]  # fmt: skip


@pytest.fixture(params=list(TOKENIZERS))
def implementation(request):
    skip_if_missing(request.param)
    return request.param


def skip_if_missing(name):
    missing = TOKENIZERS[name].MISSING
    if missing:  # In CI it must be here, as the kernel that is compiled beside it.
        required = os.environ.get("JBAG_REQUIRE_CPU_KERNEL") == "1"
        (pytest.fail if required else pytest.skip)(f"{name}: {missing}")


def random_texts(rng, most=6):
    return [
        "".join(
            rng.choice(PIECES) + rng.choice(["", " "]) for _ in range(rng.randrange(12))
        )
        for _ in range(rng.randrange(most))
    ]


@pytest.mark.parametrize("split", ["words", "spaces", "fasttext"])
@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize(("skip", "end"), [("", ""), ("__label__", "</s>")])
def test_random_texts_have_the_rows_of_the_definition(
    implementation, split, lowercase, skip, end
):
    rng = random.Random(f"{split} {lowercase} {skip}")
    for _ in range(60):
        how = {"split": split, "lowercase": lowercase, "skip": skip, "end": end}
        count = {"min_count": rng.choice([1, 2, 3]), "max_words": rng.choice([None, 3])}
        ngrams, buckets = rng.choice([1, 2, 3, 5]), rng.choice([1, 7, 64, 2_000_000])
        subwords = rng.choice([(0, 0), (1, 1), (2, 4), (3, 6), (1, 9)])
        texts, others = random_texts(rng), random_texts(rng)
        encoder, bags = Encoder.fit_encode(
            texts,
            **how,
            **count,
            ngrams=ngrams,
            buckets=buckets,
            subwords=subwords,
            implementation=implementation,
        )
        words, counts = text_oracle.vocabulary(texts, **how, **count)
        assert list(encoder.words) == words
        assert encoder.counts.tolist() == counts
        assert encoder.num_rows == len(words) + buckets

        def expected(batch, words=words, options=(ngrams, buckets, subwords), how=how):
            return [text_oracle.rows(text, words, *options, **how) for text in batch]

        assert bags.to_lists() == expected(texts)
        again = encoder.encode(others, implementation=implementation)
        assert again.to_lists() == expected(others)
        assert again.indices.dtype == again.offsets.dtype == np.int32


def test_hashes_are_fasttexts():
    # FNV-1a's own test vectors, which a sign doesn't touch, and one that it does.
    assert text_oracle.fnv(b"a") == 0xE40C292C
    assert text_oracle.fnv(b"foobar") == 0xBF9CF968
    assert text_oracle.fnv("é".encode()) != 0xE40C292C


def test_characters_are_told_apart_as_python_does():
    from jbag.text import _tokenizer_options as plan

    for name in ("words", "spaces"):
        classes = plan.character_classes(name, ascii_only=False)
        for point in [*range(1 << 16), *range(1 << 16, 0x110000, 7)]:
            c = chr(point)
            kind = plan.SPACE if c.isspace() else plan.PART
            if name == "words" and kind == plan.PART and not text_oracle.is_letter(c):
                kind = plan.ALONE
            assert classes[point] == kind, hex(point)


def test_words_keep_their_vowel_signs_and_han_is_split(implementation):
    texts = ["Isn't naïve, 3rd", "हिन्दी में", "abc北京x", "🙂🙂"]
    encoder, bags = Encoder.fit_encode(texts, implementation=implementation)
    tokens = [[encoder.words[i] for i in bag] for bag in bags.to_lists()]
    assert tokens == [
        ["isn", "'", "t", "naïve", ",", "3rd"],
        ["हिन्दी", "में"],
        ["abc", "北", "京", "x"],
        ["🙂", "🙂"],
    ]


def test_many_texts_are_numbered_in_order_whatever_the_threads(monkeypatch):
    skip_if_missing("cpp")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefg", k=rng.randint(1, 7))) for _ in range(5000)]
    texts = [" ".join(rng.choices(words, k=rng.randrange(60))) for _ in range(3000)]
    options = {"ngrams": 3, "buckets": 1000, "split": "spaces"}
    expected = Encoder.fit_encode(texts, implementation="python", **options)
    for threads in (1, 2, 5):
        monkeypatch.setattr(TOKENIZERS["cpp"], "_num_threads", lambda n=threads: n)
        encoder, bags = Encoder.fit_encode(texts, implementation="cpp", **options)
        assert encoder.words == expected[0].words
        assert np.array_equal(bags.indices, expected[1].indices)
        assert np.array_equal(bags.offsets, expected[1].offsets)
        again = encoder.encode(texts, implementation="cpp")
        assert np.array_equal(again.indices, expected[1].indices)


def test_no_texts_and_empty_texts_make_empty_bags(implementation):
    for texts in ([], [""], ["", " \n"]):
        encoder, bags = Encoder.fit_encode(texts, implementation=implementation)
        assert (encoder.words, encoder.num_rows) == ((), 0)
        assert bags.to_lists() == [[]] * len(texts)


def test_of_equal_words_the_first_counts(implementation):
    encoder = Encoder(words=["a", "b", "a"], split="spaces")
    bags = encoder.encode(["b a a c"], implementation=implementation)
    assert bags.to_lists() == [[1, 0, 0]]


def test_pruned_buckets_have_no_rows(implementation):
    bucket_rows = np.array([-1, 2, -1, 0, 1, -1, -1], np.int32)
    encoder = Encoder(
        words=["a"], ngrams=2, buckets=7, subwords=(2, 3), bucket_rows=bucket_rows
    )
    assert encoder.num_rows == 4
    texts = ["a b c d", "xyz a", "q"]
    expected = [
        text_oracle.rows(text, ["a"], 2, 7, (2, 3), bucket_rows=bucket_rows)
        for text in texts
    ]
    assert any(expected)
    assert encoder.encode(texts, implementation=implementation).to_lists() == expected


def test_tfidf_weighs_slots_by_their_rows(implementation):
    texts = ["a b b c", "a c", "a", ""]
    encoder, bags = Encoder.fit_encode(
        texts, tfidf=True, ngrams=2, buckets=5, implementation=implementation
    )
    expected = np.array(text_oracle.idf(bags.to_lists(), encoder.num_rows))
    np.testing.assert_allclose(encoder.weights, expected, rtol=1e-6)
    np.testing.assert_array_equal(bags.weights, encoder.weights[bags.indices])
    again = encoder.encode(["c c new"], implementation=implementation)
    np.testing.assert_array_equal(again.weights, encoder.weights[again.indices])
    assert bags.weights.dtype == np.float32


def test_frequent_words_are_left_out_at_random():
    texts = ["the cat"] * 50 + ["the"] * 9_950
    encoder, bags = Encoder.fit_encode(texts)
    assert encoder.counts.tolist() == [10_000, 50]
    share = 10_000 / 10_050
    kept = encoder.subsample(bags, 1e-2, seed=3)
    expected = (1e-2 / share) ** 0.5 + 1e-2 / share
    assert abs((kept.indices == 0).mean() * kept.capacity / 10_000 - expected) < 0.02
    assert (kept.indices == 1).sum() == 50  # its share is below the threshold
    assert kept.num_bags == bags.num_bags
    assert all(set(bag) <= {0, 1} and len(bag) <= 2 for bag in kept.to_lists())
    assert [1 in bag for bag in kept.to_lists()] == [True] * 50 + [False] * 9_950
    again = encoder.subsample(bags, 1e-2, seed=3)
    assert np.array_equal(kept.indices, again.indices)
    other = encoder.subsample(bags, 1e-2, seed=4)
    assert not np.array_equal(kept.offsets, other.offsets)


def test_weights_stay_with_their_slots_where_some_are_left_out():
    encoder, bags = Encoder.fit_encode(["a a a b"] * 200, tfidf=True)
    kept = encoder.subsample(bags, 1e-2, seed=0)
    assert 0 < kept.capacity < bags.capacity
    np.testing.assert_array_equal(kept.weights, encoder.weights[kept.indices])


def test_saved_encoder_is_the_same(tmp_path, implementation):
    path = tmp_path / "any name"
    texts = ["naïve \udc80 日本 \ud800 café", "b b"]
    encoders = [
        Encoder.fit(
            texts, ngrams=2, buckets=9, subwords=(2, 3), split="fasttext", end="</s>",
            skip="__x", lowercase=False, tfidf=True, implementation=implementation,
        ),
        Encoder(words=[]),
        Encoder(words=["a"], buckets=3, bucket_rows=np.array([1, -1, 0], np.int32)),
    ]  # fmt: skip
    for encoder in encoders:
        encoder.save(path)
        loaded = Encoder.load(path)
        for name in ("words", "ngrams", "buckets", "subwords", "split", "lowercase",
                     "skip", "end", "num_rows"):  # fmt: skip
            assert getattr(loaded, name) == getattr(encoder, name)
        for name in ("counts", "weights", "bucket_rows"):
            np.testing.assert_array_equal(getattr(loaded, name), getattr(encoder, name))
        assert loaded.encode(texts).to_lists() == encoder.encode(texts).to_lists()


def test_copies_have_vocabularies_of_their_own(implementation):
    encoder = Encoder.fit(["a b c d"], ngrams=2, buckets=50)
    texts = ["d a x", "b"]
    expected = encoder.encode(texts, implementation=implementation).to_lists()
    copies = [
        copy.copy(encoder),
        copy.deepcopy(encoder),
        pickle.loads(pickle.dumps(encoder)),
    ]
    del encoder
    gc.collect(1)  # of what is new alone
    for other in copies:
        found = other.encode(texts, implementation=implementation).to_lists()
        assert found == expected


def test_files_without_an_encoder_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    for content in (b"", b"no encoder", b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="holds no encoder"):
            Encoder.load(path)
    np.savez(path, words=np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="holds no encoder"):
        Encoder.load(path)
    np.save(tmp_path / "a.npy", np.array([{}], object))
    with pytest.raises(ValueError, match="holds no encoder"):
        Encoder.load(tmp_path / "a.npy")
    with pytest.raises(FileNotFoundError):
        Encoder.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"texts": "a text"}, TypeError, "`texts` must be a list of strings; got 'a t"),
        ({"texts": b"a"}, TypeError, "`texts` must be a list of strings"),
        ({"texts": 3}, TypeError, "`texts` must be a list of strings; got 3"),
        ({"texts": ["a", None]}, TypeError, "`texts` must hold strings; got None at 1"),
        ({"ngrams": 0, "buckets": 1}, ValueError, "`ngrams` must be at least 1; got 0"),
        ({"ngrams": 2}, ValueError, "`buckets` must be at least 1 with n-grams"),
        ({"subwords": (1, 2)}, ValueError, "`buckets` must be at least 1"),
        ({"subwords": (3, 2), "buckets": 1}, ValueError, r"`subwords` .*got \(3, 2\)"),
        ({"subwords": (0, 2), "buckets": 1}, ValueError, r"`subwords` .*got \(0, 2\)"),
        ({"subwords": 3, "buckets": 1}, TypeError, "`subwords` must be a pair"),
        ({"subwords": (1.0, 2), "buckets": 1}, TypeError, r"`subwords\[0\]` must be"),
        ({"buckets": 1 << 31}, ValueError, "`buckets` must be in"),
        ({"buckets": True}, TypeError, "`buckets` must be an integer"),
        ({"split": "letters"}, ValueError, "`split` must be one of 'words', 'spaces'"),
        ({"lowercase": 1}, TypeError, "`lowercase` must be True or False"),
        ({"skip": None}, TypeError, "`skip` must be a string; got None"),
        ({"end": b"</s>"}, TypeError, "`end` must be a string"),
        ({"min_count": 0}, ValueError, "`min_count` must be at least 1"),
        ({"max_words": -1}, ValueError, "`max_words` must be at least 0"),
        ({"tfidf": "yes"}, TypeError, "`tfidf` must be True or False"),
        ({"implementation": "rs"}, ValueError, "`implementation` must be None or one"),
        ({"implementation": 3}, ValueError, "`implementation` must be None or one"),
        ({"words": ["a"]}, TypeError, "`words` is not an option; the options are b"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        Encoder.fit(**{"texts": ["a"], **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"words": "abc"}, TypeError, "`words` must be a list of strings"),
        ({"words": ["a", 1]}, TypeError, "`words` must hold strings; got 1 at 1"),
        ({"buckets": (1 << 31) - 1}, ValueError, "fewer than 2\\*\\*31 rows; got 2147"),
        ({"words": ["a\nb"]}, ValueError, "`words` must not hold line feeds"),
        ({"counts": np.ones(2)}, ValueError, r"`counts` must have the shape \(1,\)"),
        ({"weights": np.ones((1, 1))}, ValueError, r"`weights` must have the shape"),
        ({"bucket_rows": np.zeros(2)}, ValueError, r"`bucket_rows` must have the sh"),
    ],
    ids=str,
)
def test_bad_encoders_are_named(options, error, message):
    with pytest.raises(error, match=message):
        Encoder(**{"words": ["a"], **options})


def test_subsampling_needs_counts_and_a_threshold():
    encoder = Encoder(words=["a"])
    with pytest.raises(ValueError, match="`counts` must be given"):
        encoder.subsample(encoder.encode(["a"]), 0.1, seed=0)
    encoder, bags = Encoder.fit_encode(["a"])
    for threshold in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="`threshold` must be above 0"):
            encoder.subsample(bags, threshold, seed=0)


def test_a_missing_tokenizer_is_an_error_with_the_reason(monkeypatch):
    monkeypatch.setattr(TOKENIZERS["cpp"], "MISSING", "it is elsewhere")
    with pytest.raises(ValueError, match="cannot be 'cpp': it is elsewhere"):
        Encoder.fit(["a"], implementation="cpp")
    assert Encoder.fit(["a"]).words == ("a",)


def test_encoders_are_used_by_many_threads_and_freed(implementation):
    encoder = Encoder.fit(["a b c d"], ngrams=2, buckets=50)
    expected = encoder.encode(["a c x"] * 100).to_lists()
    results = []

    def work():
        for _ in range(20):
            bags = encoder.encode(["a c x"] * 100, implementation=implementation)
            results.append(bags.to_lists())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 80
    del encoder
    gc.collect(1)  # of what is new alone


def test_table_of_an_encoder_pools_its_bags():
    encoder, bags = Encoder.fit_encode(["a b a", ""], ngrams=2, buckets=3)
    table = np.arange(encoder.num_rows, dtype=np.float32)[:, None]
    pooled = jbag.embedding_bag(table, bags, mode="sum")
    assert pooled[:, 0].tolist() == [sum(bag) for bag in bags.to_lists()]


def test_text_imports_neither_flax_nor_optax():
    code = (
        "import sys, jbag.text\n"
        "assert not {'flax', 'optax', 'torch', 'grain'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""Vocabularies of raw ids, against a count and a dict."""

import collections
import copy
import enum
import pickle
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import jbag
from jbag.data import IdVocabulary, _id_counts, _integer_index

INTEGERS = [7, 3, None, 9, 5, 3, 7, 7]
STRINGS = [None if x is None else "abcdefghij"[x] * x for x in INTEGERS]
BYTES = [None if x is None else x.encode() for x in STRINGS]


def counted(ids, min_count=1, max_ids=None):
    """Return the ids by frequency, and their counts."""
    counts = collections.Counter(x for x in ids if x is not None)
    ordered = sorted(counts, key=lambda x: (-counts[x], x))[:max_ids]
    ordered = [x for x in ordered if counts[x] >= min_count]
    return ordered, [counts[x] for x in ordered]


def looked_up(vocabulary, ids):
    """Return the row of each id by a dict, -1 for unknown ids."""
    table = {x: row for row, x in enumerate(vocabulary.ids.tolist())}
    return [table.get(x, -1) for x in ids]


@pytest.mark.parametrize("ids", [INTEGERS, STRINGS, BYTES])
@pytest.mark.parametrize("min_count", [1, 2, 9])
@pytest.mark.parametrize("max_ids", [None, 0, 1, 3, 100])
def test_ids_are_sorted_by_frequency_then_value(ids, min_count, max_ids):
    vocabulary = IdVocabulary.fit(ids, min_count=min_count, max_ids=max_ids)
    ordered, counts = counted(ids, min_count, max_ids)
    assert vocabulary.ids.tolist() == ordered
    assert vocabulary.counts.tolist() == counts
    assert len(vocabulary) == len(ordered) == vocabulary.num_rows - 1
    rows = vocabulary.transform(ids)
    assert rows.dtype == np.int32
    assert rows.tolist() == [row + 1 for row in looked_up(vocabulary, ids)]


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", ">i4", "u4", "i8", "u8", "f2"])
@pytest.mark.parametrize("spread", [1, 10**9])
def test_integers_of_every_dtype_have_the_row_of_their_value(dtype, spread):
    # A small spread is found in a table, a large one by hashes.
    ids = [0, 5 * spread, 120, 5 * spread, 3 * spread, 2**40]
    vocabulary = IdVocabulary.fit(ids)
    given = np.array([120, 0, 5, 3, 119, 127]).astype(dtype)
    wanted = [row + 1 for row in looked_up(vocabulary, [120, 0, 5, 3, 119, 127])]
    assert vocabulary.transform(given).tolist() == wanted
    assert vocabulary.transform(given.reshape(2, 3)).tolist() == [
        wanted[:3],
        wanted[3:],
    ]
    assert vocabulary.transform(given[::-2]).tolist() == wanted[::-2]


@pytest.mark.parametrize("kind", ["dense", "sparse", "negative", "unsigned", "collide"])
@pytest.mark.parametrize("size", [1, 2, 3, 1000, 40_000])
def test_random_integers_have_the_rows_of_a_dict(kind, size):
    rng = np.random.default_rng(size)
    inverse = pow(int(_integer_index._FACTOR), -1, 2**64)
    ids = {
        "dense": np.arange(size) + 10,
        "sparse": rng.integers(0, 2**63 - 1, size),
        "negative": rng.integers(-(2**63), 2**63 - 1, size),
        "unsigned": rng.integers(2**62, 2**64 - 1, size, np.uint64),
        # All hashes have one prefix.
        "collide": np.arange(size, dtype=np.uint64) * np.uint64(inverse),
    }[kind]
    vocabulary = IdVocabulary(rng.permutation(ids), unknown="drop")
    given = np.concatenate([ids, ids + ids.dtype.type(1), ids[:1] * 0, ~ids])
    rows = vocabulary._find(jbag.data._read_column.read_column("column", given)[0])
    assert rows.tolist() == looked_up(vocabulary, given.tolist())
    fitted = IdVocabulary.fit(np.concatenate([ids, ids[::2], ids[:1]]))
    assert fitted.ids.tolist() == counted([*ids, *ids[::2], *ids[:1]])[0]


def test_signed_and_unsigned_ids_are_told_apart():
    small = IdVocabulary(np.array([-1, 2, 2**63 - 1]))
    given = np.array([2**64 - 1, 2, 2**63 - 1], np.uint64)
    assert small.transform(given).tolist() == [0, 2, 3]
    large = IdVocabulary(np.array([2**64 - 1, 2, 2**63], np.uint64))
    assert large.ids.dtype == np.uint64
    assert large.transform([-1, 2, -(2**63)]).tolist() == [0, 2, 0]
    assert large.transform([2**64 - 1]).tolist() == [1]
    # A table of the range, over ids with and without a sign.
    table = IdVocabulary(np.array([2**64 - 1, 2**64 - 2], np.uint64))
    assert table.transform([-1, -2, 0]).tolist() == [0, 0, 0]
    assert IdVocabulary([-1, -2]).transform(given).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="fit in int64, or in uint64"):
        IdVocabulary.fit_chunks([[-1], [2**63]])
    with pytest.raises(ValueError, match="fit in int64, or in uint64"):
        IdVocabulary.fit([-1, 2**63])


def test_nulls_and_floats_of_integers():
    nan = float("nan")
    for column in (
        [7.0, nan, 3, None],
        np.array([7, nan, 3, nan], np.float32),
        np.array([7, None, 3, np.nan], object),
        np.ma.array([7, 1, 3, 2], mask=[0, 1, 0, 1]),
        np.ma.array([7.0, 1, 3, nan], mask=[0, 1, 0, 0]),
    ):
        vocabulary = IdVocabulary.fit(column)
        assert vocabulary.ids.tolist() == [3, 7]
        assert vocabulary.transform(column).tolist() == [2, 0, 1, 0]
        assert vocabulary.transform([None, nan]).tolist() == [0, 0]
    for column in ([1.5], [np.inf], [2.0**54], np.array([2**25], np.float32)):
        with pytest.raises(TypeError, match="must hold integers, as floats only"):
            IdVocabulary.fit(column)


@pytest.mark.parametrize("unknown", ["row", "error", "drop"])
def test_bags_have_the_rows_of_their_ids(unknown):
    lists = [[7, 3], None, [], [9, None, 5], (3,), np.array([1, 7], np.uint8)]
    vocabulary = IdVocabulary.fit([[7, 3], [9], np.array([7])], unknown=unknown)
    assert vocabulary.ids.tolist() == [7, 3, 9]
    if unknown == "error":
        with pytest.raises(IndexError, match="got a null at position 1 of bag 3"):
            vocabulary.transform(lists)
        assert vocabulary.transform(lists[:3]).to_lists() == [[0, 1], [], []]
        return
    bags = vocabulary.transform(lists)
    assert isinstance(bags, jbag.Bags)
    wanted = {
        "row": [[1, 2], [], [], [3, 0, 0], [2], [0, 1]],
        "drop": [[0, 1], [], [], [2], [1], [0]],
    }[unknown]
    assert bags.to_lists() == wanted
    assert bags.indices.dtype == bags.offsets.dtype == np.int32
    given = jbag.Bags.from_lists([[7, 4], [9]], [[0.5, 1], [2]], capacity=5)
    bags = vocabulary.transform(given)
    assert bags.capacity == 5
    if unknown == "row":
        assert bags.to_lists() == [[1, 0], [3]]
        assert bags.weights.tolist() == [0.5, 1, 2, 0, 0]
    else:
        assert bags.to_lists() == [[0], [2]]
        assert bags.weights.tolist() == [0.5, 2, 0, 0, 0]
        assert vocabulary.transform([7, 4]).to_lists() == [[0], []]
        assert vocabulary.transform(np.array([[3, 4, 7]])).to_lists() == [[1, 0]]
        with pytest.raises(ValueError, match=r"\[n\] or \[n, L\]"):
            vocabulary.transform(np.zeros((1, 1, 1), int))
    assert IdVocabulary.fit(given).ids.tolist() == [4, 7, 9]  # without the tail


def test_an_unknown_id_is_named():
    vocabulary = IdVocabulary(["a", "b"], unknown="error")
    assert vocabulary.transform(["b", "a"]).tolist() == [1, 0]
    with pytest.raises(IndexError, match="got 'x' at position 1"):
        vocabulary.transform(["b", "x", "y"])
    with pytest.raises(IndexError, match=r"got 'x' at position \(1, 0\)"):
        vocabulary.transform(np.array([["b", "a"], ["x", "y"]]))
    with pytest.raises(IndexError, match="got a null at position 0"):
        vocabulary.transform([None, "x"])
    masked = np.ma.array([1, 2, 3, 9], mask=[1, 0, 0, 0])
    numbers = IdVocabulary([2, 3], unknown="error")
    with pytest.raises(IndexError, match="got a null at position 0"):
        numbers.transform(masked)
    numbers = IdVocabulary([2, 3], unknown="error")
    with pytest.raises(IndexError, match="got 9 at position 1 of bag 1"):
        numbers.transform([[2], [3, 9]])


@pytest.mark.parametrize("unknown", ["row", "error", "drop"])
@pytest.mark.parametrize("ids", [INTEGERS, STRINGS, BYTES])
def test_inverse_is_the_id_of_each_row(ids, unknown):
    known = [x for x in ids if x is not None]
    vocabulary = IdVocabulary.fit(ids, unknown=unknown)
    rows = vocabulary.transform(known)
    rows = rows.indices if unknown == "drop" else rows
    assert vocabulary.inverse(rows).tolist() == known
    assert vocabulary.inverse(jnp.asarray(rows[:4].reshape(2, 2))).shape == (2, 2)
    assert vocabulary.inverse([]).tolist() == []
    last = vocabulary.num_rows
    with pytest.raises(IndexError, match=rf"got {last} at position 1"):
        vocabulary.inverse([1, last])
    with pytest.raises(TypeError, match="`rows` must hold integers"):
        vocabulary.inverse([0.5])
    if unknown == "row":
        given = np.array([[0, 1]], np.uint8)
        other = type(known[0])(1)
        out = vocabulary.inverse(given, unknown_id=other)
        assert out.tolist() == [[other, vocabulary.ids[0]]]
        with pytest.raises(IndexError, match="`unknown_id` gives it a value"):
            vocabulary.inverse(given)
        with pytest.raises(TypeError, match="`unknown_id`"):
            vocabulary.inverse(given, unknown_id=1.5)


def test_chunks_are_counted_as_one_column(monkeypatch):
    monkeypatch.setattr(_id_counts, "_PENDING", 4)
    rng = np.random.default_rng(0)
    ids = rng.zipf(1.3, 2000) % 300
    chunks = np.split(ids, [10, 10, 500, 900, 1900])
    assert IdVocabulary.fit_chunks(chunks) == IdVocabulary.fit(ids)
    names = [[f"{x}" for x in chunk] for chunk in chunks]
    whole = IdVocabulary.fit([f"{x}" for x in ids], min_count=3, max_ids=50)
    assert IdVocabulary.fit_chunks(iter(names), min_count=3, max_ids=50) == whole
    shuffled = rng.permutation(ids)
    assert IdVocabulary.fit(shuffled) == IdVocabulary.fit(ids)
    empty = IdVocabulary.fit_chunks([])
    assert len(empty) == 0
    assert empty.num_rows == 1
    assert empty.transform(["x", None]).tolist() == [0, 0]
    assert empty.transform([[3], []]).to_lists() == [[0], []]
    assert IdVocabulary.fit([None, None]) == IdVocabulary.fit([]) == empty
    assert IdVocabulary.fit_chunks([[], ["a"], [None], []]).ids.tolist() == ["a"]
    with pytest.raises(TypeError, match="must hold integers, as the columns before"):
        IdVocabulary.fit_chunks([[1], ["a"]])


def test_a_vocabulary_can_be_given():
    vocabulary = IdVocabulary(np.array(["a", "b"]), counts=[5, 9])
    assert vocabulary.transform(["b", "c"]).tolist() == [2, 0]
    assert [type(x) for x in vocabulary.ids] == [str, str]
    with pytest.raises(ValueError, match="read-only"):
        vocabulary.ids[0] = "b"
    given = np.array([3, 4])
    vocabulary = IdVocabulary(given)
    given[0] = 9
    assert vocabulary.transform([3]).tolist() == [1]
    kind = enum.Enum("kind", {"A": "a"}, type=str)
    assert IdVocabulary.fit([kind.A, "a"]).ids.tolist() == ["a"]
    for error, match, arguments in [
        (ValueError, "distinct; got 3 twice", {"ids": [3, 4, 3]}),
        (ValueError, "distinct; got 'a' twice", {"ids": ["a", "b", "a"]}),
        (ValueError, "no nulls; got a null at position 1", {"ids": [1, None]}),
        (ValueError, "one flat column", {"ids": [[1], [2]]}),
        (ValueError, "shape of `ids`", {"ids": [1, 2], "counts": [1]}),
        (TypeError, "`counts`", {"ids": [1, 2], "counts": [0.5, 1]}),
        (ValueError, "`unknown` must be one of", {"ids": [1], "unknown": "keep"}),
    ]:
        with pytest.raises(error, match=match):
            IdVocabulary(**arguments)


@pytest.mark.parametrize(
    ("error", "match", "column"),
    [
        (TypeError, "got 'a' at position 1", [1, "a"]),
        (TypeError, "got 1 at position 2", ["a", None, 1]),
        (TypeError, "got b'a' at position 1", ["a", b"a"]),
        (TypeError, "got True at position 0", [True, False]),
        (TypeError, "got True at position 1", [1, True]),
        (TypeError, "got {} at position 0", [{}]),
        (TypeError, "got bool", np.array([True])),
        (TypeError, "got datetime64", np.array(["2024"], "M8[s]")),
        (TypeError, "got complex", np.array([1j])),
        (TypeError, "must be a column of ids", np.array(3)),
        (TypeError, "got str", "abc"),
        (TypeError, "got int", 3),
        (TypeError, "got dict", {"a": 1}),
        (TypeError, "got NoneType", None),
        (TypeError, "must be a list of ids, as other elements", [[1], 2]),
        (TypeError, "got 'a' at position 2 of the concatenated", [[1], [], [2, "a"]]),
        (ValueError, "deeper lists", [[[1]]]),
        (ValueError, "deeper lists", [np.zeros((1, 1), int), [[2]]]),
        (ValueError, "deeper lists", [np.zeros((1, 1), int)]),
        (TypeError, "must be a list of ids", [[1], np.array(2)]),
        (ValueError, "got ids from", [2**64]),
    ],
)
def test_other_columns_are_errors(error, match, column):
    with pytest.raises(error, match=match):
        IdVocabulary.fit(column)
    with pytest.raises(error, match=match):
        IdVocabulary([1, 2]).transform(column)


def test_other_options_are_errors():
    for error, options in [
        (ValueError, {"min_count": 0}),
        (TypeError, {"min_count": 1.0}),
        (ValueError, {"max_ids": -1}),
        (TypeError, {"max_ids": "1"}),
        (ValueError, {"unknown": None}),
    ]:
        with pytest.raises(error, match=f"`{next(iter(options))}` must be"):
            IdVocabulary.fit([1], **options)
    with pytest.raises(TypeError, match="`columns` must be an iterable"):
        IdVocabulary.fit_chunks("abc")
    with pytest.raises(TypeError, match="must hold integers, as the vocabulary"):
        IdVocabulary([1]).transform(["1"])
    with pytest.raises(TypeError, match="must hold strings, as the vocabulary"):
        IdVocabulary(["1"]).transform([b"1"])


@pytest.mark.parametrize("unknown", ["row", "error", "drop"])
@pytest.mark.parametrize(
    "ids",
    [
        [7, -3, 2**40],
        np.array([2**64 - 1, 0], np.uint64),
        ["", "a\n", "é\0", "😀", "\ud800", "\udc00"],
        [b"", b"\xff\0", b"\n"],
        [],
    ],
    ids=["integers", "uint64", "strings", "bytes", "none"],
)
def test_saved_vocabulary_is_the_same(tmp_path, ids, unknown):
    path = tmp_path / "ids"
    for counts in (None, np.arange(len(ids)) + 1):
        vocabulary = IdVocabulary(ids, counts, unknown)
        vocabulary.save(path)
        for again in (
            IdVocabulary.load(path),
            pickle.loads(pickle.dumps(vocabulary)),
            copy.deepcopy(vocabulary),
        ):
            assert again == vocabulary
            assert again.ids.dtype == vocabulary.ids.dtype
            assert again.ids.tolist() == list(ids)
            assert again.transform(ids[:1]) is not None
    assert vocabulary != IdVocabulary(ids, None, unknown)
    assert vocabulary != "ids"
    assert [x.name for x in tmp_path.iterdir()] == ["ids"]


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "ids.npz"
    IdVocabulary(["ab", "c"], [2, 1]).save(path)
    arrays = dict(np.load(path))
    whole = path.read_bytes()
    options = np.frombuffer(b'{"kind": "strings", "unknown": "row"}', np.uint8)
    assert arrays.keys() == {"options", "text", "lengths", "counts"}
    for change in [
        {"lengths": np.array([2, 2])},
        {"lengths": np.array([4, -1])},
        {"lengths": np.array([2**62] * 4 + [3])},
        {"lengths": np.array([[2, 1]])},
        {"lengths": np.array([2.0, 1.0])},
        {"text": np.frombuffer(b"\xff\xff\xff", np.uint8)},
        {"text": np.zeros(3, np.int32)},
        {"text": np.frombuffer(b"aaa", np.uint8), "lengths": np.array([1, 1, 1])},
        {"counts": np.array([1])},
        {"counts": np.array([0.5, 1])},
        {"options": options[1:]},
        {"options": np.frombuffer(b"[]", np.uint8)},
        {"options": np.frombuffer(b'{"kind": "x", "unknown": "row"}', np.uint8)},
        {"options": np.frombuffer(b'{"kind": "bytes", "unknown": 1}', np.uint8)},
        {"options": np.frombuffer(b'{"kind": "bytes", "unknown": []}', np.uint8)},
        {"more": options},
        {"ids": np.arange(2)},
    ]:
        np.savez(path, **{**arrays, **change})
        with pytest.raises(ValueError, match=r"ids\.npz holds no vocabulary of ids"):
            IdVocabulary.load(path)
    number = np.frombuffer(b'{"kind": "integers", "unknown": "row"}', np.uint8)
    for ids in (np.array([1, 1]), np.array([1.0]), np.array([[1]]), np.array([{}])):
        np.savez(path, options=number, ids=ids)
        with pytest.raises(ValueError, match="holds no vocabulary of ids"):
            IdVocabulary.load(path)
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="holds no vocabulary of ids"):
            IdVocabulary.load(path)
    jbag.text.Encoder(words=["a"]).save(path)
    with pytest.raises(ValueError, match="holds no vocabulary of ids"):
        IdVocabulary.load(path)
    with pytest.raises(FileNotFoundError):
        IdVocabulary.load(tmp_path / "none")


def test_neither_pandas_nor_pyarrow_is_imported():
    check = (
        "import sys; sys.modules['pandas'] = sys.modules['pyarrow'] = None; "
        "from jbag.data import IdVocabulary; IdVocabulary.fit(['a']).transform([None])"
    )
    subprocess.run([sys.executable, "-c", check], check=True)

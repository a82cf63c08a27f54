"""Columns of pandas and Arrow have the rows of the same lists."""

import numpy as np
import pytest

import jbag
from jbag.data import IdVocabulary

pandas = pytest.importorskip("pandas")
arrow = pytest.importorskip("pyarrow")

INTEGERS = [7, 3, None, 9, 5]
STRINGS = ["g", "c", None, "x", "e"]
BYTES = [b"g", b"c", None, b"x", b"e"]
LISTS = [[7, 3], None, [], [9, None, 5]]
PAIRS = [[7, 3], None, [9, 5]]
ROWS = [1, 2, 0, 0, 3]


def vocabulary(ids):
    kinds = {int: [3, 3, 5, 7, 7, 7], str: [*"ccegggg"], bytes: [b"g", b"c", b"e"]}
    return IdVocabulary.fit(kinds[type(ids[0])])


def chunked(ids, make=arrow.array):
    return arrow.chunked_array([make(ids[:2]), make(ids)[:0], make(ids[2:])])


def encoded(ids):
    return arrow.array(ids, arrow.dictionary(arrow.uint8(), arrow.array(ids).type))


@pytest.mark.parametrize(
    "make",
    [
        pandas.Series,
        lambda x: pandas.Series(x, dtype="Int64"),
        lambda x: pandas.Series(x, dtype="UInt8"),
        lambda x: pandas.Series(x, dtype="Float64"),
        lambda x: pandas.Series(x, dtype="float32"),
        lambda x: pandas.Series(x, dtype=object),
        lambda x: pandas.Series(x, dtype="category"),
        lambda x: pandas.Series(x, dtype="int64[pyarrow]"),
        lambda x: pandas.Series(x, index=[3, 1, 2, 2, 0]),
        pandas.Index,
        pandas.Categorical,
        lambda x: pandas.array(x, dtype="Int32"),
        arrow.array,
        lambda x: arrow.array(x, arrow.uint16()),
        lambda x: arrow.array(x, arrow.float64()),
        lambda x: arrow.array([1, *x, 2])[1:-1],
        encoded,
        chunked,
        lambda x: chunked(x, encoded),
    ],
)
def test_integers(make):
    assert vocabulary([7]).transform(make(INTEGERS)).tolist() == ROWS
    assert IdVocabulary.fit(make(INTEGERS)).ids.tolist() == [3, 5, 7, 9]


@pytest.mark.parametrize(
    "make",
    [
        pandas.Series,
        lambda x: pandas.Series(x, dtype=object),
        lambda x: pandas.Series(x, dtype="category"),
        pandas.Index,
        arrow.array,
        encoded,
        chunked,
        lambda x: chunked(x, encoded),
        lambda x: arrow.array([x[0], *x, x[1]])[1:-1],
    ],
)
@pytest.mark.parametrize("ids", [STRINGS, BYTES], ids=["strings", "bytes"])
def test_strings_and_bytes(ids, make):
    own = vocabulary(ids)
    assert own.transform(make(ids)).tolist() == [
        0 if x is None or x not in own.ids.tolist() else own.ids.tolist().index(x) + 1
        for x in ids
    ]
    assert IdVocabulary.fit(make(ids)) == IdVocabulary.fit(ids)


@pytest.mark.parametrize("kind", ["str", "string[python]", "string[pyarrow]"])
def test_strings_of_pandas(kind):
    column = pandas.Series(STRINGS, dtype=kind)
    assert vocabulary("g").transform(column).tolist() == ROWS
    column = pandas.Series(STRINGS, dtype=pandas.ArrowDtype(arrow.string()))
    assert vocabulary("g").transform(column).tolist() == ROWS


@pytest.mark.parametrize(
    "kind",
    [arrow.large_string(), arrow.string_view(), arrow.large_binary(), arrow.binary(1)],
    ids=str,
)
def test_strings_of_arrow(kind):
    ids = STRINGS if "string" in str(kind) else BYTES
    column = arrow.array(ids, kind)
    assert IdVocabulary.fit(column) == IdVocabulary.fit(ids)


@pytest.mark.parametrize(
    "make",
    [
        pandas.Series,
        lambda x: arrow.array(x).to_pandas(),
        lambda x: pandas.Series(x, dtype=pandas.ArrowDtype(arrow.list_(arrow.int64()))),
        arrow.array,
        lambda x: arrow.array(x, arrow.large_list(arrow.int32())),
        lambda x: arrow.array(x, arrow.list_view(arrow.int32())),
        lambda x: arrow.array([[1], *x, [2]])[1:-1],
        chunked,
        lambda x: arrow.array(x, arrow.list_(arrow.dictionary(arrow.int8(), "int64"))),
    ],
)
def test_lists(make):
    bags = vocabulary([7]).transform(make(LISTS))
    assert bags.to_lists() == [[1, 2], [], [], [0, 0, 3]]
    assert IdVocabulary.fit(make(LISTS)).ids.tolist() == [3, 5, 7, 9]


def test_lists_of_fixed_size_and_of_none():
    own = vocabulary([7])
    kind = arrow.list_(arrow.int64(), 2)
    assert own.transform(arrow.array(PAIRS, kind)).to_lists() == [[1, 2], [], [0, 3]]
    rest = arrow.array([[7, 7], *PAIRS], kind)[1:]
    assert own.transform(rest).to_lists() == [[1, 2], [], [0, 3]]
    assert own.transform(arrow.chunked_array([], kind)).num_bags == 0
    assert own.transform(arrow.chunked_array([], "int64")).shape == (0,)
    assert own.transform(arrow.nulls(2)).tolist() == [0, 0]
    words = arrow.array([["g"], ["x", "c"]])
    assert vocabulary("g").transform(words).to_lists() == [[1], [0, 2]]


def test_unused_categories_are_no_ids():
    column = pandas.Categorical(["b", "a", "b"], categories=["z", "b", "a"])
    assert IdVocabulary.fit(column).ids.tolist() == ["b", "a"]
    column = arrow.array(["b", "a", "b", "z"]).dictionary_encode()[:3]
    assert IdVocabulary.fit(column).ids.tolist() == ["b", "a"]
    twice = arrow.DictionaryArray.from_arrays([0, 1, 2], ["b", "a", "b"])
    assert IdVocabulary.fit(twice).counts.tolist() == [2, 1]
    nulls = arrow.DictionaryArray.from_arrays([0, 1, None], [5, None, 4])
    assert IdVocabulary([5, 4]).transform(nulls).tolist() == [1, 0, 0]
    assert IdVocabulary.fit(nulls).ids.tolist() == [5]
    twice = arrow.DictionaryArray.from_arrays([0, 1, 2], [5, 4, 5])
    assert IdVocabulary.fit(twice).counts.tolist() == [2, 1]
    assert IdVocabulary(pandas.Index(["b", "a"])).transform(["a"]).tolist() == [2]
    with pytest.raises(ValueError, match="distinct; got 'b' twice"):
        IdVocabulary(arrow.DictionaryArray.from_arrays([0, 1, 2], ["b", "a", "b"]))


def test_an_unknown_id_of_a_chunk_is_named():
    own = IdVocabulary([7, 3], unknown="error")
    with pytest.raises(IndexError, match="got 9 at position 3"):
        own.transform(chunked([7, 3, 3, 9]))
    with pytest.raises(IndexError, match="got a null at position 2"):
        own.transform(chunked([7, 3, None, 9]))
    with pytest.raises(IndexError, match="got 9 at position 0 of bag 3"):
        own.transform(chunked([[7], [], [3], [9, 7]]))
    with pytest.raises(IndexError, match="got 'x' at position 1"):
        IdVocabulary(["g"], unknown="error").transform(arrow.array(["g", "x"]))


@pytest.mark.parametrize(
    "column",
    [
        pandas.Series([True, False]),
        pandas.Series([True, None], dtype="boolean"),
        pandas.Series(pandas.to_datetime(["2024-01-01"])),
        pandas.Series(pandas.to_datetime(["2024-01-01"], utc=True)),
        pandas.Series(["a", 1], dtype=object),
        pandas.MultiIndex.from_tuples([(1, 2)]),
        pandas.DataFrame({"a": [1]}),
        arrow.array([True]),
        arrow.array([{"a": 1}]),
        arrow.array([{"a": 1, "b": 2}]),
        arrow.array([[("a", 1)]], arrow.map_(arrow.string(), arrow.int64())),
        arrow.array([1], arrow.timestamp("s")),
        arrow.table({"a": [1]}),
    ],
    ids=lambda x: str(getattr(x, "dtype", getattr(x, "type", type(x).__name__))),
)
def test_columns_of_other_types_are_errors(column):
    with pytest.raises(TypeError, match="`column` must"):
        IdVocabulary.fit(column)


def test_deeper_lists_are_errors():
    for column in (arrow.array([[[1]]]), arrow.array([[[1]]]).to_pandas()):
        with pytest.raises(ValueError, match="deeper lists"):
            IdVocabulary.fit(column)


def test_rows_of_columns_are_features_of_batches():
    column = chunked([[7, 3], None, [5]])
    bags = vocabulary([7]).transform(column)
    [batch] = jbag.data.batches(bags, np.arange(3), batch_size=3)
    assert batch.bags.to_lists() == [[1, 2], [], [3]]

"""Ids of every kind become the same two words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbag
from jbag.vocabulary import SplitIds, split_ids


def joined(words):
    high, low = (np.array(x).astype(object) for x in words)
    return np.asarray(high * 2**32 + low, object).tolist()


@pytest.mark.parametrize("ids", [
    np.array([0, -1, 2**62], np.int64),
    np.array([0, 2**64 - 1, 2**63], np.uint64),
    np.array([0, -1, -(2**31)], np.int32),
    np.array([0, 2**32 - 1], np.uint32),
    np.array([[3, -2], [5, 127]], np.int8),
    np.array([3, 65535], np.uint16),
    np.array([3, -4], ">i8"),
    [1, -1],
    [2**64 - 1, 2**63, 0],
    [[2**63, -1], [4, 5]],
    7,
    [],
])  # fmt: skip
def test_host_ids_are_split_without_64_bits(ids):
    words = split_ids(ids)
    assert all(x.dtype == np.uint32 and isinstance(x, np.ndarray) for x in words)
    flat = np.array(ids, object).ravel().tolist()
    found = np.array(joined(words), object).ravel().tolist()
    assert found == [int(x) % 2**64 for x in flat]
    assert words.shape == np.shape(ids)


def test_device_ids_extend_to_64_bits():
    for dtype, values in [
        ("int32", [-1, 5]),
        ("uint32", [2**32 - 1, 5]),
        ("int8", [-2]),
    ]:
        ids = jnp.array(values, dtype)
        for words in (split_ids(ids), jax.jit(split_ids)(ids)):
            assert all(x.dtype == jnp.uint32 for x in words)
            assert joined(words) == [x % 2**64 for x in values]


@pytest.mark.usefixtures("x64")
def test_64_bit_device_ids_are_split():
    for dtype in ("int64", "uint64"):
        ids = jnp.array([3, 2**40 + 1], dtype)
        assert joined(jax.jit(split_ids)(ids)) == [3, 2**40 + 1]
    assert joined(split_ids(jnp.array([-1]))) == [2**64 - 1]


def test_split_ids_stay():
    words = SplitIds(np.uint32([1]), np.uint32([2]))
    assert split_ids(words) == words
    assert joined(jax.jit(split_ids)(words)) == [2**32 + 2]


def test_strings_are_hashed():
    names = ["a", "foobar"]
    expected = jbag.text.hash_strings(names).tolist()
    for strings in (names, np.array(names), np.array(names, object), (b"a", b"foobar")):
        assert joined(split_ids(strings)) == expected
    vocabulary = jbag.vocabulary.Vocabulary(50)
    rows, state = vocabulary.assign(vocabulary.init(), names, 0)
    assert vocabulary.lookup(state, ["foobar", "a"]).tolist() == rows.tolist()[::-1]


def test_bad_ids_raise():
    for ids in (np.ones(2), [1.5], [True], None, "abc", [None], {1: 2}):
        with pytest.raises(TypeError):
            split_ids(ids)
    with pytest.raises(OverflowError):
        split_ids([2**64])
    with pytest.raises(TypeError, match="uint32"):
        split_ids(SplitIds(np.zeros(2, np.int64), np.zeros(2, np.int64)))
    with pytest.raises(ValueError, match="equal shapes"):
        split_ids(SplitIds(np.zeros(2, np.uint32), np.zeros(3, np.uint32)))

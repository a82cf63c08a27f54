"""Strings have the FNV-1a hashes of their bytes, by every implementation."""

import random

import numpy as np
import pytest

from jbag.text import hash_strings
from jbag.text._tokenizer_choice import TOKENIZERS

STRINGS = ["", "a", "foobar", "é", "日本語", "😀", "\udc80", "x" * 1000, "a\0b", "\0a"]


@pytest.fixture(params=list(TOKENIZERS))
def implementation(request):
    missing = TOKENIZERS[request.param].MISSING
    if missing:
        pytest.skip(f"{request.param}: {missing}")
    return request.param


def fnv1a(data):
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def encode(x):
    return x if isinstance(x, bytes) else x.encode("utf-8", "surrogatepass")


def test_strings_have_the_published_hashes(implementation):
    published = {"": 0xCBF29CE484222325, "a": 0xAF63DC4C8601EC8C}
    published["foobar"] = 0x85944171F73967E8
    hashes = hash_strings([*published], implementation=implementation)
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == [*published.values()]


def test_every_kind_of_string_has_the_hash_of_its_bytes(implementation):
    rng = random.Random(0)
    points = [*range(1, 300), 0x7FF, 0x800, 0xD800, 0xFFFF, 0x10000, 0x10FFFF]
    lengths = [rng.randrange(20) for _ in range(99)]
    texts = ["".join(map(chr, rng.choices(points, k=k))) for k in lengths]
    strings = [*STRINGS, *texts]
    encoded = [*map(encode, strings)]
    expected = [*map(fnv1a, encoded)]
    fixed_width = [np.array(x) for x in (strings, encoded)]
    fixed_width += [np.array(strings).astype(">U1000"), np.array(strings)[:, None]]
    for given in (
        strings,
        encoded,
        tuple(strings),
        np.array(strings, object),
        *fixed_width,
    ):
        hashes = hash_strings(given, implementation=implementation)
        assert hashes.shape == np.shape(given)
        assert hashes.ravel().tolist() == expected


def test_variable_width_and_strided_arrays_are_hashed(implementation):
    valid = [x for x in STRINGS if x != "\udc80"]
    given = np.array(valid, np.dtypes.StringDType())
    hashes = hash_strings(given, implementation=implementation)
    assert hashes.tolist() == [fnv1a(encode(x)) for x in valid]
    every_second = np.array(STRINGS)[::2]
    hashes = hash_strings(every_second, implementation=implementation)
    assert hashes.tolist() == [fnv1a(encode(x)) for x in STRINGS[::2]]


def test_no_strings_have_no_hashes(implementation):
    for given in ([], np.zeros((0, 2), "U3"), np.zeros(0, "S1"), np.array(["", ""])):
        hashes = hash_strings(given, implementation=implementation)
        assert hashes.shape == np.shape(given)
        assert hashes.dtype == np.uint64


def test_other_things_raise(implementation):
    for given in (
        "abc",
        5,
        None,
        [1],
        ["a", None],
        np.array([1.5], object),
        [["a"], []],
    ):
        with pytest.raises(TypeError):
            hash_strings(given, implementation=implementation)
    with pytest.raises(ValueError, match="implementation"):
        hash_strings(["a"], implementation="c")

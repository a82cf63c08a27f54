"""Histories of users before events, against a loop over pairs of events."""

import datetime

import numpy as np
import pytest

import jbag
from jbag.data import _histories as module
from jbag.data import histories


def loop(users, items, times, length, gap=0, targets=None):
    """Return the histories as lists, pair of events by pair of events."""
    times = range(len(users)) if times is None else times
    out = []
    for i, (user, time) in enumerate(zip(users, times, strict=True)):
        if targets is not None and not targets[i]:
            continue
        before = [
            j
            for j in range(len(users))
            if users[j] == user and times[j] < time and times[j] <= time - gap
        ]
        before.sort(key=lambda j: times[j])  # stable: equal times keep their order
        out.append([int(items[j]) for j in before[-length:]])
    return out


@pytest.mark.parametrize("seed", range(40))
def test_histories_are_those_of_a_loop(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(module, "_SLOTS", int(rng.choice([1, 5, 1 << 20])))
    size = int(rng.choice([0, 1, 2, 30, 60]))
    users = rng.integers(-3, int(rng.choice([-2, 0, 20])), size)
    items = rng.integers(0, 1000, size)
    dtype = [np.int64, np.uint8, np.float32, np.int16, np.float64][seed % 5]
    times = rng.integers(0, int(rng.choice([1, 6, 100])), size).astype(dtype)
    times = np.sort(times) if seed % 3 == 0 else times
    length = int(rng.choice([1, 2, 5, 100]))
    targets = rng.random(size) < 0.5 if rng.random() < 0.5 else None
    gap = [0, 1, 3, 300][seed % 4]
    plain = times.tolist()
    found = histories(users, items, times, length=length, targets=targets)
    assert found.to_lists() == loop(users, items, plain, length, 0, targets)
    assert found.indices.dtype == found.offsets.dtype == np.int32
    found = histories(users, items, times, length=length, gap=gap, targets=targets)
    assert found.to_lists() == loop(users, items, plain, length, gap, targets)
    found = histories(users, items, length=length, targets=targets)
    assert found.to_lists() == loop(users, items, None, length, 0, targets)


def test_events_at_equal_times_do_not_see_each_other():
    times = [2, 1, 2, 1, 3]
    bags = histories([7] * 5, [10, 11, 12, 13, 14], times, length=3)
    assert bags.to_lists() == [[11, 13], [], [11, 13], [], [13, 10, 12]]


@pytest.mark.parametrize(
    "users",
    [
        ["b", "a", "b", "b"],
        [b"b", b"a", b"b", b"b"],
        np.array(["b", "a", "b", "b"]),
        np.array([2**64 - 1, 0, 2**64 - 1, 2**64 - 1], np.uint64),
    ],
    ids=["list", "bytes", "numpy", "uint64"],
)
def test_users_are_of_any_kind_of_id(users):
    assert histories(users, [1, 2, 3, 4], length=9).to_lists() == [[], [], [1], [1, 3]]


def test_times_are_datetimes_and_gaps_are_durations():
    days = np.array(["2024-02-01", "2024-02-02", "2024-02-03"], "M8[D]")
    users, items = [5, 5, 5], [1, 2, 3]

    def found(gap):
        return histories(users, items, days, length=5, gap=gap).to_lists()

    assert found(None) == [[], [1], [1, 2]]
    day = np.timedelta64(24, "h")
    assert found(day) == found(datetime.timedelta(days=1)) == found(None)
    assert found(day + np.timedelta64(1, "ns")) == [[], [], [1]]
    with pytest.raises(TypeError, match="unit that converts"):
        found(np.timedelta64(1, "M"))
    with pytest.raises(TypeError, match="`gap` must be a timedelta64"):
        found(1)
    for gap in (np.timedelta64("NaT", "D"), np.timedelta64(-1, "D")):
        with pytest.raises(ValueError, match="`gap` must be at least 0"):
            found(gap)
    far = np.array(["9000-01-01"], "M8[D]")
    with pytest.raises(ValueError, match="must fit in one unit"):
        histories([1], [1], far, length=1, gap=np.timedelta64(1, "ns"))
    near = np.array(["2024-01-01"], "M8[ns]")
    with pytest.raises(ValueError, match="must fit in one unit"):
        histories([1], [1], near, length=1, gap=np.timedelta64(10**6, "D"))


def test_differences_of_times_do_not_overflow():
    limits = np.iinfo(np.int64)
    times = np.array([limits.min, -1, limits.max])
    users, items = [1, 1, 1], [1, 2, 3]
    for gap in (2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1, 2**64, 2**70):
        found = histories(users, items, times, length=5, gap=gap).to_lists()
        assert found == loop(users, items, times.tolist(), 5, gap), gap


def test_positions_as_items_gather_other_columns():
    users, times = np.array([1, 2, 1, 1]), np.array([4, 3, 2, 1])
    ratings = np.array([0.5, 1.5, 2.5, 3.5], np.float32)
    bags = histories(users, np.arange(4), times, length=2)
    assert ratings[bags.indices].tolist() == [3.5, 2.5, 3.5]
    padded = bags.to_padded(2)
    assert padded.ids.tolist() == [[3, 2], [0, 0], [3, 0], [0, 0]]
    assert padded.mask.tolist() == [[1, 1], [0, 0], [1, 0], [0, 0]]


def test_histories_are_a_feature_of_batches():
    bags = histories([1, 1, 1], [4, 5, 6], length=2)
    [batch] = jbag.data.batches(bags, np.arange(3), batch_size=3)
    assert batch.bags.to_lists() == [[], [4], [4, 5]]


def test_columns_of_pandas_and_arrow_are_users():
    pandas, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    lists = ["b", "a", "b"]
    chunks = arrow.chunked_array([lists[:1], lists[1:]])
    times = pandas.Series(
        pandas.to_datetime(["2024-01-02", "2024-01-01", "2024-01-03"])
    )
    for users in (pandas.Series(lists), pandas.Categorical(lists), chunks):
        gap = pandas.Timedelta(days=1)
        bags = histories(users, pandas.Series([1, 2, 3]), times, length=2, gap=gap)
        assert bags.to_lists() == [[], [], [1]]


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "`length`", {"length": 1.5}),
        (ValueError, "`length` must be at least 1", {"length": 0}),
        (ValueError, "no nulls; got one at position 1", {"users": [1, None, 2]}),
        (ValueError, "`users` must be one id", {"users": [[1], [2], [3]]}),
        (ValueError, "`users` must be one id", {"users": np.ones((3, 1), int)}),
        (TypeError, "`users`", {"users": 3}),
        (TypeError, "`items` must hold integers", {"items": [1.5, 2, 3]}),
        (ValueError, "one item per event", {"items": [1, 2]}),
        (IndexError, "fit in int32; got 4294967296", {"items": [1, 2**32, 3]}),
        (ValueError, "one time per event", {"times": [1, 2]}),
        (TypeError, "`times` must be", {"times": ["1", "2", "3"]}),
        (TypeError, "`times` must be", {"times": [True, True, False]}),
        (ValueError, "finite; got nan at position 2", {"times": [1, 2, np.nan]}),
        (
            ValueError,
            "finite; got NaT at position 0",
            {"times": np.array(["NaT", "2024", "2025"], "M8[s]")},
        ),
        (TypeError, "`gap` must be an integer", {"gap": 0.5}),
        (TypeError, "`gap` must be a number", {"gap": "1", "times": [1.0, 2.0, 3.0]}),
        (ValueError, "`gap` must be at least 0", {"gap": -1}),
        (ValueError, "`gap` must be None without", {"gap": 1, "times": None}),
        (TypeError, "`targets` must be boolean", {"targets": [0, 1, 1]}),
        (ValueError, "`targets` must have the length", {"targets": [True]}),
    ],
)
def test_wrong_arguments_are_errors(error, match, change):
    arguments = {"users": [1, 1, 1], "items": [1, 2, 3], "times": [1, 2, 3]}
    with pytest.raises(error, match=match):
        histories(**{**arguments, "length": 2, **change})


def test_too_many_slots_are_an_error(monkeypatch):
    monkeypatch.setattr(module, "_MAX_SLOTS", 2)
    with pytest.raises(ValueError, match="Pass fewer `targets` per call"):
        histories([1, 1, 1], [1, 2, 3], length=2)

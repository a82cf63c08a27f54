"""`histories`: the last items of a user before each event."""

from __future__ import annotations

import datetime
import itertools
from collections import defaultdict
from typing import Any

import numpy as np
from jaxtyping import Int

from jbag._validation import check_integer, check_integers, to_index_dtype
from jbag.data._id_column import join_integers
from jbag.data._read_column import read_column
from jbag.ragged._bags import Bags

_MAX_SLOTS = np.iinfo(np.int32).max
_SLOTS = 1 << 18  # slots whose positions are in memory, and in the cache, at a time


def histories(
    users: Any,
    items: Any,
    times: Any = None,
    *,
    length: int,
    gap: Any = None,
    targets: Any = None,
) -> Bags:
    r"""Return the last L items of the same user before each event.

    The history of event i has the items of the events j with

    .. math:: u_j = u_i, \quad t_j < t_i, \quad t_j \le t_i - \mathrm{gap}

    in order of time, the oldest first, and cut to the last L. So it has nothing that
    was unknown at the time of the event: events at equal times are not in each other's
    histories. Within a history, items of equal times are in the order of the arrays.

    `Bags.to_padded` returns histories as ids [n, L] and a mask. For other columns of
    the events, such as ratings, pass `np.arange(n)` as the items: the histories are
    then positions in those columns.

    Args:
      users: n ids of users, as for `IdVocabulary`: integers, strings or bytes.
      items: [n] integers: rows of a table, or ids in int32.
      times: [n] integers, floats or `datetime64`, in any order. None: the events are in
        order of time, at different times.
      length: L, the maximum length of a history.
      gap: the minimum age of an item in a history, in the unit of `times`; a
        `timedelta64` for `datetime64`. None: any age above 0.
      targets: [n] booleans: the events whose histories are returned. The items of all
        events are in histories. None: all events. The memory is that of the events and
        of the returned slots, so histories of large data can be made in parts.

    Returns:
      `Bags` of n histories, or of one per target, in the order of the events.

    Raises:
      IndexError: an item does not fit in int32 (int64 if JAX has 64 bits enabled).
      TypeError: an argument has a wrong type.
      ValueError: shapes differ, a user is null, a time is NaN, NaT or infinite, an
        option is out of range, or there are 2**31 slots or more.

    Example:
      >>> users = ["ann", "bob", "ann", "ann", "bob"]
      >>> items, days = [3, 8, 4, 5, 9], [1, 1, 2, 2, 3]
      >>> jbag.data.histories(users, items, days, length=2).to_lists()
      [[], [], [3], [3], [8]]
      >>> last = np.array([False, False, False, True, True])
      >>> bags = jbag.data.histories(users, items, length=2, targets=last)
      >>> bags.to_padded(2).ids
      array([[3, 4],
             [8, 0]], dtype=int32)
    """
    groups = _check_users(users)
    size = groups.size
    items = _check_items(items, size)
    length = check_integer("length", length, low=1)
    times, gap = _check_times(times, gap, size)
    wanted = _check_targets(targets, size)

    if times is None or (times[1:] >= times[:-1]).all():
        order = np.argsort(groups, kind="stable")
    else:
        order = np.lexsort((times, groups))
    groups = groups[order]
    ends = np.arange(size) if times is None else _ends(groups, times[order], gap)
    starts = _firsts(groups[1:] != groups[:-1], size)
    starts = np.maximum(starts, ends - length)
    if wanted is None:
        wanted = np.arange(size)
    sorted_at = np.empty(size, np.int64)
    sorted_at[order] = np.arange(size)
    at = sorted_at[wanted]
    return _gather(items[order], starts[at], ends[at])


def _ends(
    groups: Int[np.ndarray, " n"], times: Int[np.ndarray, " n"], gap: Any
) -> Int[np.ndarray, " n"]:
    """Return the position after the last event that each event may know.

    Events are sorted by group and time.
    """
    size = groups.size
    same = (groups[1:] == groups[:-1]) & (times[1:] == times[:-1])
    ends = _firsts(~same, size)
    if gap is None:
        return ends
    # Sort the events and the latest times they may know together; an event at that
    # very time comes first.
    known = np.ones(size, bool)
    if times.dtype == np.uint64:
        known = times >= gap
        gap = min(gap, int(times.max(initial=0)))
        latest = times - np.minimum(times, np.uint64(gap))
    else:
        latest = times - gap
    both = np.lexsort(
        (
            np.repeat([0, 1], size),
            np.concatenate([times, latest]),
            np.concatenate([groups, groups]),
        )
    )
    is_event = both < size
    before = np.cumsum(is_event)
    known_ends = np.empty(size, np.int64)
    known_ends[both[~is_event] - size] = before[~is_event]
    return np.where(known, np.minimum(ends, known_ends), 0)


def _firsts(changes: np.ndarray, size: int) -> Int[np.ndarray, " n"]:
    """Return the start of the run of each position; `changes` [n - 1] start runs."""
    firsts = np.zeros(size, np.int64)
    firsts[1:] = np.where(changes, np.arange(1, max(1, size)), 0)
    return np.maximum.accumulate(firsts)


def _gather(items: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Bags:
    lengths = np.maximum(ends - starts, 0)
    offsets = np.append(0, np.cumsum(lengths))
    if offsets[-1] > _MAX_SLOTS:
        raise ValueError(
            f"the histories must have fewer than 2**31 slots; got {offsets[-1]}. "
            "Pass fewer `targets` per call."
        )
    out = np.empty(offsets[-1], items.dtype)
    first = 0
    while first < lengths.size:
        # The bags that end within the slots of one step; at least one.
        limit = offsets[first] + _SLOTS
        last = max(first + 1, int(np.searchsorted(offsets, limit, side="right")) - 1)
        own = lengths[first:last]
        shifts = starts[first:last] - offsets[first:last]
        slots = np.repeat(shifts, own)
        slots += np.arange(offsets[first], offsets[last])
        np.take(items, slots, out=out[offsets[first] : offsets[last]], mode="clip")
        first = last
    return Bags(out, offsets.astype(np.int32))


def _check_users(users: Any) -> Int[np.ndarray, " n"]:
    """Return a number per event, equal for events of one user."""
    groups: list[np.ndarray] = []
    numbers: defaultdict[Any, int] = defaultdict(itertools.count().__next__)
    for part in read_column("users", users):
        if part.lengths is not None or len(part.shape) != 1:
            raise ValueError("`users` must be one id per event, [n]; got lists.")
        own = part.values
        if not isinstance(own, np.ndarray):
            own = np.fromiter(map(numbers.__getitem__, own), np.int64, len(own))
        rows = part.spread(np.arange(len(own)))
        if (rows < 0).any():
            raise ValueError(
                f"`users` must hold no nulls; got one at position {np.argmax(rows < 0)}"
                f"{' of a chunk' if groups else ''}."
            )
        groups.append(own[rows])
    return join_integers(groups)


def _check_items(items: Any, size: int) -> np.ndarray:
    ids = np.asarray(check_integers("items", items))
    if ids.shape != (size,):
        raise ValueError(
            f"`items` must have one item per event, ({size},); got shape {ids.shape}."
        )
    narrow = np.asarray(to_index_dtype(ids))
    if narrow.dtype != ids.dtype and not np.array_equal(narrow, ids):
        at = int(np.argmax(narrow != ids))
        raise IndexError(
            f"`items` must fit in {narrow.dtype}; got {ids[at]} at position {at}."
        )
    return narrow


def _check_times(times: Any, gap: Any, size: int) -> tuple[np.ndarray | None, Any]:
    """Return times and the gap, as uint64 above the first time, or as floats."""
    if times is None:
        if gap is not None:
            raise ValueError(f"`gap` must be None without `times`; got {gap!r}.")
        return None, None
    times = np.asarray(times)
    if times.shape != (size,):
        raise ValueError(
            f"`times` must have one time per event, ({size},); got shape {times.shape}."
        )
    if times.dtype.kind not in "iufM":
        raise TypeError(
            "`times` must be integers, floats or datetime64 without a time zone; "
            f"got {times.dtype}."
        )
    finite = np.isfinite(times)
    if not finite.all():
        at = int(np.argmin(finite))
        raise ValueError(f"`times` must be finite; got {times[at]} at position {at}.")
    if times.dtype.kind == "M":
        if gap is not None:
            times, gap = _to_one_unit(times, gap)
        times = times.astype(np.int64)
    elif gap is not None and times.dtype.kind == "f":
        if not isinstance(gap, int | float | np.number) or isinstance(gap, bool):
            raise TypeError(f"`gap` must be a number; got {gap!r}.")
        gap = float(gap)
    elif gap is not None:
        gap = check_integer("gap", gap)
    if gap is not None and not gap >= 0:
        raise ValueError(f"`gap` must be at least 0; got {gap!r}.")
    if times.dtype.kind == "f":
        return times.astype(np.float64), gap
    # Relative to the first time, so that no difference overflows.
    if times.dtype.kind == "i":
        low = np.int64(times.min(initial=0))
        times = times.astype(np.int64).view(np.uint64) - low.view(np.uint64)
    times = times.astype(np.uint64, copy=False)
    return times, gap


def _to_one_unit(times: np.ndarray, gap: Any) -> tuple[np.ndarray, int]:
    """Return datetimes in a unit that also the gap has, and the gap in it."""
    if hasattr(gap, "to_timedelta64"):  # of pandas
        gap = gap.to_timedelta64()
    elif isinstance(gap, datetime.timedelta):
        gap = np.timedelta64(gap)
    if not isinstance(gap, np.timedelta64) or np.datetime_data(gap)[0] == "generic":
        raise TypeError(
            f"`gap` must be a timedelta64, as `times` are datetime64; got {gap!r}."
        )
    try:
        unit = np.promote_types(times.dtype.str.replace("M8", "m8"), gap.dtype)
    except TypeError as error:  # a month has no number of days
        raise TypeError(
            f"`gap` must have a unit that converts to that of `times`, {times.dtype}; "
            f"got {gap!r}."
        ) from error
    if np.isnat(gap):
        raise ValueError("`gap` must be at least 0; got NaT.")
    try:
        converted, age = times.astype(unit.str.replace("m8", "M8")), gap.astype(unit)
        # Before NumPy 2.5, what does not fit wraps without an error.
        fits = np.array_equal(converted.astype(times.dtype), times)
        fits = fits and age.astype(gap.dtype) == gap
    except OverflowError:
        fits = False
    if not fits:
        raise ValueError(
            f"`times` and `gap` must fit in one unit, {unit}; got times in "
            f"{times.dtype}, and {gap!r}."
        )
    return converted, int(age.astype(np.int64))


def _check_targets(targets: Any, size: int) -> np.ndarray | None:
    """Return the positions of the targets."""
    if targets is None:
        return None
    targets = np.asarray(targets)
    if targets.dtype != bool:
        raise TypeError(f"`targets` must be boolean; got {targets.dtype}.")
    if targets.shape != (size,):
        raise ValueError(
            f"`targets` must have the length of `users`, ({size},); "
            f"got shape {targets.shape}."
        )
    return np.flatnonzero(targets)

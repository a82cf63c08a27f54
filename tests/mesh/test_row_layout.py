"""Where rows lie: layouts and lanes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbag._mesh.row_layout import GRID, Lanes, place
from jbag.ragged._csr_arrays import OUT_OF_RANGE_ID
from jbag.sharding import Layout

SIZES = [(1, 1), (10, 1), (10, 4), (12, 4), (3, 7), (30_000, GRID), (7, GRID)]
SIZES += [(400_000, 322_560), (0, 4), (1000, 1 << 20)]


@pytest.mark.parametrize(("size", "grid"), SIZES)
def test_each_row_has_a_place_of_its_own(size, grid):
    layout, ids = Layout(size, grid), np.arange(size)
    rows = layout.place(ids)
    assert layout.num_rows % grid == 0
    assert size <= layout.num_rows < size + grid
    assert np.unique(rows).size == size
    assert ((rows >= 0) & (rows < layout.num_rows)).all()
    np.testing.assert_array_equal(layout.find(rows), ids)
    every = layout.find(np.arange(layout.num_rows))
    np.testing.assert_array_equal(np.sort(every), np.arange(layout.num_rows))
    assert (every >= size).sum() == layout.num_rows - size
    on_device = jax.jit(layout.place)(jnp.asarray(ids, jnp.int32))
    assert on_device.dtype == jnp.int32
    np.testing.assert_array_equal(on_device, rows)
    back = jax.jit(layout.find)(jnp.arange(layout.num_rows, dtype=jnp.int32))
    np.testing.assert_array_equal(back, every)


@pytest.mark.parametrize("grid", [GRID, 322_560, 1])
def test_the_largest_ids_fit_in_32_bits(grid):
    size = 2**31 - 2 * grid
    layout = Layout(size, grid)
    rng = np.random.default_rng(0)
    ids = [0, size - 1, size - grid, *rng.integers(0, size, 500).tolist()]
    height = -(-size // grid)
    rows = [i % grid * layout.multiplier % grid * height + i // grid for i in ids]
    assert max(rows) < layout.num_rows < 2**31
    for numpy in (np, jnp):
        some = numpy.asarray(ids, numpy.int32)
        placed = layout.place(some)
        assert placed.dtype == np.int32
        np.testing.assert_array_equal(placed, rows)
        np.testing.assert_array_equal(layout.find(placed), ids)


@pytest.mark.parametrize("numpy", [np, jnp])
@pytest.mark.parametrize("grid", [1, 4, 12, GRID])
def test_arrays_go_there_and_back(numpy, grid):
    layout = Layout(10, grid)
    rows = numpy.asarray(np.random.default_rng(0).normal(size=(10, 3)), np.float32)
    physical = layout.to_physical(rows, fill=7)
    assert type(physical) is type(rows)
    assert physical.shape == (layout.num_rows, 3)
    assert physical.dtype == rows.dtype
    np.testing.assert_array_equal(physical[layout.place(np.arange(10))], rows)
    assert (np.asarray(physical) == 7).all(1).sum() == layout.num_rows - 10
    logical = layout.to_logical(physical)
    assert type(logical) is type(rows)
    np.testing.assert_array_equal(logical, rows)
    # States of one number a row, too.
    narrow = layout.to_physical(rows[:, 0])
    np.testing.assert_array_equal(layout.to_logical(narrow), rows[:, 0])


@pytest.mark.parametrize("grid", [1, 2, 3, 4, 12, 61, 20160, 322_560, 1 << 20])
def test_the_multiplier_is_near_the_golden_section_and_coprime(grid):
    multiplier = Layout(10, grid).multiplier
    assert np.gcd(multiplier, grid) == 1
    if grid > 12:
        assert 0 <= multiplier - grid / 1.6180339887 < 20


def test_the_grid_can_be_cut_in_many_ways():
    for owners in (*range(1, 11), 12, 14, 15, 16, 18, 20, 21, 24, 28, 30, 32, 64):
        assert GRID % owners == 0


V, DRAWS = 1_000_000, 4096
OWNERS = (2, 3, 4, 6, 7, 8, 12, 16, 32, 64)


def loads(layout, exponent):
    """Return the load of the fullest owner over the mean, by the number of owners.

    A load is the number of distinct ids that an owner is asked for, when so many are
    drawn by Zipf's law from a vocabulary sorted by frequency. It is the expected one,
    so that nothing hangs on the draws.
    """
    frequency = np.arange(1, V + 1) ** -exponent
    drawn = -np.expm1(DRAWS * np.log1p(-frequency / frequency.sum()))
    rows = layout.place(np.arange(V))
    out = {}
    for owners in OWNERS:
        if layout.num_rows % owners:
            continue
        shard = layout.num_rows // owners
        own = np.bincount(rows // shard, drawn, minlength=owners)
        out[owners] = own.max() / own.mean()
    return out


@pytest.mark.parametrize("exponent", [1.0, 1.2])
def test_frequent_rows_are_spread_evenly(exponent):
    dealt = loads(Layout(V), exponent)
    assert tuple(dealt) == OWNERS
    assert max(dealt.values()) < 1.15
    in_order = loads(Layout(V, grid=1), exponent)
    assert in_order[8] > 2


def test_draws_are_spread_evenly_too():
    rng = np.random.default_rng(0)
    frequency = np.arange(1, V + 1) ** -1.1
    cumulative = np.cumsum(frequency / frequency.sum())
    rows = Layout(V).place(np.unique(np.searchsorted(cumulative, rng.random(1 << 17))))
    for owners in OWNERS:
        own = np.bincount(rows // (Layout(V).num_rows // owners), minlength=owners)
        # Beyond what is expected, there is the noise of counting.
        assert own.max() / own.mean() < 1.06 + 4 / np.sqrt(own.mean())


def test_lanes_hold_whole_tables_that_do_not_overlap():
    sizes = (5, 100, 30, 1, 30, 64, 7)
    lanes = Lanes(sizes, num_lanes=3)
    taken = np.zeros(lanes.num_rows, int)
    for table, size in enumerate(sizes):
        start = lanes.start(table)
        taken[start : start + size] += 1
        lane = lanes.lanes[table]
        assert lane * lanes.length <= start
        assert start + size <= (lane + 1) * lanes.length
    assert taken.max() == 1
    assert taken.sum() == sum(sizes)
    # The largest first, each to the emptiest lane: no lane can do with less than 100.
    assert lanes.length == 100
    assert lanes.num_rows == 300


def test_lanes_may_outnumber_tables():
    lanes = Lanes((4, 9), num_lanes=5)
    assert lanes.length == 9
    assert len(set(lanes.lanes)) == 2


@pytest.mark.parametrize("layout", [Layout(30, 4), Layout(30, 1), Lanes((10, 20), 4)])
def test_ids_of_no_row_have_no_place(layout):
    ids = jnp.array([-1, 0, 5, 9, 10, 2**31 - 1, -(2**31)])
    first, second = place(layout, 0, 0, 10, ids), place(layout, 1, 10, 20, ids)
    known = np.array([False, True, True, True, False, False, False])
    np.testing.assert_array_equal(np.asarray(first) != OUT_OF_RANGE_ID, known)
    known[4] = True  # the second table has 20 rows
    np.testing.assert_array_equal(np.asarray(second) != OUT_OF_RANGE_ID, known)
    both = np.r_[np.asarray(first)[1:4], np.asarray(second)[1:5]]
    assert np.unique(both).size == both.size


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((-1,), ValueError, "`num_embeddings` must be at least 0; got -1"),
        ((1.5,), TypeError, "`num_embeddings` must be an integer; got 1.5"),
        ((3, 0), ValueError, r"`grid` must be in \[1, 1048577\); got 0"),
        ((3, 1 << 21), ValueError, r"`grid` must be in \[1, 1048577\); got 2097152"),
        ((3, None), TypeError, "`grid` must be an integer; got None"),
    ],
)
def test_a_layout_that_cannot_be_meant_is_named(args, error, message):
    with pytest.raises(error, match=message):
        Layout(*args)

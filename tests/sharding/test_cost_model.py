"""The bytes and the memory that plans say."""

import dataclasses

import numpy as np
import pytest
from plans import P, Table, plan_one, totals

import jbag
from jbag._mesh.strategies import TableWise
from jbag.sharding._feature_loads import Load
from jbag.sharding._planner import plan


def test_replicated_tables_send_their_gradient():
    # Of 10 features, no 4 columns are alike, and buckets would be as large as the bags.
    found = plan_one(Table(100, 10), Load("t", 16), batch_size=64)
    assert found.strategy == "data_parallel"
    assert found.spec == P()
    assert found.forward_bytes == 0
    assert found.backward_bytes == 3 * 16 * (4 * 10 + 4)
    # Its rows fill the grid, with a number of state each.
    table, received = 20160 * (40 + 4), 4 * 16 * 44
    assert found.memory_bytes == table + 2 * received + 3 * 16 * 40


def test_rows_are_sent_in_buckets_both_ways():
    found = plan_one(Table(10**6, 10), Load("t", 400), memory=20 * 10**6)
    assert found.strategy == "row_wise"
    assert found.spec == P("x", None)
    # 400 / 4 + 6 * 10 + 8 = 168, a multiple of 8.
    assert found.forward_bytes == 3 * 168 * (4 + 40)
    assert found.backward_bytes == 3 * 168 * (4 + 40)
    table, received = 50 * 20160 * (40 + 4) // 4, 4 * 168 * (44 + 44)
    assert found.memory_bytes == table + 2 * received + 3 * 400 * 40


def test_columns_get_all_ids_and_send_pooled_pieces():
    found = plan_one(Table(20160, 128), Load("t", 1000), Load("t", 24), optimizer="sgd")
    assert found.strategy == "column_wise"
    assert found.spec == P(None, "x")
    # Two features of 64 bags, of whose 128 features a device has 32.
    assert found.forward_bytes == 3 * (1024 * 4 + 2 * 65 * 4 + 2 * 64 * 32 * 4)
    assert found.backward_bytes == 3 * 2 * 64 * 32 * 4
    received = found.forward_bytes // 3 + found.backward_bytes // 3
    held = 20160 * 32 * 4 + 2 * 4 * received + 3 * 4096 * 32 * 4
    assert found.memory_bytes == held


def test_columns_sum_squares_for_a_state_of_one_number_a_row():
    loads = Load("t", 1000), Load("t", 24)
    plain = plan_one(Table(20160, 128), *loads, optimizer="sgd")
    found = plan_one(Table(20160, 128), *loads, optimizer="rowwise_adagrad")
    assert (plain.strategy, found.strategy) == ("column_wise", "column_wise")
    # 4 * 1024 rows may be named; an all-reduce sends all but a quarter of them twice.
    squares = 2 * 3 * 4096 * 4 // 4
    assert found.backward_bytes == plain.backward_bytes + squares
    # Each device has the whole of that state, as it has of all rows a part.
    state = 20160 * 4 + 2 * 4 * squares // 3
    assert found.memory_bytes == plain.memory_bytes + state


def test_whole_tables_get_their_ids_and_send_pooled_rows():
    tables = {f"t{i}": Table(1000 - i, 16) for i in range(6)}
    loads = {k: Load(k, slots=80 if k == "t1" else 64) for k in tables}
    found = plan(tables, loads, num_devices=4, batch_size=256, memory=10**9)
    assert {table.strategy for table in found.tables} == {"table_wise"}
    assert {table.spec for table in found.tables} == {TableWise("x", lanes=4)}
    # The largest first, each to the device that has the least.
    assert [table.device for table in found.tables] == [0, 1, 2, 3, 3, 2]
    # Two devices have two tables; one has most slots of all, 2 * 64.
    forward = 3 * (128 * 4 + 2 * 64 * 4 + 2 * 64 * 16 * 4)
    backward = 3 * 2 * 64 * 16 * 4
    table, named = (997 + 996) * (64 + 4), 4 * 128
    held = table + 2 * 4 * (forward + backward) // 3 + 3 * named * 64
    assert totals(found) == [forward, backward, held]
    # What is the same of all is shared evenly.
    assert found.tables[0].backward_bytes == backward // 6


def test_weights_go_with_the_ids():
    whole = {f"t{i}": Table(1000, 16) for i in range(4)}
    for tables, strategy in (
        ({"t0": Table(100, 10)}, "data_parallel"),
        ({"t0": Table(20160, 128)}, "column_wise"),
        (whole, "table_wise"),
    ):
        sent = []
        for weighted in (False, True):
            loads = {k: Load(k, 16, weighted=weighted) for k in tables}
            options = {"num_devices": 4, "batch_size": 64, "memory": 10**9}
            found = plan(tables, loads, **options)
            assert found.tables[0].strategy == strategy
            sent.append(found.bytes_per_step)
        more = 0 if strategy == "data_parallel" else 3 * 16 * 4
        assert sent[1] == sent[0] + more


@pytest.mark.parametrize(
    ("dtype", "row", "gradient"),
    [
        ("float32", 40, 40),
        ("bfloat16", 20, 40),
        ("float16", 20, 40),
        ("float64", 80, 80),
    ],
)
def test_rows_have_the_bytes_of_their_dtype(dtype, row, gradient):
    table = Table(10**6, 10, dtype)
    found = plan_one(table, Load("t", 400), memory=row * 10**6)
    assert found.strategy == "row_wise"
    assert found.forward_bytes == 3 * 168 * (4 + row)
    assert found.backward_bytes == 3 * 168 * (4 + gradient)


@pytest.mark.parametrize(
    ("optimizer", "numbers"),
    [
        ("sgd", 0),
        ("momentum", 10),
        ("adagrad", 10),
        ("rowwise_adagrad", 1),
        ("adam", 20),
        ("rowwise_adam", 11),
        ("rowwise_rmsprop", 1),
        ("ftrl", 20),
    ],
)
def test_the_state_of_the_optimizer_is_held(optimizer, numbers):
    found = plan_one(Table(20160, 10), Load("t", 16), optimizer=optimizer)
    plain = plan_one(Table(20160, 10), Load("t", 16), optimizer="sgd")
    assert (found.strategy, plain.strategy) == ("data_parallel", "data_parallel")
    assert found.memory_bytes - plain.memory_bytes == 20160 * numbers * 4


def test_tables_of_one_width_share_buckets_and_the_grid():
    tables = {f"t{i}": Table(10**6 + i, 10) for i in range(3)}
    loads = {k: Load(k, 400) for k in tables}
    options = {"num_devices": 8, "batch_size": 512, "memory": 30 * 10**6}
    found = plan(tables, loads, **options)
    assert {table.strategy for table in found.tables} == {"row_wise"}
    # 1200 / 8 + 6 * sqrt(150) + 8 = 231.5, up to a multiple of 8.
    assert totals(found)[0] == 7 * 232 * 44
    assert totals(found)[2] == (
        149 * 20160 * 44 // 8 + 2 * 8 * 232 * 88 + 3 * 1200 * 40
    )
    assert {table.forward_bytes for table in found.tables} == {7 * 232 * 44 // 3, 23819}
    # Another dtype is another array.
    tables["t2"] = Table(10**6, 10, "bfloat16")
    found = plan(tables, loads, **options)
    # 800 / 8 + 6 * 10 + 8 = 168; 400 / 8 + 6 * sqrt(50) + 8 = 100.4.
    assert totals(found)[0] == 7 * (168 * 44 + 104 * 24)


def test_shares_are_in_proportion_to_slots():
    tables = {"much": Table(10**6, 10), "little": Table(10**6, 10)}
    loads = {"much": Load("much", 3000), "little": Load("little", 1000)}
    options = {"num_devices": 8, "batch_size": 512, "memory": 30 * 10**6}
    much, little = plan(tables, loads, **options).tables
    assert (much.strategy, little.strategy) == ("row_wise", "row_wise")
    assert much.forward_bytes == pytest.approx(3 * little.forward_bytes, abs=2)
    assert much.backward_bytes == pytest.approx(3 * little.backward_bytes, abs=2)


def test_a_capacity_is_taken_and_rounds_are_counted():
    table, load = Table(10**6, 10), Load("t", 400, rows_per_round=120)
    # Of 100 ids on average, some bucket has more than 120, but of 50 none.
    options = {"num_devices": 4, "batch_size": 256, "memory": 20 * 10**6}
    found = plan({"t": table}, {"f": load}, **options)
    assert totals(found)[:2] == [2 * 3 * 120 * 44] * 2
    assert found.warnings == (
        "row-wise tables of 10 features need 2 rounds; a bucket holds 120 ids.",
    )
    few = dataclasses.replace(load, distinct=200)
    found = plan({"t": table}, {"f": few}, **options)
    assert totals(found)[:2] == [3 * 120 * 44] * 2
    assert found.warnings == ()
    both = {"f": few, "g": Load("t", 100)}
    found = plan({"t": table}, both, **options)
    # 100 / 4 + 6 * 5 + 8 = 63, up to a multiple of 8.
    assert totals(found)[0] == 3 * (120 + 64) * 44


def test_rounds_suffice_for_ids_that_fall_evenly():
    rng = np.random.default_rng(0)
    slots, devices, rows = 320, 16, 2**24
    for rows_per_round in (1, 5, 10, 22, 30, 45):
        found = plan_one(
            Table(rows, 10),
            Load("t", slots, rows_per_round=rows_per_round),
            num_devices=devices,
            batch_size=16,
            memory=200 * 10**6,
        )
        assert found.strategy == "row_wise"
        planned = found.forward_bytes // (15 * rows_per_round * 44)
        needed = 1
        for _ in range(devices):
            ids = rng.choice(rows, slots, replace=False)
            while (
                np.bincount(ids // (rows // (devices * needed))).max() > rows_per_round
            ):
                needed *= 2
        assert needed <= planned <= 4 * needed


def test_unpooled_features_return_a_row_for_each_slot():
    table, options = Table(20160, 128), {"optimizer": "sgd"}
    loads = Load("t", 100, pooling=None), Load("t", 24)
    found = plan_one(table, *loads, **options)
    assert found.strategy == "column_wise"
    # One feature of 64 bags and 100 slots, of whose 128 features a device has 32.
    rows = 64 + 100
    assert found.forward_bytes == 3 * (124 * 4 + 2 * 65 * 4 + rows * 32 * 4)
    assert found.backward_bytes == 3 * rows * 32 * 4


def test_a_load_knows_whether_it_is_pooled():
    bags = jbag.Bags.from_lists([[7, 7], [7, 8]], capacity=6)
    load = Load.measure("t", bags, pooling=None)
    assert load == Load("t", 6, distinct=2, pooling=None)
    with pytest.raises(ValueError, match="`pooling` must be 'bag' or None; got 'sum'"):
        Load("t", 6, pooling="sum")

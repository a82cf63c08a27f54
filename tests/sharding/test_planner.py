"""Plans: which strategies they choose, and how they are used."""

import itertools
import math
import random

import jax
import numpy as np
import pytest
from meshes import make_mesh
from plans import STRATEGIES, P, Table, oracle, plan_one, random_case, totals

import jbag
from jbag._mesh.strategies import TableWise
from jbag.sharding._feature_loads import Load
from jbag.sharding._planner import Plan, TablePlan, plan


def test_a_table_of_few_rows_is_replicated_where_its_columns_are_uneven():
    options = {"num_devices": 8, "batch_size": 8 * 3200}
    for slots in (32, 3200):
        found = plan_one(Table(7, 10), Load("t", slots), **options)
        assert found.strategy == "data_parallel"
        assert found.backward_bytes == 7 * 7 * (4 * 10 + 4)
    assert plan_one(Table(10**6, 10), Load("t", 3200), **options).strategy == "row_wise"


def test_a_huge_table_is_cut_in_rows():
    options = {"num_devices": 8, "memory": 35 * 10**9}
    found = plan_one(Table(10**9, 64), Load("t", 512), **options)
    assert found.strategy == "row_wise"


def test_wide_rows_in_few_bags_are_cut_in_columns():
    found = plan_one(Table(10**6, 512), Load("t", 10_000), num_devices=8)
    assert found.strategy == "column_wise"


def test_many_tables_lie_whole_on_different_devices():
    tables = {f"t{i:02}": Table(10**5 + i, 32) for i in range(32)}
    loads = {k: Load(k, 64) for k in tables}
    found = plan(tables, loads, num_devices=8, batch_size=512, memory=10**9)
    assert {table.strategy for table in found.tables} == {"table_wise"}
    devices = [table.device for table in found.tables]
    assert [devices.count(d) for d in range(8)] == [4] * 8
    assert all(type(table.memory_bytes) is int for table in found.tables)
    assert found.warnings == ()


def test_one_device_sends_nothing():
    tables = {"a": Table(100, 8), "b": Table(10**6, 64)}
    loads = {"a": Load("a", 64), "b": Load("b", 10**5)}
    found = plan(tables, loads, num_devices=1, batch_size=64, memory=10**9)
    assert found.bytes_per_step == 0
    assert [table.strategy for table in found.tables] == ["data_parallel"] * 2


def test_a_table_that_no_feature_looks_up_sends_nothing():
    tables = {"used": Table(1000, 10), "unused": Table(10**6, 16)}
    found = plan(
        tables, {"f": Load("used", 64)}, num_devices=4, batch_size=64, memory=10**9
    )
    used, unused = found.tables
    assert used.forward_bytes + used.backward_bytes == found.bytes_per_step > 0
    assert unused.memory_bytes >= 10**6 * 17 * 4 // 4


def test_less_memory_takes_more_bytes():
    # Tables that lie whole set aside what the largest of their width takes.
    sizes = [(10**5 * (i + 1), width) for width in (10, 30) for i in range(8)]
    tables = {f"t{at}": Table(*size) for at, size in enumerate(sizes)}
    loads = {k: Load(k, 64) for k in tables}
    options = {"num_devices": 8, "batch_size": 512, "spare": 0}
    sent, ways = [], set()
    for memory in range(150 * 10**6, 85 * 10**6, -5 * 10**6):
        found = plan(tables, loads, memory=memory, **options)
        assert found.memory_per_device <= memory
        sent.append(found.bytes_per_step)
        ways.add(tuple(table.strategy for table in found.tables))
    assert sent == sorted(sent)
    assert len(ways) >= 3


def test_part_of_the_memory_is_spared():
    tables, loads = {"t": Table(10**6, 64)}, {"f": Load("t", 512)}
    options = {"num_devices": 8, "batch_size": 512}
    found = plan(tables, loads, memory=10**9, **options)
    assert found.limit == 900_000_000
    least = found.memory_per_device
    with pytest.raises(ValueError, match="`memory` must suffice"):
        plan({"t": Table(10**8, 64)}, loads, memory=least, **options)
    assert plan(tables, loads, memory=10**9, spare=0.25, **options).limit == 750_000_000


def test_too_little_memory_is_an_error_that_says_how_much_it_takes():
    with pytest.raises(ValueError) as error:
        plan_one(Table(10**6, 10), Load("t", 400), memory=10**6)
    table, received = 50 * 20160 * (40 + 4) // 4, 4 * 168 * (44 + 44)
    needed = table + 2 * received + 3 * 400 * 40
    assert str(error.value) == (
        "`memory` must suffice for the smallest plan found, "
        f"{needed} bytes; got 1000000, of which 1000000 are usable."
    )
    assert plan_one(Table(10**6, 10), Load("t", 400), memory=needed)


@pytest.mark.parametrize("seed", range(4))
def test_plans_are_near_the_best_of_all_choices(seed):
    rng = random.Random(seed)
    ratios = []
    for _ in range(40):
        tables, loads, options = random_case(rng)
        devices, memory = options["num_devices"], options["memory"]
        best = math.inf
        for strategies in itertools.product(STRATEGIES, repeat=len(tables)):
            choice = dict(zip(tables, strategies, strict=True))
            if any(
                choice[k] == "column_wise" and table.embedding_dim % devices
                for k, table in tables.items()
            ):
                continue
            *sent, held = oracle(tables, loads, choice, devices, options["batch_size"])
            if held <= memory:
                best = min(best, sum(sent))
        if best == math.inf:
            with pytest.raises(ValueError, match="`memory` must suffice"):
                plan(tables, loads, **options)
            continue
        found = plan(tables, loads, **options)
        assert found.memory_per_device <= found.limit == memory
        choice = {table.name: table.strategy for table in found.tables}
        expected = oracle(tables, loads, choice, devices, options["batch_size"])
        np.testing.assert_allclose(totals(found), expected, rtol=1e-6, atol=2)
        assert best <= found.bytes_per_step + 1 <= 1.25 * best + 1
        ratios.append(found.bytes_per_step / best if best else 1)
    assert np.mean(ratios) < 1.01


@pytest.mark.slow
def test_there_is_a_plan_where_all_tables_in_rows_fit():
    rng = random.Random(0)
    for _ in range(20):
        tables = {
            f"t{i}": Table(int(10 ** rng.uniform(1, 7)), rng.choice([8, 32, 128]))
            for i in range(30)
        }
        loads = {k: Load(k, rng.choice([64, 640])) for k in tables}
        rows = oracle(tables, loads, dict.fromkeys(tables, "row_wise"), 8, 512)
        memory = math.ceil(rows[2]) + 1
        found = plan(
            tables, loads, num_devices=8, batch_size=512, memory=memory, spare=0
        )
        assert found.memory_per_device <= memory
        assert found.bytes_per_step <= rows[0] + rows[1]


def test_hundreds_of_tables_are_planned_in_seconds():
    tables = {f"t{i}": Table(2 + i * i, (16, 32, 64)[i % 3]) for i in range(300)}
    loads = {k: Load(k, 64) for k in tables}
    found = plan(tables, loads, num_devices=64, batch_size=4096, memory=10**9)
    assert [table.name for table in found.tables] == list(tables)
    assert found.bytes_per_step > 0


def test_specs_are_those_of_groups_named_by_their_strategies():
    tables = {f"t{i}": Table(10**5, 32) for i in range(8)} | {"wide": Table(10**5, 512)}
    tables["uneven"] = Table(10, 10)
    loads = {k: Load(k, 64 if k != "wide" else 6400) for k in tables}
    loads["uneven"] = Load("uneven", 8)
    options = {"num_devices": 8, "batch_size": 512, "memory": 10**9}
    found = plan(tables, loads, axis=("x", "y"), **options)
    assert found.specs == {
        "table_wise": TableWise(("x", "y"), lanes=8),
        "column_wise": P(None, ("x", "y")),
        "data_parallel": P(),
    }
    for table in found.tables:
        assert found.specs[table.strategy] == table.spec


def test_specs_lay_arrays_on_a_mesh():
    mesh = make_mesh()
    rows = plan_one(Table(10**6, 10), Load("t", 400), memory=20 * 10**6)
    columns = plan_one(Table(20160, 128), Load("t", 1024))
    replicated = plan_one(Table(100, 10), Load("t", 16), batch_size=64)
    for found, shape in ((rows, (2, 8)), (columns, (8, 2)), (replicated, (8, 8))):
        sharding = jax.NamedSharding(mesh, found.spec)
        assert sharding.shard_shape((8, 8)) == shape


def test_plans_print_a_line_for_each_table():
    found = Plan(
        (
            TablePlan(
                "item", 10**9, 64, "row_wise", P("x", None), 999, 99_950, 2 * 10**10
            ),
            TablePlan(
                "day", 7, 8, "table_wise", TableWise("x", 2), 0, 1_500_000, 12_345, 1
            ),
        ),
        limit=3 * 10**12,
        warnings=("all is well.",),
    )
    assert str(found).splitlines() == [
        "table  strategy               rows  features  forward  backward     held",
        "item   row_wise         1000000000        64    999 B    100 kB    20 GB",
        "day    table_wise on 1           7         8      0 B    1.5 MB  12.3 kB",
        "total                                           999 B    1.6 MB    20 GB",
        "A device sends 1.6 MB in a step, and holds 20 GB of 3 TB.",
        "Warning: all is well.",
    ]


def test_narrow_columns_are_warned_of():
    tables, loads = {"t": Table(10**4, 64)}, {"f": Load("t", 2048)}
    options = {"batch_size": 512, "memory": 10**9}
    found = plan(tables, loads, num_devices=8, **options)
    assert found.tables[0].strategy == "column_wise"
    assert found.warnings == (
        "column-wise tables of 64 features have 8 per device; fewer than 16 are slow.",
    )
    assert str(found).endswith("\nWarning: " + found.warnings[0])
    assert plan(tables, loads, num_devices=4, **options).warnings == ()


def test_idle_devices_are_warned_of():
    tables = {f"t{i}": Table(2000, 10) for i in range(7)}
    loads = {k: Load(k, 64) for k in tables}
    found = plan(tables, loads, num_devices=8, batch_size=64, memory=10**9)
    assert {table.strategy for table in found.tables} == {"table_wise"}
    assert found.warnings == (
        "table-wise tables of 10 features number 7 for 8 devices; devices without a "
        "table allocate and send as much as the others.",
    )


def test_more_rows_than_ids_count_are_warned_of():
    tables = {"a": Table(2 * 10**9, 10), "b": Table(2 * 10**8, 10)}
    loads = {k: Load(k, 512) for k in tables}
    options = {"num_devices": 8, "batch_size": 64}
    found = plan(tables, loads, memory=2 * 10**10, **options)
    assert {table.strategy for table in found.tables} == {"row_wise"}
    [warning] = found.warnings
    assert warning == (
        "2200000320 rows of 10 features in one array exceed the range of 32-bit ids."
    )


def test_a_load_is_measured():
    bags = jbag.Bags.from_lists([[5, 5, 7], [], [7, 9]], capacity=8)
    assert Load.measure("t", bags) == Load("t", 8, distinct=3)
    weighted = jbag.Bags.from_lists([[5, 5]], [[1.0, 2.0]])
    expected = Load("t", 2, weighted=True, rows_per_round=4, distinct=1)
    assert Load.measure("t", weighted, rows_per_round=4) == expected
    on_device = jax.tree.map(jax.numpy.asarray, bags)
    assert Load.measure("t", on_device) == Load("t", 8, distinct=3)


def test_modules_are_tables():
    tables = {"linen": jbag.EmbeddingBag(1000, 16)}
    found = plan(
        tables, {"f": Load("linen", 8)}, num_devices=2, batch_size=8, memory=10**8
    )
    assert (found.tables[0].num_embeddings, found.tables[0].embedding_dim) == (1000, 16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tables": [1]}, TypeError, r"`tables` must be a mapping by name; got \[1\]"),
        ({"tables": {}}, ValueError, "`tables` must hold at least one table; got none"),
        (
            {"tables": {"t": 3}},
            TypeError,
            r"`tables\['t'\]` must have `num_embeddings`, .*; got 3",
        ),
        (
            {"tables": {"t": Table(0, 8)}},
            ValueError,
            r"`tables\['t'\].num_embeddings` must be at least 1; got 0",
        ),
        (
            {"tables": {"t": Table(8, 1.5)}},
            TypeError,
            r"`tables\['t'\].embedding_dim` must be an integer; got 1.5",
        ),
        (
            {"tables": {"t": Table(8, 8, "int8")}},
            TypeError,
            r"`tables\['t'\].param_dtype` must be one of float32, .*; got int8",
        ),
        ({"loads": [1]}, TypeError, r"`loads` must be a mapping by name; got \[1\]"),
        ({"loads": {"f": 8}}, TypeError, r"`loads\['f'\]` must be a Load; got 8"),
        (
            {"loads": {"f": Load("u", 8)}},
            ValueError,
            r"`loads\['f'\].table` must be one of `tables`, t; got 'u'",
        ),
        ({"num_devices": 0}, ValueError, "`num_devices` must be at least 1; got 0"),
        ({"num_devices": 2.0}, TypeError, "`num_devices` must be an integer; got 2.0"),
        (
            {"batch_size": 66},
            ValueError,
            "`batch_size` must be a multiple of `num_devices`, 4; got 66. 132 is one",
        ),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1; got 0"),
        (
            {"num_devices": 1024, "batch_size": 1024},
            ValueError,
            "`grid` must be a multiple of `num_devices`, 1024; got 20160. 322560 is",
        ),
        ({"grid": 0}, ValueError, "`grid` must be at least 1; got 0"),
        ({"memory": 0}, ValueError, "`memory` must be at least 1; got 0"),
        ({"memory": 1e9}, TypeError, "`memory` must be an integer; got 1000000000.0"),
        (
            {"optimizer": "lion"},
            ValueError,
            "`optimizer` must be one of sgd, .*ftrl; got 'lion'",
        ),
        ({"spare": 1}, ValueError, r"`spare` must be in \[0, 1\); got 1"),
        ({"spare": -0.1}, ValueError, r"`spare` must be in \[0, 1\); got -0.1"),
        ({"spare": "0.1"}, TypeError, "`spare` must be a number; got '0.1'"),
        ({"axis": None}, TypeError, "`axis` must be a name, .*; got None"),
        ({"axis": ("x", 1)}, TypeError, "`axis` must be a name, .*; got"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    good = {
        "tables": {"t": Table(1000, 16)},
        "loads": {"f": Load("t", 64)},
        "num_devices": 4,
        "batch_size": 64,
        "memory": 10**9,
    }
    plan(**good)
    with pytest.raises(error, match=message):
        plan(**(good | arguments))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"table": 3}, TypeError, "`table` must be the name of a table; got 3"),
        ({"slots": -1}, ValueError, "`slots` must be at least 0; got -1"),
        ({"slots": 1.5}, TypeError, "`slots` must be an integer; got 1.5"),
        ({"weighted": 1}, TypeError, "`weighted` must be True or False; got 1"),
        (
            {"rows_per_round": 0},
            ValueError,
            "`rows_per_round` must be at least 1; got 0",
        ),
        ({"distinct": 65}, ValueError, r"`distinct` must be in \[0, 65\); got 65"),
    ],
)
def test_bad_loads_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        Load(**({"table": "t", "slots": 64} | arguments))


def test_only_one_batch_is_measured():
    with pytest.raises(TypeError, match="`bags` must be Bags; got list"):
        Load.measure("t", [[1]])
    bags = jbag.Bags.from_lists([[1], [2]])
    stack = jax.tree.map(lambda x: np.stack([x, x]), bags)
    with pytest.raises(ValueError, match=r"`bags` must be one batch; .*\(2, 2\)"):
        Load.measure("t", stack)

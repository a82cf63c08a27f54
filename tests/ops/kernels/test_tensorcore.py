"""What the TensorCore's kernel has of its own: lines, pieces, DMAs.

What it shares with the other kernels is tested beside them.
"""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental.pallas import tpu as pltpu
from oracle import assert_close
from slow import slow

import jbag
from jbag.ops.kernels import line_reductions, tensorcore

PADDING = 2


@pytest.fixture(autouse=True)
def _kernel(require):
    require("tensorcore")


@pytest.fixture
def interpreter_of_tpus():
    """Simulate memories and DMAs: accesses out of bounds and races are errors.

    What nothing has written is NaN.
    """
    options = {"detect_races": True, "out_of_bounds_reads": "raise"}
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**options)):
        yield
    pltpu.reset_tpu_interpret_mode_state()


def make_batch(layout, dtype, width, num_bags, length, rows=21, seed=0):
    """Return a table, ids, offsets, coefficients and bags of the oracle.

    The numbers are small integers, of which every sum is exact.
    """
    rng = np.random.default_rng(seed)
    table = rng.integers(-4, 5, (rows, width))
    ids = rng.integers(0, rows, num_bags * length + 3)
    coefficients = rng.integers(-3, 4, ids.size)
    if layout == "rectangular":
        ids, coefficients = ids[:-3], coefficients[:-3]
        bounds, offsets = np.arange(num_bags + 1) * length, None
    else:
        cuts = np.sort(rng.integers(0, num_bags * length + 1, num_bags - 1))
        bounds = np.array([0, *cuts, num_bags * length])
        offsets = jnp.asarray(bounds, jnp.int32)
    bags = oracle.slices(ids.tolist(), bounds, coefficients)
    shape = (num_bags, length) if offsets is None else ids.shape
    ids = jnp.asarray(ids.reshape(shape), jnp.int32)
    coefficients = jnp.asarray(coefficients.reshape(shape), jnp.float32)
    return jnp.asarray(table, dtype), ids, offsets, coefficients, bags


def check_operations(table, ids, offsets, coefficients, bags):
    """Compare the operations with the oracle."""
    cotangent = np.random.default_rng(1).integers(-4, 5, (len(bags), table.shape[1]))
    options = {"pad_id": PADDING}
    rows = {"num_embeddings": table.shape[0]}

    @jax.jit
    def run(table, cotangent, ids, offsets, coefficients):
        bags = (ids, offsets, coefficients)
        dtype = {"dtype": jnp.dtype("float32")}
        capacity = {"max_unique_ids": min(ids.size, table.shape[0])}
        return (
            tensorcore.spmm(table, *bags, average=None, **options, **dtype),
            tensorcore.sddmm(table, cotangent, ids, offsets, **options),
            tensorcore.extremum(table, *bags, largest=True, **options),
            tensorcore.extremum(table, ids, offsets, None, largest=False, **options),
            tensorcore.coalesce(cotangent, *bags, **options, **rows, **capacity),
        )

    sums, dots, (most, slots), (least, _), (unique, rows) = run(
        table, jnp.asarray(cotangent, jnp.float32), ids, offsets, coefficients
    )
    plain = [[(i, None) for i, _ in bag] for bag in bags]
    table = np.asarray(table, np.float64)
    assert_close(sums, oracle.forward(table, bags, "sum", PADDING))
    assert_close(most, oracle.forward(table, bags, "max", PADDING))
    assert_close(least, oracle.forward(table, plain, "min", PADDING))
    to_table, to_weights = oracle.gradients(table, bags, cotangent, "sum", PADDING)
    expected = np.zeros(ids.size)
    meant = np.concatenate([np.zeros(0), *to_weights])
    expected[: meant.size] = meant
    assert_close(dots.reshape(-1), expected)
    used = sorted({i for bag in bags for i, _ in bag} - {PADDING})
    np.testing.assert_array_equal(unique[: len(used)], used)
    assert_close(rows[: len(used)], to_table[used])
    assert not rows[len(used) :].any()
    # The first slot of each maximum, and N in an empty bag.
    flat, scale = np.asarray(ids).reshape(-1), np.asarray(coefficients).reshape(-1)
    is_bag = np.asarray(slots) < ids.size
    kept = np.array([any(i != PADDING for i, _ in bag) for bag in bags])
    np.testing.assert_array_equal(is_bag, np.broadcast_to(kept[:, None], is_bag.shape))
    first = np.where(is_bag, slots, 0)
    columns = np.arange(table.shape[1])
    found = scale[first] * table[flat[first], columns]
    np.testing.assert_array_equal(found[is_bag], np.asarray(most)[is_bag])


@pytest.mark.parametrize(
    ("layout", "dtype", "width"),
    [
        ("ragged", "bfloat16", 10),
        *slow(
            ("rectangular", "float32", 64),
            ("ragged", "float32", 128),
            ("rectangular", "float16", 1),
            ("ragged", "float16", 300),
            ("rectangular", "bfloat16", 128),
        ),
    ],
)
def test_operations_equal_the_oracle(layout, dtype, width):
    check_operations(*make_batch(layout, dtype, width, num_bags=13, length=4))


@pytest.mark.slow
@pytest.mark.parametrize("num_bags", [3, 700])
def test_pieces_of_slots_and_blocks_of_bags_join(num_bags):
    # More bags than a block has; bags that lie in several pieces of slots.
    slots = 5 * line_reductions._PIECE // 2
    assert num_bags < 4 or num_bags > 2 * line_reductions._MOST_BAGS
    check_operations(*make_batch("ragged", "float32", 3, num_bags, slots // num_bags))


@pytest.mark.slow
def test_lines_with_unused_lanes_equal_their_rows():
    table, ids, offsets, coefficients, bags = make_batch("ragged", "float32", 50, 7, 3)
    lines = jnp.pad(table.reshape(7, 150), ((0, 0), (0, 106)), constant_values=jnp.nan)
    lines = line_reductions.Lines(lines, 21, 50, rows_per_line=3)
    options = {"pad_id": None}
    sums = line_reductions.spmm_lines(
        lines,
        ids,
        offsets,
        coefficients,
        average=None,
        dtype=jnp.dtype("float32"),
        **options,
    )
    assert_close(sums, oracle.forward(table, bags, "sum"))
    values, _ = line_reductions.extremum_lines(
        lines, ids, offsets, coefficients, largest=True, **options
    )
    assert_close(values, oracle.forward(table, bags, "max"))
    cotangent = jnp.asarray(oracle.forward(table, bags, "sum"), jnp.float32)
    dots = line_reductions.sddmm_lines(lines, cotangent, ids, offsets, **options)
    _, expected = oracle.gradients(table, bags, cotangent, "sum")
    assert_close(dots[:21], np.concatenate(expected))


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter_of_tpus")
@pytest.mark.parametrize(
    ("operation", "dtype", "width"),
    [("spmm", "float32", 128), ("extremum", "float32", 50), ("sddmm", "bfloat16", 3)],
)
def test_dmas_stay_in_the_table_and_race_with_nothing(operation, dtype, width, capfd):
    # More slots than row DMAs in flight; ids out of range, in the last row, empty.
    rows = 7
    ids = np.random.default_rng(0).integers(-1, rows, (8, 6))
    ids[1, 1], ids[3, 2], ids[0, 0], ids[7, 5] = rows, -5, rows - 1, rows - 1
    assert ids.size > line_reductions._IN_FLIGHT
    table = np.random.default_rng(1).integers(-4, 5, (rows, width))
    cotangent = np.random.default_rng(2).integers(-4, 5, (8, width))
    bags = jnp.asarray(ids, jnp.int32), None
    operands = jnp.asarray(table, dtype), jnp.asarray(cotangent, jnp.float32)
    lists = [[(i, None) for i in bag] for bag in ids]
    if operation == "spmm":
        options = {"average": None, "dtype": jnp.dtype("float32")}
        found = tensorcore.spmm(operands[0], *bags, None, pad_id=-1, **options)
        expected = oracle.forward(table, lists, "sum", -1)
    elif operation == "extremum":
        run = functools.partial(tensorcore.extremum, pad_id=-1, largest=False)
        found, _ = run(operands[0], *bags, None)
        expected = oracle.forward(table, lists, "min", -1)
    else:
        found = tensorcore.sddmm(*operands, *bags, pad_id=-1).reshape(-1)
        _, dots = oracle.gradients(table, lists, cotangent, "sum", -1)
        expected = np.concatenate(dots)
    assert_close(found, expected)
    assert "RACE" not in "".join(capfd.readouterr())


def test_float64_is_an_error_that_lists_the_dtypes():
    message = "takes tables of float32, bfloat16, float16; got float64"
    with jax.enable_x64(True), pytest.raises(ValueError, match=message):
        jbag.embedding_bag(
            np.ones((3, 2)), [[0, 1]], mode="sum", implementation="tensorcore"
        )


def test_symbolic_sizes_are_an_error():
    size = jax.export.symbolic_shape("b, 3")
    ids = jax.ShapeDtypeStruct(size, jnp.int32)
    pool = jax.jit(
        lambda ids: jbag.embedding_bag(
            jnp.ones((3, 2)), ids, mode="sum", implementation="tensorcore"
        )
    )
    with pytest.raises(ValueError, match=r"takes no symbolic sizes; got .*b"):
        jax.export.export(pool)(ids)

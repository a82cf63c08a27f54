import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.experimental.sparse import BCOO

import jbag
from jbag.ops._factored_gradient import FactoredGradient
from jbag.ops._row_gather import accumulation_dtype

V, D = 9, 3
RNG = np.random.default_rng(0)
INDICES = np.array([7, 2, 7, -1, 0, 9, 2, 7], np.int32)  # two of them name no row
VALUES = RNG.normal(size=(INDICES.size, D)).astype(np.float32)
TABLE = RNG.normal(size=(V, D)).astype(np.float32)
ROWS = jbag.RowSparse.from_rows(INDICES, VALUES, V)


def dense(indices=INDICES, values=VALUES):
    total = np.zeros((V, D))
    for i, row in zip(indices, np.asarray(values, np.float64), strict=True):
        if 0 <= i < V:
            total[i] += row
    return total


def terms(implementation):
    """Bags in every layout, malformed ones among them, and what they add up to."""
    cotangent = RNG.normal(size=(3, D)).astype(np.float32)
    coefficients = RNG.normal(size=6).astype(np.float32)
    ids = np.array([4, 1, 4, 9, 4, 0], np.int32)
    layouts = [  # and the bag of each slot
        (ids, np.array([0, 2, 2, 5], np.int32), [0, 0, 2, 2, 2, None]),
        # Falling: the first bag alone is well formed.
        (ids, np.array([0, 4, 3, 6], np.int32), [0, 0, 0, 0, None, None]),
        (ids.reshape(3, 2), None, [0, 0, 1, 1, 2, 2]),
    ]
    cases = [(0, False, None), (0, True, 1), (1, True, None), (2, False, 1)]
    for layout, weighted, pad_id in cases:
        own, offsets, bags = layouts[layout]
        slots = [i for i in range(6) if bags[i] is not None and ids[i] != pad_id]
        scale = coefficients if weighted else np.ones(6)
        values = [scale[i] * cotangent[bags[i]] for i in slots]
        expected = dense(ids[slots], np.reshape(values, (-1, D)))
        shaped = jnp.asarray(coefficients.reshape(own.shape)) if weighted else None
        yield (
            FactoredGradient(
                jnp.asarray(cotangent),
                jnp.asarray(own),
                None if offsets is None else jnp.asarray(offsets),
                shaped,
                pad_id,
                implementation,
            ),
            expected,
            set(ids[slots]) - {9},
        )


def sums(rows):
    """Return rows with distinct ids, the dense gradient, and rows added to a table."""
    unique = rows.coalesce()
    return {
        "unique": (unique.indices, unique.values),
        "counts": (rows.num_rows, unique.num_rows),
        "whole": rows.todense(),
        "rows": (rows.indices, rows.values),
        "moved": jnp.asarray(TABLE) + rows,
    }


def test_rows_are_summed_in_order(implementation):
    every, expected, named = zip(*terms(implementation), strict=True)
    make = lambda *terms: jbag.RowSparse(terms, (V, D), jnp.dtype("float32"))

    @jax.jit
    def run(each):
        return list(map(sums, each)), each[-1].coalesce().todense()

    (*each, together), unique = run([*map(make, every), make(*every)])
    for found, total, own in zip(each, expected, named, strict=True):
        indices, values = found["unique"]
        assert indices.shape == (6,)
        assert values.shape == (6, D)
        assert indices.tolist() == sorted(own) + [V] * (6 - len(own))
        oracle.assert_close(dense(indices, values), total, "float32")
        assert (values[len(own) :] == 0).all()
        oracle.assert_close(found["whole"], total)
        oracle.assert_close(dense(*found["rows"]), total, "float32")
        oracle.assert_close(found["moved"], TABLE + total)
        assert set(map(int, found["counts"])) == {len(own)}
    oracle.assert_close(together["whole"], sum(expected))
    oracle.assert_close(unique, sum(expected))
    assert together["unique"][0].shape == (V,)


@pytest.mark.parametrize("indices", [[], [-1, 9], [5] * 2000, list(range(9)) * 2])
def test_corners_of_coalescing(indices, implementation):
    indices = np.array(indices, np.int32)
    values = RNG.normal(size=(indices.size, D)).astype(np.float32)
    rows = jbag.RowSparse.from_rows(indices, values, V)
    (term,) = rows.terms
    terms = (FactoredGradient(term.cotangent, term.ids, implementation=implementation),)
    rows = jbag.RowSparse(terms, rows.shape, rows.dtype)
    named = sorted({i for i in indices if 0 <= i < V})

    @jax.jit
    def run(rows):
        unique = rows.coalesce()
        return unique.indices, unique.todense(), jnp.asarray(TABLE) + rows

    unique, coalesced, moved = run(rows)
    assert unique.shape == (min(len(indices), V),)
    assert unique.tolist()[: len(named)] == named
    oracle.assert_close(coalesced, dense(indices, values))
    oracle.assert_close(moved, TABLE + dense(indices, values))


def test_arithmetic():
    table, total, scale = jnp.asarray(TABLE), dense(), np.arange(8)[:, None]
    for found, expected in [
        (ROWS + ROWS, 2 * total),
        (sum([ROWS, ROWS * 3]), 4 * total),
        (ROWS - ROWS * 0.5, total / 2),
        (-ROWS, -total),
        (ROWS * jnp.float32(2), 2 * total),
        (np.float32(2) * ROWS, 2 * total),
        (ROWS / 4, total / 4),
        (ROWS.coalesce() + ROWS, 2 * total),
        (ROWS.scale_rows(jnp.arange(8.0)), dense(values=VALUES * scale)),
    ]:
        assert isinstance(found, jbag.RowSparse)
        oracle.assert_close(found.todense(), expected)
    for found, expected in [
        (table + ROWS, TABLE + total),
        (ROWS + table, TABLE + total),
        (table - ROWS, TABLE - total),
        (ROWS - table, total - TABLE),
        (TABLE + ROWS, TABLE + total),
        (TABLE - ROWS, TABLE - total),
        (jax.jit(lambda t, r: t + 2 * r)(table, ROWS), TABLE + 2 * total),
    ]:
        assert isinstance(found, jax.Array)
        oracle.assert_close(found, expected)


def test_what_arithmetic_can_not_mean_is_an_error():
    for wrong in ("x", None, jnp.ones(3)):
        with pytest.raises((TypeError, ValueError)):
            ROWS * wrong
    for wrong in ("x", None, 2):
        with pytest.raises(TypeError):
            ROWS + wrong
    with pytest.raises(ValueError, match=r"Shapes must be equal; got \(8, 3\)"):
        jnp.ones((V - 1, D)) + ROWS
    with pytest.raises(ValueError, match="Shapes must be equal"):
        ROWS + jbag.RowSparse.from_rows(INDICES, VALUES, V + 1)


def test_rows_that_were_mapped_over_are_an_error():
    for change in (lambda x: 0.5 * x, lambda x: x + x, jnp.sign, jnp.sum):
        for run in (lambda f: f(), lambda f: jax.jit(f)()):
            with pytest.raises(TypeError, match="RowSparse; for gradients"):
                run(lambda change=change: jax.tree.map(change, ROWS))


def test_optimizers_for_arrays_say_what_takes_rows():
    for optimizer in (
        optax.adam(0.1),
        optax.sgd(0.1),
        optax.MultiSteps(optax.sgd(1), 2),
    ):
        with pytest.raises((TypeError, ValueError), match=r"see jbag\.optim"):
            optimizer.update(ROWS, optimizer.init(TABLE), TABLE)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.usefixtures("x64")
def test_dtypes(dtype, implementation):
    values = jnp.asarray(VALUES, dtype)
    rows = jbag.RowSparse.from_rows(INDICES.astype(np.int64), values, V)
    (term,) = rows.terms
    terms = (FactoredGradient(term.cotangent, term.ids, implementation=implementation),)
    rows = jbag.RowSparse(terms, rows.shape, rows.dtype)
    expected = dense(values=jnp.asarray(VALUES, dtype))
    table = np.asarray(TABLE).astype(jnp.dtype(dtype))

    @jax.jit
    def run(rows):
        unique = rows.coalesce()
        dense = rows.todense(), unique.todense(), jnp.asarray(table) + rows
        return rows.values, unique.indices, dense

    values, indices, (whole, coalesced, added) = run(rows)
    assert rows.dtype == whole.dtype == coalesced.dtype == added.dtype == dtype
    assert values.dtype == accumulation_dtype(jnp.dtype(dtype))
    assert indices.dtype == jnp.int64
    oracle.assert_close(whole, expected)
    oracle.assert_close(coalesced, expected)
    oracle.assert_close(added, table.astype("float64") + expected)


def test_it_is_a_pytree_with_static_shapes():
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), ROWS)

    @jax.jit
    def run(stacked):
        _, total = jax.lax.scan(lambda c, rows: (c, rows.todense()), 0, stacked)
        return total, jax.vmap(lambda r: r.coalesce().todense())(stacked)

    for found in run(stacked):
        oracle.assert_close(found, np.stack([dense(), dense()]))
    same = jax.tree.unflatten(*reversed(jax.tree.flatten(ROWS)))
    assert (same.shape, same.ndim, same.dtype) == ((V, D), 2, jnp.float32)


def test_adding_rows_is_differentiable():
    def loss(table, values):
        added = table + jbag.RowSparse.from_rows(INDICES, values, V)
        return (added**2).sum()

    def plain(table, values):
        added = table.at[jnp.where(INDICES < 0, V, INDICES)].add(values, mode="drop")
        return (added**2).sum()

    args = jnp.asarray(TABLE), jnp.asarray(VALUES)
    gradients = jax.jit(
        lambda *args: [jax.grad(f, (0, 1))(*args) for f in (loss, plain)]
    )
    jax.tree.map(oracle.assert_close, *gradients(*args))


def test_the_way_to_bcoo_and_back():
    rows = ROWS.coalesce()
    matrix = BCOO(
        (rows.values, rows.indices[:, None]),
        shape=rows.shape,
        indices_sorted=True,
        unique_indices=True,
    )
    oracle.assert_close(matrix.todense(), dense())
    back = jbag.RowSparse.from_rows(matrix.indices[:, 0], matrix.data, matrix.shape[0])
    oracle.assert_close(back.todense(), dense())


def test_the_way_to_pytorch_and_back():
    torch = pytest.importorskip("torch")
    rows, n = ROWS.coalesce(), int(ROWS.num_rows)
    tensor = torch.sparse_coo_tensor(
        np.array(rows.indices[:n])[None],
        np.array(rows.values[:n]),
        rows.shape,
        check_invariants=True,
    ).coalesce()
    oracle.assert_close(tensor.to_dense().numpy(), dense())
    back = jbag.RowSparse.from_rows(
        tensor.indices()[0].numpy(), tensor.values().numpy(), tensor.shape[0]
    )
    oracle.assert_close(back.todense(), dense())


def test_bad_arguments_are_errors():
    make = jbag.RowSparse.from_rows
    with pytest.raises(TypeError, match="`indices`"):
        make([0.5], jnp.ones((1, 2)), 3)
    with pytest.raises(TypeError, match="`values` must be floating"):
        make([0], jnp.ones((1, 2), int), 3)
    with pytest.raises(ValueError, match=r"`values` \[N, D\]; got \(2,\) and \(1, 2\)"):
        make([0, 1], jnp.ones((1, 2)), 3)
    with pytest.raises(ValueError, match="`num_embeddings`"):
        make([0], jnp.ones((1, 2)), -1)

"""Batches and options of a collection are checked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collection_cases import make, make_nnx
from jax.sharding import PartitionSpec as P
from meshes import make_mesh

import jbag


def bags(*lists):
    return jbag.Bags.from_lists(lists)


TABLES = {"a": jbag.Table(20, 6), "b": jbag.Table(9, 6, group="other")}
FEATURES = {"first": jbag.Feature("a"), "second": jbag.Feature("b", "sum")}
GOOD = {"first": bags([1]), "second": bags([2])}


@pytest.mark.parametrize(
    ("options", "batch", "error", "message"),
    [
        ({"tables": {}}, GOOD, ValueError, "`tables` must hold at least one Table"),
        ({"tables": 3}, GOOD, TypeError, "`tables` must be a dict; got 3"),
        (
            {"tables": {"a": 3}},
            GOOD,
            TypeError,
            "`tables` must hold a Table for each name; got 3 at 'a'",
        ),
        (
            {"features": {"first": jbag.Feature("z")}},
            GOOD,
            ValueError,
            r"`features\['first'\]` must name one of the tables, .* got 'z'",
        ),
        (
            {"features": {"": jbag.Feature("a")}},
            GOOD,
            ValueError,
            "`features` must have names; got an empty one",
        ),
        ({"grid": 0}, GOOD, ValueError, "`grid` must be in .* got 0"),
        (
            {"rows_per_round": 0},
            GOOD,
            ValueError,
            "`rows_per_round` must be at least 1; got 0",
        ),
        ({"dtype": "int32"}, GOOD, TypeError, "`dtype` must be floating; got int32"),
        ({"sparse": 1}, GOOD, TypeError, "`sparse` must be True or False; got 1"),
        ({"concatenate": "yes"}, GOOD, TypeError, "`concatenate` must be True or"),
        ({"implementation": "x"}, GOOD, ValueError, "`implementation` must be None or"),
        (
            {"specs": {"none": P()}},
            GOOD,
            ValueError,
            r"`specs` must name groups of tables, \['embedding', 'other'\]; got 'none'",
        ),
        ({}, {"first": bags([1])}, ValueError, r"the features .* got \['first'\]"),
        ({}, GOOD | {"third": bags([1])}, ValueError, "the features .*'third'"),
        ({}, [[1]], TypeError, r"`batch` must be a dict .* got \[\[1\]\]"),
        (
            {},
            GOOD | {"second": bags([1], [2])},
            ValueError,
            "as many bags of each feature; got {'first': 1, 'second': 2}",
        ),
        (
            {},
            GOOD | {"second": bags([1, 9])},
            IndexError,
            r"In `batch\['second'\]`: .* lie in \[0, 9\).* got 9 at position 1",
        ),
        (
            {},
            GOOD | {"second": [[1, -1]]},
            IndexError,
            r"In `batch\['second'\]`: .* got -1 at position \(0, 1\)",
        ),
        (
            {},
            GOOD | {"second": [["a"]]},
            TypeError,
            r"In `batch\['second'\]`: `indices` must hold integers",
        ),
        (
            {},
            GOOD | {"first": jax.tree.map(lambda x: x[None], bags([1]))},
            ValueError,
            r"In `batch\['first'\]`: `bags` must be one batch",
        ),
        (
            {},
            bags([1], [9]),
            IndexError,
            r"In the bags of 'second': .* lie in \[0, 9\).* got 9 at position 0",
        ),
        ({}, bags([1], [2], [3]), ValueError, "each of the 2 features.* got 3"),
        ({}, bags([-1], [2]), IndexError, "got -1 at position 0"),
    ],
)
def test_bad_options_and_batches_are_named(options, batch, error, message):
    options = {"tables": TABLES, "features": FEATURES} | options
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: make(**options).init(jax.random.key(0), batch))
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: make_nnx(**options)(batch))


ON_DEVICE = [
    (GOOD | {"second": bags([1]).pad_to(5)}, None, None),
    (bags([1, 2], [3]).pad_to(5), None, None),
    (
        GOOD | {"second": bags([1, 9])},
        IndexError,
        r"In `batch\['second'\]`: .* lie in \[0, 9\).* got 9 at position 1",
    ),
    (
        GOOD | {"second": np.array([[1, -1]])},
        IndexError,
        r"In `batch\['second'\]`: .* got -1 at position \(0, 1\)",
    ),
    (bags([1], [9]), IndexError, r"In the bags of 'second': .* got 9 at position 0"),
    (
        GOOD | {"first": jbag.Bags(np.array([1, 2]), np.array([0, 3]))},
        ValueError,
        r"In `batch\['first'\]`: `offsets` must not pass the end",
    ),
]


@pytest.mark.parametrize("make_any", [make, make_nnx])
@pytest.mark.parametrize(("batch", "error", "message"), ON_DEVICE)
def test_a_batch_on_a_device_is_validated_by_value(make_any, batch, error, message):
    collection = make_any(TABLES, FEATURES)
    batch = jax.tree.map(jnp.asarray, batch)
    if error is None:
        assert collection.validate(batch) is batch
    else:
        with pytest.raises(error, match=message):
            collection.validate(batch)


@pytest.mark.parametrize("make_any", [make, make_nnx])
@pytest.mark.parametrize("keyed", [False, True])
def test_a_batch_over_a_mesh_is_validated_block_by_block(make_any, keyed):
    mesh = make_mesh(sizes=(2,))
    specs = {TABLES["a"].group: P("x", None)}
    collection = make_any(TABLES, FEATURES, specs=specs, mesh=mesh)
    blocks = [bags([1], [2]), bags([1], [9])]
    batch = jax.tree.map(lambda *xs: jnp.stack(xs), *blocks)
    place = "In the bags of 'second', in block 1"
    if not keyed:
        batch = {"first": np.zeros((4, 1), np.int32), "second": batch}
        place = r"In `batch\['second'\]`: In block 1"
    with pytest.raises(IndexError, match=f"{place}: .* got 9 at position"):
        collection.validate(batch)


@pytest.mark.parametrize(
    ("make_one", "error", "message"),
    [
        (lambda: jbag.Table(0, 1), ValueError, "`num_embeddings` must be at least 1"),
        (lambda: jbag.Table(1, 1.5), TypeError, "`embedding_dim` must be an integer"),
        (lambda: jbag.Table(1, 1, group="a b"), ValueError, "`group` must be an ident"),
        (lambda: jbag.Table(1, 1, group=1), TypeError, "`group` must be a string"),
        (lambda: jbag.Table(2, 1, padding_idx=2), ValueError, "`padding_idx` must be"),
        (
            lambda: jbag.Table(2, 2, param_dtype=int),
            TypeError,
            "`param_dtype` must be one of float32, .* got int",
        ),
        (
            lambda: jbag.Table(2, 2, param_dtype="float8_e4m3fn"),
            TypeError,
            "`param_dtype` must be one of float32, .* got float8_e4m3fn",
        ),
        (lambda: jbag.Table(2, 2, max_norm=-1), ValueError, "`max_norm` must be at"),
        (lambda: jbag.Table(2, 2, max_norm="1"), TypeError, "`max_norm` must be a num"),
        (
            lambda: jbag.Table(2, 2, scale_grad_by_freq=1),
            TypeError,
            "`scale_grad_by_freq` must be True or False; got 1",
        ),
        (lambda: jbag.Feature(3), TypeError, "`table` must be a string; got 3"),
        (lambda: jbag.Feature("a", "avg"), ValueError, "`mode` must be one of .*'avg'"),
    ],
)
def test_bad_tables_and_features_are_named(make_one, error, message):
    with pytest.raises(error, match=message):
        make_one()


def test_tables_that_do_not_fit_are_named():
    collection = make(TABLES, FEATURES)
    rows = {"a": np.ones((20, 6)), "b": np.ones((9, 6))}
    with pytest.raises(ValueError, match=r"`tables` must be \['a', 'b'\]; got \['a'\]"):
        collection.import_tables({"a": rows["a"]})
    for wrong in ((8, 6), (9, 5), (9, 6, 1), ()):
        with pytest.raises(
            ValueError, match=r"`tables\['b'\]` must have shape \(9, 6\)"
        ):
            collection.import_tables(rows | {"b": np.ones(wrong)})

"""Whether the gradient of a sparse table may be dense."""

import functools
import warnings

import jax
import pytest
from dense_counterpart import (
    IDS,
    assert_equal,
    in_scan,
    is_rows,
    pool,
    random_table,
)

import jbag

pytestmark = pytest.mark.standard_promotion


def tied(table, sparse=True):
    pooled = pool(table, IDS, sparse)
    return ((pooled @ table.T) ** 2).sum()


def computed(table, sparse=True):
    return (pool(table * 2, IDS, sparse) ** 2).sum()


def untied(table, sparse=True):
    return (pool(table, IDS, sparse) ** 2).sum()


@pytest.mark.parametrize("loss", [tied, computed])
@pytest.mark.parametrize("make", [jbag.value_and_grad, jbag.grad])
def test_a_dense_gradient_of_a_sparse_table_warns(loss, make):
    table, options = random_table(), {}
    with pytest.warns(jbag.DenseGradientWarning):
        found = make(loss)(table)
    with pytest.warns(jbag.DenseGradientWarning):
        make(loss, allow_dense=None)(table)
    expected = jax.value_and_grad(loss)(table, sparse=False)
    expected = expected if make is jbag.value_and_grad else expected[1]
    assert_equal(found, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(make(loss, allow_dense=True, **options)(table), expected)
    with pytest.raises(ValueError, match="dense"):
        make(loss, allow_dense=False)(table)


def test_a_dense_gradient_warns_as_a_step_is_compiled():
    with pytest.warns(jbag.DenseGradientWarning):
        jax.jit(jbag.grad(tied))(random_table())
    with pytest.raises(ValueError, match="dense"):
        jax.jit(jbag.grad(tied, allow_dense=False))(random_table())


@pytest.mark.parametrize("allow_dense", [None, True, False])
def test_row_sparse_gradients_and_dense_tables_do_not_warn(allow_dense):
    both = functools.partial(jbag.value_and_grad, allow_dense=allow_dense)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cases = [(True, untied), (True, in_scan)]
        cases += [(False, loss) for loss in (untied, tied, computed, in_scan)]
        for sparse, loss in cases:
            gradient = both(functools.partial(loss, sparse=sparse))
            _, found = jax.eval_shape(gradient, random_table())
            assert is_rows(found) is sparse


def test_allow_dense_is_a_flag():
    with pytest.raises(TypeError, match="allow_dense"):
        jbag.value_and_grad(untied, allow_dense="yes")

"""What trains for three steps beside its dense counterpart.

Once with a sparse table and `jbag.value_and_grad`, and once with a dense table and
`jax.value_and_grad`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from jax import lax

import jbag

V, D = 12, 2
IDS = jnp.array([[1, 4, 4], [7, 1, 2]], jnp.int32)
BATCHES = [IDS, jnp.array([[3, 3, 8], [4, 9, 1]], jnp.int32), IDS + 2]
SEQUENCE = jnp.stack(BATCHES)


def is_rows(x):
    return isinstance(x, jbag.RowSparse)


def densify(tree):
    return jax.tree.map(
        lambda x: x.todense() if is_rows(x) else x, tree, is_leaf=is_rows
    )


def count_rows(tree):
    return sum(map(is_rows, jax.tree.leaves(tree, is_leaf=is_rows)))


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: oracle.assert_close(a, b, "float32"), found, expected)


def differentiate(sparse):
    """Return `value_and_grad`; whether a gradient is dense is told elsewhere."""
    if not sparse:
        return jax.value_and_grad
    return functools.partial(jbag.value_and_grad, allow_dense=True)


def random_table(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(V, D)), jnp.float32)


def pool(table, ids, sparse=True, **options):
    return jbag.embedding_bag(table, ids, sparse=sparse, **options)


def in_scan(table, sparse):
    def step(carry, ids):
        pooled = pool(table, ids, sparse)
        return carry * 0.5 + pooled, (pooled**2).sum()

    carry, out = lax.scan(step, jnp.ones((2, D)), SEQUENCE)
    return (carry**2).sum() + out.sum()


def squares(params, ids, sparse):
    pooled = pool(params["table"], ids, sparse) + params["bias"]
    return ((pooled - 1) ** 2).sum()


def start():
    return {"table": random_table(), "bias": jnp.ones(D)}


def loss_of(sparse, loss=squares):
    return functools.partial(loss, sparse=sparse)

"""Gradients of a walk over functions of row-sparse gradients, and what each gives."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
from dense_counterpart import densify
from jax import lax

import jbag
from jbag import optim

V, D = 12, 2  # four devices divide V
SGD = optim.sgd(0.1)


def start():
    rng = np.random.default_rng(0)
    shapes = {"table": (V, D), "bias": (D,)}
    return {k: jnp.asarray(rng.normal(size=s), "float32") for k, s in shapes.items()}


# No batch names row 0, which gets what is lost; row 3 has three slots in the first.
BATCHES = [
    jnp.array([[3, 4, 3], [5, 3, 7]], jnp.int32),
    jnp.array([[1, 4, 9], [2, 2, 8]], jnp.int32),
]
SIGNS = np.array([1, -1], np.float32)  # of what the gradients are, more or less


def loss(params, ids, sparse):
    """Pool bags of each layout, so that the gradient has every kind of leaf."""
    pool = functools.partial(jbag.embedding_bag, params["table"], sparse=sparse)
    weights = jnp.linspace(0.5, 2, ids.size, dtype=jnp.float32)
    ragged = jbag.Bags(ids.ravel(), jnp.array([0, 2, ids.size], jnp.int32), weights)
    pooled = [pool(ids, mode="sum"), pool(ragged), pool(ids, mode="max")]
    return sum(((x + params["bias"]) ** 2 @ SIGNS).sum() for x in pooled)


def small_loss(params, ids, sparse):
    """Pool once, where the layout doesn't matter."""
    pooled = jbag.embedding_bag(params["table"], ids, mode="sum", sparse=sparse)
    return ((pooled + params["bias"]) ** 2 @ SIGNS).sum()


def loss_of(sparse, loss=loss):
    return functools.partial(loss, sparse=sparse)


@functools.cache
def gradients(sparse):
    """Return value and gradient for each batch, all of the first parameters."""
    both = jax.jit((jbag if sparse else jax).value_and_grad(loss_of(sparse)))
    return [both(start(), ids) for ids in BATCHES]


def numbers(x):
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)


def is_close(a, b):
    a, b = numbers(a), numbers(b)
    if a.shape != b.shape:
        return False
    return np.allclose(a, b, **oracle.TOLERANCES["float32"], equal_nan=True)


def equals(found, expected):
    """Whether both trees hold the same numbers, in leaves of the same order."""
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    return len(found) == len(expected) and all(map(is_close, found, expected))


def outcome(run):
    """Return "equal", "wrong", or the error. `run` is told whether to be sparse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no error to users
        try:
            found = jax.block_until_ready(densify(run(True)))
        except Exception as error:  # of any kind: nothing is trained in silence
            return error
        return "equal" if equals(found, run(False)) else "wrong"


def trace_dense(run):
    """Raise if it is not the rows that an error is about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jax.eval_shape(lambda: run(False))


def check(run, must_equal=False):
    found = outcome(run)
    if isinstance(found, Exception):
        if must_equal:
            raise found
        trace_dense(run)
    assert found != "wrong", "neither the dense result nor an error"


PLACES = {
    "alone": lambda tx: tx,
    "before": lambda tx: optax.chain(tx, SGD),
    "after": lambda tx: optax.chain(SGD, tx),
}


def each(function):
    """Return a function that maps over the leaves of gradients."""
    return lambda *trees: jax.tree.map(function, *trees)


def stacked_by_vmap(sparse):
    gradient = (jbag if sparse else jax).grad(loss_of(sparse))
    return jax.vmap(gradient, in_axes=(None, 0))(start(), jnp.stack(BATCHES))["table"]


def stacked_by_scan(sparse):
    gradient = (jbag if sparse else jax).grad(loss_of(sparse))
    body = lambda params, ids: (params, gradient(params, ids))
    return lax.scan(body, start(), jnp.stack(BATCHES))[1]["table"]


STACKED = {"vmap": stacked_by_vmap, "scan": stacked_by_scan}


@functools.cache
def stacked(kind, sparse):
    return jax.jit(lambda: STACKED[kind](sparse))()

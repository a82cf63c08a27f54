"""PyTorch as a peer: its own operator samples, and ragged batches at random."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from slow import slow

import jbag

torch = pytest.importorskip("torch", reason="PyTorch is not installed")


MODES = ("sum", "mean", "max")


S, M = 5, 10


def samples():
    """Yield (V, indices, options) as PyTorch's tests of its operator choose them."""
    rng = np.random.default_rng(0)
    draw = lambda *shape, high=M: rng.integers(0, high, shape)
    for mode in MODES:
        for weighted in (False, True):
            if weighted and mode != "sum":
                continue  # PyTorch weights sums alone
            common = {"mode": mode, "weighted": weighted}
            yield M, draw(S), {"offsets": [0, 3], **common}
            yield M, draw(2 * S)[::2], {"offsets": [0, 3], **common}
            yield M, draw(S), {"offsets": [0, 0, 3], **common}
            yield M, draw(S, S), common
            padded = draw(6, high=S)
            padded[[0, 4]] = 4
            yield S, padded, {"padding_idx": -1, "offsets": [0, 3], **common}
            square = draw(3, 3, high=S)
            square[[0, 1], [0, 1]] = 2
            yield S, square, {"padding_idx": 2, **common}
            last = {"offsets": [0, 3, 6], "include_last_offset": True}
            yield S, draw(6, high=S), {**last, **common}
            yield S, draw(2, 2, high=S), {"max_norm": 1.0, **common}
            norms = {"max_norm": 1.0, "norm_type": 1.0, "offsets": [0, 3]}
            yield S, draw(6, high=S), {**norms, **common}
            if mode != "max":
                yield S, draw(2, 2, high=S), {"scale_grad_by_freq": True, **common}

                # Where an id repeats before the last one, PyTorch 2.13 divides the rows
                # after it by another row's count on CPU: it is no oracle there.


SAMPLES = list(samples())


@pytest.mark.parametrize("sample", range(len(SAMPLES)))
@pytest.mark.parametrize("dtype", ["float32", *slow("float64")])
def test_operator_samples_equal_pytorch(sample, dtype, implementation):
    with jax.enable_x64(True):
        check_sample(*SAMPLES[sample], dtype, implementation)


def check_sample(num_embeddings, indices, options, dtype, implementation):
    options = dict(options)
    rng = np.random.default_rng(1)
    # Of norm above 1, so that max_norm has something to do.
    table = (rng.normal(size=(num_embeddings, S)) * 2).astype(dtype)
    weights = rng.normal(size=indices.shape).astype(dtype)
    weighted = options.pop("weighted")
    offsets = options.pop("offsets", None)

    peer = torch.tensor(table, requires_grad=True)
    peer_weights = torch.tensor(weights, requires_grad=True) if weighted else None
    # max_norm writes into the weight in place: give it a copy that isn't a leaf's.
    used = peer if "max_norm" not in options else torch.tensor(table)
    expected = torch.nn.functional.embedding_bag(
        torch.tensor(indices),
        used.requires_grad_(),
        offsets=None if offsets is None else torch.tensor(offsets),
        per_sample_weights=peer_weights,
        **options,
    )
    cotangent = rng.normal(size=expected.shape).astype(dtype)
    expected.backward(torch.tensor(cotangent))

    @jax.jit
    def results(table, weights, cotangent):
        value, pullback = jax.vjp(
            lambda t, w: jbag.embedding_bag(
                t, indices, offsets, weights=w, implementation=implementation, **options
            ),
            table,
            weights,
        )
        return value, *pullback(cotangent)

    value, to_table, to_weights = results(
        jnp.asarray(table),
        jnp.asarray(weights) if weighted else None,
        jnp.asarray(cotangent),
    )
    oracle.assert_close(value, expected.detach().numpy())
    oracle.assert_close(to_table, used.grad.numpy())
    if weighted:
        oracle.assert_close(to_weights, peer_weights.grad.numpy())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(5))
def test_random_ragged_batches_equal_pytorch(seed, mode, implementation):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 7, 20)
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    indices = rng.integers(0, 30, lengths.sum())
    table = rng.normal(size=(30, 7)).astype(np.float32)
    peer = torch.tensor(table, requires_grad=True)
    expected = torch.nn.functional.embedding_bag(
        torch.tensor(indices), peer, torch.tensor(offsets), mode=mode, padding_idx=3
    )
    expected.sum().backward()
    options = {"mode": mode, "padding_idx": 3, "implementation": implementation}

    @jax.jit
    def results(table):
        pool = lambda t: jbag.embedding_bag(t, indices, offsets, **options)
        value, pullback = jax.vjp(pool, table)
        return value, *pullback(jnp.ones_like(value))

    value, to_table = results(jnp.asarray(table))
    oracle.assert_close(value, expected.detach().numpy())
    oracle.assert_close(to_table, peer.grad.numpy())

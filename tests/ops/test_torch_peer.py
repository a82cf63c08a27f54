"""PyTorch as a peer: its own operator samples, and modules moved over and back."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

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
@pytest.mark.parametrize("dtype", ["float32", "float64"])
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


OPTIONS = [
    {"mode": mode, "padding_idx": padding_idx, "include_last_offset": last}
    for mode, padding_idx, last in itertools.product(MODES, (None, -3), (False, True))
] + [{"max_norm": 0.5, "norm_type": 1.0}, {"scale_grad_by_freq": True}]


@pytest.mark.parametrize("options", OPTIONS)
def test_modules_move_over_and_back(options):
    peer = torch.nn.EmbeddingBag(10, 3, **options)
    ids, offsets = [0, 1, 2, 3, 4, 5, 6, 7, 7, 8], [0, 4, 6, 10]
    bag, variables = jbag.from_torch(peer)
    other = jbag.nnx.EmbeddingBag.from_torch(peer)
    expected = peer(torch.tensor(ids), torch.tensor(offsets)).detach().numpy()
    oracle.assert_close(bag.apply(variables, ids, offsets), expected)
    oracle.assert_close(other(ids, offsets), expected)
    for back in (jbag.to_torch(bag, variables), other.to_torch()):
        again = back(torch.tensor(ids), torch.tensor(offsets)).detach().numpy()
        np.testing.assert_array_equal(again, expected)
        for name in (*options, "num_embeddings", "embedding_dim"):
            assert getattr(back, name) == getattr(peer, name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_moves_bit_for_bit(dtype):
    peer = torch.nn.EmbeddingBag(10, 3).to(getattr(torch, dtype))
    bag, variables = jbag.from_torch(peer)
    assert variables["params"]["embedding"].dtype == dtype
    assert torch.equal(jbag.to_torch(bag, variables).weight, peer.weight)


def test_what_moves_is_a_copy():
    peer = torch.nn.EmbeddingBag(10, 3)
    _, variables = jbag.from_torch(peer)
    before = np.array(variables["params"]["embedding"])
    with torch.no_grad():
        peer.weight.zero_()
    np.testing.assert_array_equal(variables["params"]["embedding"], before)


def test_frozen_modules_stay_frozen():
    peer = torch.nn.EmbeddingBag.from_pretrained(torch.ones(10, 3))
    bag, variables = jbag.from_torch(peer)
    assert list(variables) == ["frozen"]
    assert not jbag.to_torch(bag, variables).weight.requires_grad
    other = jbag.nnx.EmbeddingBag.from_torch(peer)
    assert not jax.tree.leaves(nnx.state(other, nnx.Param))
    assert not other.to_torch().weight.requires_grad


def test_what_pytorch_lacks_is_an_error():
    bag = jbag.EmbeddingBag(10, 3, mode="min")
    variables = bag.init(jax.random.key(0), [[1]])
    with pytest.raises(ValueError, match="must be 'sum', 'mean' or 'max' in PyTorch"):
        jbag.to_torch(bag, variables)
    with pytest.raises(
        TypeError, match=r"must be a torch\.nn\.EmbeddingBag; got Linear"
    ):
        jbag.from_torch(torch.nn.Linear(2, 3))

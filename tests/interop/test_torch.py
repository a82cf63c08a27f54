"""Modules moved over to PyTorch and back."""

import itertools

import jax
import numpy as np
import oracle
import pytest
from flax import nnx

import jbag

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
MODES = ("sum", "mean", "max")
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
        TypeError,
        match=r"a torch\.nn\.EmbeddingBag or a torch\.nn\.Embedding; got Linear",
    ):
        jbag.from_torch(torch.nn.Linear(2, 3))


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": -3}, {"max_norm": 0.5, "norm_type": 1.0, "sparse": True}],
)
def test_lookups_move_over_and_back(options):
    peer = torch.nn.Embedding(10, 3, **options)
    ids = np.array([[0, 7], [7, 9]])
    embed, variables = jbag.from_torch(peer)
    other = jbag.nnx.Embed.from_torch(peer)
    assert isinstance(embed, jbag.linen.Embed)
    weight = peer.weight.detach().numpy().copy()
    expected = peer(torch.tensor(ids)).detach().numpy()
    oracle.assert_close(embed.apply(variables, ids), expected)
    oracle.assert_close(other(ids), expected)
    for back in (jbag.to_torch(embed, variables), other.to_torch()):
        assert isinstance(back, torch.nn.Embedding)
        np.testing.assert_array_equal(back.weight.detach().numpy(), weight)
        for name in (*options, "num_embeddings", "embedding_dim"):
            assert getattr(back, name) == getattr(peer, name)


def test_a_frozen_lookup_stays_frozen_and_others_raise():
    embed, variables = jbag.from_torch(
        torch.nn.Embedding.from_pretrained(torch.ones(2, 3))
    )
    assert list(variables) == ["frozen"]
    assert not jbag.to_torch(embed, variables).weight.requires_grad
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Embedding; got Emb"):
        jbag.nnx.Embed.from_torch(torch.nn.EmbeddingBag(2, 3))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.EmbeddingBag; got Emb"):
        jbag.nnx.EmbeddingBag.from_torch(torch.nn.Embedding(2, 3))

"""The embedding bag and lookup as Flax NNX modules, and gradients of NNX modules."""

from jbag.nnx._catch_up import catch_up
from jbag.nnx._embed import Embed
from jbag.nnx._gradient import grad, value_and_grad
from jbag.nnx._modules import EmbeddingBag, EmbeddingBagCollection, Frozen

__all__ = [
    "Embed",
    "EmbeddingBag",
    "EmbeddingBagCollection",
    "Frozen",
    "catch_up",
    "grad",
    "value_and_grad",
]

"""The embedding bag as a Flax NNX module, and gradients of NNX modules."""

from jbag.nnx._gradient import grad, value_and_grad
from jbag.nnx._modules import EmbeddingBag, EmbeddingBagCollection, Frozen

__all__ = [
    "EmbeddingBag",
    "EmbeddingBagCollection",
    "Frozen",
    "grad",
    "value_and_grad",
]

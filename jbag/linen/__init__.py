"""The embedding bag, its collection and the lookup as Flax Linen modules."""

from jbag.linen._embed import Embed
from jbag.linen._modules import (
    EmbeddingBag,
    EmbeddingBagCollection,
    from_torch,
    to_torch,
)

__all__ = [
    "Embed",
    "EmbeddingBag",
    "EmbeddingBagCollection",
    "from_torch",
    "to_torch",
]

"""The embedding bag for JAX: pooled embeddings of ragged bags of ids."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

from jbag._files import atomic_write
from jbag.collection._tables_and_features import Feature, Table
from jbag.interop._load_table import load_table
from jbag.ops._embedding_bag import embedding_bag
from jbag.ops._embedding_lookup import embedding_lookup
from jbag.ops._max_norm import renorm
from jbag.ops._packed_table import PackedTable, pack, pack_like, unpack
from jbag.ops.kernels.huge_pages import to_huge_pages
from jbag.ragged._bags import Bags
from jbag.ragged._bucket_capacity import bucket
from jbag.ragged._offsets import offsets_to_segment_ids, segment_ids_to_offsets
from jbag.sparse._gradient import DenseGradientWarning, grad, value_and_grad
from jbag.sparse._row_sparse import RowSparse

if TYPE_CHECKING:
    __version__: str

    from jbag import (
        data,
        fasttext,
        linen,
        nnx,
        optim,
        sharding,
        sparse,
        text,
        vocabulary,
    )
    from jbag.linen import (
        Embed,
        EmbeddingBag,
        EmbeddingBagCollection,
        from_torch,
        to_torch,
    )

__all__ = [
    "Bags",
    "DenseGradientWarning",
    "Embed",
    "EmbeddingBag",
    "EmbeddingBagCollection",
    "Feature",
    "PackedTable",
    "RowSparse",
    "Table",
    "__version__",
    "atomic_write",
    "bucket",
    "data",
    "embedding_bag",
    "embedding_lookup",
    "fasttext",
    "from_torch",
    "grad",
    "linen",
    "load_table",
    "nnx",
    "offsets_to_segment_ids",
    "optim",
    "pack",
    "pack_like",
    "renorm",
    "segment_ids_to_offsets",
    "sharding",
    "sparse",
    "text",
    "to_huge_pages",
    "to_torch",
    "unpack",
    "value_and_grad",
    "vocabulary",
]

# Flax and Optax take longer to import than the function needs: loaded on use.
_MODULES = (
    "data",
    "fasttext",
    "linen",
    "nnx",
    "optim",
    "sharding",
    "sparse",
    "text",
    "vocabulary",
)
_FROM_LINEN = (
    "Embed",
    "EmbeddingBag",
    "EmbeddingBagCollection",
    "from_torch",
    "to_torch",
)


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"jbag.{name}")
    if name in _FROM_LINEN:
        return getattr(importlib.import_module("jbag.linen"), name)
    if name == "__version__":  # of the installed package, as pyproject.toml has it
        return importlib.metadata.version("jbag")
    raise AttributeError(f"module 'jbag' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

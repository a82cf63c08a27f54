"""The embedding bag for JAX: pooled embeddings of ragged bags of ids."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

from jbag._files import atomic_write as atomic_write
from jbag.collection._stacking import Feature as Feature
from jbag.collection._stacking import Table as Table
from jbag.interop._load_table import load_table as load_table
from jbag.ops._embedding_bag import embedding_bag as embedding_bag
from jbag.ops._max_norm import renorm as renorm
from jbag.ops.kernels.memory_pages import to_huge_pages as to_huge_pages
from jbag.ragged._bags import Bags as Bags
from jbag.ragged._bucket import bucket as bucket
from jbag.ragged._offsets import offsets_to_segment_ids as offsets_to_segment_ids
from jbag.ragged._offsets import segment_ids_to_offsets as segment_ids_to_offsets
from jbag.sparse._gradient import DenseGradientWarning as DenseGradientWarning
from jbag.sparse._gradient import grad as grad
from jbag.sparse._gradient import value_and_grad as value_and_grad
from jbag.sparse._row_sparse import RowSparse as RowSparse

if TYPE_CHECKING:
    __version__: str

    from jbag import data as data
    from jbag import fasttext as fasttext
    from jbag import linen as linen
    from jbag import nnx as nnx
    from jbag import optim as optim
    from jbag import sharding as sharding
    from jbag import sparse as sparse
    from jbag import text as text
    from jbag.linen import EmbeddingBag as EmbeddingBag
    from jbag.linen import EmbeddingBagCollection as EmbeddingBagCollection
    from jbag.linen import from_torch as from_torch
    from jbag.linen import to_torch as to_torch

# Flax and Optax take longer to import than the function needs: loaded on use.
_MODULES = ("data", "fasttext", "linen", "nnx", "optim", "sharding", "sparse", "text")
_FROM_LINEN = ("EmbeddingBag", "EmbeddingBagCollection", "from_torch", "to_torch")


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"jbag.{name}")
    if name in _FROM_LINEN:
        return getattr(importlib.import_module("jbag.linen"), name)
    if name == "__version__":  # of the installed package, as pyproject.toml has it
        return importlib.metadata.version("jbag")
    raise AttributeError(f"module 'jbag' has no attribute {name!r}")


def __dir__() -> list[str]:
    own = {"TYPE_CHECKING", "annotations", "importlib"}
    return sorted({*globals(), *_MODULES, *_FROM_LINEN, "__version__"} - own)

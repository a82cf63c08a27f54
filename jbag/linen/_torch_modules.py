"""Conversion of Flax Linen modules from and to PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flax.linen as nn

from jbag.interop import _torch
from jbag.linen._embed import Embed
from jbag.linen._modules import EmbeddingBag

if TYPE_CHECKING:
    import torch


def from_torch(
    module: torch.nn.EmbeddingBag | torch.nn.Embedding,
) -> tuple[Any, dict[str, Any]]:
    """Return the Linen module and the variables that equal a PyTorch module.

    Args:
      module: a `torch.nn.EmbeddingBag` or a `torch.nn.Embedding`. Its state is copied;
        a weight that requires no gradient comes frozen.

    Returns:
      (module, variables) of an `EmbeddingBag` or an `Embed`:
      `module.apply(variables, indices, offsets)`, or `module.apply(variables, ids)`,
      gives what the PyTorch module gives.

    Raises:
      TypeError: `module` is neither of these.

    Example:
      >>> module = torch.nn.EmbeddingBag(10, 3)  # doctest: +SKIP
      >>> bag, variables = jbag.from_torch(module)  # doctest: +SKIP
    """
    table, options = _torch.read(module, "EmbeddingBag", "Embedding")
    kind = EmbeddingBag if "mode" in options else Embed
    own = kind(param_dtype=table.dtype, **options)
    return own, {"frozen" if own.freeze else "params": {"embedding": table}}


def to_torch(
    module: EmbeddingBag | Embed, variables: Any
) -> torch.nn.EmbeddingBag | torch.nn.Embedding:
    """Return the PyTorch module that equals a Linen module with its variables.

    Args:
      module: `dtype`, `implementation` and initializers have no counterpart there.
      variables: what `module.init` returned, or training made of it.

    Raises:
      ValueError: PyTorch lacks the module's mode, or its combination of options.

    Example:
      >>> module = jbag.to_torch(bag, variables)  # doctest: +SKIP
    """
    variables = nn.meta.unbox(variables)
    table = variables["frozen" if module.freeze else "params"]["embedding"]
    if isinstance(module, Embed):
        return _torch.write_embedding(table, module)
    return _torch.write(table, module)

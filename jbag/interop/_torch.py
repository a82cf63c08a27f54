"""Conversion from and to `torch.nn.EmbeddingBag` and `torch.nn.Embedding`.

PyTorch is imported only by the functions that need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jbag.ops._packed_table import AnyTable, unpack

if TYPE_CHECKING:
    import torch

_LOOKUP_OPTIONS = (
    "padding_idx",
    "max_norm",
    "norm_type",
    "scale_grad_by_freq",
    "sparse",
)
# The options that the modules share with those of PyTorch, by the names there.
_SHARED_OPTIONS = {
    "EmbeddingBag": ("mode", "include_last_offset", *_LOOKUP_OPTIONS),
    "Embedding": _LOOKUP_OPTIONS,
}


def read(module: Any, *kinds: str) -> tuple[Float[Array, "V D"], dict[str, Any]]:
    """Return a copy of a module's table, and the options of the module of jbag.

    `kinds` are names of modules of PyTorch; the module must be of one of them.
    """
    import torch

    found = [kind for kind in kinds if isinstance(module, getattr(torch.nn, kind))]
    if not found:
        expected = " or ".join(f"a torch.nn.{kind}" for kind in kinds)
        raise TypeError(f"`module` must be {expected}; got {type(module).__name__}.")
    table = to_numpy(module.weight)
    options = {name: getattr(module, name) for name in _SHARED_OPTIONS[found[0]]}
    options |= {
        "num_embeddings": module.num_embeddings,
        "features": module.embedding_dim,
        "freeze": not module.weight.requires_grad,
    }
    return jnp.array(table), options


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as an array that shares the memory of a CPU tensor."""
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:  # NumPy has no bfloat16
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def write(table: AnyTable, module: Any) -> torch.nn.EmbeddingBag:
    """Return a PyTorch module with a copy of the table and the module's options."""
    if module.mode not in ("sum", "mean", "max"):
        raise ValueError(
            f"`mode` must be 'sum', 'mean' or 'max' in PyTorch; got {module.mode!r}."
        )
    if module.mode == "max" and module.scale_grad_by_freq:
        raise ValueError(
            "`scale_grad_by_freq` must be False with mode 'max' in PyTorch; got True."
        )
    return _write("EmbeddingBag", table, module)


def write_embedding(table: AnyTable, module: Any) -> torch.nn.Embedding:
    """Return a `torch.nn.Embedding` with a copy of the table and the options."""
    return _write("Embedding", table, module)


def _write(kind: str, table: AnyTable, module: Any) -> Any:
    import torch

    host = np.array(jax.device_get(unpack(table)))
    if host.dtype == jnp.bfloat16:
        weight = torch.from_numpy(host.view(np.int16)).view(torch.bfloat16)
    else:
        weight = torch.from_numpy(host)
    options = {name: getattr(module, name) for name in _SHARED_OPTIONS[kind]}
    rows, features = weight.shape
    result = getattr(torch.nn, kind)(rows, features, _weight=weight, **options)
    result.weight.requires_grad_(not module.freeze)
    return result

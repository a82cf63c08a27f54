"""Conversion from and to `torch.nn.EmbeddingBag`.

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

_SHARED_OPTIONS = (
    "mode",
    "padding_idx",
    "include_last_offset",
    "max_norm",
    "norm_type",
    "scale_grad_by_freq",
    "sparse",
)


def read(module: torch.nn.EmbeddingBag) -> tuple[Float[Array, "V D"], dict[str, Any]]:
    """Return a copy of the module's table, and the options of `jbag.EmbeddingBag`."""
    import torch

    if not isinstance(module, torch.nn.EmbeddingBag):
        raise TypeError(
            f"`module` must be a torch.nn.EmbeddingBag; got {type(module).__name__}."
        )
    table = to_numpy(module.weight)
    options = {name: getattr(module, name) for name in _SHARED_OPTIONS}
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
    import torch

    if module.mode not in ("sum", "mean", "max"):
        raise ValueError(
            f"`mode` must be 'sum', 'mean' or 'max' in PyTorch; got {module.mode!r}."
        )
    if module.mode == "max" and module.scale_grad_by_freq:
        raise ValueError(
            "`scale_grad_by_freq` must be False with mode 'max' in PyTorch; got True."
        )
    host = np.array(jax.device_get(unpack(table)))
    if host.dtype == jnp.bfloat16:
        weight = torch.from_numpy(host.view(np.int16)).view(torch.bfloat16)
    else:
        weight = torch.from_numpy(host)
    options = {name: getattr(module, name) for name in _SHARED_OPTIONS}
    rows, features = weight.shape
    result = torch.nn.EmbeddingBag(rows, features, _weight=weight, **options)
    result.weight.requires_grad_(not module.freeze)
    return result

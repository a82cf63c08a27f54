"""The tokenizers, in order of preference."""

from __future__ import annotations

from types import ModuleType

from jbag.text import _tokenizer_cpp as cpp
from jbag.text import _tokenizer_python as python

TOKENIZERS: dict[str, ModuleType] = {"cpp": cpp, "python": python}


def tokenizer(implementation: str | None) -> ModuleType:
    """Return the tokenizer of that name; None returns the first available one.

    Raises:
      ValueError: the name is unknown, or the tokenizer is not available.
    """
    if implementation is None:
        return next(module for module in TOKENIZERS.values() if not module.MISSING)
    if implementation not in TOKENIZERS:
        names = ", ".join(map(repr, TOKENIZERS))
        raise ValueError(
            f"`implementation` must be None or one of {names}; got {implementation!r}."
        )
    if TOKENIZERS[implementation].MISSING:
        raise ValueError(
            f"`implementation` cannot be {implementation!r}: "
            f"{TOKENIZERS[implementation].MISSING}."
        )
    return TOKENIZERS[implementation]

"""The readers of texts, the best first."""

from __future__ import annotations

from types import ModuleType

from jbag.text import _tokenizer_cpp as cpp
from jbag.text import _tokenizer_python as python

READERS: dict[str, ModuleType] = {"cpp": cpp, "python": python}


def reader(implementation: str | None) -> ModuleType:
    """Return the best reader that is here, or the one of that name.

    Raises:
      ValueError: there is no such reader, or it isn't here.
    """
    if implementation is None:
        return next(module for module in READERS.values() if not module.MISSING)
    if implementation not in READERS:
        names = ", ".join(map(repr, READERS))
        raise ValueError(
            f"`implementation` must be None or one of {names}; got {implementation!r}."
        )
    if READERS[implementation].MISSING:
        raise ValueError(
            f"`implementation` can't be {implementation!r}: "
            f"{READERS[implementation].MISSING}."
        )
    return READERS[implementation]

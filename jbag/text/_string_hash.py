"""`hash_strings`: strings to 64-bit ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import numpy as np

from jbag.text._tokenizer_choice import tokenizer

StringArray = np.ndarray | Sequence[Any]


def hash_strings(strings: Any, *, implementation: str | None = None) -> np.ndarray:
    r"""Hash strings to 64 bits by FNV-1a.

    .. math:: h_0 = \mathtt{cbf29ce484222325}_{16}, \qquad
        h_{i + 1} = (h_i \oplus b_i) \cdot \mathtt{100000001b3}_{16} \bmod 2^{64}

    where :math:`b_i` are the bytes of the string in UTF-8. The hash doesn't depend on
    the platform, the process or the version of jbag. A million distinct strings have a
    collision with a probability of about 3e-8.

    Args:
      strings: a list of `str` or `bytes`, nested lists of equal lengths, or a NumPy
        array of them (dtypes "U", "S", "T" and object). `bytes` are hashed as they are.
        As in NumPy, an element of dtype "U" or "S" has no zero characters at its end.
      implementation: "cpp", "python" or None, which is C++ if it is installed. Both
        give the same hashes.

    Returns:
      The hashes, a NumPy array of uint64 with the shape of `strings`.

    Raises:
      TypeError: an element is neither `str` nor `bytes`.
      ValueError: `implementation` is not available.

    References:
      Fowler, Noll, Vo and Eastlake, The FNV Non-Cryptographic Hash Algorithm, 2012.

    Example:
      >>> [hex(h) for h in jbag.text.hash_strings(["a", b"a", "foobar"])]
      ['0xaf63dc4c8601ec8c', '0xaf63dc4c8601ec8c', '0x85944171f73967e8']
    """
    hasher = tokenizer(implementation)
    if isinstance(strings, str | bytes) or not isinstance(strings, Iterable):
        raise TypeError(
            f"`strings` must be a list or an array of strings; got {strings!r}."
        )
    array = (
        strings if isinstance(strings, np.ndarray) else np.array(list(strings), object)
    )
    if array.dtype.kind in "US":
        native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
        return hasher.hash_fixed(native.ravel()).reshape(array.shape)
    encoded = [_encode(x, at) for at, x in enumerate(array.ravel().tolist())]
    return hasher.hash_bytes(encoded).reshape(array.shape)


def holds_strings(x: Any) -> TypeGuard[StringArray]:
    """Return whether host data holds strings rather than numbers."""
    if isinstance(x, np.ndarray) and x.dtype.kind != "O":
        return x.dtype.kind in "UST"
    while isinstance(x, list | tuple | np.ndarray) and len(x) > 0:
        x = x[0]
    return isinstance(x, str | bytes)


def _encode(x: Any, at: int) -> bytes:
    if isinstance(x, str):
        return x.encode("utf-8", "surrogatepass")
    if not isinstance(x, bytes):
        raise TypeError(
            f"`strings` must hold str or bytes; got {x!r} at position {at}."
        )
    return x

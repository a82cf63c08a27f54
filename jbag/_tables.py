"""Tables from the files of other libraries: PyTorch, safetensors, NumPy.

Those libraries are imported where a file of theirs is to be read, not before.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jbag import _torch
from jbag._validation import TABLE_DTYPES

_MANY_NAMES = 20


class _Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def is_table(self) -> bool:
        return len(self.shape) == 2 and self.dtype in TABLE_DTYPES


def load_table(path: str | os.PathLike[str], name: str | None = None) -> np.ndarray:
    """Read one table of embeddings from a file, and nothing else of it.

    The file's ending says what it is: `.safetensors`, which takes the package
    safetensors; `.pt`, `.pth` or `.bin`, written by `torch.save`, which takes PyTorch,
    and of which nothing is run; `.npz` and `.npy`.

    Args:
      path: of the file.
      name: of the table in the file. Where dictionaries lie in dictionaries, their keys
        are joined by dots: "state_dict.bag.weight". None for the only matrix there is.

    Returns:
      [V, D], on the host, of the dtype in the file: float32, float64, float16 or
      bfloat16.

    Raises:
      ImportError: the package that reads such a file isn't installed.
      OSError: the file can't be read.
      TypeError: what has that name isn't floating.
      ValueError: the file's ending isn't known or belies what it holds, or there is no
        such name, or it is no matrix, or there is no name and there are several.

    Example:
      >>> path = directory / "model.npz"
      >>> numpy.savez(path, embedding=numpy.ones((10, 2)), bias=numpy.zeros(10))
      >>> jbag.load_table(path).shape
      (10, 2)
      >>> jbag.load_table(path, "bias")
      Traceback (most recent call last):
      ValueError: `name` must be that of a matrix [V, D]; got 'bias' of shape (10,).
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _READERS:
        raise ValueError(
            f"`path` must end with one of {', '.join(_READERS)}; got "
            f"{os.fspath(path)!r}. For fastText's models and word vectors there are "
            "jbag.fasttext.load and jbag.fasttext.load_vectors."
        )
    with _READERS[suffix](path) as tensors:
        return _choose(tensors, name, os.fspath(path)).read()


def _choose(tensors: Mapping[str, _Tensor], name: str | None, path: str) -> _Tensor:
    if name is None:
        tables = [tensor for tensor in tensors.values() if tensor.is_table]
        if len(tables) == 1:
            return tables[0]
        raise ValueError(
            f"`name` must say which table is meant where a file doesn't hold just one; "
            f"{path} holds {_describe(tensors)}."
        )
    if name not in tensors:
        raise ValueError(
            f"`name` must be one that {path} holds; got {name!r}, of "
            f"{_describe(tensors)}."
        )
    tensor = tensors[name]
    if len(tensor.shape) != 2:
        raise ValueError(
            f"`name` must be that of a matrix [V, D]; got {name!r} of shape "
            f"{tensor.shape}."
        )
    if not tensor.is_table:
        raise TypeError(
            f"`name` must be that of a matrix of {', '.join(TABLE_DTYPES)}; got "
            f"{name!r} of {tensor.dtype}."
        )
    return tensor


def _describe(tensors: Mapping[str, _Tensor]) -> str:
    if not tensors:
        return "no tensors"
    all_names = [f"{name!r} {t.dtype}{list(t.shape)}" for name, t in tensors.items()]
    more = len(all_names) - _MANY_NAMES
    names = ", ".join(all_names[:_MANY_NAMES])
    return f"{names} and {more} more" if more > 0 else names


def _import(package: str, path: str | os.PathLike[str]) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{os.fspath(path)} is read by {package}: pip install {package}"
        ) from error


@contextlib.contextmanager
def _open_numpy(path: str | os.PathLike[str]) -> Iterator[dict[str, _Tensor]]:
    try:
        file = np.load(path, allow_pickle=False)
        arrays = {"": file} if isinstance(file, np.ndarray) else dict(file)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{os.fspath(path)} holds no arrays: {error}") from error
    if not isinstance(file, np.ndarray):
        file.close()
    yield {
        name: _Tensor(
            array.dtype.name, array.shape, functools.partial(np.asarray, array)
        )
        for name, array in arrays.items()
    }


@contextlib.contextmanager
def _open_safetensors(path: str | os.PathLike[str]) -> Iterator[dict[str, _Tensor]]:
    safetensors = _import("safetensors", path)
    try:
        file = safetensors.safe_open(os.fspath(path), framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} holds no tensors: {error}") from error
    dtypes = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    with file:
        tensors = {}
        for name in file.keys():  # noqa: SIM118  (it is no dictionary)
            part = file.get_slice(name)
            tensors[name] = _Tensor(
                dtypes.get(part.get_dtype(), part.get_dtype()),
                tuple(part.get_shape()),
                functools.partial(file.get_tensor, name),
            )
        yield tensors


@contextlib.contextmanager
def _open_torch(path: str | os.PathLike[str]) -> Iterator[dict[str, _Tensor]]:
    torch = _import("torch", path)
    # Files of PyTorch before 1.6 aren't zipped, and can't be mapped.
    mapped = zipfile.is_zipfile(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{os.fspath(path)} must hold tensors, in dictionaries or alone, as "
            "torch.save writes them; it holds something else, of which nothing is run."
        ) from error
    yield {
        name: _Tensor(
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
            functools.partial(_torch.to_numpy, tensor),
        )
        for name, tensor in _leaves(state, ())
        if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
    }


def _leaves(tree: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield what lies in dictionaries, with the keys on the way to it."""
    if not isinstance(tree, Mapping):
        yield ".".join(keys), tree
        return
    for key, value in tree.items():
        yield from _leaves(value, (*keys, str(key)))


_READERS = {
    ".safetensors": _open_safetensors,
    **dict.fromkeys((".pt", ".pth", ".bin"), _open_torch),
    **dict.fromkeys((".npz", ".npy"), _open_numpy),
}

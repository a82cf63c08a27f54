"""`load_table`: tables from the files of PyTorch, safetensors and NumPy.

Those libraries are imported where a file of theirs is to be read, not before.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jbag._files import refusing
from jbag._validation import TABLE_DTYPES
from jbag.interop import _torch
from jbag.interop._numpy_files import Archive, native_dtype, read_npy

_MANY_NAMES = 20
_MOST_TENSORS = 1_000_000
_MOST_KEYS = 100


class _Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def is_table(self) -> bool:
        return len(self.shape) == 2 and self.dtype in TABLE_DTYPES


class _NotFloatingError(TypeError, ValueError):
    """A table of another dtype: by what was asked for, or what the file holds."""


# By name; None where two tensors have the same.
_Tensors = Mapping[str, _Tensor | None]


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
      bfloat16, in the machine's byte order. It doesn't depend on the file any more.

    Raises:
      ImportError: the package that reads such a file isn't installed.
      OSError: the file can't be read.
      TypeError, which is a ValueError, too: what has that name isn't floating.
      ValueError: the file's ending isn't known, or belies what it holds, or the file is
        broken, or there is no such name, or it is no matrix, or two tensors have it, or
        there is no name and there are several.

    Example:
      >>> path = directory / "model.npz"
      >>> numpy.savez(path, embedding=numpy.ones((10, 2)), bias=numpy.zeros(10))
      >>> jbag.load_table(path).shape
      (10, 2)
      >>> jbag.load_table(path, "bias")
      Traceback (most recent call last):
      ValueError: `name` must be that of a matrix [V, D]; got 'bias' of shape ...
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _READERS:
        raise ValueError(
            f"`path` must end with one of {', '.join(_READERS)}; got "
            f"{os.fspath(path)!r}. For fastText's models and word vectors there are "
            "jbag.fasttext.load and jbag.fasttext.load_vectors."
        )
    reader, finding = _READERS[suffix]
    with contextlib.ExitStack() as stack:
        with refusing(path, finding):
            tensors = stack.enter_context(reader(path))
        tensor = _choose(tensors, name, os.fspath(path))
        with refusing(path, finding):
            return tensor.read()


def _choose(tensors: _Tensors, name: str | None, path: str) -> _Tensor:
    if name is None:
        tables = [tensor for tensor in tensors.values() if tensor and tensor.is_table]
        if len(tables) == 1 and None not in tensors.values():
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
    if tensor is None:
        raise ValueError(
            f"`name` must be that of one tensor; {path} holds two of the name {name!r}."
        )
    if len(tensor.shape) != 2:
        raise ValueError(
            f"`name` must be that of a matrix [V, D]; got {name!r} of shape "
            f"{tensor.shape} in {path}."
        )
    if not tensor.is_table:
        raise _NotFloatingError(
            f"`name` must be that of a matrix of {', '.join(TABLE_DTYPES)}; got "
            f"{name!r} of {tensor.dtype} in {path}."
        )
    return tensor


def _describe(tensors: _Tensors) -> str:
    if not tensors:
        return "no tensors"
    all_names = [
        f"{name!r} {t.dtype}{list(t.shape)}" if t else f"{name!r} twice"
        for name, t in itertools.islice(tensors.items(), _MANY_NAMES)
    ]
    more = len(tensors) - _MANY_NAMES
    names = ", ".join(all_names)
    return f"{names} and {more} more" if more > 0 else names


def _import(package: str, path: str | os.PathLike[str]) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{os.fspath(path)} is read by {package}: pip install {package}"
        ) from error


@contextlib.contextmanager
def _open_npy(path: str | os.PathLike[str]) -> Iterator[_Tensors]:
    with Path(path).open("rb") as file:
        array = read_npy(file)
        yield {"": _Tensor(array.dtype.name, array.shape, lambda: array)}


@contextlib.contextmanager
def _open_npz(path: str | os.PathLike[str]) -> Iterator[_Tensors]:
    with Path(path).open("rb") as file:
        archive = Archive(file)
        tensors = {}
        for name in archive.names():
            header = archive.header(name)
            dtype = native_dtype(header.dtype).name
            read = functools.partial(archive.array, name)
            tensors[name] = _Tensor(dtype, header.shape, read)
        yield tensors


@contextlib.contextmanager
def _open_safetensors(path: str | os.PathLike[str]) -> Iterator[_Tensors]:
    safetensors = _import("safetensors", path)
    Path(path).open("rb").close()  # or what is wrong with the path is told vaguely
    dtypes = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    with safetensors.safe_open(os.fspath(path), framework="numpy") as file:
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
def _open_torch(path: str | os.PathLike[str]) -> Iterator[_Tensors]:
    torch = _import("torch", path)
    # Files of PyTorch before 1.6 aren't zipped, and can't be mapped.
    mapped = zipfile.is_zipfile(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:  # of which the message is a page
        raise ValueError(
            "it must hold tensors, in dictionaries or alone; it holds something else, "
            "of which nothing is run"
        ) from error
    tensors: dict[str, _Tensor | None] = {}
    for name, tensor in _leaves(state):
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            continue
        if len(tensors) == _MOST_TENSORS:
            raise ValueError(f"there are more than {_MOST_TENSORS} tensors in it")
        dtype = str(tensor.dtype).removeprefix("torch.")
        own = _Tensor(dtype, tuple(tensor.shape), functools.partial(_copy, tensor))
        tensors[name] = None if name in tensors else own
    yield tensors


def _copy(tensor: Any) -> np.ndarray:
    """Return a tensor's numbers, in memory of their own: the tensor's is the file."""
    held = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > held:
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} has {held} bytes: its rows are "
            "the same ones"
        )
    return np.array(_torch.to_numpy(tensor), order="C")


def _leaves(state: Any) -> Iterator[tuple[str, Any]]:
    """Yield what lies in dictionaries, with the keys on the way to it."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), state)]
    count = 0
    while waiting:
        keys, tree = waiting.pop()
        if not isinstance(tree, Mapping):
            yield ".".join(keys), tree
            continue
        count += len(tree)
        if len(keys) == _MOST_KEYS or count > _MOST_TENSORS:
            raise ValueError("there are too many dictionaries in it")
        waiting += [((*keys, str(key)), x) for key, x in tree.items()][::-1]


_TORCH = (_open_torch, "holds no tensors as torch.save writes them")
_READERS = {
    ".safetensors": (_open_safetensors, "holds no tensors"),
    **dict.fromkeys((".pt", ".pth", ".bin"), _TORCH),
    ".npz": (_open_npz, "holds no arrays"),
    ".npy": (_open_npy, "holds no array"),
}

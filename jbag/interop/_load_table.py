"""`load_table`: the reader of tables from PyTorch, safetensors and NumPy files.

PyTorch and safetensors are imported only to read their files.
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
    """A tensor is not floating: a wrong name (TypeError) or file (ValueError)."""


# Tensors by name; None for a duplicate name.
_Tensors = Mapping[str, _Tensor | None]


def load_table(path: str | os.PathLike[str], name: str | None = None) -> np.ndarray:
    """Read one embedding table from a file.

    The suffix selects the format: `.safetensors` (requires safetensors), `.pt`, `.pth`
    or `.bin` of `torch.save` (requires PyTorch; no pickled code runs), `.npz` or
    `.npy`. Other tensors of the file are not read.

    Args:
      path: the path of the file.
      name: the name of the table in the file. The keys of nested dictionaries are
        joined by dots: "state_dict.bag.weight". None selects the only matrix.

    Returns:
      [V, D] on the host, in the file's dtype (float32, float64, float16 or bfloat16)
      and in native byte order. The array does not reference the file.

    Raises:
      ImportError: the package for the format is not installed.
      OSError: the file cannot be read.
      TypeError: the named tensor is not floating. The error is also a ValueError.
      ValueError: the suffix is unknown, the file is broken or of another format, the
        name is unknown, duplicate or not that of a matrix, or no name is given and the
        file does not hold exactly one matrix.

    Example:
      >>> path = directory / "model.npz"
      >>> numpy.savez(path, embedding=numpy.ones((10, 2)), bias=numpy.zeros(10))
      >>> jbag.load_table(path).shape
      (10, 2)
      >>> jbag.load_table(path, "bias")
      Traceback (most recent call last):
      ValueError: `name` must be the name of a matrix [V, D]; got 'bias' of shape ...
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _READERS:
        raise ValueError(
            f"`path` must end with one of {', '.join(_READERS)}; got "
            f"{os.fspath(path)!r}. Use jbag.fasttext.load for fastText models and "
            "jbag.fasttext.load_vectors for word vectors."
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
            f"`name` must be given unless the file holds exactly one table; {path} "
            f"holds {_describe(tensors)}."
        )
    if name not in tensors:
        raise ValueError(
            f"`name` must be the name of a tensor in {path}; got {name!r}. It holds "
            f"{_describe(tensors)}."
        )
    tensor = tensors[name]
    if tensor is None:
        raise ValueError(
            f"`name` must be unique; {path} holds two of the name {name!r}."
        )
    if len(tensor.shape) != 2:
        raise ValueError(
            f"`name` must be the name of a matrix [V, D]; got {name!r} of shape "
            f"{tensor.shape} in {path}."
        )
    if not tensor.is_table:
        raise _NotFloatingError(
            f"`name` must be the name of a matrix of {', '.join(TABLE_DTYPES)}; got "
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
            f"Reading {os.fspath(path)} requires {package}: pip install {package}"
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
    Path(path).open("rb").close()  # raises an OSError with the path
    dtypes = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    with safetensors.safe_open(os.fspath(path), framework="numpy") as file:
        tensors = {}
        for name in file.keys():  # noqa: SIM118  (not a dictionary)
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
    # Files of PyTorch before 1.6 are not zip files; mmap needs zip files.
    mapped = zipfile.is_zipfile(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:  # its message is long
        raise ValueError(
            "it must hold tensors, in dictionaries or alone; got other objects, which "
            "are not loaded"
        ) from error
    tensors: dict[str, _Tensor | None] = {}
    for name, tensor in _leaves(state):
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            continue
        if len(tensors) == _MOST_TENSORS:
            raise ValueError(f"it must hold at most {_MOST_TENSORS} tensors")
        dtype = str(tensor.dtype).removeprefix("torch.")
        own = _Tensor(dtype, tuple(tensor.shape), functools.partial(_copy, tensor))
        tensors[name] = None if name in tensors else own
    yield tensors


def _copy(tensor: Any) -> np.ndarray:
    """Copy a memory-mapped tensor to an array."""
    held = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > held:
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} has only {held} bytes: its rows "
            "share memory"
        )
    return np.array(_torch.to_numpy(tensor), order="C")


def _leaves(state: Any) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dictionaries, with their joined keys."""
    pending: list[tuple[tuple[str, ...], Any]] = [((), state)]
    count = 0
    while pending:
        keys, tree = pending.pop()
        if not isinstance(tree, Mapping):
            yield ".".join(keys), tree
            continue
        count += len(tree)
        if len(keys) == _MOST_KEYS or count > _MOST_TENSORS:
            raise ValueError("it holds too many dictionaries")
        pending += [((*keys, str(key)), x) for key, x in tree.items()][::-1]


_TORCH = (_open_torch, "holds no tensors of torch.save")
_READERS = {
    ".safetensors": (_open_safetensors, "holds no tensors"),
    **dict.fromkeys((".pt", ".pth", ".bin"), _TORCH),
    ".npz": (_open_npz, "holds no arrays"),
    ".npy": (_open_npy, "holds no array"),
}

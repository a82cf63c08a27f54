"""Arrays from NumPy's `.npy` and `.npz` files, of which nothing else is read.

A header is checked against the bytes that follow it before anything is allocated, which
NumPy's own reader doesn't do.
"""

from __future__ import annotations

import math
import os
import zipfile
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.lib import format as npy

from jbag._files import check_declared

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_CHUNK = 1 << 18  # bytes: they stay in the cache while they are expanded and copied


class Header(NamedTuple):
    """What an array is of."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran_order: bool

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Archive:
    """The arrays of an open `.npz` file, by name."""

    def __init__(self, file: IO[bytes]) -> None:
        self._size = os.fstat(file.fileno()).st_size
        self._zip = zipfile.ZipFile(file)
        self._members: dict[str, zipfile.ZipInfo] = {}
        for info in self._zip.infolist():
            if not info.filename.endswith(".npy"):
                continue
            name = info.filename.removesuffix(".npy")
            if name in self._members:
                raise ValueError(f"it has two arrays of the name {name!r}")
            self._members[name] = info

    def names(self) -> list[str]:
        return list(self._members)

    def header(self, name: str) -> Header:
        """Read the dtype and shape of an array."""
        with self._open(name) as stream:
            return _read_header(stream)

    def array(self, name: str) -> np.ndarray:
        """Read an array."""
        size = self._members[name].file_size
        check_declared(size, self._size, f"{name!r}, expanded,")
        with self._open(name) as stream:
            return _read(stream, size)

    def _open(self, name: str) -> IO[bytes]:
        info = self._members[name]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name!r} is compressed in a way that NumPy never does")
        return self._zip.open(info)


def read_npy(file: IO[bytes]) -> np.ndarray:
    """Read the array of an open `.npy` file."""
    return _read(file, os.fstat(file.fileno()).st_size)


def _read_header(stream: IO[bytes]) -> Header:
    version = npy.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"the version of its format is {version}")
    shape, fortran_order, dtype = _HEADERS[version](stream)
    if dtype.hasobject:
        raise ValueError("it holds Python's objects, which are not read")
    if any(size < 0 for size in shape):
        raise ValueError(f"its shape is {shape}")
    return Header(dtype, shape, fortran_order)


def _read(stream: IO[bytes], size: int) -> np.ndarray:
    """Read an array, of the machine's byte order, from a stream of so many bytes."""
    header = _read_header(stream)
    left = size - stream.tell()
    if header.num_bytes != left:
        raise ValueError(
            f"an array of {header.dtype}{list(header.shape)} takes {header.num_bytes} "
            f"bytes; {left} follow"
        )
    numbers = np.empty(header.num_bytes, np.uint8)
    at, view = 0, numbers.data
    while at < len(view):
        count = stream.readinto(view[at : at + _CHUNK])  # type: ignore[attr-defined]
        if not count:
            raise ValueError(f"an array ends after {at} of {len(view)} bytes")
        at += count
    stream.read(1)  # At its end, a member of an archive is checked against its sum.
    array = numbers.view(header.dtype)
    shape = header.shape[::-1] if header.fortran_order else header.shape
    array = array.reshape(shape)
    array = np.ascontiguousarray(array.T) if header.fortran_order else array
    return _native(array)


def _native(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.dtype("V2"):  # as which NumPy writes bfloat16
        return array.view(jnp.bfloat16)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def native_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype as which an array of the file's dtype is read."""
    return _native(np.empty(0, dtype)).dtype

"""The reader of arrays from NumPy's `.npy` and `.npz` files.

It checks a header against the size of the data before it allocates, unlike NumPy's
reader.
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
_CHUNK = 1 << 18  # bytes: decompressed and copied within the cache


class Header(NamedTuple):
    """The dtype, shape and order of an array."""

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
            raise ValueError(
                f"{name!r} must be stored or deflated; got type {info.compress_type}"
            )
        return self._zip.open(info)


def read_npy(file: IO[bytes]) -> np.ndarray:
    """Read the array of an open `.npy` file."""
    return _read(file, os.fstat(file.fileno()).st_size)


def _read_header(stream: IO[bytes]) -> Header:
    version = npy.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"its format version must be 1.0 or 2.0; got {version}")
    shape, fortran_order, dtype = _HEADERS[version](stream)
    if dtype.hasobject:
        raise ValueError("it must hold no Python objects")
    if any(size < 0 for size in shape):
        raise ValueError(f"its shape must not be negative; got {shape}")
    return Header(dtype, shape, fortran_order)


def _read(stream: IO[bytes], size: int) -> np.ndarray:
    """Read an array, in native byte order, from a stream of `size` bytes."""
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
    stream.read(1)  # reading to the end checks the CRC
    array = numbers.view(header.dtype)
    shape = header.shape[::-1] if header.fortran_order else header.shape
    array = array.reshape(shape)
    array = np.ascontiguousarray(array.T) if header.fortran_order else array
    return _native(array)


def _native(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.dtype("V2"):  # NumPy's form of bfloat16
        return array.view(jnp.bfloat16)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def native_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of the array that is read for a dtype in a file."""
    return _native(np.empty(0, dtype)).dtype

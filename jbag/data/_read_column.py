"""Read a column of raw ids: lists, NumPy, pandas, Arrow, `Bags`.

pandas and pyarrow are used if the caller has imported them, and never imported here.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from jbag.data._id_column import Column, from_array, from_list
from jbag.ragged._bags import Bags


def read_column(name: str, column: Any) -> list[Column]:
    """Return the parts of a column, one after another; there is at least one.

    Raises:
      TypeError: it is no column, or it holds neither integers, strings nor bytes.
      ValueError: its lists are nested deeper, or an integer exceeds 64 bits.
    """
    arrow, pandas = sys.modules.get("pyarrow"), sys.modules.get("pandas")
    if isinstance(column, Bags):
        return [_from_bags(name, column)]
    if arrow is not None and isinstance(column, arrow.Array | arrow.ChunkedArray):
        return _from_arrow(name, column, arrow)
    if pandas is not None and isinstance(
        column, pandas.Series | pandas.Index | pandas.api.extensions.ExtensionArray
    ):
        return _from_pandas(name, column, pandas)
    if isinstance(column, list | tuple):
        return [from_list(name, list(column))]
    if isinstance(column, np.ndarray):
        return [from_array(name, column)]
    if hasattr(column, "dtype") and hasattr(column, "__array__"):
        return [from_array(name, np.asarray(column))]
    raise TypeError(
        f"`{name}` must be a list, an array, a pandas Series, an Arrow array or Bags; "
        f"got {type(column).__name__}."
    )


def _from_bags(name: str, bags: Bags) -> Column:
    bags.check_single()
    lengths = np.asarray(bags.lengths)
    used = int(np.asarray(bags.offsets)[-1])
    ids = from_array(name, np.asarray(bags.indices)[:used])
    return ids._replace(lengths=lengths)


def _from_arrow(name: str, column: Any, arrow: Any) -> list[Column]:
    if not isinstance(column, arrow.ChunkedArray):
        return [_from_arrow_array(name, column, arrow)]
    chunks = column.chunks or [arrow.array([], column.type)]
    return [_from_arrow_array(name, chunk, arrow) for chunk in chunks]


def _from_arrow_array(name: str, array: Any, arrow: Any) -> Column:
    types, own = arrow.types, array.type
    if isinstance(own, arrow.BaseExtensionType):
        return _from_arrow_array(name, array.storage, arrow)
    if types.is_nested(own) and getattr(own, "num_fields", 0) == 1:
        return _from_arrow_lists(name, array, arrow)
    if types.is_dictionary(own):
        values = _from_arrow_array(name, array.dictionary, arrow)
        codes = _to_numpy(array.indices.cast(arrow.int64()).fill_null(-1))
        return _coded(values, codes)
    if types.is_integer(own):
        valid = _to_numpy(array.is_valid()) if array.null_count else None
        return from_array(name, _to_numpy(array.fill_null(0)), valid)
    if types.is_floating(own):
        return from_array(name, _to_numpy(array))  # NaN for a null
    if types.is_null(own):
        return from_list(name, array.to_pylist())
    strings = types.is_string(own) or types.is_large_string(own)
    if strings or types.is_string_view(own):
        array = array.cast(arrow.large_string())
    elif any(
        is_type(own)
        for is_type in (
            types.is_binary,
            types.is_large_binary,
            types.is_binary_view,
            types.is_fixed_size_binary,
        )
    ):
        array = array.cast(arrow.large_binary())
    else:
        raise TypeError(f"`{name}` must hold integers or strings; got {own} of Arrow.")
    # Only the distinct ids become Python objects.
    encoded = array.dictionary_encode()
    values = from_list(name, encoded.dictionary.to_pylist())
    return _coded(values, _to_numpy(encoded.indices.fill_null(-1)))


def _from_arrow_lists(name: str, array: Any, arrow: Any) -> Column:
    own = array.type
    if arrow.types.is_struct(own) or arrow.types.is_map(own):
        raise TypeError(f"`{name}` must hold ids or lists of ids; got {own} of Arrow.")
    flat = _from_arrow_array(name, array.flatten(), arrow)  # without those of nulls
    if flat.lengths is not None:
        raise ValueError(f"`{name}` must hold lists of ids; got deeper lists.")
    if hasattr(array, "value_lengths"):
        lengths = _to_numpy(array.value_lengths().fill_null(0))
    else:
        lengths = _to_numpy(array.is_valid()) * own.list_size
    return flat._replace(lengths=lengths)


def _from_pandas(name: str, column: Any, pandas: Any) -> list[Column]:
    if isinstance(column, pandas.MultiIndex):
        raise TypeError(f"`{name}` must be one column; got a MultiIndex.")
    dtype = column.dtype
    if isinstance(dtype, np.dtype):
        return [from_array(name, column.to_numpy())]
    array = column if not hasattr(column, "array") else column.array
    if isinstance(dtype, pandas.CategoricalDtype):
        [values] = _from_pandas(name, array.categories, pandas)
        return [_coded(values, np.asarray(array.codes))]
    if hasattr(dtype, "pyarrow_dtype"):
        return _from_arrow(name, array.__arrow_array__(), sys.modules["pyarrow"])
    if isinstance(dtype, pandas.StringDtype):
        codes, distinct = array.factorize()
        return [_coded(from_list(name, distinct.tolist()), codes)]
    own = getattr(dtype, "numpy_dtype", None)  # of the dtypes with nulls
    if own is not None and own.kind in "iu":
        valid = ~np.asarray(array.isna())
        return [from_array(name, array.to_numpy(own, na_value=0), valid)]
    if own is not None and own.kind == "f":
        return [from_array(name, array.to_numpy(own, na_value=np.nan))]
    return [from_array(name, np.asarray(array))]


def _coded(values: Column, codes: np.ndarray) -> Column:
    """Return the column of codes into a column of values."""
    if values.codes is not None or values.valid is not None:
        # The values have nulls, or codes of their own.
        size = len(values.values)
        codes = np.append(values.spread(np.arange(size)), -1)[codes]
    return Column(values.kind, values.values, codes, None, codes.shape)


def _to_numpy(array: Any) -> np.ndarray:
    return array.to_numpy(zero_copy_only=False)

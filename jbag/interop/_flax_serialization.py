"""Flax serialization: `Bags` and `RowSparse` as dicts, a `PackedTable` as an array."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax.serialization import (
    from_state_dict,
    register_serialization_state,
    to_state_dict,
)

from jbag.ops._packed_table import PackedTable, pack_like
from jbag.ragged._bags import Bags
from jbag.sparse._row_sparse import RowSparse

_BAGS = ("indices", "offsets", "weights")
_TERM = ("cotangent", "ids", "offsets", "coefficients", "winners")


def _take(x: Any, fields: tuple[str, ...]) -> dict[str, Any]:
    return {name: to_state_dict(getattr(x, name)) for name in fields}


def _replace(x: Any, state: dict[str, Any], fields: tuple[str, ...]) -> Any:
    if set(state) != set(fields):
        raise ValueError(
            f"A {type(x).__name__} must have {list(fields)}; got {list(state)}."
        )
    arrays = {
        name: from_state_dict(getattr(x, name), state[name], name) for name in fields
    }
    return dataclasses.replace(x, **arrays)


def _rows_to_state(rows: RowSparse) -> dict[str, Any]:
    return {str(k): _take(term, _TERM) for k, term in enumerate(rows.terms)}


def _rows_from_state(rows: RowSparse, state: dict[str, Any]) -> RowSparse:
    if set(state) != {str(k) for k in range(len(rows.terms))}:
        raise ValueError(
            f"A RowSparse must have {len(rows.terms)} terms; got {list(state)}."
        )
    terms = [_replace(x, state[str(k)], _TERM) for k, x in enumerate(rows.terms)]
    return RowSparse(terms, rows.shape, rows.dtype, rows.is_coalesced)


def _table_to_state(table: PackedTable) -> Any:
    return to_state_dict(table.unpack())


def _table_from_state(table: PackedTable, state: Any) -> PackedTable:
    if isinstance(table.lines, RowSparse):
        return dataclasses.replace(table, lines=from_state_dict(table.lines, state))
    return pack_like(state, table)


register_serialization_state(PackedTable, _table_to_state, _table_from_state)
register_serialization_state(
    Bags, lambda bags: _take(bags, _BAGS), lambda x, state: _replace(x, state, _BAGS)
)
register_serialization_state(RowSparse, _rows_to_state, _rows_from_state)

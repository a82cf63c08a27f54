"""Checks of the bags of a collection's features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbag._validation import check_ids, on_host, to_index_dtype
from jbag.collection._stacking import KEYED, Bag, Stack
from jbag.collection._tables_and_features import Feature, Table
from jbag.ops._embedding_bag import check_bags
from jbag.ragged._bags import Bags


class Parts(NamedTuple):
    """The checked tables, features and stacks of a collection."""

    tables: dict[str, Table]
    features: dict[str, Feature]
    stacks: tuple[Stack, ...]


def check_batch(batch: Any, parts: Parts, blocks: int | None) -> dict[str, Bag]:
    """Check a batch, host arrays by value; return each feature's bags.

    Args:
      batch: a dict by feature, or one `Bags` with the features one after another.
      parts: the parts of the collection.
      blocks: P, the required number of blocks; None without a mesh.

    Raises:
      IndexError: a host array holds an out-of-range id.
      TypeError: an array has a wrong dtype.
      ValueError: an array has a wrong shape, or the features are not those of the
        collection or differ in their number of bags.
    """
    features = parts.features
    if isinstance(batch, Bags):
        return {KEYED: _check_keyed(batch, parts, blocks)}
    if not isinstance(batch, Mapping):
        raise TypeError(f"`batch` must be a dict by feature, or a Bags; got {batch!r}.")
    if set(batch) != set(features):
        raise ValueError(
            f"`batch` must hold the features {list(features)}; got {list(batch)}."
        )
    out, sizes = {}, {}
    for name, feature in features.items():
        rows = parts.tables[feature.table].num_embeddings
        try:
            out[name] = bag = _check_bag(batch[name], rows, blocks)
        except (IndexError, TypeError, ValueError) as error:
            raise type(error)(f"In `batch[{name!r}]`: {error}") from error
        ends = bag.offsets
        sizes[name] = bag.ids.shape[0] if ends is None else ends.shape[-1] - 1
        if ends is not None and blocks is not None:
            sizes[name] *= blocks
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"`batch` must hold as many bags of each feature; got {sizes}."
        )
    return out


def _check_keyed(batch: Bags, parts: Parts, blocks: int | None) -> Bag:
    bag = _check_bag(batch, None, blocks)
    assert bag.offsets is not None
    count = bag.offsets.shape[-1] - 1
    if not parts.features or count % len(parts.features):
        raise ValueError(
            f"`batch` must hold bags of each of the {len(parts.features)} features, "
            f"one feature after another; got {count}."
        )
    if on_host(batch.indices) and on_host(batch.offsets):
        ids, ends = np.asarray(batch.indices), np.asarray(batch.offsets)
        size = count // len(parts.features)
        each = zip(_rows(ids), _rows(ends), strict=True)
        for number, (block, own) in enumerate(each):
            where = "" if blocks is None else f", in block {number}"
            for at, (name, feature) in enumerate(parts.features.items()):
                span = slice(own[at * size], own[(at + 1) * size])
                rows = parts.tables[feature.table].num_embeddings
                try:
                    check_ids(block[span], rows)
                except IndexError as error:
                    raise IndexError(
                        f"In the bags of {name!r}{where}: {error}"
                    ) from error
    return bag


def _rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


def _check_bag(given: Any, rows: int | None, blocks: int | None) -> Bag:
    """Check bags for a table of `rows` rows; None accepts any 32-bit id."""
    most = np.iinfo(np.int32).max if rows is None else rows
    if blocks is None or not isinstance(given, Bags):
        ids, offsets, weights = check_bags(given, None, None, False, most)
        if blocks is not None and ids.shape[0] % blocks:
            raise ValueError(
                f"`indices` must have a multiple of {blocks} rows; "
                f"got shape {ids.shape}."
            )
        return _as_bag(ids, offsets, weights)
    shapes = np.shape(given.indices), np.shape(given.offsets)
    if {(len(shape), *shape[:1]) for shape in shapes} != {(2, blocks)}:
        raise ValueError(
            f"`bags` must be a stack of {blocks}, a block for each device, of indices "
            f"[{blocks}, N] and offsets [{blocks}, B + 1]; got shapes {shapes[0]} and "
            f"{shapes[1]}."
        )
    if all(map(on_host, jax.tree.leaves(given))):
        no_weights = [None] * blocks
        coefficients = no_weights if given.weights is None else given.weights
        each = zip(given.indices, given.offsets, coefficients, strict=True)
        own = [_check_block(at, Bags(*block), most) for at, block in enumerate(each)]
        stacked = jax.tree.map(lambda *xs: np.stack(xs), *own)
        return _as_bag(*stacked)
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), given)
    jax.eval_shape(lambda bags: check_bags(bags, None, None, False, most)[0], example)
    return _as_bag(given.indices, given.offsets, given.weights)


def _check_block(at: int, bags: Bags, rows: int) -> tuple[Any, Any, Any]:
    try:
        return check_bags(bags, None, None, False, rows)
    except (IndexError, TypeError, ValueError) as error:
        raise type(error)(f"In block {at}: {error}") from error


def _as_bag(ids: Any, offsets: Any, weights: Any) -> Bag:
    """Return bags as arrays, with int32 offsets; larger offsets become -1."""
    if offsets is not None:
        offsets = jnp.asarray(offsets)
        fits = (offsets >= 0) & (offsets <= jnp.iinfo(jnp.int32).max)
        offsets = jnp.where(fits, offsets, -1).astype(jnp.int32)
    weights = None if weights is None else jnp.asarray(weights)
    return Bag(jnp.asarray(to_index_dtype(ids)), offsets, weights)

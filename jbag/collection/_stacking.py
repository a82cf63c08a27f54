"""Tables stacked in one array, and features that are pooled from it in one launch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped

from jbag._mesh.partition_specs import TableWise
from jbag._mesh.row_layout import Lanes, Layout, place
from jbag._validation import TABLE_DTYPES, check_flag, check_integer
from jbag.ops import _row_gather
from jbag.ops._embedding_bag import check_mode, check_padding_idx
from jbag.ops._embedding_bag_module import Initializer, default_embedding_init
from jbag.ops._max_norm import check_norm
from jbag.ops._pooling import PoolingOptions
from jbag.ops._row_gather import accumulation_dtype
from jbag.ragged import _csr
from jbag.ragged._concatenate import concatenate_bags, concatenate_slots, num_bags
from jbag.ragged._csr import PAD_ID, Ids, Offsets, Slots


@dataclasses.dataclass(frozen=True)
class Table:
    """One table of an `EmbeddingBagCollection`.

    Attributes:
      num_embeddings: V.
      embedding_dim: D, its width.
      group: tables of one group, width and dtype are stacked in one parameter, which an
        optimizer sees as one, and which lies on a mesh as one.
      padding_idx: the row that stands for nothing; it starts as zeros.
      max_norm: rows are used scaled down to this norm.
      norm_type: p of that norm.
      scale_grad_by_freq: divide each row's gradient by its count in a feature's batch.
      param_dtype: of the table.
      embedding_init: called with (key, (V, D), param_dtype); by default N(0, 1 / D).

    Example:
      >>> jbag.Table(num_embeddings=1000, embedding_dim=64).group
      'embedding'
    """

    num_embeddings: int
    embedding_dim: int
    _: dataclasses.KW_ONLY
    group: str = "embedding"
    padding_idx: int | None = None
    max_norm: float | None = None
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    param_dtype: Any = jnp.float32
    embedding_init: Initializer = default_embedding_init

    def __post_init__(self) -> None:
        size = check_integer("num_embeddings", self.num_embeddings, low=1)
        check_integer("embedding_dim", self.embedding_dim, low=1)
        if not isinstance(self.group, str):
            raise TypeError(f"`group` must be a name; got {self.group!r}.")
        if not self.group.isidentifier():
            raise ValueError(f"`group` must be a name; got {self.group!r}.")
        if self.padding_idx is not None:
            check_padding_idx(self.padding_idx, size)
        if self.max_norm is not None and not isinstance(self.max_norm, int | float):
            raise TypeError(f"`max_norm` must be a number; got {self.max_norm!r}.")
        check_norm(self.max_norm, self.norm_type)
        check_flag("scale_grad_by_freq", self.scale_grad_by_freq)
        dtype = jnp.dtype(self.param_dtype).name
        if dtype not in TABLE_DTYPES:
            names = ", ".join(TABLE_DTYPES)
            raise TypeError(f"`param_dtype` must be one of {names}; got {dtype}.")


@dataclasses.dataclass(frozen=True)
class Feature:
    """One feature of an `EmbeddingBagCollection`: bags of ids of one table's rows.

    Attributes:
      table: its name.
      mode: "mean", "sum", "sqrtn", "max" or "min".

    Example:
      >>> jbag.Feature("items", mode="sum")
      Feature(table='items', mode='sum')
    """

    table: str
    mode: str = "mean"

    def __post_init__(self) -> None:
        if not isinstance(self.table, str):
            raise TypeError(f"`table` must be a name; got {self.table!r}.")
        check_mode(self.mode)


class Stack(NamedTuple):
    """Tables of one group, width and dtype, in one array of which they have rows."""

    name: str
    names: tuple[str, ...]
    tables: tuple[Table, ...]
    layout: Layout | Lanes
    spec: P | TableWise | None

    @property
    def shape(self) -> tuple[int, int]:
        """The array's."""
        return self.layout.num_rows, self.tables[0].embedding_dim

    @property
    def dtype(self) -> Any:
        """The array's."""
        return self.tables[0].param_dtype

    @property
    def partition_spec(self) -> P | None:
        """The array's, or None where none was given."""
        return self.spec.spec if isinstance(self.spec, TableWise) else self.spec

    def base(self, name: str) -> int:
        """Return how many rows the tables before this one have."""
        at = self.names.index(name)
        return sum(table.num_embeddings for table in self.tables[:at])

    def place(self, name: str, ids: Ids) -> Ids:
        """Return the array's row of each id, or `OUT_OF_RANGE_ID`, or `PAD_ID`."""
        at = self.names.index(name)
        table = self.tables[at]
        rows = place(self.layout, at, self.base(name), table.num_embeddings, ids)
        if table.padding_idx is None:
            return rows
        padding = check_padding_idx(table.padding_idx, table.num_embeddings)
        return jnp.where(ids == padding, PAD_ID, rows)

    def table_rows(self, name: str) -> np.ndarray:
        """Return the array's row of each of a table's rows, in order."""
        at = self.names.index(name)
        ids = np.arange(self.tables[at].num_embeddings)
        if isinstance(self.layout, Lanes):
            return ids + self.layout.start(at)
        return self.layout.place(ids + self.base(name))

    def fill(self, rows: Mapping[str, Shaped[Any, "V ..."]]) -> Shaped[Array, "R ..."]:
        """Return the array that holds the rows of each table; zeros elsewhere."""
        given = [jnp.asarray(rows[name]) for name in self.names]
        if isinstance(self.layout, Layout):
            return self.layout.to_physical(jnp.concatenate(given))
        out = jnp.zeros((self.layout.num_rows, *given[0].shape[1:]), given[0].dtype)
        for at, own in enumerate(given):
            out = jax.lax.dynamic_update_slice_in_dim(
                out, own, self.layout.start(at), axis=0
            )
        return out

    def init(self, key: Array) -> Float[Array, "R D"]:
        """Return the first array: each table by its own initializer and key."""
        rows = {}
        for at, (name, table) in enumerate(zip(self.names, self.tables, strict=True)):
            shape = (table.num_embeddings, table.embedding_dim)
            own = table.embedding_init(
                jax.random.fold_in(key, at), shape, table.param_dtype
            )
            if table.padding_idx is not None:
                own = own.at[table.padding_idx].set(0)
            rows[name] = own
        return self.fill(rows)


class Bag(NamedTuple):
    """A feature's bags: ids [N] and offsets [B + 1], or ids [B, L]; and weights."""

    ids: Ids
    offsets: Offsets
    weights: Slots | None


# The key of bags that are those of all features, one feature after another.
KEYED = ""


class Launch(NamedTuple):
    """Features of one stack that are pooled by one call of a kernel.

    `keys` are the features of all stacks, in order, and `tables` those of `features`.
    """

    features: tuple[str, ...]
    tables: tuple[str, ...]
    keys: tuple[str, ...]
    pooling: PoolingOptions
    max_norm: float | None

    def own(self, bags: Mapping[str, Bag]) -> Mapping[str, Bag]:
        """Return the bags that the launch needs."""
        return bags if KEYED in bags else {name: bags[name] for name in self.features}

    def join(
        self, stack: Stack, blocks: Sequence[Mapping[str, Bag]]
    ) -> tuple[Ids, Offsets, Slots | None]:
        """Return all bags end to end: of each block, those of each feature in order."""
        parts, values = [], []
        value_dtype = accumulation_dtype(jnp.dtype(stack.dtype))
        for bags in blocks:
            if KEYED in bags:
                bag = bags[KEYED]
                placed = [(self._place_keyed(stack, bag), bag)]
            else:
                placed = [
                    (stack.place(table, bags[feature].ids), bags[feature])
                    for feature, table in zip(self.features, self.tables, strict=True)
                ]
            for ids, bag in placed:
                parts.append((ids, bag.offsets))
                if bag.weights is not None:
                    values.append(bag.weights.astype(value_dtype))
        ids, offsets = concatenate_bags(parts)
        return ids, offsets, concatenate_slots(parts, values) if values else None

    def _place_keyed(self, stack: Stack, bag: Bag) -> Ids:
        """Return the array's row of each slot; those of other launches are empty."""
        assert bag.offsets is not None
        count = self.sizes({KEYED: bag})[self.features[0]]
        bounds, _ = _csr.bag_bounds(bag.offsets, bag.ids.size)
        key = _csr.segment_ids(bounds, bag.ids.size) // max(count, 1)
        rows = jnp.full_like(bag.ids, PAD_ID)
        for feature, table in zip(self.features, self.tables, strict=True):
            own = stack.place(table, bag.ids)
            rows = jnp.where(key == self.keys.index(feature), own, rows)
        return rows

    def sizes(self, bags: Mapping[str, Bag]) -> dict[str, int]:
        """Return B of each feature."""
        if KEYED in bags:
            return dict.fromkeys(self.features, size(bags[KEYED]) // len(self.keys))
        return {name: size(bags[name]) for name in self.features}

    def split(
        self, pooled: Float[Array, "bags D"], bags: Mapping[str, Bag]
    ) -> dict[str, Float[Array, "B D"]]:
        """Return the rows of each feature."""
        sizes = self.sizes(bags)
        names = self.keys if KEYED in bags else self.features
        lengths = [sizes.get(name, sizes[self.features[0]]) for name in names]
        # Transposed, it is one concatenation; slices would be a sum of as many arrays.
        parts = jax.lax.split(pooled, lengths)
        return {
            name: part
            for name, part in zip(names, parts, strict=True)
            if name in self.features
        }

    def norm(self) -> Array | None:
        """Return `max_norm` as an array."""
        return None if self.max_norm is None else jnp.asarray(self.max_norm)


def size(bag: Bag) -> int:
    """Return B."""
    return num_bags(bag.ids, bag.offsets)


def only_in_bags(ids: Ids, offsets: Offsets) -> Ids:
    """Return ids of which those in no well-formed bag are `PAD_ID`."""
    if offsets is None:
        return ids
    bounds, malformed = _csr.bag_bounds(offsets, ids.size)
    bags = _csr.segment_ids(bounds, ids.size)
    return jnp.where(_row_gather.take(malformed, bags, True), PAD_ID, ids)


def make_stacks(
    tables: Mapping[str, Table],
    specs: Mapping[str, P | TableWise],
    grid: int,
) -> tuple[Stack, ...]:
    """Return the stacks of the tables, in order of their first one.

    Raises:
      ValueError: `specs` names a group that no table is of.
    """
    groups: dict[tuple[str, int, Any], list[str]] = {}
    for name, table in tables.items():
        key = (table.group, table.embedding_dim, jnp.dtype(table.param_dtype))
        groups.setdefault(key, []).append(name)
    known = {group for group, _, _ in groups}
    for group in specs:
        if group not in known:
            raise ValueError(
                f"`specs` must name groups of tables, {sorted(known)}; got {group!r}."
            )
    stacks = []
    for (group, width, dtype), names in groups.items():
        own = tuple(tables[name] for name in names)
        sizes = tuple(table.num_embeddings for table in own)
        spec = specs.get(group)
        layout: Layout | Lanes = Layout(sum(sizes), grid)
        if isinstance(spec, TableWise):
            layout = Lanes(sizes, check_integer("lanes", spec.lanes, low=1))
        others = {d for g, w, d in groups if (g, w) == (group, width)}
        suffix = f"_{dtype.name}" if len(others) > 1 else ""
        title = f"{group}_{width}{suffix}"
        if layout.num_rows >= 1 << 31:
            raise ValueError(
                f"`tables` of {title!r} must have less than 2147483648 rows together; "
                f"got {layout.num_rows}. More go in several groups."
            )
        stacks.append(Stack(title, tuple(names), own, layout, spec))
    return tuple(stacks)


def make_launches(
    stack: Stack,
    features: Mapping[str, Feature],
    weighted: Mapping[str, bool],
    implementation: str | None,
) -> tuple[Launch, ...]:
    """Return the fewest launches that pool all features of a stack."""
    grouped: dict[Any, list[str]] = {}
    for name, feature in features.items():
        if feature.table not in stack.names:
            continue
        table = stack.tables[stack.names.index(feature.table)]
        # A row's count is that of one feature's batch.
        alone = name if table.scale_grad_by_freq else None
        pooling = PoolingOptions(
            feature.mode, table.norm_type, table.scale_grad_by_freq, implementation
        )
        key = (pooling, table.max_norm, weighted[name], alone)
        grouped.setdefault(key, []).append(name)
    return tuple(
        Launch(
            tuple(names),
            tuple(features[name].table for name in names),
            tuple(features),
            pooling,
            max_norm,
        )
        for (pooling, max_norm, _, _), names in grouped.items()
    )

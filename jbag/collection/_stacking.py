"""Table stacking: tables that share an array, features that share a kernel launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Shaped

from jbag._mesh.row_layout import Lanes, Layout, place
from jbag._mesh.strategies import TableWise
from jbag._validation import check_integer
from jbag.collection._tables_and_features import Feature, Table
from jbag.ops import _row_gather
from jbag.ops._embedding_bag import check_padding_idx
from jbag.ops._explicit_axes import flatten_slots, unflatten_slots
from jbag.ops._packed_table import AnyTable
from jbag.ops._pooling import PoolingOptions
from jbag.ops._row_gather import accumulation_dtype
from jbag.ragged import _csr_arrays
from jbag.ragged._concatenate import concatenate_bags, concatenate_slots, num_bags
from jbag.ragged._csr_arrays import PAD_ID, Ids, Offsets, Slots


class Stack(NamedTuple):
    """Tables of one group, width and dtype, stacked in one array [R, D]."""

    name: str
    names: tuple[str, ...]
    tables: tuple[Table, ...]
    layout: Layout | Lanes
    spec: P | TableWise | None

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the array."""
        return self.layout.num_rows, self.tables[0].embedding_dim

    @property
    def dtype(self) -> Any:
        """The dtype of the array."""
        return self.tables[0].param_dtype

    @property
    def partition_spec(self) -> P | None:
        """The `PartitionSpec` of the array, or None without a spec."""
        return self.spec.spec if isinstance(self.spec, TableWise) else self.spec

    def base(self, name: str) -> int:
        """Return the number of rows of the tables before this one."""
        at = self.names.index(name)
        return sum(table.num_embeddings for table in self.tables[:at])

    def place(self, name: str, ids: Ids) -> Ids:
        """Return the array row of each id, or `OUT_OF_RANGE_ID`, or `PAD_ID`."""
        at = self.names.index(name)
        table = self.tables[at]
        rows = place(self.layout, at, self.base(name), table.num_embeddings, ids)
        if table.padding_idx is None:
            return rows
        padding = check_padding_idx(table.padding_idx, table.num_embeddings)
        return jnp.where(ids == padding, PAD_ID, rows)

    def table_rows(self, name: str) -> np.ndarray:
        """Return the array row of each table row, in the order of the ids."""
        at = self.names.index(name)
        ids = np.arange(self.tables[at].num_embeddings)
        if isinstance(self.layout, Lanes):
            return ids + self.layout.start(at)
        return self.layout.place(ids + self.base(name))

    def fill(self, rows: Mapping[str, Shaped[Any, "V ..."]]) -> Shaped[Array, "R ..."]:
        """Return the array with the rows of each table; other rows are zeros."""
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
        """Initialize the array, each table with its own initializer and key."""
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
    """The bags of a feature: ids [N] and offsets [B + 1], or ids [B, L]; weights."""

    ids: Ids
    offsets: Offsets
    weights: Slots | None


# The key of one `Bags` that holds all features, one feature after another.
KEYED = ""


class Launch(NamedTuple):
    """Features of one stack that one kernel call pools.

    `tables` has the table of each of `features`; `keys` has the features of all stacks.
    The features of an unpooled launch have a bag for each slot of their bags.
    """

    features: tuple[str, ...]
    tables: tuple[str, ...]
    keys: tuple[str, ...]
    pooling: PoolingOptions
    max_norm: float | None
    unpooled: bool = False

    def own(self, bags: Mapping[str, Bag]) -> Mapping[str, Bag]:
        """Return the bags of the launch's features."""
        return bags if KEYED in bags else {name: bags[name] for name in self.features}

    def join(
        self, stack: Stack, blocks: Sequence[Mapping[str, Bag]]
    ) -> tuple[Ids, Offsets, Slots | None]:
        """Concatenate the bags of each block, and in a block those of each feature."""
        parts, values = [], []
        value_dtype = accumulation_dtype(jnp.dtype(stack.dtype))
        for bags in blocks:
            for bag in self._placed(stack, bags):
                parts.append((bag.ids, bag.offsets))
                if bag.weights is not None:
                    values.append(bag.weights.astype(value_dtype))
        ids, offsets = concatenate_bags(parts)
        return ids, offsets, concatenate_slots(parts, values) if values else None

    def _placed(self, stack: Stack, bags: Mapping[str, Bag]) -> list[Bag]:
        """Return the bags with array rows as ids: a bag for each feature, or one."""
        if KEYED in bags and not self.unpooled:
            bag = bags[KEYED]
            rows = jnp.full_like(bag.ids, PAD_ID)
            for feature, table in zip(self.features, self.tables, strict=True):
                own = stack.place(table, bag.ids)
                rows = jnp.where(self._is_of(feature, bag), own, rows)
            return [bag._replace(ids=rows)]
        return [self.place(stack, at, bags) for at in range(len(self.features))]

    def place(self, stack: Stack, at: int, bags: Mapping[str, Bag]) -> Bag:
        """Return the bags of a feature as the launch pools them, array rows as ids."""
        bag = bags[KEYED if KEYED in bags else self.features[at]]
        rows = stack.place(self.tables[at], bag.ids)
        if not self.unpooled:
            return bag._replace(ids=rows)
        if bag.offsets is not None:
            slots = _csr_arrays.slots_of_bags(bag.ids, bag.offsets)
            rows = jnp.where(slots < 0, slots, rows)
            if KEYED in bags:
                rows = jnp.where(self._is_of(self.features[at], bag), rows, PAD_ID)
        weights = None if bag.weights is None else flatten_slots(bag.weights)
        return Bag(flatten_slots(rows), None, weights)

    def _is_of(self, feature: str, bag: Bag) -> Bool[Array, " N"]:
        """Return which slots of bags of all features are in those of one feature."""
        assert bag.offsets is not None
        count = size(bag) // len(self.keys)
        bounds, _ = _csr_arrays.bag_bounds(bag.offsets, bag.ids.size)
        key = _csr_arrays.segment_ids(bounds, bag.ids.size) // max(count, 1)
        return key == self.keys.index(feature)

    def _ids(self, bags: Mapping[str, Bag]) -> dict[str, Ids]:
        """Return the ids of each feature; of keyed bags, those of all features."""
        if KEYED in bags:
            return dict.fromkeys(self.features, bags[KEYED].ids)
        return {name: bags[name].ids for name in self.features}

    def sizes(self, bags: Mapping[str, Bag]) -> dict[str, int]:
        """Return the number of bags of each feature that the launch pools."""
        if self.unpooled:
            return {name: ids.size for name, ids in self._ids(bags).items()}
        if KEYED in bags:
            return dict.fromkeys(self.features, size(bags[KEYED]) // len(self.keys))
        return {name: size(bags[name]) for name in self.features}

    def split(
        self, pooled: Float[Array, "bags D"], bags: Mapping[str, Bag]
    ) -> dict[str, Float[Array, "*B D"]]:
        """Split pooled rows by feature; rows of slots have the shape of the ids."""
        sizes = self.sizes(bags)
        names = self.keys if KEYED in bags and not self.unpooled else self.features
        lengths = [sizes.get(name, sizes[self.features[0]]) for name in names]
        # The transpose of `split` is one concatenation; that of slices is a sum.
        parts = jax.lax.split(pooled, lengths)
        if self.unpooled:
            named = self._ids(bags)
            return {
                name: unflatten_slots(part, named[name])
                for name, part in zip(names, parts, strict=True)
            }
        return {
            name: part
            for name, part in zip(names, parts, strict=True)
            if name in self.features
        }

    def empty_rows(
        self, bags: Mapping[str, Bag], table: AnyTable
    ) -> dict[str, Float[Array, "*B D"]]:
        """Return the rows of each unpooled feature that has no slots."""
        named = self._ids(bags) if self.unpooled else {}
        return {
            name: jnp.zeros((*ids.shape, table.shape[1]), table.dtype)
            for name, ids in named.items()
            if ids.size == 0
        }

    def norm(self) -> Array | None:
        """Return `max_norm` as an array."""
        return None if self.max_norm is None else jnp.asarray(self.max_norm)


def size(bag: Bag) -> int:
    """Return the number of bags."""
    return num_bags(bag.ids, bag.offsets)


def only_in_bags(ids: Ids, offsets: Offsets) -> Ids:
    """Return the ids; those outside every well-formed bag become `PAD_ID`."""
    if offsets is None:
        return ids
    bounds, malformed = _csr_arrays.bag_bounds(offsets, ids.size)
    bags = _csr_arrays.segment_ids(bounds, ids.size)
    return jnp.where(_row_gather.take(malformed, bags, True), PAD_ID, ids)


def make_stacks(
    tables: Mapping[str, Table],
    specs: Mapping[str, P | TableWise],
    grid: int,
) -> tuple[Stack, ...]:
    """Return the stacks of the tables, in the order of their first tables.

    Raises:
      ValueError: `specs` names an unknown group, or a stack has 2^31 rows or more.
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
                f"`tables` of {title!r} must have fewer than 2147483648 rows together; "
                f"got {layout.num_rows}. Divide them into several groups."
            )
        stacks.append(Stack(title, tuple(names), own, layout, spec))
    return tuple(stacks)


def make_launches(
    stack: Stack,
    features: Mapping[str, Feature],
    weighted: Mapping[str, bool],
    implementation: str | None,
) -> tuple[Launch, ...]:
    """Return the smallest set of launches that pools all features of a stack."""
    grouped: dict[Any, list[str]] = {}
    for name, feature in features.items():
        if feature.table not in stack.names:
            continue
        table = stack.tables[stack.names.index(feature.table)]
        # `scale_grad_by_freq` counts rows per feature, so it needs its own launch.
        alone = name if table.scale_grad_by_freq else None
        # An unpooled feature is the sum of bags of one id. Apart from pooled features,
        # these bags stay rectangular.
        unpooled = feature.pooling is None
        pooling = PoolingOptions(
            feature.mode or "sum",
            table.norm_type,
            table.scale_grad_by_freq,
            implementation,
        )
        key = (pooling, table.max_norm, unpooled, weighted[name], alone)
        grouped.setdefault(key, []).append(name)
    return tuple(
        Launch(
            tuple(names),
            tuple(features[name].table for name in names),
            tuple(features),
            pooling,
            max_norm,
            unpooled,
        )
        for (pooling, max_norm, unpooled, _, _), names in grouped.items()
    )

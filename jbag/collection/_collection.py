"""The collection, independent of Linen and NNX: checks, strategies, pooling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array

from jbag._mesh.row_layout import GRID
from jbag._mesh.strategies import (
    SHARDED_BY_ROWS,
    ShardingType,
    Strategy,
    TableWise,
    current_mesh,
    reshard,
    strategy,
)
from jbag._validation import check_flag, check_integer
from jbag.collection._inputs import Parts, check_batch
from jbag.collection._lookup import Traffic, measure_traffic, pool_stack
from jbag.collection._stacking import (
    KEYED,
    Bag,
    Launch,
    Stack,
    make_launches,
    make_stacks,
)
from jbag.collection._tables_and_features import Feature, Table
from jbag.ops._packed_table import AnyTable, pack, packing_for, unpack
from jbag.ops.kernels import check_implementation


@dataclasses.dataclass(eq=False, repr=False)
class CollectionOptions:
    """The options of an `EmbeddingBagCollection` module.

    The dataclass is not frozen, because Linen modules cannot inherit a frozen one.
    """

    tables: Mapping[str, Table]
    features: Mapping[str, Feature]
    specs: Mapping[str, P | TableWise] = dataclasses.field(default_factory=dict)
    mesh: Mesh | AbstractMesh | None = None
    batch_axis: Any = None
    rows_per_round: int | None = None
    grid: int | None = None
    sparse: bool = False
    concatenate: bool = False
    dtype: DTypeLike | None = None
    implementation: str | None = None
    packed: bool | None = None


def check_parts(options: CollectionOptions) -> Parts:
    """Check the options of a collection; return its parts.

    Raises:
      TypeError: an option has a wrong type.
      ValueError: a feature names an unknown table, or a spec names an unknown group.
    """
    tables = _check_mapping("tables", options.tables, Table, "Table")
    features = _check_mapping("features", options.features, Feature, "Feature")
    kinds = "PartitionSpec or a TableWise"
    specs = _check_mapping("specs", options.specs, P | TableWise, kinds)
    if not tables:
        raise ValueError("`tables` must hold at least one Table; got none.")
    for name, feature in features.items():
        if feature.table not in tables:
            raise ValueError(
                f"`features[{name!r}]` must name one of the tables, {list(tables)}; "
                f"got {feature.table!r}."
            )
    if KEYED in features:
        raise ValueError("`features` must have names; got an empty one.")
    for flag in ("sparse", "concatenate"):
        check_flag(flag, getattr(options, flag))
    unpooled = [name for name, x in features.items() if x.pooling is None]
    if options.concatenate and unpooled:
        raise ValueError(
            "`concatenate` must be False with unpooled features, which have a row for "
            f"each slot; got True and {unpooled}."
        )
    check_implementation(options.implementation)
    if options.packed is not None:
        check_flag("packed", options.packed)
    if options.dtype is not None and not jnp.issubdtype(options.dtype, jnp.floating):
        raise TypeError(f"`dtype` must be floating; got {jnp.dtype(options.dtype)}.")
    if options.rows_per_round is not None:
        check_integer("rows_per_round", options.rows_per_round, low=1)
    grid = options.grid
    if grid is None:
        grid = GRID if specs else 1
    return Parts(tables, features, make_stacks(tables, specs, grid))


def _check_mapping(name: str, given: Any, kind: Any, called: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise TypeError(f"`{name}` must be a dict; got {given!r}.")
    for key, value in given.items():
        if not isinstance(key, str) or not isinstance(value, kind):
            raise TypeError(
                f"`{name}` must hold a {called} for each name; "
                f"got {value!r} at {key!r}."
            )
    return dict(given)


def strategies(
    stacks: tuple[Stack, ...],
    mesh: Mesh | AbstractMesh | None,
    batch_axis: Any,
) -> dict[str, Strategy]:
    """Return the strategy of each stack by name; an empty dict without a mesh.

    The mesh of `jax.set_mesh` applies if a stack has a spec.

    Raises:
      ValueError: the specs name different axes, or a shape is not divisible by the
        number of devices.
    """
    if mesh is None and all(stack.spec is None for stack in stacks):
        return {}
    mesh = current_mesh(mesh)
    if mesh is None:
        return {}
    named = [
        strategy(mesh, stack.spec, batch_axis)
        for stack in stacks
        if stack.spec is not None and any(stack.partition_spec or ())
    ]
    axes = {one.batch for one in named}
    if len(axes) > 1:
        raise ValueError(
            f"`specs` must name the same axes of the mesh; got {sorted(axes)}."
        )
    if batch_axis is None and axes:
        batch_axis = next(iter(axes))
    found = {
        stack.name: strategy(
            mesh, P() if stack.spec is None else stack.spec, batch_axis
        )
        for stack in stacks
    }
    if len({one.batch for one in found.values()}) > 1:
        raise ValueError(
            "`batch_axis` must equal the axes that `specs` name; "
            f"got {batch_axis!r} and {sorted(axes)}."
        )
    for stack in stacks:
        _check_division(stack, found[stack.name])
    return found


def _check_division(stack: Stack, found: Strategy) -> None:
    rows, width = stack.shape
    if found.sharding_type == ShardingType.COLUMN_WISE and width % found.size:
        raise ValueError(
            f"`embedding_dim` must be divisible by the {found.size} devices that "
            f"shard the columns of {stack.name!r}; got {width}."
        )
    if found.sharding_type in SHARDED_BY_ROWS and rows % found.size:
        raise ValueError(
            f"`grid` (or `lanes`) must be divisible by the {found.size} devices that "
            f"shard the rows of {stack.name!r}; got {stack.layout}."
        )
    is_table_wise = found.sharding_type == ShardingType.TABLE_WISE
    if is_table_wise and stack.layout.num_lanes % found.size:  # type: ignore[union-attr]  # table-wise stacks have lanes
        raise ValueError(
            f"`lanes` must be a multiple of the {found.size} devices; "
            f"got {stack.layout}."
        )


def initializer(
    options: CollectionOptions, parts: Parts, stack: Stack, packed: bool | None
) -> Callable[[Array], AnyTable]:
    """Return the function of a key that initializes a stack with its sharding.

    `packed` is that of the options; or whether the array that the stack has is packed.
    """

    def init(key: Array) -> AnyTable:
        found = strategies(parts.stacks, options.mesh, options.batch_axis)
        array, own = stack.init(key), found.get(stack.name)
        if own is not None:
            array = reshard(array, own, own.table)
        return _packed(array, packed, own)

    return init


def _packed(array: Array, packed: bool | None, own: Strategy | None) -> AnyTable:
    """Pack a table by the option of that name; leave a state of rows."""
    num_blocks = 1 if own is None else _num_blocks(own)
    if packed is False or array.ndim != 2 or num_blocks is None:
        return array
    return pack(array, always=bool(packed), num_blocks=num_blocks)


def _num_blocks(own: Strategy) -> int | None:
    """Return the blocks of a packed table; None if tables are not packed."""
    if own.sharding_type == ShardingType.COLUMN_WISE:
        return None
    return own.size if own.sharding_type in SHARDED_BY_ROWS else 1


def pool_collection(
    options: CollectionOptions,
    parts: Parts,
    arrays: Mapping[str, AnyTable],
    batch: Any,
) -> Any:
    """Pool a batch; return a dict by feature, or one concatenated array."""
    found, bags = _check_call(options, parts, batch)
    pooled: dict[str, Array] = {}
    for stack, launches, own in _calls(options, parts, bags):
        one = found.get(stack.name)
        if (
            one is not None
            and one.sharding_type == ShardingType.TABLE_WISE
            and KEYED in bags
        ):
            raise ValueError(
                "Table-wise tables take a dict of bags; got one keyed Bags, which has "
                "no static size per device."
            )
        pooled |= pool_stack(
            arrays[stack.name],
            own,
            stack=stack,
            launches=launches,
            strategy=one,
            sparse=bool(options.sparse),
            rows_per_round=options.rows_per_round,
        )
    out = [pooled[name] for name in parts.features]
    if options.dtype is not None:
        out = [x.astype(options.dtype) for x in out]
    if options.concatenate:
        return jnp.concatenate(out, axis=1)
    return dict(zip(parts.features, out, strict=True))


def _check_call(
    options: CollectionOptions, parts: Parts, batch: Any
) -> tuple[dict[str, Strategy], dict[str, Bag]]:
    found = strategies(parts.stacks, options.mesh, options.batch_axis)
    blocks = next(iter(found.values())).size if found else None
    return found, check_batch(batch, parts, blocks)


def _calls(
    options: CollectionOptions, parts: Parts, bags: Mapping[str, Bag]
) -> Iterator[tuple[Stack, tuple[Launch, ...], dict[str, Bag]]]:
    """Yield each stack with its launches and their bags."""
    weighted = {
        name: bags[KEYED if KEYED in bags else name].weights is not None
        for name in parts.features
    }
    for stack in parts.stacks:
        launches = make_launches(
            stack, parts.features, weighted, options.implementation
        )
        own: dict[str, Bag] = {}
        for launch in launches:
            own |= launch.own(bags)
        if launches:
            yield stack, launches, own


def collection_traffic(options: CollectionOptions, batch: Any) -> dict[str, Traffic]:
    """Return the traffic of a batch for each row-wise stack, by its name."""
    parts = check_parts(options)
    found, bags = _check_call(options, parts, batch)
    bags = {name: bag._replace(weights=None) for name, bag in bags.items()}
    return {
        stack.name: measure_traffic(
            own,
            stack=stack,
            launches=launches,
            strategy=found[stack.name],
            rows_per_round=options.rows_per_round,
        )
        for stack, launches, own in _calls(options, parts, bags)
        if stack.name in found
        and found[stack.name].sharding_type == ShardingType.ROW_WISE
    }


def validate_batch(options: CollectionOptions, batch: Any) -> Any:
    """Check a batch by value, on a host copy; return the batch."""
    # Lists and NumPy arrays are checked by value without a copy.
    on_host = jax.tree.map(
        lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, batch
    )
    _check_call(options, check_parts(options), on_host)
    return batch


def export_tables(parts: Parts, arrays: Mapping[str, Any]) -> dict[str, Array]:
    """Return each table by name, its rows in the order of the ids."""
    arrays = unpack(arrays)
    names = {stack.name for stack in parts.stacks}
    if not isinstance(arrays, Mapping) or not names <= set(arrays):
        raise ValueError(
            f"`params` must be a dict with {sorted(names)}; "
            f"got {list(arrays) if isinstance(arrays, Mapping) else arrays!r}."
        )
    return {
        name: _take(jnp.asarray(arrays[stack.name]), stack.table_rows(name))
        for stack in parts.stacks
        for name in stack.names
    }


def _take(array: Array, rows: np.ndarray) -> Array:
    """Return rows of an array; on Explicit axes, replicated."""
    mesh = jax.typeof(array).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return array[rows]
    return array.at[rows].get(out_sharding=NamedSharding(mesh, P()))


def import_tables(
    options: CollectionOptions, tables: Mapping[str, Any]
) -> dict[str, AnyTable]:
    """Return the parameters of tables with rows in the order of the ids."""
    parts = check_parts(options)
    if set(tables) != set(parts.tables):
        raise ValueError(f"`tables` must be {list(parts.tables)}; got {list(tables)}.")
    for name, table in parts.tables.items():
        shape = np.shape(tables[name])
        full = (table.num_embeddings, table.embedding_dim)
        if shape not in (full, full[:1]):
            raise ValueError(
                f"`tables[{name!r}]` must have shape {full} or {full[:1]}; got {shape}."
            )
    found = strategies(parts.stacks, options.mesh, options.batch_axis)
    arrays = {stack.name: stack.fill(tables) for stack in parts.stacks}
    return {
        name: _packed(array, options.packed, found.get(name))
        for name, array in arrays.items()
    }


def collection_shardings(options: CollectionOptions, tree: Any) -> Any:
    """Return a `NamedSharding` for each array of a tree.

    An array under a stack's name with as many rows has the stack's sharding; other
    arrays are replicated.
    """
    stacks = check_parts(options).stacks
    found = strategies(stacks, options.mesh, options.batch_axis)
    if not found:
        raise ValueError("`mesh` must be given, or set by jax.set_mesh; got neither.")
    mesh = next(iter(found.values())).mesh
    lengths = {}
    for stack in stacks:
        lengths[stack.name] = {stack.shape[0]}
        if num_blocks := _num_blocks(found[stack.name]):
            packing = packing_for(*stack.shape, num_blocks)
            lengths[stack.name] |= set() if packing is None else {packing.shape[0]}

    def one(path: Any, x: Any) -> NamedSharding:
        names = {str(getattr(key, "key", getattr(key, "name", ""))) for key in path}
        for stack in stacks:
            if stack.name in names and x.shape and x.shape[0] in lengths[stack.name]:
                own = found[stack.name]
                return NamedSharding(mesh, own.table if x.ndim == 2 else own.per_row)
        return NamedSharding(mesh, P())

    return jax.tree.map_with_path(one, tree)

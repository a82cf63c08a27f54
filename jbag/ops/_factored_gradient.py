"""Gradients of tables as unmultiplied factors, A.T @ cotangent."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jbag.ops import _row_gather
from jbag.ops._packed_table import AnyTable, put_rows, stored, take_rows
from jbag.ops._packing import Packing
from jbag.ops._row_updates import coalesce, update_rows
from jbag.ops._spmm import divided, spmm_transpose
from jbag.ragged import _csr_arrays
from jbag.ragged._concatenate import (
    concatenate_bags,
    concatenate_slots,
    merge_batches,
    unit_weights,
)
from jbag.ragged._csr_arrays import (
    OUT_OF_RANGE_ID,
    PAD_ID,
    Ids,
    Offsets,
    Slots,
    merge_axes,
)

Shape = tuple[int, ...]


class Placement(Protocol):
    """The layout of a gradient's arrays on devices, and its operations.

    Attributes:
      packing: how the table and its states [V, D] are packed into lines, or None.
      over_mesh: whether every array of a term has one block per device of a mesh.
      num_blocks: the number of blocks of the ids, offsets and coefficients.
    """

    over_mesh: ClassVar[bool]

    @property
    def packing(self) -> Packing | None: ...

    @property
    def num_blocks(self) -> int: ...

    def of_packed(self, packing: Packing) -> Placement: ...

    def table_shape(self, stored: Shape) -> Shape: ...

    def coalesce(
        self, terms: Sequence[FactoredGradient], shape: Shape, dtype: Any
    ) -> FactoredGradient: ...

    def flat(
        self, terms: Sequence[FactoredGradient], shape: Shape, dtype: Any
    ) -> FactoredGradient: ...

    def todense(
        self, terms: Sequence[FactoredGradient], shape: Shape, dtype: Any
    ) -> Float[Array, "V D"]: ...

    def update_rows(
        self,
        terms: Sequence[FactoredGradient],
        table: Float[Array, "V D"],
        states: tuple[Array, ...],
        scalars: Sequence[Any] | Array,
        seed: Array | None,
        *,
        rule: str,
    ) -> tuple[Array, ...]: ...

    def take(
        self, array: Shaped[Array, "V ..."], indices: Int[Array, " N"]
    ) -> Shaped[Array, "N ..."]: ...

    def put(
        self,
        array: Shaped[Array, "V ..."],
        indices: Int[Array, " N"],
        rows: Shaped[Array, "N ..."],
    ) -> Shaped[Array, "V ..."]: ...

    def zeros(self, shape: Shape, dtype: Any) -> Array: ...

    def place_ids(self, ids: Int[Array, "B 1"]) -> Int[Array, "B 1"]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableStorage:
    """The part of placements that knows how a table is stored."""

    packing: Packing | None = None

    def of_packed(self, packing: Packing) -> Self:
        """Return the placement of a table that is packed."""
        return dataclasses.replace(self, packing=packing)

    def table_shape(self, stored: Shape) -> Shape:
        """Return (V, D) of a table with an array of this shape."""
        return stored if self.packing is None else self.packing[:2]

    def table_of(self, array: Array) -> AnyTable:
        """Return the table, or the state of an optimizer, that an array stores."""
        is_packed = self.packing is not None and array.shape == self.packing.shape
        return stored(array, self.packing if is_packed else None)


@dataclasses.dataclass(frozen=True)
class OneDevice(TableStorage):
    """The placement of a table that is on one device, or replicated."""

    over_mesh: ClassVar[bool] = False
    num_blocks: ClassVar[int] = 1

    def coalesce(
        self, terms: Sequence[FactoredGradient], shape: Shape, dtype: Any
    ) -> FactoredGradient:
        """Return one bag per distinct id, sorted by id, with the sum of its rows."""
        term = self._join(terms, shape, dtype)
        indices, sums = term.apply(coalesce, num_embeddings=shape[0])
        return FactoredGradient(
            sums,
            indices[:, None],
            implementation=term.implementation,
            placement=self,
        )

    def flat(
        self, terms: Sequence[FactoredGradient], shape: Shape, dtype: Any
    ) -> FactoredGradient:
        """Return one bag per slot."""
        term = self._join(terms, shape, dtype).plain()
        rows, kept = _row_gather.bag_rows(term.cotangent, term.ids, term.offsets)
        if term.coefficients is not None:
            rows = term.coefficients[..., None] * rows
        kept &= (term.ids >= 0) & (term.ids < shape[0])
        kept &= _csr_arrays.filled(term.ids, term.pad_id)
        indices = jnp.where(kept, term.ids, shape[0]).reshape(-1, 1)
        rows = jnp.where(kept[..., None], rows, 0).reshape(indices.size, shape[1])
        return FactoredGradient(
            rows, indices, implementation=term.implementation, placement=self
        )

    def todense(
        self, terms: Sequence[FactoredGradient], shape: Shape, dtype: Any
    ) -> Float[Array, "V D"]:
        """Return the sum of the terms as a dense array."""
        return self._join(terms, shape, dtype).apply(
            spmm_transpose, num_embeddings=shape[0], dtype=dtype
        )

    def update_rows(
        self,
        terms: Sequence[FactoredGradient],
        table: Float[Array, "V D"],
        states: tuple[Array, ...],
        scalars: Sequence[Any] | Array,
        seed: Array | None,
        *,
        rule: str,
    ) -> tuple[Array, ...]:
        """Update rows in place by an update rule; see `RowSparse.update_table`."""
        packed, *packed_states = map(self.table_of, (table, *states))
        term = self._join(terms, packed.shape, table.dtype)
        operands = (packed, packed_states, scalars, seed)
        return term.apply(update_rows, *operands, rule=rule)

    def take(
        self, array: Shaped[Array, "V ..."], indices: Int[Array, " N"]
    ) -> Shaped[Array, "N ..."]:
        """Gather rows; an index out of range gives zeros."""
        return take_rows(self.table_of(array), indices, 0)

    def put(
        self,
        array: Shaped[Array, "V ..."],
        indices: Int[Array, " N"],
        rows: Shaped[Array, "N ..."],
    ) -> Shaped[Array, "V ..."]:
        """Scatter rows at sorted indices; drop those out of range."""
        return put_rows(self.table_of(array), indices, rows)

    def zeros(self, shape: Shape, dtype: Any) -> Array:
        """Return zeros with the layout of a cotangent."""
        return jnp.zeros(shape, dtype)

    def place_ids(self, ids: Int[Array, "B 1"]) -> Int[Array, "B 1"]:
        """Return ids with the layout of those of bags."""
        return ids

    def _join(
        self, terms: Sequence[FactoredGradient], shape: Shape, dtype: Any
    ) -> FactoredGradient:
        return concatenate_gradients(
            terms, shape[1], _row_gather.accumulation_dtype(jnp.dtype(dtype))
        )


ONE_DEVICE = OneDevice()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["cotangent", "ids", "offsets", "coefficients", "winners"],
    meta_fields=["pad_id", "implementation", "average", "placement"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class FactoredGradient:
    """The gradient of a table as unmultiplied factors, A.T @ cotangent.

    Its size is that of the cotangent and the bags; V rows are never formed.

    Attributes:
      cotangent: the cotangent of the pooled bags.
      ids: the column of A of each slot.
      offsets: the bags, or None for ids [B, L].
      coefficients: the values of A, or None for ones.
      pad_id: the id of an empty slot, or None.
      implementation: the kernel, or None.
      winners: for "max" and "min", the flat slot that gets each feature's cotangent.
      average: "mean" or "sqrtn" divide each bag's cotangent by its number of slots, or
        by the square root of that; None divides by 1.
      placement: the layout of the arrays on devices.
    """

    cotangent: Float[Array, "B D"]
    ids: Ids
    offsets: Offsets = None
    coefficients: Slots | None = None
    pad_id: int | None = None
    implementation: str | None = None
    winners: Int[Array, "B D"] | None = None
    average: str | None = None
    placement: Placement = ONE_DEVICE

    def apply(
        self, operation: Callable[..., Any], *operands: Any, **params: Any
    ) -> Any:
        """Call an operation on the operands, the cotangent and the bags."""
        term = self.plain()
        return operation(
            *operands,
            term.cotangent,
            term.ids,
            term.offsets,
            term.coefficients,
            pad_id=term.pad_id,
            implementation=term.implementation,
            **params,
        )

    def plain(self) -> FactoredGradient:
        """Return an equal gradient without an average or winners."""
        options: dict[str, Any] = {
            "pad_id": self.pad_id,
            "implementation": self.implementation,
        }
        if self.average is not None:
            rows = divided(
                self.cotangent,
                self.ids,
                self.offsets,
                self.cotangent.dtype,
                self.average,
                **options,
            )
            return dataclasses.replace(self, cotangent=rows, average=None)
        if self.winners is None:
            return self
        # One bag per slot, whose cotangent is zero in the features it didn't win.
        rows, kept = _row_gather.bag_rows(self.cotangent, self.ids, self.offsets)
        own, _ = _row_gather.bag_rows(self.winners, self.ids, self.offsets)
        slots = jnp.arange(self.ids.size, dtype=own.dtype)
        rows = jnp.where(own == slots.reshape((*self.ids.shape, 1)), rows, 0)
        if self.coefficients is not None:
            rows = rows * self.coefficients[..., None]
        ids = jnp.where(
            kept & _csr_arrays.filled(self.ids, self.pad_id), self.ids, PAD_ID
        )
        return FactoredGradient(
            rows.reshape(ids.size, -1),
            ids.reshape(-1, 1),
            pad_id=PAD_ID,
            implementation=self.implementation,
        )


def sum_batch(batch: FactoredGradient, num_embeddings: int) -> FactoredGradient:
    """Sum a batch of terms: every array has a leading batch axis."""
    ids, offsets, coefficients, winners = merge_batches(
        batch.ids,
        batch.offsets,
        batch.coefficients,
        batch.winners,
        pad_id=batch.pad_id,
        num_embeddings=num_embeddings,
    )
    return dataclasses.replace(
        batch,
        cotangent=merge_axes(batch.cotangent),
        ids=ids,
        offsets=offsets,
        coefficients=coefficients,
        winners=winners,
        pad_id=PAD_ID,
    )


def concatenate_gradients(
    terms: Sequence[FactoredGradient], width: int, dtype: Any = jnp.float32
) -> FactoredGradient:
    """Sum terms by concatenating their bags.

    Without terms, the sum has no bags, and `width` and `dtype` are those of its
    cotangent.
    """
    terms = [t for t in terms if t.ids.size and t.cotangent.shape[0]]
    if not terms:
        return FactoredGradient(
            jnp.zeros((0, width), dtype), jnp.zeros((0, 1), jnp.int32)
        )
    if len(terms) == 1:
        return terms[0]
    terms = [term.plain() for term in terms]
    dtype = jnp.result_type(*(term.ids.dtype for term in terms))
    parts = []
    for term in terms:
        ids = term.ids
        if term.pad_id is not None:
            ids = jnp.where(ids == term.pad_id, PAD_ID, ids)
        elif jnp.issubdtype(ids.dtype, jnp.signedinteger):
            ids = jnp.maximum(ids, OUT_OF_RANGE_ID)  # -1 marks empty slots below
        parts.append((ids.astype(dtype), term.offsets))
    value_dtype = jnp.result_type(*(term.cotangent.dtype for term in terms))
    coefficients = None
    if any(term.coefficients is not None for term in terms):
        coefficients = concatenate_slots(
            parts,
            [
                unit_weights(term.ids, value_dtype)
                if term.coefficients is None
                else term.coefficients.astype(value_dtype)
                for term in terms
            ],
        )
    ids, offsets = concatenate_bags(parts)
    return FactoredGradient(
        jnp.concatenate([term.cotangent.astype(value_dtype) for term in terms]),
        ids,
        offsets,
        coefficients,
        pad_id=PAD_ID,
        implementation=terms[0].implementation,
    )

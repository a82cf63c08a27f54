"""Gradients of tables as factors, A.T @ cotangent: the terms of row-sparse arrays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jbag.ops import _row_gather
from jbag.ops._row_updates import coalesce, update_rows
from jbag.ops._spmm import divided, spmm_transpose
from jbag.ragged import _csr
from jbag.ragged._concatenate import (
    concatenate_bags,
    concatenate_slots,
    merge_batches,
    unit_weights,
)
from jbag.ragged._csr import OUT_OF_RANGE_ID, PAD_ID, Ids, Offsets, Slots, merge_axes

Shape = tuple[int, ...]


class Placement(Protocol):
    """How the arrays of terms lie on devices, and how rows come to where they move.

    Attributes:
      over_mesh: whether every array of a term has a block for each device of a mesh.
      num_blocks: of the ids, offsets and coefficients.
    """

    over_mesh: ClassVar[bool]

    @property
    def num_blocks(self) -> int: ...

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
        scalars: Sequence[Any],
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


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """The placement of a table that each device, or the only one, has for itself."""

    over_mesh: ClassVar[bool] = False
    num_blocks: ClassVar[int] = 1

    def coalesce(
        self, terms: Sequence[FactoredGradient], shape: Shape, dtype: Any
    ) -> FactoredGradient:
        """Return the rows that are named, each once, in order, and their sums."""
        term = self._join(terms, shape, dtype)
        indices, sums = term.apply(coalesce, num_embeddings=shape[0])
        return FactoredGradient(
            sums, indices[:, None], implementation=term.implementation
        )

    def flat(
        self, terms: Sequence[FactoredGradient], shape: Shape, dtype: Any
    ) -> FactoredGradient:
        """Return the rows of all slots as bags of one."""
        term = self._join(terms, shape, dtype).plain()
        rows, kept = _row_gather.bag_rows(term.cotangent, term.ids, term.offsets)
        if term.coefficients is not None:
            rows = term.coefficients[..., None] * rows
        kept &= (term.ids >= 0) & (term.ids < shape[0])
        kept &= _csr.filled(term.ids, term.pad_id)
        indices = jnp.where(kept, term.ids, shape[0]).reshape(-1, 1)
        rows = jnp.where(kept[..., None], rows, 0).reshape(indices.size, shape[1])
        return FactoredGradient(rows, indices, implementation=term.implementation)

    def todense(
        self, terms: Sequence[FactoredGradient], shape: Shape, dtype: Any
    ) -> Float[Array, "V D"]:
        """Return the sum of the terms as an array."""
        return self._join(terms, shape, dtype).apply(
            spmm_transpose, num_embeddings=shape[0], dtype=dtype
        )

    def update_rows(
        self,
        terms: Sequence[FactoredGradient],
        table: Float[Array, "V D"],
        states: tuple[Array, ...],
        scalars: Sequence[Any],
        seed: Array | None,
        *,
        rule: str,
    ) -> tuple[Array, ...]:
        """Move the rows by a rule, in place; see `RowSparse.move`."""
        term = self._join(terms, table.shape, table.dtype)
        return term.apply(update_rows, table, states, scalars, seed, rule=rule)

    def take(
        self, array: Shaped[Array, "V ..."], indices: Int[Array, " N"]
    ) -> Shaped[Array, "N ..."]:
        """Return an array's rows at the indices, zeros where these name none."""
        return _row_gather.take(array, indices, 0)

    def put(
        self,
        array: Shaped[Array, "V ..."],
        indices: Int[Array, " N"],
        rows: Shaped[Array, "N ..."],
    ) -> Shaped[Array, "V ..."]:
        """Return the array with those rows replaced; the indices are in order."""
        return array.at[indices].set(rows, mode="drop", indices_are_sorted=True)

    def zeros(self, shape: Shape, dtype: Any) -> Array:
        """Return zeros that lie as a cotangent does."""
        return jnp.zeros(shape, dtype)

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
    """A gradient of a table in factors that aren't multiplied: A.T @ cotangent.

    A holds the bags' coefficients, divided as an `average` divides. With `winners`, a
    feature goes to the one slot that won it. The `placement` tells how the arrays lie
    on devices. What it adds up to is never larger than these arrays are.
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
        """Call an operation with the operands, the cotangent and the bags."""
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
        """Return the same without an average and winners."""
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
        # Each slot is a bag of its own, of the features that it won.
        rows, kept = _row_gather.bag_rows(self.cotangent, self.ids, self.offsets)
        own, _ = _row_gather.bag_rows(self.winners, self.ids, self.offsets)
        slots = jnp.arange(self.ids.size, dtype=own.dtype)
        rows = jnp.where(own == slots.reshape((*self.ids.shape, 1)), rows, 0)
        if self.coefficients is not None:
            rows = rows * self.coefficients[..., None]
        ids = jnp.where(kept & _csr.filled(self.ids, self.pad_id), self.ids, PAD_ID)
        return FactoredGradient(
            rows.reshape(ids.size, -1),
            ids.reshape(-1, 1),
            pad_id=PAD_ID,
            implementation=self.implementation,
        )


def sum_batch(batch: FactoredGradient, num_embeddings: int) -> FactoredGradient:
    """Return the sum of a batch of terms, whose arrays have one axis more, in front."""
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
    """Return one factored gradient, the sum of all: their bags are concatenated.

    Without any, it is zeros of that width and dtype.
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
            ids = jnp.maximum(ids, OUT_OF_RANGE_ID)  # -1 is an empty slot from here on
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

"""Transposed products that are not multiplied out: the terms of row-sparse arrays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jbag._joining import fold_bags, join, join_slots, ones
from jbag._kernels import xla
from jbag._kernels.xla import Ids, Offsets, Slots
from jbag._primitive import EMPTY, UNKNOWN, merge
from jbag._product import divided
from jbag._sealed import seal, unseal


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["cotangent", "ids", "offsets", "coefficients", "winners"],
    meta_fields=["empty", "implementation", "average", "placement"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Term:
    """A transposed product that isn't multiplied out: A.T @ cotangent.

    A holds the bags' coefficients, divided as an `average` divides. With `winners`, a
    feature goes to the one slot that won it. With a `placement`, every array has a
    block for each device of a mesh; see `_placement`. What it adds up to is never
    larger than these arrays are.
    """

    cotangent: Float[Array, "B D"]
    ids: Ids
    offsets: Offsets = None
    coefficients: Slots | None = None
    empty: int | None = None
    implementation: str | None = None
    winners: Int[Array, "B D"] | None = None
    average: str | None = None
    placement: Any = None

    def apply(self, operation: Callable, *operands: Any, **params: Any) -> Any:
        """Call an operation with the operands, the cotangent and the bags."""
        term = self.plain()
        return operation(
            *operands,
            term.cotangent,
            term.ids,
            term.offsets,
            term.coefficients,
            empty=term.empty,
            implementation=term.implementation,
            **params,
        )

    def plain(self) -> Term:
        """Return the same without an average and winners."""
        options: dict[str, Any] = {
            "empty": self.empty,
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
        rows, kept = xla.bag_rows(self.cotangent, self.ids, self.offsets)
        own, _ = xla.bag_rows(self.winners, self.ids, self.offsets)
        slots = jnp.arange(self.ids.size, dtype=own.dtype)
        rows = jnp.where(own == slots.reshape((*self.ids.shape, 1)), rows, 0)
        if self.coefficients is not None:
            rows = rows * self.coefficients[..., None]
        ids = jnp.where(kept & xla.filled(self.ids, self.empty), self.ids, EMPTY)
        return Term(
            rows.reshape(ids.size, -1),
            ids.reshape(-1, 1),
            empty=EMPTY,
            implementation=self.implementation,
        )


class SealedTerms(NamedTuple):
    """Terms as the leaves of a pytree: the cotangents, and sealed arrays.

    Attributes:
      leaves: of each term the cotangent, ids, offsets, coefficients and winners.
      structure: of each term the options, and the dtypes of what is sealed.
    """

    leaves: tuple[tuple[Any, ...], ...]
    structure: tuple[Any, ...]

    @classmethod
    def close(cls, terms: Sequence[Term]) -> SealedTerms:
        leaves, structure = [], []
        for term in terms:
            arrays = (term.ids, term.offsets, term.coefficients, term.winners)
            dtypes = tuple(None if x is None else jnp.dtype(x.dtype) for x in arrays)
            leaves.append(
                (term.cotangent, *(x if x is None else seal(x) for x in arrays))
            )
            options = (term.empty, term.implementation, term.average, term.placement)
            structure.append((dtypes, *options))
        return cls(tuple(leaves), tuple(structure))

    def open(self) -> tuple[Term, ...]:
        terms = []
        for (cotangent, *sealed), (dtypes, *options) in zip(
            self.leaves, self.structure, strict=True
        ):
            ids, offsets, coefficients, winners = (
                x if x is None else unseal(x, dtype)
                for x, dtype in zip(sealed, dtypes, strict=True)
            )
            empty, implementation, average, placement = options
            terms.append(
                Term(
                    cotangent,
                    ids,
                    offsets,
                    coefficients,
                    empty,
                    implementation,
                    winners,
                    average,
                    placement,
                )
            )
        return tuple(terms)


def fold(batch: Term, num_embeddings: int) -> Term:
    """Return the sum of a batch of terms, whose arrays have one axis more, in front."""
    ids, offsets, coefficients, winners = fold_bags(
        batch.ids,
        batch.offsets,
        batch.coefficients,
        batch.winners,
        empty=batch.empty,
        num_embeddings=num_embeddings,
    )
    return dataclasses.replace(
        batch,
        cotangent=merge(batch.cotangent),
        ids=ids,
        offsets=offsets,
        coefficients=coefficients,
        winners=winners,
        empty=EMPTY,
    )


def join_terms(terms: Sequence[Term], width: int, dtype: Any = jnp.float32) -> Term:
    """Return one term that is the sum of all: their bags laid end to end.

    Without any, it is zeros of that width and dtype.
    """
    terms = [t for t in terms if t.ids.size and t.cotangent.shape[0]]
    if not terms:
        return Term(jnp.zeros((0, width), dtype), jnp.zeros((0, 1), jnp.int32))
    if len(terms) == 1:
        return terms[0]
    terms = [term.plain() for term in terms]
    dtype = jnp.result_type(*(term.ids.dtype for term in terms))
    parts = []
    for term in terms:
        ids = term.ids
        if term.empty is not None:
            ids = jnp.where(ids == term.empty, EMPTY, ids)
        elif jnp.issubdtype(ids.dtype, jnp.signedinteger):
            ids = jnp.maximum(ids, UNKNOWN)  # -1 is an empty slot from here on
        parts.append((ids.astype(dtype), term.offsets))
    wide = jnp.result_type(*(term.cotangent.dtype for term in terms))
    coefficients = None
    if any(term.coefficients is not None for term in terms):
        coefficients = join_slots(
            parts,
            [
                ones(term.ids, wide)
                if term.coefficients is None
                else term.coefficients.astype(wide)
                for term in terms
            ],
        )
    ids, offsets = join(parts)
    return Term(
        jnp.concatenate([term.cotangent.astype(wide) for term in terms]),
        ids,
        offsets,
        coefficients,
        empty=EMPTY,
        implementation=terms[0].implementation,
    )

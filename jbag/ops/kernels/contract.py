"""The operations that every kernel implements, and what they mean.

Each operation reads the bags in one of two layouts:

- ragged: `ids` [N] with `offsets` [B + 1]; bag b is `ids[offsets[b]:offsets[b + 1]]`;
- rectangular: `ids` [B, L] with `offsets` None; bag b is `ids[b]`.

An id that equals `pad_id` is an empty slot, which adds nothing; `pad_id` None means
that there are none. Any other id in [0, V) is a row. An id outside [0, V) reads as NaN
and receives no gradient. Slots outside every bag are empty. A bag whose offsets are
malformed (see `jbag.ragged._csr.bag_bounds`) is NaN and receives no gradient.

`coefficients` have the shape of `ids` and the accumulation dtype; None means ones.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from jbag.ragged._csr import Ids, Offsets, Size, Slots


@runtime_checkable
class Operations(Protocol):
    """The functions of a kernel, a module."""

    def spmm(
        self,
        table: Float[Array, "V D"],
        ids: Ids,
        offsets: Offsets,
        coefficients: Slots | None,
        *,
        pad_id: int | None,
        average: str | None,
        dtype: jnp.dtype,
    ) -> Float[Array, "B D"]:
        """Return out[b] = sum of c[i] * table[ids[i]] over the slots i of bag b.

        An `average` divides it by the number of filled slots ("mean"), or by its square
        root ("sqrtn"), 1 where there are none. Rounds to `dtype` once.
        """

    def spmm_transpose(
        self,
        cotangent: Float[Array, "B D"],
        ids: Ids,
        offsets: Offsets,
        coefficients: Slots | None,
        *,
        pad_id: int | None,
        num_embeddings: Size,
        dtype: jnp.dtype,
    ) -> Float[Array, "V D"]:
        """Return out[v] = sum of c[i] * cotangent[bag of i] over the i of ids[i] = v.

        Accumulates in the dtype of `cotangent`; rounds to `dtype` once.
        """

    def sddmm(
        self,
        table: Float[Array, "V D"],
        cotangent: Float[Array, "B D"],
        ids: Ids,
        offsets: Offsets,
        *,
        pad_id: int | None,
    ) -> Slots:
        """Return out[i] = <table[ids[i]], cotangent[bag of i]>, zero at empty slots."""

    def extremum(
        self,
        table: Float[Array, "V D"],
        ids: Ids,
        offsets: Offsets,
        coefficients: Slots | None,
        *,
        pad_id: int | None,
        largest: bool,
    ) -> tuple[Float[Array, "B D"], Int[Array, "B D"]]:
        """Return the largest (or smallest) c[i] * table[ids[i]], and its first slot.

        The slot is a flat index into `ids`, or N where the bag is empty, whose value is
        zero. A NaN wins.
        """

    def coalesce(
        self,
        cotangent: Float[Array, "B D"],
        ids: Ids,
        offsets: Offsets,
        coefficients: Slots | None,
        *,
        pad_id: int | None,
        num_embeddings: Size,
        max_unique_ids: Size,
    ) -> tuple[Int[Array, " U"], Float[Array, "U D"]]:
        """Return the indices and sums of the rows of `spmm_transpose` that slots name.

        Indices are sorted and unique. Past the last one, up to `max_unique_ids`, the
        index is V and the sum zero.
        """

    def update_rows(
        self,
        table: Float[Array, "V D"],
        states: tuple[Array, ...],
        scalars: Float[Array, " H"],
        seed: UInt32[Array, "2"] | None,
        cotangent: Float[Array, "B D"],
        ids: Ids,
        offsets: Offsets,
        coefficients: Slots | None,
        *,
        pad_id: int | None,
        rule: str,
    ) -> tuple[Array, ...]:
        """Update the rows that slots name by a rule; return the table and its states.

        Their gradient is that of `spmm_transpose`. Other rows stay. The table is
        rounded once, to nearest, or at random by a `seed`.
        """

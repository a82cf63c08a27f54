"""The contract of the operations that every kernel implements.

A kernel is a module with the six operations; `xla.py` is the reference. To add one:

1. Write its module beside `xla.py`. Where it calls a library through XLA's FFI, the
   module loads the library and registers the targets, as `cpu.py` does. `update_rows`
   takes every rule of `update_rules.py`.
2. Register it in `KERNELS` of `__init__.py`, before those that it is preferred to,
   with its `platforms` and the reason where it is `missing`. One that its platform has
   not run yet is `preferred_on` no platform.
3. Name it in `implementation` of `jbag.embedding_bag`. The tests with the fixture
   `implementation` then run over it.

The bags have one of two layouts:

- ragged: `ids` [N] with `offsets` [B + 1]; bag b is `ids[offsets[b]:offsets[b + 1]]`;
- rectangular: `ids` [B, L] with `offsets` None; bag b is `ids[b]`.

An id equal to `pad_id` marks an empty slot, which adds nothing; with `pad_id` None no
slot is empty. Any other id outside [0, V) reads a row of NaN, and the table gets no
gradient from it. Slots in no bag are empty. A bag with malformed offsets (see
`jbag.ragged._csr_arrays.bag_bounds`) is NaN, and the table gets no gradient from it.

An empty bag, which has no slot or empty slots only, is zero in every mode: `spmm` sums
nothing and divides by at least 1, and the winner of `extremum` is N, which is no slot.
It gives no gradient to the table or to the coefficients. Each kernel does so, in C++ in
`csrc/kernels/reductions.h` and `csrc/cuda/device/`; for weighted averages
`finish` of `jbag/ops/_pooling.py` does.

`coefficients` has the shape of `ids` and the accumulation dtype; None means ones.

A kernel that is registered with `reads_packed` takes a `PackedTable` as the table, and
as the states [V, D]. Its `spmm_transpose` has a parameter `packing`, and then returns
the lines of its result; `update_rows` returns what is packed as its lines. For other
kernels a packed table is unpacked, which copies it.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from jbag.ragged._csr_arrays import Ids, Offsets, Size, Slots


@runtime_checkable
class Operations(Protocol):
    """The functions of a kernel's module."""

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

        An `average` divides it by the number of filled slots, at least 1 ("mean"), or
        by the square root of that ("sqrtn"). An empty bag is zero. It rounds to `dtype`
        once.
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
        """Return out[v] = sum of c[i] * cotangent[bag of i] over the slots i with id v.

        It accumulates in the dtype of `cotangent` and rounds to `dtype` once.
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
        """Return the extremum of c[i] * table[ids[i]] per bag and feature, and a slot.

        The slot is the first that holds the extremum, as a flat index into `ids`. An
        empty bag has the value zero and the slot N; a malformed bag, NaN and N. A NaN
        wins.
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
        """Return the distinct ids, sorted, and their rows of `spmm_transpose`.

        Empty slots, malformed bags and ids outside [0, V) name no row. U is
        `max_unique_ids`. Entries past the last distinct id have the index V and a zero
        row.
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
        """Update the rows of the bags' ids by an update rule; return table and states.

        The rows are those of `coalesce`, and so is their gradient. Other rows don't
        change, but a rule that catches up may also apply to rows that no bag names if
        slots do. The table rounds once: to nearest, or stochastically with a `seed`.
        """

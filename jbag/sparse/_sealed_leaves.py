"""Detection of functions that map over the leaves of a `RowSparse`.

Any function may map over the leaves of a pytree. If it multiplies or adds ids, they
become the ids of other rows. So ids are sealed: they are arrays of an extended dtype,
like keys of `jax.random`. Copies, stacks, selections and `lax.scan` work; arithmetic
raises a TypeError. Sealing is a bitcast, which costs nothing when compiled.

A guard of three more leaves detects functions that change the cotangent. Two hold
numbers computed from the sealed arrays. Linear functions of one gradient preserve their
proportions; `clip`, `sign`, `flip`, `ones_like` and sums of two gradients don't. The
third has dtype float0, on which functions such as `isnan` raise.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend import random
from jaxtyping import Array, Bool, Float, Int, Shaped

from jbag.ops._factored_gradient import FactoredGradient
from jbag.ragged._csr_arrays import filled

# Powers of two, whose proportions are exact under any scale; unsorted, of both signs
# and not all integers, and of different norms per leaf, so that clips, sorts, roundings
# and normalizations change them. A fingerprint is appended to the first.
_GUARD_NUMBERS = (
    np.array([0.5, -0.25], np.float32),
    np.array([2**14, -(2**-8)], np.float32),
)
_FINGERPRINT_SIZE = 8

_TAG = "indices of a jbag.RowSparse; for gradients with rows, see jbag.optim"


@functools.cache
def _seal_dtype(num_words: int) -> Any:
    """Return the PRNG implementation whose keys have this number of 32-bit words."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"This is not a key of random numbers: {_TAG}.")

    return random.define_prng_impl(
        key_shape=(num_words,),
        seed=refuse,
        split=refuse,
        random_bits=refuse,
        fold_in=refuse,
        name=f"jbag_sealed_{num_words}",
        tag=_TAG,
    )


@jax.custom_jvp
def _words(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


@functools.partial(_words.defjvp, symbolic_zeros=True)
def _words_jvp(primals: tuple[Array], tangents: tuple[Any]) -> tuple[Array, Any]:
    if not isinstance(tangents[0], SymbolicZero):
        raise TypeError(
            "The weights of a RowSparse have no derivative outside the transformed "
            "function that returns it: differentiate inside that function."
        )
    words = _words(*primals)
    return words, np.zeros(words.shape, jax.dtypes.float0)


@functools.partial(jax.jit, inline=True)
def seal(x: Shaped[Array, "..."]) -> Array:
    """Seal an array of 32-bit or 64-bit elements; keep its shape."""
    is_floating = jnp.issubdtype(x.dtype, jnp.floating)
    words = _words(x) if is_floating else jax.lax.bitcast_convert_type(x, jnp.uint32)
    num_words = x.dtype.itemsize // 4
    return jax.random.wrap_key_data(
        words.reshape(*x.shape, num_words), impl=_seal_dtype(num_words)
    )


@functools.partial(jax.jit, inline=True, static_argnums=1)
def unseal(x: Array, dtype: Any) -> Shaped[Array, "..."]:
    """Return the array, of the given dtype, that was sealed."""
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"A function changed the {_TAG}: they must have their extended dtype; "
            f"got {x.dtype}."
        )
    words = jax.random.key_data(x)
    if words.shape[-1] == 1:
        words = words[..., 0]
    return jax.lax.bitcast_convert_type(words, dtype)


def _guard_numbers(
    leaves: Sequence[tuple[Any, ...]], batch_ndim: int
) -> tuple[Float[Array, "... 10"], Float[Any, "2"]]:
    """Return the numbers of the guard of these leaves."""
    head, tail = _GUARD_NUMBERS
    sealed = [x for own in leaves for x in own[1:] if x is not None]
    fingerprint = _fingerprint(sealed, batch_ndim)
    start = jnp.broadcast_to(head, (*fingerprint.shape[:-1], *head.shape))
    return jnp.concatenate([start, fingerprint], axis=-1), tail


@functools.partial(jax.jit, inline=True, static_argnums=1)
def _fingerprint(sealed: Sequence[Array], batch_ndim: int) -> Float[Array, "... 8"]:
    """Return powers of two whose exponents are bits of a hash of sealed arrays.

    A sum of scaled fingerprints is proportional to the first if all are equal.
    """
    total = jnp.uint32(0)
    for k, x in enumerate(sealed):
        words = jax.random.key_data(x)
        shape = words.shape[batch_ndim:]
        position = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
        # The finalizer of MurmurHash3 (Appleby, 2011).
        h = words ^ (position * np.uint32(0x9E3779B9) + np.uint32(k))
        h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
        h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
        h = h ^ (h >> 16)
        total = total + h.sum(axis=tuple(range(batch_ndim, h.ndim)), dtype=jnp.uint32)
    shifts = np.arange(0, 32, 32 // _FINGERPRINT_SIZE, dtype=np.uint32)
    exponents = (total[..., None] >> shifts) & np.uint32(15)
    bits = (exponents + np.uint32(127 - 8)) << 23  # 2^-8 to 2^7
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


class SealedGradients(NamedTuple):
    """The leaves of factored gradients: cotangents and sealed arrays.

    Attributes:
      leaves: per term, the cotangent and the sealed ids, offsets, coefficients and
        winners.
      structure: per term, their dtypes and shapes, and the options.
      guard: arrays that detect functions of the leaves that are not linear.
    """

    leaves: tuple[tuple[Any, ...], ...]
    structure: tuple[Any, ...]
    guard: tuple[Any, ...]

    @classmethod
    def from_terms(cls, terms: Sequence[FactoredGradient]) -> SealedGradients:
        leaves, structure = [], []
        for term in terms:
            # Inverted, so that a leaf filled with zeros or ones is out of range.
            arrays = (~term.ids, term.offsets, term.coefficients, term.winners)
            types = tuple(
                None if x is None else (jnp.dtype(x.dtype), x.shape)
                for x in (term.cotangent, *arrays)
            )
            sealed = tuple(x if x is None else seal(x) for x in arrays)
            leaves.append((term.cotangent, *sealed))
            options = (term.pad_id, term.implementation, term.average, term.placement)
            structure.append((types, *options))
        guard = (*_guard_numbers(leaves, batch_ndim=0), np.zeros((), jax.dtypes.float0))
        gradients = cls(tuple(leaves), tuple(structure), guard)
        _record_leaves(gradients)
        return gradients

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes of the cotangents; () for one gradient."""
        return self.leaves[0][0].shape[:-2] if self.leaves else ()

    def to_terms(self, num_embeddings: int) -> tuple[FactoredGradient, ...]:
        """Return the terms; every array of a batch has leading axes.

        If a traced guard turns out to be changed, every slot holds a valid id and a row
        of NaN.

        Raises:
          TypeError: a function changed the dtype of a leaf.
          ValueError: a function changed the shape or the numbers of a leaf.
        """
        terms = []
        for own, (types, *options) in zip(self.leaves, self.structure, strict=True):
            for leaf, known in zip(own, types, strict=True):
                if known and leaf.shape != (*self.batch_shape, *known[1]):
                    raise ValueError(
                        f"A function changed the shape of a leaf of a RowSparse, from "
                        f"{known[1]} to {leaf.shape}; for gradients with rows, see "
                        "jbag.optim."
                    )
            cotangent, *sealed = own
            inverted, offsets, coefficients, winners = (
                x if known is None else unseal(x, known[0])
                for x, known in zip(sealed, types[1:], strict=True)
            )
            pad_id, implementation, average, placement = options
            term = FactoredGradient(
                cotangent,
                ~inverted,
                offsets,
                coefficients,
                pad_id,
                implementation,
                winners,
                average,
                placement,
            )
            terms.append(term)
        intact = self._is_intact()
        traced = isinstance(intact, jax.core.Tracer)
        if not traced and not np.all(intact):
            raise ValueError(
                "A function that isn't linear changed the leaves of a RowSparse; for "
                "gradients with rows, see jbag.optim."
            )
        if traced:
            terms = [_nan_unless(intact, term, num_embeddings) for term in terms]
        return tuple(terms)

    def _is_intact(self) -> Bool[Any, "..."]:
        """Return whether only linear functions were applied, per gradient."""
        if _is_unchanged(self):
            return np.bool_(True)
        found = jnp.concatenate([x.astype(jnp.float32) for x in self.guard[:2]], -1)
        start, tail = _guard_numbers(self.leaves, len(self.batch_shape))
        tail = jnp.broadcast_to(tail, (*start.shape[:-1], *tail.shape))
        expected = jnp.concatenate([start, tail], axis=-1)
        proportions = expected / _GUARD_NUMBERS[0][0]
        return jnp.all(found == found[..., :1] * proportions, axis=-1)

    def _recorded_leaves(self) -> list[Any]:
        """Return the guard's numbers and the sealed leaves."""
        sealed = [x for own in self.leaves for x in own[1:] if x is not None]
        return [self.guard[0], self.guard[1], *sealed]


# The leaves that `from_terms` made, by the id() of the guard's first leaf while that is
# alive. Leaves that are still the same objects need no comparison in the program.
_leaves_by_guard: dict[int, list[Any]] = {}


def _record_leaves(gradients: SealedGradients) -> None:
    first, tail, *sealed = gradients._recorded_leaves()
    key = id(first)
    first_ref = weakref.ref(first, lambda _: _leaves_by_guard.pop(key, None))
    _leaves_by_guard[key] = [first_ref, lambda: tail, *map(weakref.ref, sealed)]


def _is_unchanged(gradients: SealedGradients) -> bool:
    """Return whether the leaves are the objects that `from_terms` made."""
    leaves = gradients._recorded_leaves()
    recorded = _leaves_by_guard.get(id(leaves[0]))
    return recorded is not None and all(
        reference() is x for reference, x in zip(recorded, leaves, strict=True)
    )


def _nan_unless(
    intact: Bool[Array, "..."], term: FactoredGradient, num_embeddings: int
) -> FactoredGradient:
    """Return the term if intact, else one of the same shapes with rows of NaN."""

    def select(x: Any, otherwise: Any) -> Any:
        if x is None:
            return None
        axes = range(intact.ndim, x.ndim)
        return jnp.where(jnp.expand_dims(intact, axes), x, otherwise)

    ids = term.ids
    is_row = (ids >= 0) & (ids < num_embeddings) & filled(ids, term.pad_id)
    return dataclasses.replace(
        term,
        cotangent=select(term.cotangent, jnp.nan),
        ids=select(ids, jnp.where(is_row, ids, int(term.pad_id == 0))),
        offsets=select(term.offsets, _offsets_of_first_bag(term)),
        winners=select(term.winners, 0),
    )


def _offsets_of_first_bag(term: FactoredGradient) -> Int[Array, " ends"] | None:
    """Return offsets that put every slot of a block in the block's first bag."""
    if term.offsets is None:
        return None
    num_blocks = term.placement.num_blocks
    ends, slots = (x.shape[-1] // num_blocks for x in (term.offsets, term.ids))
    is_first = jnp.arange(ends * num_blocks) % ends == 0
    return jnp.where(is_first, 0, slots).astype(term.offsets.dtype)

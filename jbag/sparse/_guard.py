"""Guards against functions that map over the leaves of a row-sparse array.

Any function may map over the leaves of a pytree. Multiplied or summed, the ids of a
gradient would name other rows. Sealed, they are arrays of an extended dtype, as keys
are: copying, stacking, selecting and `lax.scan` work, arithmetic is a TypeError that
says what to use. Compiled, sealing is nothing: the bits stay as they are.

What such a function can do to the numbers beside them shows in a guard, three more
leaves. Two hold numbers that follow from the sealed arrays. Linear functions of one
gradient keep them in proportion. `clip`, `sign`, `flip` or `ones_like` don't, nor does
the sum of two gradients. The third is of `float0`, which even `isnan` refuses.
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
from jbag.ragged._csr import filled

# Powers of two, and so exact under any scale. They aren't sorted, nor of one sign, nor
# whole; the two leaves differ in norm. The first goes on with a fingerprint.
_KNOWN = np.array([0.5, -0.25], np.float32), np.array([2**14, -(2**-8)], np.float32)
_FINGERPRINT_SIZE = 8

_TAG = "indices of a jbag.RowSparse; for gradients with rows, see jbag.optim"


@functools.cache
def _seal_dtype(num_words: int) -> Any:
    """Return the key implementation that holds elements of so many 32-bit words."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"Not a key of random numbers: {_TAG}.")

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
            "The weights of a RowSparse have no derivative where it leaves a "
            "transformed function: differentiate what is computed of it there."
        )
    words = _words(*primals)
    return words, np.zeros(words.shape, jax.dtypes.float0)


@functools.partial(jax.jit, inline=True)
def seal(x: Shaped[Array, "..."]) -> Array:
    """Return an array of 32-bit or 64-bit elements, sealed, of the same shape."""
    is_floating = jnp.issubdtype(x.dtype, jnp.floating)
    words = _words(x) if is_floating else jax.lax.bitcast_convert_type(x, jnp.uint32)
    num_words = x.dtype.itemsize // 4
    return jax.random.wrap_key_data(
        words.reshape(*x.shape, num_words), impl=_seal_dtype(num_words)
    )


@functools.partial(jax.jit, inline=True, static_argnums=1)
def unseal(x: Array, dtype: Any) -> Shaped[Array, "..."]:
    """Return the array of the dtype that was sealed."""
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"A function changed the {_TAG}: these were an array of a dtype of their "
            f"own, and are now of {x.dtype}."
        )
    words = jax.random.key_data(x)
    if words.shape[-1] == 1:
        words = words[..., 0]
    return jax.lax.bitcast_convert_type(words, dtype)


def _numbers(
    leaves: Sequence[tuple[Any, ...]], batch_ndim: int
) -> tuple[Float[Array, "... 10"], Float[Any, "2"]]:
    """Return the numbers that a guard of these leaves holds."""
    head, tail = _KNOWN
    sealed = [x for own in leaves for x in own[1:] if x is not None]
    fingerprint = _fingerprint(sealed, batch_ndim)
    start = jnp.broadcast_to(head, (*fingerprint.shape[:-1], *head.shape))
    return jnp.concatenate([start, fingerprint], axis=-1), tail


@functools.partial(jax.jit, inline=True, static_argnums=1)
def _fingerprint(sealed: Sequence[Array], batch_ndim: int) -> Float[Array, "... 8"]:
    """Return powers of two by the bits of a hash of sealed arrays.

    A sum of scaled fingerprints is in proportion to the first where they are the same.
    """
    total = jnp.uint32(0)
    for k, x in enumerate(sealed):
        words = jax.random.key_data(x)
        shape = words.shape[batch_ndim:]
        position = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
        # MurmurHash3's finalizer (A. Appleby, 2011).
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
    """Factored gradients as the leaves of a pytree: cotangents, and sealed arrays.

    Attributes:
      leaves: of each term the cotangent, ids, offsets, coefficients and winners.
      structure: of each term the dtypes and shapes of these, and the options.
      guard: arrays that show through which functions the leaves have passed.
    """

    leaves: tuple[tuple[Any, ...], ...]
    structure: tuple[Any, ...]
    guard: tuple[Any, ...]

    @classmethod
    def from_terms(cls, terms: Sequence[FactoredGradient]) -> SealedGradients:
        leaves, structure = [], []
        for term in terms:
            # Inverted, ids that a function fills with zeros or ones name no row.
            arrays = (~term.ids, term.offsets, term.coefficients, term.winners)
            types = tuple(
                None if x is None else (jnp.dtype(x.dtype), x.shape)
                for x in (term.cotangent, *arrays)
            )
            sealed = tuple(x if x is None else seal(x) for x in arrays)
            leaves.append((term.cotangent, *sealed))
            options = (term.pad_id, term.implementation, term.average, term.placement)
            structure.append((types, *options))
        guard = (*_numbers(leaves, batch_ndim=0), np.zeros((), jax.dtypes.float0))
        closed = cls(tuple(leaves), tuple(structure), guard)
        _remember(closed)
        return closed

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The axes that the cotangents have in front, () of one gradient."""
        return self.leaves[0][0].shape[:-2] if self.leaves else ()

    def to_terms(self, num_embeddings: int) -> tuple[FactoredGradient, ...]:
        """Return the terms; of a batch, every array has its axes in front.

        Where the guard is traced and changed, every slot names a row, and that is NaN.

        Raises:
          TypeError, ValueError: a function changed the dtype, the shape or the numbers
            of a leaf.
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
        """Return whether only linear functions were applied, to one or to a batch."""
        if _is_as_made(self):
            return np.bool_(True)
        found = jnp.concatenate([x.astype(jnp.float32) for x in self.guard[:2]], -1)
        start, tail = _numbers(self.leaves, len(self.batch_shape))
        tail = jnp.broadcast_to(tail, (*start.shape[:-1], *tail.shape))
        expected = jnp.concatenate([start, tail], axis=-1)
        proportions = expected / _KNOWN[0][0]
        return jnp.all(found == found[..., :1] * proportions, axis=-1)

    def _bound(self) -> list[Any]:
        """Return the leaves that belong together: the guard's and the sealed ones."""
        sealed = [x for own in self.leaves for x in own[1:] if x is not None]
        return [self.guard[0], self.guard[1], *sealed]


# By the identity of a guard's first leaf the leaves that it was made with, while it
# lives. Within the program that made them nothing is computed to compare them.
_made_with: dict[int, list[Any]] = {}


def _remember(closed: SealedGradients) -> None:
    first, tail, *sealed = closed._bound()
    key = id(first)
    alive = weakref.ref(first, lambda _: _made_with.pop(key, None))
    _made_with[key] = [alive, lambda: tail, *map(weakref.ref, sealed)]


def _is_as_made(opened: SealedGradients) -> bool:
    """Return whether these are the very leaves that `from_terms` made."""
    bound = opened._bound()
    made = _made_with.get(id(bound[0]))
    return made is not None and all(
        reference() is x for reference, x in zip(made, bound, strict=True)
    )


def _nan_unless(
    intact: Bool[Array, "..."], term: FactoredGradient, num_embeddings: int
) -> FactoredGradient:
    """Return the term, or one of the same shapes in which each slot's row is NaN."""

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
    """Return offsets by which the first bag of each device's block has every slot."""
    if term.offsets is None:
        return None
    num_blocks = term.placement.num_blocks
    ends, slots = (x.shape[-1] // num_blocks for x in (term.offsets, term.ids))
    is_first = jnp.arange(ends * num_blocks) % ends == 0
    return jnp.where(is_first, 0, slots).astype(term.offsets.dtype)

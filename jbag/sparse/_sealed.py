"""Arrays on which arithmetic is impossible: the indices of a row-sparse array.

A pytree is open to every function that maps over its leaves. Multiplied or summed, the
ids of a gradient would name other rows. Sealed, they are arrays of an extended dtype,
as keys are: copying, stacking, selecting and `lax.scan` work, arithmetic is a TypeError
that says what to use. Compiled, sealing is nothing: the bits stay as they are.

What such a function can do to the numbers beside them shows in a guard, three more
leaves. Two hold known numbers, which linear functions keep in proportion, and `clip`,
`sign`, `flip` or `ones_like` don't. One is of `float0`, which even `isnan` refuses.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend import random
from jaxtyping import Array, Bool, Int, Shaped

from jbag.ops._gradient_terms import Term
from jbag.ragged._slots import filled

# Powers of two, and so exact under any scale. They aren't sorted, nor of one sign, nor
# whole; the two leaves differ in norm.
_KNOWN = tuple(np.array(x, np.float32) for x in ([0.5, -0.25], [2**14, -(2**-8)]))
GUARD = (*_KNOWN, np.zeros((), jax.dtypes.float0))

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


def is_intact(guard: tuple[Any, ...]) -> Bool[Any, "..."]:
    """Return whether only linear functions were applied to a guard, of one or a batch.

    NumPy's answer, and free, where it never left the program that made it.
    """
    *found, _ = guard
    xp = np if all(isinstance(x, np.ndarray) for x in found) else jnp
    numbers = xp.concatenate([x.astype(np.float32) for x in found], axis=-1)
    proportions = np.concatenate(_KNOWN) / _KNOWN[0][0]
    return xp.all(numbers == numbers[..., :1] * proportions, axis=-1)


class SealedTerms(NamedTuple):
    """Terms as the leaves of a pytree: the cotangents, and sealed arrays.

    Attributes:
      leaves: of each term the cotangent, ids, offsets, coefficients and winners.
      structure: of each term the dtypes and shapes of these, and the options.
      guard: arrays that show through which functions the leaves have passed.
    """

    leaves: tuple[tuple[Any, ...], ...]
    structure: tuple[Any, ...]
    guard: tuple[Any, ...] = GUARD

    @classmethod
    def close(cls, terms: Sequence[Term]) -> SealedTerms:
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
            options = (term.empty, term.implementation, term.average, term.placement)
            structure.append((types, *options))
        return cls(tuple(leaves), tuple(structure))

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The axes that the cotangents have in front, () of one gradient."""
        return self.leaves[0][0].shape[:-2] if self.leaves else ()

    def open(self, num_embeddings: int) -> tuple[Term, ...]:
        """Return the terms; of a batch, every array has its axes in front.

        Where the guard is traced and changed, every slot names a row, and that is NaN.

        Raises:
          TypeError, ValueError: a function changed the dtype, the shape or the numbers
            of a leaf.
        """
        intact = is_intact(self.guard)
        traced = isinstance(intact, jax.core.Tracer)
        if not traced and not np.all(intact):
            raise ValueError(
                "A function that isn't linear changed the leaves of a RowSparse; for "
                "gradients with rows, see jbag.optim."
            )
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
            empty, implementation, average, placement = options
            term = Term(
                cotangent,
                ~inverted,
                offsets,
                coefficients,
                empty,
                implementation,
                winners,
                average,
                placement,
            )
            terms.append(_nan_unless(intact, term, num_embeddings) if traced else term)
        return tuple(terms)


def _nan_unless(intact: Bool[Array, "..."], term: Term, num_embeddings: int) -> Term:
    """Return the term, or one of the same shapes in which each slot's row is NaN."""

    def select(x: Any, otherwise: Any) -> Any:
        if x is None:
            return None
        axes = range(intact.ndim, x.ndim)
        return jnp.where(jnp.expand_dims(intact, axes), x, otherwise)

    ids = term.ids
    is_row = (ids >= 0) & (ids < num_embeddings) & filled(ids, term.empty)
    return dataclasses.replace(
        term,
        cotangent=select(term.cotangent, jnp.nan),
        ids=select(ids, jnp.where(is_row, ids, int(term.empty == 0))),
        offsets=select(term.offsets, _offsets_of_first_bag(term)),
        winners=select(term.winners, 0),
    )


def _offsets_of_first_bag(term: Term) -> Int[Array, " ends"] | None:
    """Return offsets by which the first bag of each device's block has every slot."""
    if term.offsets is None:
        return None
    num_blocks = term.placement.num_blocks
    ends, slots = (x.shape[-1] // num_blocks for x in (term.offsets, term.ids))
    is_first = jnp.arange(ends * num_blocks) % ends == 0
    return jnp.where(is_first, 0, slots).astype(term.offsets.dtype)

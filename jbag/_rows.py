"""`RowSparse`: a [V, D] array of which few rows aren't zero."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jbag._kernels import xla
from jbag._kernels.xla import Ids, Offsets, Slots
from jbag._primitive import EMPTY
from jbag._product import transposed_product
from jbag._update import coalesce, update_rows
from jbag._validation import check_integer, check_integers, to_index_dtype


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["cotangent", "ids", "offsets", "coefficients"],
    meta_fields=["empty", "implementation"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Term:
    """A transposed product that isn't multiplied out: A.T @ cotangent.

    A holds the bags' coefficients. What it adds up to is never larger than they are.
    """

    cotangent: Float[Array, "B D"]
    ids: Ids
    offsets: Offsets = None
    coefficients: Slots | None = None
    empty: int | None = None
    implementation: str | None = None

    def apply(self, operation: Callable, *operands: Any, **params: Any) -> Any:
        """Call an operation with the operands, the cotangent and the bags."""
        return operation(
            *operands,
            self.cotangent,
            self.ids,
            self.offsets,
            self.coefficients,
            empty=self.empty,
            implementation=self.implementation,
            **params,
        )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["terms", "applied"],
    meta_fields=["shape", "dtype", "is_coalesced"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class RowSparse:
    """A [V, D] array of which few rows aren't zero: a table's gradient, or its update.

    `jbag.value_and_grad` makes them. They are held as products that aren't multiplied
    out: a bag's row of the cotangent stands once, however many ids the bag has, and the
    sums of rows are only made by `coalesce`, or as they are added to a table. All
    shapes are static, and it is a pytree, which passes through `jit`, `scan` and the
    like.

    `array + rows` adds them to an array of the same shape, in place where that is
    donated; so `optax.apply_updates` works as it is. Further `rows + rows`, `-rows` and
    `rows * number`. Functions that map over the arrays of a gradient, such as
    `optax.scale`, don't know of rows: use those of `jbag.optim`.

    To `jax.experimental.sparse.BCOO`, of which a padded index is out of bounds, too::

        rows = rows.coalesce()
        BCOO((rows.values, rows.indices[:, None]), shape=rows.shape,
             indices_sorted=True, unique_indices=True)

    and from it, `RowSparse.from_rows(x.indices[:, 0], x.data, x.shape[0])`. To PyTorch,
    which takes no padding::

        rows, n = rows.coalesce(), int(rows.num_rows)
        torch.sparse_coo_tensor(np.array(rows.indices[:n])[None],
                                np.array(rows.values[:n]), rows.shape)

    and from a coalesced tensor, `RowSparse.from_rows(x.indices()[0].numpy(),
    x.values().numpy(), x.shape[0])`.

    Attributes:
      shape: (V, D).
      dtype: of the array that it stands for. The sums run in float32 at least.

    Example:
      >>> rows = jbag.RowSparse.from_rows([3, 1, 3], jnp.ones((3, 2)), num_embeddings=5)
      >>> rows.coalesce().indices
      Array([1, 3, 5], dtype=int32)
      >>> (jnp.zeros((5, 2)) + rows)[:, 0]
      Array([0., 1., 0., 2., 0.], dtype=float32)
    """

    terms: tuple[Term, ...]
    shape: tuple[int, ...]
    dtype: Any
    is_coalesced: bool = False
    # Of an update that an optimizer has made already: the table before and after.
    applied: tuple[Array, Array] | None = None

    @classmethod
    def from_rows(
        cls, indices: ArrayLike, values: ArrayLike, num_embeddings: int
    ) -> RowSparse:
        """Return the array that holds, at each index, the sum of its rows.

        Args:
          indices: [N], integers; those outside [0, V) count for nothing.
          values: [N, D], floating: the rows.
          num_embeddings: V.

        Raises:
          TypeError: `indices` aren't integers, or `values` aren't floating.
          ValueError: the shapes don't fit.
        """
        num_embeddings = check_integer("num_embeddings", num_embeddings, low=0)
        ids = jnp.asarray(to_index_dtype(check_integers("indices", indices)))
        rows = jnp.asarray(values)
        if not jnp.issubdtype(rows.dtype, jnp.floating):
            raise TypeError(f"`values` must be floating; got {rows.dtype}.")
        if ids.ndim != 1 or rows.ndim != 2 or ids.shape[0] != rows.shape[0]:
            raise ValueError(
                "`indices` must be [N], and `values` [N, D]; "
                f"got {ids.shape} and {rows.shape}."
            )
        term = Term(rows.astype(xla.accumulation_dtype(rows.dtype)), ids[:, None])
        return cls((term,), (num_embeddings, rows.shape[1]), rows.dtype)

    @property
    def ndim(self) -> int:
        """Two."""
        return 2

    @property
    def indices(self) -> Int[Array, " N"]:
        """The rows that aren't zero, V where a slot names none; unique if coalesced."""
        return self._rows()[0]

    @property
    def values(self) -> Float[Array, "N D"]:
        """The row at each of `indices`, in the accumulation dtype."""
        return self._rows()[1]

    @property
    def num_rows(self) -> Int[Array, ""]:
        """How many rows are named."""
        return (self.coalesce().indices < self.shape[0]).sum()

    def coalesce(self) -> RowSparse:
        """Return the same array with each row once, in order.

        There is room for as many rows as there are ids, or V; past the last one the
        index is V, and the row zero.

        Example:
          >>> rows = jbag.RowSparse.from_rows([3, 1, 3], jnp.ones((3, 2)), 5)
          >>> rows.coalesce().values[:, 0]
          Array([1., 2., 0.], dtype=float32)
        """
        if self.is_coalesced:
            return self
        term = self.joined()
        indices, sums = term.apply(coalesce, num_embeddings=self.shape[0])
        unique = Term(sums, indices[:, None], implementation=term.implementation)
        return dataclasses.replace(self, terms=(unique,), is_coalesced=True)

    def todense(self) -> Float[Array, "V D"]:
        """Return the array, rounded once to `dtype`."""
        num_embeddings = self.shape[0]
        return self.joined().apply(
            transposed_product, num_embeddings=num_embeddings, dtype=self.dtype
        )

    def with_values(self, values: Float[Array, "N D"]) -> RowSparse:
        """Return it with other rows at the same indices."""
        term = Term(values, self.indices[:, None])
        return dataclasses.replace(self, terms=(term,), applied=None)

    def scale_rows(self, scale: Float[Array, " N"]) -> RowSparse:
        """Return it with each of the `values` times its number."""
        values = self.values
        return self.with_values(values * scale.astype(values.dtype)[:, None])

    def joined(self) -> Term:
        """Return one term that is the sum of all."""
        terms = [t for t in self.terms if t.ids.size and t.cotangent.shape[0]]
        for term in terms:
            if not jnp.issubdtype(term.ids.dtype, jnp.integer):
                raise TypeError(
                    "The ids of a RowSparse must be integers; got "
                    f"{term.ids.dtype}. A function that maps over the arrays of a "
                    "gradient changed them: those of `jbag.optim` know of rows."
                )
        if not terms:
            dtype = xla.accumulation_dtype(jnp.dtype(self.dtype))
            rows = jnp.zeros((0, self.shape[1]), dtype)
            return Term(rows, jnp.zeros((0, 1), jnp.int32))
        return terms[0] if len(terms) == 1 else _join(terms)

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, RowSparse):
            return self.__radd__(other)
        if self.shape != other.shape:
            raise ValueError(
                f"Shapes must be equal; got {self.shape} and {other.shape}."
            )
        dtype = jnp.promote_types(self.dtype, other.dtype)
        return RowSparse(self.terms + other.terms, self.shape, dtype)

    def __radd__(self, other: Any) -> Any:
        """Return an array with the rows added to it."""
        if isinstance(other, int) and other == 0:  # as `sum` starts
            return self
        if not isinstance(other, jax.Array | np.ndarray):
            return NotImplemented
        if self.applied is not None and other is self.applied[0]:
            return self.applied[1]
        if other.shape != self.shape:
            raise ValueError(
                f"Shapes must be equal; got {other.shape} and {self.shape}."
            )
        table = jnp.asarray(other)
        numbers = (-1.0, 0.0)  # a step of size one upwards, without decay
        return self.joined().apply(update_rows, table, (), numbers, None, rule="sgd")[0]

    def __sub__(self, other: Any) -> Any:
        return self + -other

    def __rsub__(self, other: Any) -> Any:
        return (-self).__radd__(other)

    def __neg__(self) -> RowSparse:
        return self * -1

    def __mul__(self, scale: Any) -> RowSparse:
        if not isinstance(scale, numbers.Real | np.generic) and not (
            isinstance(scale, jax.Array | np.ndarray) and scale.ndim == 0
        ):
            return NotImplemented
        terms = tuple(
            dataclasses.replace(
                term,
                cotangent=term.cotangent * jnp.asarray(scale, term.cotangent.dtype),
            )
            for term in self.terms
        )
        return dataclasses.replace(self, terms=terms, applied=None)

    __rmul__ = __mul__

    def __truediv__(self, scale: Any) -> RowSparse:
        return self * (1 / scale)

    # NumPy's arrays and numbers then leave arithmetic to these methods, as JAX's do.
    __array_ufunc__ = None

    def _rows(self) -> tuple[Int[Array, " N"], Float[Array, "N D"]]:
        term = self.joined()
        rows, kept = xla.bag_rows(term.cotangent, term.ids, term.offsets)
        if term.coefficients is not None:
            rows = term.coefficients[..., None] * rows
        kept &= (term.ids >= 0) & (term.ids < self.shape[0])
        kept &= xla.filled(term.ids, term.empty)
        indices = jnp.where(kept, term.ids, self.shape[0]).reshape(-1)
        rows = jnp.where(kept[..., None], rows, 0)
        return indices, rows.reshape(indices.size, self.shape[1])


def is_rows(x: Any) -> bool:
    """Return whether x is a `RowSparse`: for trees, in which it is a leaf."""
    return isinstance(x, RowSparse)


def _join(terms: list[Term]) -> Term:
    """Lay the bags of the terms end to end."""
    ids, starts, first = [], [], 0
    dtype = jnp.result_type(*(term.ids.dtype for term in terms))
    for term in terms:
        own, offsets = term.ids, term.offsets
        if term.empty is not None:
            own = jnp.where(own == term.empty, EMPTY, own)
        if offsets is None:
            bounds = own.shape[1] * jnp.arange(own.shape[0] + 1, dtype=dtype)
        else:
            bounds, malformed = xla.bag_bounds(offsets, own.size)
            bags = xla.segment_ids(bounds, own.size)
            own = jnp.where(xla.take(malformed, bags, True), EMPTY, own)
        ids.append(own.reshape(-1).astype(dtype))
        starts.append(bounds[:-1].astype(dtype) + first)
        first += own.size
    wide = jnp.result_type(*(term.cotangent.dtype for term in terms))
    coefficients = None
    if any(term.coefficients is not None for term in terms):
        coefficients = jnp.concatenate([_flat(t).astype(wide) for t in terms])
    return Term(
        jnp.concatenate([term.cotangent.astype(wide) for term in terms]),
        jnp.concatenate(ids),
        jnp.concatenate([*starts, jnp.full(1, first, dtype)]),
        coefficients,
        EMPTY,
        terms[0].implementation,
    )


def _flat(term: Term) -> Slots:
    """Return the term's coefficients."""
    if term.coefficients is None:
        return jnp.ones(term.ids.size, term.cotangent.dtype)
    return term.coefficients.reshape(-1)

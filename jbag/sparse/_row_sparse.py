"""`RowSparse`: a [V, D] array with few non-zero rows."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Shaped

from jbag._validation import AnyArray, check_integer, check_integers, to_index_dtype
from jbag.ops import _row_gather
from jbag.ops._factored_gradient import (
    ONE_DEVICE,
    FactoredGradient,
    Placement,
    sum_batch,
)
from jbag.sparse._sealed_leaves import SealedGradients

_UNEQUAL = "Shapes must be equal; got {} and {}."


class _RowSparseType(type):
    # JAX puts the name of the class in its error if a RowSparse is used as an array, as
    # by `optax.adam`.
    def __repr__(cls) -> str:
        return f"<class 'jbag.{cls.__name__}'; for gradients with rows, see jbag.optim>"


@jax.tree_util.register_pytree_node_class
class RowSparse(metaclass=_RowSparseType):
    """A [V, D] array with few non-zero rows: the gradient or the update of a table.

    It is the `IndexedSlices` of TensorFlow. `jbag.value_and_grad` returns it. It holds
    factors, A.T @ cotangent, with one row per bag; `coalesce` and additions to a table
    multiply them. It is a pytree of static shapes, which works under `jit`, `scan` and
    other transformations.

    `array + rows` adds the rows to an array [V, D], in place if the array is donated,
    so `optax.apply_updates` works. `rows + rows`, `-rows` and `rows * number` work too.

    A function that maps over the leaves, such as `optax.scale` or `jax.lax.psum`,
    raises a TypeError: all leaves but the cotangent have a dtype without arithmetic.
    If a function that is not linear changes the cotangent, the next use of the rows
    raises a ValueError, or gives NaN under `jit`. Use the transformations of
    `jbag.optim`, `jbag.sparse.psum` and `pmean`, or map over whole gradients with
    `jax.tree.map(..., is_leaf=lambda x: isinstance(x, jbag.RowSparse))`.

    `jax.vmap` and `jax.lax.scan` return a batch of them, with leading axes
    `batch_shape`. `sum` adds the batch up; `todense` and `coalesce` are applied to each
    element.

    Conversions of coalesced rows to `jax.experimental.sparse.BCOO` and PyTorch, the
    latter without padding, and back::

        x = BCOO((rows.values, rows.indices[:, None]), shape=rows.shape,
                 indices_sorted=True, unique_indices=True)
        RowSparse.from_rows(x.indices[:, 0], x.data, x.shape[0])

        n = int(rows.num_rows)
        indices, values = np.array(rows.indices[:n]), np.array(rows.values[:n])
        x = torch.sparse_coo_tensor(indices[None], values, rows.shape).coalesce()
        RowSparse.from_rows(*map(np.asarray, (x.indices()[0], x.values())), x.shape[0])

    Attributes:
      shape: (V, D).
      dtype: the dtype of the array. Sums accumulate in float32 or float64.

    Example:
      >>> rows = jbag.RowSparse.from_rows([3, 1, 3], jnp.ones((3, 2)), num_embeddings=5)
      >>> rows.coalesce().indices
      Array([1, 3, 5], dtype=int32)
      >>> rows.num_rows
      Array(2, dtype=int32)
      >>> (jnp.zeros((5, 2)) + rows)[:, 0]
      Array([0., 1., 0., 2., 0.], dtype=float32)
    """

    def __init__(
        self,
        terms: Sequence[FactoredGradient],
        shape: tuple[int, ...],
        dtype: Any,
        is_coalesced: bool = False,
    ) -> None:
        self.shape, self.dtype, self.is_coalesced = shape, dtype, is_coalesced
        self._terms: tuple[FactoredGradient, ...] | None = tuple(terms)
        self._sealed: SealedGradients | None = None

    @property
    def terms(self) -> tuple[FactoredGradient, ...]:
        """The terms whose sum it is."""
        if self._terms is not None:
            return self._terms
        assert self._sealed is not None
        if self.batch_shape:
            raise ValueError(
                f"This is a batch of RowSparse, of shape {self.batch_shape}, as `vmap` "
                "and `scan` return it: sum it with `rows.sum()`, or use `jax.vmap`."
            )
        return self._sealed.to_terms(self.shape[0])

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes of a batch, as `vmap` and `scan` return it; else ()."""
        return () if self._sealed is None else self._sealed.batch_shape

    def tree_flatten(self) -> tuple[Any, Any]:
        """Return the leaves; all but the cotangents are sealed."""
        sealed = (
            SealedGradients.from_terms(self.terms)
            if self._sealed is None
            else self._sealed
        )
        aux = (sealed.structure, self.shape, self.dtype, self.is_coalesced)
        return (sealed.leaves, sealed.guard), aux

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> RowSparse:
        """Rebuild from leaves, without checks."""
        structure, shape, dtype, is_coalesced = aux
        rows = cls.__new__(cls)
        RowSparse.__init__(rows, (), shape, dtype, is_coalesced)
        rows._terms = None
        rows._sealed = SealedGradients(children[0], structure, children[1])
        return rows

    @classmethod
    def from_rows(
        cls, indices: ArrayLike, values: ArrayLike, num_embeddings: int
    ) -> RowSparse:
        """Return the array whose row v is the sum of `values` at the indices v.

        Args:
          indices: [N], integers; indices outside [0, V) are ignored.
          values: [N, D], floating.
          num_embeddings: V.

        Raises:
          TypeError: `indices` aren't integers, or `values` aren't floating.
          ValueError: the shapes don't match.
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
        term = FactoredGradient(
            rows.astype(_row_gather.accumulation_dtype(rows.dtype)), ids[:, None]
        )
        return cls((term,), (num_embeddings, rows.shape[1]), rows.dtype)

    @property
    def ndim(self) -> int:
        """The number of axes, 2."""
        return 2

    def __getitem__(self, key: Any) -> RowSparse:
        """Return itself for `...`, with which a variable of NNX reads its value."""
        if key is not Ellipsis:
            raise TypeError(f"The index of a RowSparse must be `...`; got {key!r}.")
        return self

    @property
    def indices(self) -> Int[Array, " N"]:
        """The ids of the rows, V in empty slots; sorted and unique if coalesced."""
        return self._flat().ids[:, 0]

    @property
    def values(self) -> Float[Array, "N D"]:
        """The row at each of `indices`, in the accumulation dtype."""
        return self._flat().cotangent

    @property
    def num_rows(self) -> Int[Array, ""]:
        """The number of distinct ids."""
        return (self.coalesce().indices < self.shape[0]).sum()

    def coalesce(self) -> RowSparse:
        """Return an equal array with sorted, unique ids and the sum of each one's rows.

        It has min(N, V) entries. Entries past the last distinct id have the index V and
        a zero row. For a table sharded over a mesh, each device has the rows it owns.

        Example:
          >>> rows = jbag.RowSparse.from_rows([3, 1, 3], jnp.ones((3, 2)), 5)
          >>> rows.coalesce().values[:, 0]
          Array([1., 2., 0.], dtype=float32)
        """
        if self.is_coalesced:
            return self
        if self.batch_shape:
            return jax.vmap(RowSparse.coalesce)(self)
        unique = self._placement.coalesce(self.terms, self.shape, self.dtype)
        return RowSparse((unique,), self.shape, self.dtype, is_coalesced=True)

    def sum(self, axis: int | None = None) -> RowSparse:
        """Sum a batch by concatenating its bags.

        Args:
          axis: an axis of the batch; None sums over all.

        Raises:
          ValueError: `axis` is out of range.

        Example:
          >>> loss = lambda t, ids: jbag.embedding_bag(t, ids, sparse=True).sum()
          >>> rows = jax.vmap(jbag.grad(loss), in_axes=(None, 0))(
          ...     jnp.ones((9, 1)), jnp.array([[[1, 2]], [[2, 3]]])
          ... )
          >>> rows.batch_shape, rows.sum().coalesce().values[:, 0].tolist()
          ((2,), [0.5, 1.0, 0.5, 0.0])
        """
        axes = len(self.batch_shape)
        if axis is None:
            rows = self
            for _ in range(axes):
                rows = rows.sum(0)
            return rows
        if not -axes <= axis < axes:
            raise ValueError(
                f"`axis` must be one of the {axes} of the batch; got {axis}."
            )
        if axes > 1:  # the others stay
            rest = 1 if axis % axes == 0 else 0
            inner = functools.partial(RowSparse.sum, axis=max(axis % axes - 1, 0))
            return jax.vmap(inner, in_axes=rest)(self)
        assert self._sealed is not None
        terms = self._sealed.to_terms(self.shape[0])
        if any(term.placement.over_mesh for term in terms):
            size = self.batch_shape[0]
            parts = [jax.tree.map(operator.itemgetter(k), self) for k in range(size)]
            return functools.reduce(operator.add, parts)
        terms = tuple(sum_batch(term, self.shape[0]) for term in terms)
        return RowSparse(terms, self.shape, self.dtype)

    def todense(self) -> Float[Array, "V D"]:
        """Return the dense array [V, D], rounded once to `dtype`.

        Example:
          >>> jbag.RowSparse.from_rows([1, 1], jnp.ones((2, 1)), 3).todense()[:, 0]
          Array([0., 2., 0.], dtype=float32)
        """
        if self.batch_shape:
            return jax.vmap(RowSparse.todense)(self)
        dense = self._placement.todense(self.terms, self.shape, self.dtype)
        return dense.astype(self.dtype)

    def fits(self, table: AnyArray) -> bool:
        """Return whether an array is such a table, or the lines of one."""
        packing = self._placement.packing
        return table.shape in (self.shape, packing and packing.shape)

    def update_table(
        self,
        table: Float[Array, "rows width"],
        states: Sequence[Array],
        scalars: Sequence[Any] | Array,
        seed: Array | None = None,
        *,
        rule: str,
    ) -> tuple[Array, ...]:
        """Update a table by a rule of `kernels.update_rules`, in place if donated."""
        operands = (table, tuple(states), scalars, seed)
        return self._placement.update_rows(self.terms, *operands, rule=rule)

    def rows_of(self, array: Shaped[Array, "V ..."]) -> Shaped[Array, "N ..."]:
        """Gather the rows of an array at `indices`, zeros in empty slots."""
        return self._placement.take(array, self.indices)

    def put(
        self, array: Shaped[Array, "V ..."], rows: Shaped[Array, "N ..."]
    ) -> Shaped[Array, "V ..."]:
        """Scatter rows to an array at `indices`, which must be unique."""
        return self._placement.put(array, self.indices, rows)

    def with_values(self, values: Float[Array, "N D"]) -> RowSparse:
        """Return a `RowSparse` with the same indices and other values."""
        term = self._flat()
        term = dataclasses.replace(term, cotangent=values)
        return RowSparse((term,), self.shape, self.dtype, self.is_coalesced)

    def scale_rows(self, scale: Float[Array, " N"]) -> RowSparse:
        """Multiply each row of `values` by its scale."""
        values = self.values
        return self.with_values(values * scale.astype(values.dtype)[:, None])

    @property
    def _placement(self) -> Placement:
        """The placement of the terms."""
        placements: set[Placement] = {term.placement for term in self.terms}
        placements = placements - {ONE_DEVICE} or placements  # rows made by hand fit
        if len(placements) > 1:
            raise ValueError(
                "Gradients of a sharded table can be added if all have the same "
                "strategy, and all are coalesced or not; got several."
            )
        return next(iter(placements), ONE_DEVICE)

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, RowSparse):
            return self.__radd__(other)
        if self.shape != other.shape:
            raise ValueError(_UNEQUAL.format(self.shape, other.shape))
        dtype = jnp.promote_types(self.dtype, other.dtype)
        return RowSparse(self.terms + other.terms, self.shape, dtype)

    def __radd__(self, other: Any) -> Any:
        """Return an array with the rows added to it."""
        if isinstance(other, int) and other == 0:  # as `sum` starts
            return self
        if not isinstance(other, jax.Array | np.ndarray):
            return NotImplemented
        if not self.fits(other):
            raise ValueError(_UNEQUAL.format(other.shape, self.shape))
        if not jnp.issubdtype(other.dtype, jnp.floating):
            raise TypeError(
                f"A RowSparse must be added to a floating array; got {other.dtype}."
            )
        scalars = (-1.0, 0.0)  # learning rate and weight decay
        return self.update_table(jnp.asarray(other), (), scalars, rule="sgd")[0]

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
        if self.batch_shape:
            return jax.vmap(RowSparse.__mul__, in_axes=(0, None))(self, scale)
        terms = [
            dataclasses.replace(
                term,
                cotangent=term.cotangent * jnp.asarray(scale, term.cotangent.dtype),
            )
            for term in self.terms
        ]
        return RowSparse(terms, self.shape, self.dtype, self.is_coalesced)

    __rmul__ = __mul__

    def __truediv__(self, scale: Any) -> RowSparse:
        return self * (1 / scale)

    def __repr__(self) -> str:
        batch = f", batch_shape={self.batch_shape}" if self.batch_shape else ""
        return f"RowSparse(shape={self.shape}, dtype={jnp.dtype(self.dtype)}{batch})"

    # Makes NumPy's arrays and numbers defer arithmetic to these methods.
    __array_ufunc__ = None

    def _flat(self) -> FactoredGradient:
        """Return one bag per slot, or per distinct id if coalesced."""
        if self.is_coalesced:
            return self.terms[0]
        return self._placement.flat(self.terms, self.shape, self.dtype)


def is_rows(x: Any) -> bool:
    """Return whether x is a `RowSparse`, as the `is_leaf` of tree functions."""
    return isinstance(x, RowSparse)


def _refuse_export(_: Any) -> NoReturn:
    raise ValueError(
        "A function that takes or returns a RowSparse can't be serialized: take or "
        "return `rows.indices` and `rows.values`, and use `RowSparse.from_rows`."
    )


# JAX's format has no extended dtypes. The exported function may use RowSparse inside.
jax.export.register_pytree_node_serialization(
    RowSparse,
    serialized_name="jbag.RowSparse",
    serialize_auxdata=_refuse_export,
    deserialize_auxdata=_refuse_export,
)

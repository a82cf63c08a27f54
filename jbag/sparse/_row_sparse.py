"""`RowSparse`: a [V, D] array of which few rows aren't zero."""

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

from jbag._validation import check_integer, check_integers, to_index_dtype
from jbag.ops import _row_gather
from jbag.ops._factored_gradient import (
    ONE_DEVICE,
    FactoredGradient,
    Placement,
    sum_batch,
)
from jbag.sparse._guard import SealedGradients


class _RowSparseType(type):
    # JAX names the class where it finds a RowSparse in the place of an array, as in the
    # state of `optax.adam`: the one place to say what takes rows.
    def __repr__(cls) -> str:
        return f"<class 'jbag.{cls.__name__}'; for gradients with rows, see jbag.optim>"


@jax.tree_util.register_pytree_node_class
class RowSparse(metaclass=_RowSparseType):
    """A [V, D] array of which few rows aren't zero: a table's gradient, or its update.

    `jbag.value_and_grad` makes them. They are held as products that aren't multiplied
    out: a bag's row of the cotangent stands once, however many ids the bag has, and the
    sums of rows are only made by `coalesce`, or as they are added to a table. All
    shapes are static, and it is a pytree, which passes through `jit`, `scan` and the
    like.

    `array + rows` adds them to an array of the same shape, in place where that is
    donated; so `optax.apply_updates` works as it is. Further `rows + rows`, `-rows` and
    `rows * number`.

    A function that maps over the leaves of a gradient, such as `optax.scale` or
    `jax.lax.psum`, raises a TypeError: all leaves but the cotangent are sealed, of a
    dtype without arithmetic. What changes the cotangent alone, and isn't linear, is a
    ValueError where the rows are read next, and NaN where that is traced. `jbag.optim`
    has `scale`, `scale_by_schedule`, `clip_by_global_norm` and the like, `jbag.sparse`
    has `psum` and `pmean`, and
    `jax.tree.map(..., is_leaf=lambda x: isinstance(x, jbag.RowSparse))` maps over whole
    gradients.

    What `jax.vmap` or `jax.lax.scan` returns is a batch of them, with leading axes
    `batch_shape`: `rows.sum()` adds it up, `todense` and `coalesce` take it as it is.

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
        """The products that it is the sum of."""
        if self._terms is not None:
            return self._terms
        assert self._sealed is not None
        if self.batch_shape:
            raise ValueError(
                f"This is a batch of RowSparse, of shape {self.batch_shape}, as `vmap` "
                "and `scan` return it: add it up with `rows.sum()`, or call this under "
                "`jax.vmap`."
            )
        return self._sealed.to_terms(self.shape[0])

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes of a batch, as `vmap` and `scan` return it; () of one."""
        return () if self._sealed is None else self._sealed.batch_shape

    def tree_flatten(self) -> tuple[Any, Any]:
        """Return the leaves, of which all but the cotangents are sealed."""
        sealed = (
            SealedGradients.from_terms(self.terms)
            if self._sealed is None
            else self._sealed
        )
        aux = (sealed.structure, self.shape, self.dtype, self.is_coalesced)
        return (sealed.leaves, sealed.guard), aux

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> RowSparse:
        """Return the array of these leaves, whatever they are."""
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
        term = FactoredGradient(
            rows.astype(_row_gather.accumulation_dtype(rows.dtype)), ids[:, None]
        )
        return cls((term,), (num_embeddings, rows.shape[1]), rows.dtype)

    @property
    def ndim(self) -> int:
        """Two."""
        return 2

    def __getitem__(self, key: Any) -> RowSparse:
        """Return itself at `...`, as a variable of NNX reads its value."""
        if key is not Ellipsis:
            raise TypeError(f"A RowSparse is read whole, at `...`; got {key!r}.")
        return self

    @property
    def indices(self) -> Int[Array, " N"]:
        """The rows that aren't zero, V where a slot names none; unique if coalesced."""
        return self._flat().ids[:, 0]

    @property
    def values(self) -> Float[Array, "N D"]:
        """The row at each of `indices`, in the accumulation dtype."""
        return self._flat().cotangent

    @property
    def num_rows(self) -> Int[Array, ""]:
        """How many rows are named."""
        return (self.coalesce().indices < self.shape[0]).sum()

    def coalesce(self) -> RowSparse:
        """Return the same array with each row once, in order.

        The result has as many rows as there are ids, or V; past the last one the
        index is V, and the row zero. Of a table over a mesh, each device has the rows
        that it owns.

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
        """Return the sum of a batch, over one of its axes or over all.

        Nothing is multiplied out: the bags are laid end to end.

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
        """Return the array, rounded once to `dtype`."""
        if self.batch_shape:
            return jax.vmap(RowSparse.todense)(self)
        dense = self._placement.todense(self.terms, self.shape, self.dtype)
        return dense.astype(self.dtype)

    def move(
        self,
        table: Float[Array, "V D"],
        states: Sequence[Array],
        scalars: Sequence[Any],
        seed: Array | None = None,
        *,
        rule: str,
    ) -> tuple[Array, ...]:
        """Return the table and its states, the rows that are named moved by a rule.

        In place, where they aren't needed any more. The rules are those of
        `ops.kernels.update_rules`.
        """
        operands = (table, tuple(states), scalars, seed)
        return self._placement.update_rows(self.terms, *operands, rule=rule)

    def rows_of(self, array: Shaped[Array, "V ..."]) -> Shaped[Array, "N ..."]:
        """Return an array's rows at `indices`, zeros where a slot names none."""
        return self._placement.take(array, self.indices)

    def put(
        self, array: Shaped[Array, "V ..."], rows: Shaped[Array, "N ..."]
    ) -> Shaped[Array, "V ..."]:
        """Return an array with its rows at `indices` replaced; they must be unique."""
        return self._placement.put(array, self.indices, rows)

    def with_values(self, values: Float[Array, "N D"]) -> RowSparse:
        """Return it with other rows at the same indices."""
        term = self._flat()
        term = dataclasses.replace(term, cotangent=values)
        return RowSparse((term,), self.shape, self.dtype, self.is_coalesced)

    def scale_rows(self, scale: Float[Array, " N"]) -> RowSparse:
        """Return it with each of the `values` times its number."""
        values = self.values
        return self.with_values(values * scale.astype(values.dtype)[:, None])

    @property
    def _placement(self) -> Placement:
        """How the terms lie on devices."""
        found = {term.placement for term in self.terms}
        if len(found) > 1:
            raise ValueError(
                "Gradients of a table over a mesh add up where all of them are of one "
                "strategy, and coalesced or not; got several."
            )
        return next(iter(found), ONE_DEVICE)

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
        if other.shape != self.shape:
            raise ValueError(
                f"Shapes must be equal; got {other.shape} and {self.shape}."
            )
        if not jnp.issubdtype(other.dtype, jnp.floating):
            raise TypeError(
                f"Rows are added to a floating array; got one of {other.dtype}."
            )
        numbers = (-1.0, 0.0)  # a step of size one upwards, without decay
        return self.move(jnp.asarray(other), (), numbers, rule="sgd")[0]

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

    # NumPy's arrays and numbers then leave arithmetic to these methods, as JAX's do.
    __array_ufunc__ = None

    def _flat(self) -> FactoredGradient:
        """Return the rows of all slots as bags of one."""
        if self.is_coalesced:
            return self.terms[0]
        return self._placement.flat(self.terms, self.shape, self.dtype)


def is_rows(x: Any) -> bool:
    """Return whether x is a `RowSparse`: for trees, in which it is a leaf."""
    return isinstance(x, RowSparse)


def _refuse_export(_: Any) -> NoReturn:
    raise ValueError(
        "A function that takes or returns a RowSparse can't be serialized: let it take "
        "or return `rows.indices` and `rows.values`, and use `RowSparse.from_rows`."
    )


# JAX's format has no dtype for sealed arrays. Within the function there may be rows.
jax.export.register_pytree_node_serialization(
    RowSparse,
    serialized_name="jbag.RowSparse",
    serialize_auxdata=_refuse_export,
    deserialize_auxdata=_refuse_export,
)

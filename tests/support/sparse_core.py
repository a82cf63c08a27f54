"""A model of Pallas for SparseCores in NumPy: it runs the bodies of kernels on a CPU.

JAX can't interpret these kernels. Here subcores run one after the other. A copy takes
place when it is waited for, so data that nothing has waited for is missing. Memory that
nothing has written is NaN, or a huge number. Copies stay inside their arrays, and no
two write the same element of an output.
"""

import inspect
import types

import jax
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc

NUM_LANES = 16
MESH = types.SimpleNamespace(num_cores=2, num_subcores=2)


class Ref:
    """An array in some memory, or a part of one."""

    def __init__(self, array, is_written=None):
        self.array = array
        self.is_written = is_written  # a mask, in outputs

    @classmethod
    def empty(cls, shape, dtype, *, is_output=False):
        poison = np.nan if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
        is_written = np.zeros(shape, bool) if is_output else None
        return cls(np.full(shape, poison, dtype), is_written)

    @property
    def at(self):
        return _At(self)

    def __getitem__(self, index):
        return self.array[self._index(index)].copy()

    def __setitem__(self, index, value):
        index = self._index(index)
        assert self.array[index].dtype == value.dtype
        self.array[index] = value

    def bitcast(self, dtype):
        """Return 16-bit rows by pairs: the even row in the lower halves of words."""
        halves = self.array.view(np.uint16).astype(np.uint32)
        return Ref((halves[::2] | halves[1::2] << 16).view(dtype))

    def part(self, index):
        index = self._index(index)
        mask = None if self.is_written is None else self.is_written[index]
        return Ref(self.array[index], mask)

    def _index(self, index):
        index = index if isinstance(index, tuple) else (index,)
        found = []
        for i, size in zip(index, self.array.shape, strict=False):
            if isinstance(i, pl.Slice):
                assert 0 <= i.start <= i.start + i.size <= size
                found.append(slice(i.start, i.start + i.size))
            else:
                assert 0 <= i < size
                found.append(i)
        return tuple(found)


class _At:
    """Parts of a reference: by slices, or as an iterator of rows by `Indices`."""

    def __init__(self, ref):
        self.ref = ref

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        if isinstance(index[0], plsc.Indices):
            return _Rows(self.ref, *index)
        return self.ref.part(index)


class _Rows:
    """The rows of a reference that a stream gathers or scatters."""

    def __init__(self, ref, indices, *columns):
        self.ref, self.indices, self.columns = ref, indices, columns

    def __iter__(self):
        """Yield the positions in the stream, and the rows that are not ignored."""
        for position, row in enumerate(self.indices.values.array):
            if row != self.indices.ignored_value:
                yield position, self.ref.part((row, *self.columns))


class _Copy:
    def __init__(self, source, target, add):
        self.source, self.target, self.add = source, target, add

    def wait(self):
        if isinstance(self.source, _Rows):
            for position, row in self.source:
                _write(self.target.part((position,)), row.array, self.add)
        elif isinstance(self.target, _Rows):
            for position, row in self.target:
                _write(row, self.source.array[position], self.add)
        else:
            _write(self.target, self.source.array, self.add)


def _write(target, values, add):
    assert target.array.shape == values.shape
    assert target.array.dtype == values.dtype
    if target.is_written is not None:
        assert not target.is_written.any()
        target.is_written[...] = True
    target.array[...] = values + (target.array if add else 0)


def async_copy(source, target, semaphore, *, add=False):
    assert semaphore is not None
    return _Copy(source, target, add)


def sync_copy(source, target):
    _Copy(source, target, add=False).wait()


def addupdate(ref, values):
    ref.array += values


def loop(lower, upper, *, step=1):
    def run(body):
        for i in range(lower, upper, step):
            body(i)

    return run


def when(condition):
    return lambda body: body() if condition else None


def kernel(body, *, out_type, scratch_types, **options):
    """Return the function that runs a body on every subcore."""
    del options

    def run(*operands):
        refs = [Ref(np.array(x)) for x in operands]
        out = [Ref.empty(x.shape, x.dtype, is_output=True) for x in leaves]
        for core in range(MESH.num_cores):
            for subcore in range(MESH.num_subcores):
                scratch = [Ref.empty(*x) for x in scratch_types[:-1]]
                where = {"core": core, "subcore": subcore}
                with np.errstate(all="ignore"):
                    with_numpy(body, where)(*refs, *out, *scratch, "semaphore")
        return jax.tree.unflatten(tree, [x.array for x in out])

    leaves, tree = jax.tree.flatten(out_type)
    return lambda *operands: jax.pure_callback(run, out_type, *operands)


def with_numpy(body, where):
    """Return a body that computes with NumPy, as a callback can't run JAX's programs.

    A copy of the function has other globals, as other threads use its module's.
    """
    body = inspect.unwrap(body)
    lax = types.SimpleNamespace(axis_index=where.__getitem__)
    names = body.__globals__ | {"jnp": np, "jax": types.SimpleNamespace(lax=lax)}
    return types.FunctionType(body.__code__, names, closure=body.__closure__)


def install(patch):
    """Replace what kernels use of Pallas by the model."""
    core = types.SimpleNamespace(num_lanes=NUM_LANES)
    patch.setattr(pl, "kernel", kernel)
    patch.setattr(pl, "loop", loop)
    patch.setattr(pl, "when", when)
    patch.setattr(pl, "multiple_of", lambda x, _: x)
    patch.setattr(pltpu, "async_copy", async_copy)
    patch.setattr(pltpu, "sync_copy", sync_copy)
    patch.setattr(pltpu, "VMEM", lambda shape, dtype: (shape, dtype))
    info = types.SimpleNamespace(sparse_core=core)
    patch.setattr(pltpu, "get_tpu_info", lambda: info)
    patch.setattr(plsc, "VectorSubcoreMesh", lambda **_: MESH)
    patch.setattr(plsc, "addupdate", addupdate)
    patch.setattr(plsc, "bitcast", lambda x, dtype: x.view(dtype))

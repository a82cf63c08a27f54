"""Batches made in a thread of their own, and put on devices."""

import gc
import subprocess
import sys
import threading
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_cases import BAGS, LABELS, expected, same
from meshes import make_mesh, some_devices

import jbag
from jbag import Bags
from jbag.data import batches


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("jbag.data")]


def all_threads_end():
    for thread in threads():
        thread.join(10)
    return not threads()


@pytest.mark.parametrize("prefetch", [1, 3, 100])
def test_prefetching_changes_nothing(prefetch):
    options = {"batch_size": 4, "seed": 0, "steps": 2}
    stream = batches(BAGS, LABELS, prefetch=prefetch, **options)
    same(list(stream), list(batches(BAGS, LABELS, **options)))
    assert all_threads_end()


def test_batches_are_made_while_the_loop_is_busy():
    made = []

    def capacity(n):
        made.append(n)
        return n

    stream = batches(BAGS, batch_size=2, prefetch=3, capacity=capacity)
    assert not threads()
    iterator = iter(stream)
    next(iterator)
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.01)
    assert len(made) == 4  # the one taken, and three ahead
    del iterator
    assert all_threads_end()


def test_the_thread_ends_when_the_loop_stops_early():
    stream = batches(BAGS, batch_size=2, prefetch=2)
    for _ in stream:
        assert threads()
        break
    gc.collect()
    assert all_threads_end()
    ring = {"iterator": iter(stream)}
    ring["self"] = ring
    next(ring["iterator"])
    assert threads()
    del ring
    gc.collect()
    assert all_threads_end()


def test_an_error_in_the_thread_reaches_the_loop():
    def capacity(n):
        made.append(n)
        if len(made) == 3:
            raise RuntimeError("no room")
        return n

    made, seen = [], []
    stream = batches(BAGS, batch_size=2, prefetch=1, capacity=capacity)
    iterator = iter(stream)
    with pytest.raises(RuntimeError, match="no room"):
        seen.extend(iterator)
    assert len(seen) == 2
    assert next(iterator, None) is None
    gc.collect()
    assert all_threads_end()


def test_a_program_that_ends_within_an_epoch_ends():
    program = (
        "import jbag; b = jbag.Bags.from_lists([[1]] * 100)\n"
        "it = iter(jbag.data.batches(b, batch_size=1, prefetch=4)); next(it)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        check=True,
        capture_output=True,
        timeout=60,
    )
    assert done.stderr == b""


@pytest.mark.parametrize("prefetch", [0, 2])
def test_items_are_put_on_a_device(prefetch):
    *_, device = some_devices(3)  # not where arrays go by themselves
    options = {"batch_size": 4, "seed": 0, "prefetch": prefetch}
    labels = LABELS.astype(np.int32)
    stream = batches(BAGS, labels, device=device, **options)
    for batch, other in zip(stream, batches(BAGS, labels, **options), strict=True):
        assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(batch))
        same(batch, other)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.usefixtures("x64")
def test_items_on_a_device_have_the_dtypes_of_the_loop(prefetch):
    bags = Bags.from_lists([[1, 2], [3]])
    wide = Bags(bags.indices.astype(np.int64), bags.offsets.astype(np.int32))
    for batch in batches(
        wide, np.arange(2), batch_size=1, prefetch=prefetch, device=jax.devices()[0]
    ):
        assert batch.arrays.dtype == batch.bags.indices.dtype == jnp.int64
        assert batch.positions.dtype == batch.bags.offsets.dtype == jnp.int32


def test_a_stack_gives_each_device_a_batch():
    mesh = make_mesh(names=("data",))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    table = jnp.arange(2000.0).reshape(1000, 2)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    def pool(stack):
        return jax.vmap(lambda b: jbag.embedding_bag(table, b.bags, mode="sum"))(stack)

    for stack in batches(BAGS, batch_size=2, steps=4, seed=0, device=sharding):
        assert stack.bags.indices.sharding == sharding
        out = np.asarray(pool(stack))
        for k, b in np.ndindex(4, 2):
            row = expected(int(stack.positions[k, b])) if stack.mask[k, b] else ([], [])
            wanted = sum(w * 2 * i for i, w in zip(row[0], row[1], strict=True))
            np.testing.assert_allclose(out[k, b, 0], wanted, rtol=1e-5)

"""Programs that take and return jbag's types, written to bytes and read back."""

import flax.serialization
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jbag

BAGS = jbag.Bags.from_lists([[1, 2], [], [3]], [[0.5, 1.0], [], [2.0]], capacity=5)
TREES = {
    "jbag.Bags": BAGS,
    "jbag.Padded": BAGS.to_padded(3),
    "jbag.data.Batch": jbag.data.Batch({"a": BAGS}, None, np.ones(3, bool)),
    "jbag.data.Example": jbag.data.Example(np.arange(3, dtype=np.int32), np.float32(1)),
    "jbag.optim.RowState": jbag.optim.adam(0.1).init(jnp.ones((4, 2))),
    "jbag.sharding.Traffic": jbag.sharding.Traffic(*np.zeros((4, 1), np.int32)),
}


def bare(bags):
    return jbag.Bags(bags.indices, bags.offsets)


@pytest.mark.parametrize(
    "tree", [*TREES.values(), bare(BAGS)], ids=[*TREES, "no weights"]
)
def test_types_pass_through_exported_programs(tree):
    def double(tree):
        return jax.tree.map(lambda x: x + x, tree)

    exported = jax.export.export(jax.jit(double))(tree)
    restored = jax.export.deserialize(exported.serialize())
    out, wanted = restored.call(tree), double(tree)
    assert jax.tree.structure(out) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, out, wanted)


@pytest.mark.parametrize("name", TREES)
def test_serialized_programs_name_public_types(name):
    exported = jax.export.export(jax.jit(lambda tree: tree))(TREES[name])
    assert name.encode() in bytes(exported.serialize())


def test_a_pooled_batch_is_exported():
    table = jnp.arange(8.0).reshape(4, 2)
    pool = jax.jit(lambda table, bags: jbag.embedding_bag(table, bags, mode="sum"))
    exported = jax.export.export(pool)(table, BAGS)
    restored = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(restored.call(table, BAGS), pool(table, BAGS))


@pytest.mark.parametrize("bags", [BAGS, bare(BAGS), jax.tree.map(jnp.asarray, BAGS)])
def test_flax_writes_and_reads_bags(bags):
    assert jbag.linen  # Flax comes with it, and what it is told of bags
    state = flax.serialization.to_state_dict({"bags": bags})
    assert set(state["bags"]) == {"indices", "offsets", "weights"}
    empty = jax.tree.map(np.zeros_like, bags)
    restored = flax.serialization.from_state_dict({"bags": empty}, state)["bags"]
    data = flax.serialization.to_bytes(bags)
    for own in (restored, flax.serialization.from_bytes(empty, data)):
        assert jax.tree.structure(own) == jax.tree.structure(bags)
        jax.tree.map(np.testing.assert_array_equal, own, bags)

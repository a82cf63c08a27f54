"""The bytes that plans reckon with, beside those of compiled programs."""

import jax
import numpy as np
import optax
import pytest
from hlo import bytes_sent
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
from slow import slow

import jbag
from jbag.ops.kernels.update_rules import RULES
from jbag.sharding import Load, TableWise
from jbag.sharding._cost_model import CostModel
from jbag.sharding._feature_loads import check_table_loads

pytestmark = pytest.mark.standard_promotion
DEVICES, BAGS, SLOTS, WIDTH, COUNT = 4, 64, 500, 32, 5
SPECS = {
    "row_wise": P("x", None),
    "column_wise": P(None, "x"),
    "data_parallel": P(),
    "table_wise": TableWise("x", lanes=DEVICES),
}


def make_block(rng, weighted):
    lengths = rng.multinomial(SLOTS - 20, np.ones(BAGS) / BAGS)
    ids = rng.integers(0, 3000, SLOTS - 20)
    weights = np.ones(ids.size, np.float32) if weighted else None
    return jbag.Bags.from_lengths(ids, lengths, weights).pad_to(SLOTS)


@pytest.mark.parametrize(
    ("strategy", "weighted"),
    [
        ("row_wise", False),
        *slow(("row_wise", True), ("column_wise", True), ("table_wise", True)),
        *slow(("data_parallel", False)),
    ],
)
def test_a_step_sends_what_is_planned(strategy, weighted):
    mesh = make_mesh(sizes=(DEVICES,))
    collection = jbag.EmbeddingBagCollection(
        tables={f"t{i}": jbag.Table(3000 + i, WIDTH) for i in range(COUNT)},
        features={f"f{i}": jbag.Feature(f"t{i}", "sum") for i in range(COUNT)},
        specs={"embedding": SPECS[strategy]},
        mesh=mesh,
        sparse=True,
    )
    rng = np.random.default_rng(0)
    batch = {
        name: jax.tree.map(
            lambda *xs: np.stack(xs),
            *(make_block(rng, weighted) for _ in range(DEVICES)),
        )
        for name in collection.features
    }
    optimizer = jbag.optim.rowwise_adagrad(0.1)

    def forward(params, batch):
        return sum((x**2).sum() for x in collection.apply(params, batch).values())

    def step(params, state, batch):
        loss = lambda params: forward(params, batch)
        value, gradient = jbag.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    def laid(tree):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            tree,
            collection.shardings(tree),
        )

    params = jax.eval_shape(collection.init, jax.random.key(0), batch)
    params = {"params": {k: _unboxed(x) for k, x in params["params"].items()}}
    params, state = laid(params), laid(jax.eval_shape(optimizer.init, params))
    cut = jax.sharding.NamedSharding(mesh, P("x"))
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut), batch
    )
    sent = bytes_sent(jax.jit(forward).lower(params, batch).compile(), DEVICES)
    compiled = jax.jit(step, donate_argnums=(0, 1))
    compiled = compiled.lower(params, state, batch).compile()

    loads = {f"f{i}": Load(f"t{i}", SLOTS, weighted) for i in range(COUNT)}
    model = CostModel(DEVICES, BAGS, 20160, RULES["rowwise_adagrad"])
    load = model.combined(
        strategy, list(check_table_loads(collection.tables, loads).values())
    )
    forward, backward, held = model.cost(strategy, load)
    # Besides, two slots a feature tell its bags apart, and losses are summed up.
    apart = 2 * COUNT * (WIDTH + 1) * 4 * DEVICES + 200
    assert forward <= sent <= forward + apart
    assert (
        forward + backward
        <= bytes_sent(compiled, DEVICES)
        <= forward + backward + 2 * apart
    )
    memory = compiled.memory_analysis()
    of_batch = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch)) / DEVICES
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < held + of_batch


def _unboxed(x):
    return getattr(x, "value", x)

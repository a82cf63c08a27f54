"""Programs of collections over a mesh, and what a plan says of them.

    python mesh_programs.py v5e:4x4        # or another topology of TPUs

As a program it compiles them for TPUs on a machine without one, and prints what each
device sends and holds as JSON. It needs `libtpu`. Nothing runs.
"""

import json
import os
import sys
import time

if __name__ == "__main__":  # before JAX is imported
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # of a machine in Google's cloud
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no lock: no TPU is used
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import jax
import numpy as np
import optax
from hlo import bytes_sent
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jbag
from jbag.ops.kernels.update_rules import RULES
from jbag.sharding import Load, TableWise
from jbag.sharding._cost_model import CostModel
from jbag.sharding._feature_loads import check_table_loads

BAGS, COUNT = 64, 5  # bags of a feature on a device, and features
# By strategy: the features of the tables on TPUs. All but those by columns are packed.
STRATEGIES = {"row_wise": 32, "column_wise": 128, "data_parallel": 64, "table_wise": 10}


def spec_of(strategy, devices):
    return {
        "row_wise": P("x", None),
        "column_wise": P(None, "x"),
        "data_parallel": P(),
        "table_wise": TableWise("x", lanes=devices),
    }[strategy]


def make_collection(strategy, mesh, rows, width, packed):
    return jbag.EmbeddingBagCollection(
        tables={f"t{i}": jbag.Table(rows + i, width) for i in range(COUNT)},
        features={f"f{i}": jbag.Feature(f"t{i}", "sum") for i in range(COUNT)},
        specs={"embedding": spec_of(strategy, mesh.size)},
        mesh=mesh,
        sparse=True,
        packed=packed,
    )


def lower(strategy, mesh, *, rows, width, slots, weighted=False, packed=False):
    """Return a forward pass and a step of row-wise Adagrad, lowered."""
    collection = make_collection(strategy, mesh, rows, width, packed)
    block = jbag.Bags.from_lengths(
        np.zeros(slots, np.int32),
        np.bincount(np.arange(slots) % BAGS),
        np.ones(slots, np.float32) if weighted else None,
    )
    cut = NamedSharding(mesh, P("x"))
    batch = dict.fromkeys(
        collection.features,
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (mesh.size, *x.shape), x.dtype, sharding=cut
            ),
            block,
        ),
    )
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
    return (
        jax.jit(forward).lower(params, batch),
        jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch),
    )


def _unboxed(x):
    return getattr(x, "value", x)


def plan_bytes(strategy, devices, *, rows, width, slots, weighted=False):
    """Return the bytes that a plan says: sent forward and backward, and held."""
    tables = {f"t{i}": jbag.Table(rows + i, width) for i in range(COUNT)}
    loads = {f"f{i}": Load(f"t{i}", slots, weighted) for i in range(COUNT)}
    model = CostModel(devices, BAGS, 20160, RULES["rowwise_adagrad"])
    loads = list(check_table_loads(tables, loads).values())
    return model.cost(strategy, model.combined(strategy, loads))


def batch_bytes(slots, weighted=False):
    """Return the bytes of a device's part of the batch."""
    return COUNT * 4 * (slots * (1 + weighted) + BAGS + 1)


def options_on_tpus(strategy, devices):
    """Return the options of tables of 5 GB, and of as many ids on few or many TPUs.

    The compiler takes its time for the sort of all ids.
    """
    width = STRATEGIES[strategy]
    return {"rows": (1 << 28) // width, "width": width, "slots": 2000 // devices}


def measure(lowered_forward, lowered_step, devices):
    """Compile; return the bytes that a device sends and holds."""
    forward, step = lowered_forward.compile(), lowered_step.compile()
    memory = step.memory_analysis()
    return {
        "forward": bytes_sent(forward, devices),
        "step": bytes_sent(step, devices),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }


def main(topology):
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    mesh = Mesh(np.array(found.devices), ("x",))
    figures = {}
    for strategy in STRATEGIES:
        start = time.process_time()
        options = options_on_tpus(strategy, mesh.size)
        lowered = lower(strategy, mesh, packed=True, **options)
        figures[strategy] = measure(*lowered, mesh.size)
        print(strategy, figures[strategy], time.process_time() - start, file=sys.stderr)
    print(json.dumps({"devices": mesh.size, "figures": figures}))


if __name__ == "__main__":
    main(sys.argv[1])

"""One of several processes, started by test_processes.py; imports nothing of pytest.

python process_worker.py TASK FOLDER PROCESSES PROCESS PORT DEVICES
"""

import json
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

import jbag

BATCH = 168  # Examples that 1, 3, 4 or 8 devices can share.
STEPS, LATER = 3, range(3, 6)  # before what is saved, and after it
SPECS = {
    "data_parallel": P(),
    "row_wise": P("x", None),
    "column_wise": P(None, "x"),
    "table_wise": jbag.sharding.TableWise("x", lanes=8),
}
# The strategy of each group's tables, by the name of the run.
RUNS = {
    "first": {
        "sgd": "data_parallel",
        "rowwise_adagrad": "column_wise",
        "adam": "row_wise",
    },
    "second": {
        "sgd": "row_wise",
        "rowwise_adagrad": "table_wise",
        "adam": "column_wise",
    },
}
# The tables of a group are trained by the optimizer of that name. 56 columns, as 168
# examples, can be shared by any of these numbers of devices but 3.
OPTIMIZERS = {
    "sgd": jbag.optim.sgd(0.5),
    "rowwise_adagrad": jbag.optim.rowwise_adagrad(0.1),
    "adam": jbag.optim.adam(0.01),
}
TABLES = {
    "a": jbag.Table(60, 56, group="sgd", padding_idx=2),
    "b": jbag.Table(30, 56, group="sgd"),
    "c": jbag.Table(50, 56, group="rowwise_adagrad", padding_idx=-1),
    "d": jbag.Table(40, 56, group="adam"),
}
FEATURES = {
    "sum": jbag.Feature("a", "sum"),
    "mean": jbag.Feature("b", "mean"),
    "sqrtn": jbag.Feature("c", "sqrtn"),
    "max": jbag.Feature("c", "max"),
    "min": jbag.Feature("d", "min"),
    "plain": jbag.Feature("a", "mean"),
    "square": jbag.Feature("d", "sum"),
}
WEIGHTED = ("sum", "mean", "sqrtn", "max", "min")


def first_tables():
    """Return the tables that training starts from."""
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal((table.num_embeddings, 56), np.float32)
        for name, table in TABLES.items()
    }


def draw(step):
    """Return a batch: bags with empty ones, duplicates and padding, and targets."""
    rng = np.random.default_rng((1, step))
    bags = {}
    for name, feature in FEATURES.items():
        rows = TABLES[feature.table].num_embeddings
        if name == "square":
            bags[name] = rng.integers(0, rows, (BATCH, 3)).astype(np.int32)
            continue
        lengths = rng.integers(0, 5, BATCH)
        ids = rng.integers(0, rows, lengths.sum()).astype(np.int32)
        weights = None
        if name in WEIGHTED:
            weights = rng.uniform(0.5, 2, ids.size).astype(np.float32)
        bags[name] = jbag.Bags.from_lengths(ids, lengths, weights)
    targets = {name: rng.standard_normal((BATCH, 56), np.float32) for name in FEATURES}
    return bags, targets


def cut(bags, own):
    """Return a run of examples."""
    if not isinstance(bags, jbag.Bags):
        return bags[own]
    span = slice(bags.offsets[own.start], bags.offsets[own.stop])
    weights = None if bags.weights is None else bags.weights[span]
    return jbag.Bags.from_lengths(bags.indices[span], bags.lengths[own], weights)


def make_collection(mesh, strategies):
    specs = {group: SPECS[name] for group, name in strategies.items()}
    return jbag.EmbeddingBagCollection(
        TABLES, FEATURES, specs=specs, mesh=mesh, sparse=True
    )


def make_blocks(mesh, capacity=None):
    capacity = 6 * BATCH // mesh.size if capacity is None else capacity
    names = [name for name in FEATURES if name != "square"]
    return jbag.sharding.Blocks(
        mesh, batch_size=BATCH, capacity=dict.fromkeys(names, capacity)
    )


def place(blocks, step):
    """Return the batch of a step on the mesh; each process gives its own examples."""
    bags, targets = draw(step)
    own = slice(blocks.positions[0], blocks.positions[-1] + 1)
    bags = {name: cut(x, own) for name, x in bags.items()}
    square = bags.pop("square")
    targets = {name: x[own] for name, x in targets.items()}
    bags, (square, targets) = blocks(bags, (square, targets))
    return bags | {"square": square}, targets


def make_optimizer():
    return optax.partition(
        OPTIMIZERS, lambda params: {name: name.rpartition("_")[0] for name in params}
    )


def make_step(collection):
    """Return a step, which tells all that it has found on its way."""

    def mean_square(params, weights, batch):
        bags, targets = batch
        own = {
            name: jbag.Bags(bags[name].indices, bags[name].offsets, weights[name])
            for name in weights
        }
        pooled = collection.apply({"params": params}, bags | own)
        errors = [jnp.mean((pooled[name] - targets[name]) ** 2) for name in FEATURES]
        return sum(errors), pooled

    @jax.jit(donate_argnums=0)
    def step(state, batch):
        params, opt_state = state
        weights = {name: batch[0][name].weights for name in WEIGHTED}
        run = jbag.value_and_grad(mean_square, argnums=(0, 1), has_aux=True)
        (loss, pooled), (gradient, to_weights) = run(params, weights, batch)
        updates, opt_state = make_optimizer().update(gradient, opt_state, params)
        found = {
            "pooled": pooled,
            "gradient": {name: x.todense() for name, x in gradient.items()},
            "to_weights": to_weights,
        }
        return (optax.apply_updates(params, updates), opt_state), loss, found

    return step


def first_state(collection):
    """Return the function that makes parameters and optimizer state, to be jitted."""

    def first():
        params = nn.meta.unbox(collection.import_tables(first_tables()))
        return params, make_optimizer().init(params)

    return first


def gather(tree):
    """Return every array whole, on the host."""
    return jax.tree.map(
        lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree
    )


def flat(tree):
    """Return the arrays by path."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def run_strategies(mesh, strategies):
    """Return a step, the state after some of them, and by name what is to be compared.

    That is values and gradients of the first step, the tables after all, and losses.
    """
    collection = make_collection(mesh, strategies)
    first = first_state(collection)
    shardings = collection.shardings(jax.eval_shape(first))
    state = jax.jit(first, out_shardings=shardings)()
    step = make_step(collection)
    state, losses, found = take_steps(step, mesh, state, range(STEPS))
    found["gradient"] = collection.export_tables(found["gradient"])
    found["trained"] = collection.export_tables(gather(state[0]))
    return step, state, flat(found | {"losses": losses})


def take_steps(step, mesh, state, numbers):
    """Return the state after the steps, their losses, and what the first one found."""
    blocks = make_blocks(mesh)
    losses, first = [], None
    for number in numbers:
        batch = place(blocks, number)
        state, loss, found = step(state, batch)
        losses.append(float(loss))
        if first is None:
            first = gather(found)
            for name, blocks_of in first["to_weights"].items():
                ends = gather(batch[0][name].offsets)[:, -1]
                own = [x[:end] for x, end in zip(blocks_of, ends, strict=True)]
                first["to_weights"][name] = np.concatenate(own)
    return state, np.array(losses), first


def check_blocks(mesh):
    """Return what `Blocks` says of sizes that differ, and of a block that's too large.

    No process may hang: what differs is found by all of them, and what doesn't fit by
    the one that has it, while the others go on.
    """
    process, output = jax.process_index(), {}
    for what, arguments in {
        "capacity": {"batch_size": 8, "capacity": 10 + process},
        "batch_size": {"batch_size": 8 * (1 + process), "capacity": 10},
        "fine": {"batch_size": 8, "capacity": 10},
    }.items():
        try:
            blocks = jbag.sharding.Blocks(mesh, **arguments)
            output[what] = ""
        except ValueError as error:
            output[what] = str(error)
    lists = [[1]] * blocks.num_bags
    blocks({"tags": jbag.Bags.from_lists(lists)})
    if process == 1:
        lists[-1] = list(range(11))
    try:
        blocks({"tags": jbag.Bags.from_lists(lists)})
        output["block"] = ""
    except ValueError as error:
        output["block"] = str(error)
    return output


def manager(folder):
    import orbax.checkpoint as ocp  # which takes a second, where it is needed

    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder / "saved", options=options), ocp.args


def train(mesh, folder):
    """Train by every strategy."""
    for name, strategies in RUNS.items():
        *_, out = run_strategies(mesh, strategies)
        if jax.process_index() == 0:
            np.savez(folder / f"{name}.npz", **out)
    output = check_blocks(mesh)
    name = f"blocks{jax.process_index()}.json"
    (folder / name).write_text(json.dumps(output))


def save(mesh, folder):
    """Train, save the state, and go on with it."""
    step, state, out = run_strategies(mesh, RUNS["first"])
    saved_by, args = manager(folder)
    saved_by.save(STEPS, args=args.StandardSave(state))
    saved = flat(gather(state))
    _, losses, _ = take_steps(step, mesh, state, LATER)
    if jax.process_index() == 0:
        np.savez(folder / "first.npz", **out)
        np.savez(folder / "state.npz", losses=losses, **saved)


def restore(devices, folder):
    """Restore what was saved on some of the devices, by some strategies, and go on."""
    saved = dict(np.load(folder / "state.npz"))
    expected = saved.pop("losses")
    tables = dict(np.load(folder / "first.npz"))
    saved_by, args = manager(folder)
    cases = [(len(devices), "column_wise"), (1, "data_parallel")]
    if jax.process_count() > 1:
        cases = [(len(devices), "row_wise")]
    for count, name in cases:
        mesh = jax.make_mesh((count,), ("x",), devices=devices[:count])
        collection = make_collection(mesh, dict.fromkeys(OPTIMIZERS, name))
        shapes = jax.eval_shape(first_state(collection))
        empty = jax.tree.map(
            lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own),
            shapes,
            collection.shardings(shapes),
        )
        state = saved_by.restore(STEPS, args=args.StandardRestore(empty))
        whole = gather(state)
        assert flat(whole).keys() == saved.keys()
        for path, x in flat(whole).items():
            np.testing.assert_array_equal(x, saved[path], err_msg=path)
        for table, x in collection.export_tables(whole[0]).items():
            np.testing.assert_array_equal(x, tables[f"['trained']['{table}']"])
        _, losses, _ = take_steps(make_step(collection), mesh, state, LATER)
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        print(f"{count} devices, {name}: restored", flush=True)


def main(task, folder, processes, process, port, devices):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices))
    if int(processes) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"127.0.0.1:{port}",
            int(processes),
            int(process),
            heartbeat_timeout_seconds=20,
        )
    if task == "restore":
        restore(jax.devices(), Path(folder))
        return
    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    {"train": train, "save": save}[task](mesh, Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Several processes, really started, that train over one mesh on the loopback."""

import functools
import json
import re

import jax
import numpy as np
import optax
import oracle
import process_worker as worker
import pytest
from processes import free_port, succeed

import jbag

pytestmark = pytest.mark.standard_promotion


def work(task, folder, processes, devices):
    port = free_port()
    return succeed(
        [
            [
                worker.__file__,
                task,
                folder,
                processes,
                process,
                port,
                devices,
            ]
            for process in range(processes)
        ]
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The function that returns where so many processes left what they computed."""

    @functools.cache
    def run(processes, devices, task="train"):
        folder = tmp_path_factory.mktemp("ran")
        work(task, folder, processes, devices)
        return folder

    return run


# Processes and the devices of each.
SHAPES = [(2, 2), pytest.param((4, 1), marks=pytest.mark.slow)]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=["2x2", "4x1"])


@pytest.fixture(scope="module")
def by_oracle():
    """Values and gradients of the first step, in NumPy."""
    bags, targets = worker.draw(0)
    tables = worker.first_tables()
    out = {f"['gradient']['{name}']": np.zeros(x.shape) for name, x in tables.items()}
    for name, feature in worker.FEATURES.items():
        table, options = tables[feature.table], worker.TABLES[feature.table]
        bag = bags[name]
        if isinstance(bag, jbag.Bags):
            pairs = oracle.slices(bag.indices, bag.offsets, bag.weights)
        else:
            pairs = [[(i, None) for i in row] for row in bag]
        padding = options.padding_idx
        padding = None if padding is None else padding % len(table)
        pooled = oracle.forward(table, pairs, feature.mode, padding)
        cotangent = 2 * (pooled - targets[name]) / pooled.size
        to_table, to_weights = oracle.gradients(
            table, pairs, cotangent, feature.mode, padding
        )
        out[f"['pooled']['{name}']"] = pooled
        out[f"['gradient']['{feature.table}']"] += to_table
        if name in worker.WEIGHTED:
            out[f"['to_weights']['{name}']"] = np.concatenate(to_weights)
    return out


@pytest.fixture(scope="module")
def on_one_device():
    """The tables after some steps, and the losses: of plain arrays, in this process."""
    optimizer = optax.partition(
        worker.OPTIMIZERS, {name: table.group for name, table in worker.TABLES.items()}
    )

    def mean_square(tables, bags, targets):
        out = 0
        for name, feature in worker.FEATURES.items():
            pooled = jbag.embedding_bag(
                tables[feature.table],
                bags[name],
                mode=feature.mode,
                padding_idx=worker.TABLES[feature.table].padding_idx,
                sparse=True,
            )
            out += ((pooled - targets[name]) ** 2).mean()
        return out

    @jax.jit
    def step(tables, state, bags, targets):
        loss, gradient = jbag.value_and_grad(mean_square)(tables, bags, targets)
        updates, state = optimizer.update(gradient, state, tables)
        return optax.apply_updates(tables, updates), state, loss

    tables = jax.tree.map(jax.numpy.asarray, worker.first_tables())
    state = optimizer.init(tables)
    losses = []
    for number in range(worker.STEPS):
        tables, state, loss = step(tables, state, *worker.draw(number))
        losses.append(loss)
    out = {f"['trained']['{name}']": x for name, x in tables.items()}
    return out | {"['losses']": np.array(losses)}


@pytest.mark.parametrize("name", worker.RUNS)
@by_shape
def test_processes_compute_what_the_oracle_does(ran, shape, by_oracle, name):
    found = np.load(ran(*shape) / f"{name}.npz")
    assert by_oracle.keys() < set(found)
    for path, expected in by_oracle.items():
        np.testing.assert_allclose(
            found[path], expected, rtol=1e-5, atol=1e-5, err_msg=path
        )


@pytest.mark.parametrize("name", worker.RUNS)
@by_shape
def test_processes_train_as_one_device(ran, shape, on_one_device, name):
    found = np.load(ran(*shape) / f"{name}.npz")
    for path, expected in on_one_device.items():
        np.testing.assert_allclose(
            found[path], expected, rtol=1e-5, atol=1e-5, err_msg=path
        )


@by_shape
def test_sizes_that_differ_are_found_by_all_processes(ran, shape):
    for process in range(shape[0]):
        output = json.loads((ran(*shape) / f"blocks{process}.json").read_text())
        assert f"process {process} has (8, 4, ({10 + process},))" in output["capacity"]
        assert (
            f"process {process} has ({8 * (1 + process)}, 4, (" in output["batch_size"]
        )
        for what in ("capacity", "batch_size"):
            other = 0 if process else 1
            assert f"process {other} has " in output[what]
        assert output["fine"] == ""


@by_shape
def test_a_block_that_does_not_fit_is_found_by_the_process_that_has_it(ran, shape):
    for process in range(shape[0]):
        output = json.loads((ran(*shape) / f"blocks{process}.json").read_text())
        if process != 1:
            assert output["block"] == ""
            continue
        assert output["block"] == (
            "`capacity` must be at least the ids of a block of `bags['tags']`, "
            f"12 in block {shape[1] - 1} of this process; "
            "got 10."
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "restored"),
    [
        (1, {"8": "column_wise", "1": "data_parallel"}),
        (3, {"3": "row_wise"}),
    ],
)
def test_checkpoints_go_on_with_other_devices(ran, processes, restored):
    """Bit by bit the same, and so are the losses that follow; see the worker."""
    devices = 8 if processes == 1 else 1
    output = work("restore", ran(2, 2, "save"), processes, devices)
    assert dict(re.findall(r"(\d) devices, (\w+): restored", output[0])) == restored

"""Several processes, really started, that train over one mesh on the loopback."""

import contextlib
import functools
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import optax
import oracle
import process_worker as worker
import pytest
from slow import slow

import jbag

pytestmark = pytest.mark.standard_promotion
EXAMPLE = Path(__file__).parents[2] / "examples" / "train_recommender.py"
TRAINING = "--rows 300 --features 8 --batch-size 168 --steps 120 --test-examples 500"


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Processes:
    """Processes that are started, and in any case ended; what they print is kept."""

    def __init__(self, commands):
        self.files = [tempfile.TemporaryFile("w+") for _ in commands]  # noqa: SIM115 (closed on leaving)
        self.all = [
            subprocess.Popen(
                [sys.executable, "-W", "error", *map(str, command)],
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            for command, file in zip(commands, self.files, strict=True)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for one, file in zip(self.all, self.files, strict=True):
            one.kill()
            one.wait()
            file.close()

    def wait(self, number, seconds):
        """Return the exit code of one of them, None if it goes on after that time."""
        try:
            return self.all[number].wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def said(self, number):
        """Return what one of them has printed."""
        self.files[number].seek(0)
        return self.files[number].read()


def succeed(commands, seconds=300):
    """Run all at once, and return what they print."""
    end = time.monotonic() + seconds
    with Processes(commands) as processes:
        numbers = range(len(commands))
        codes = [processes.wait(i, max(0, end - time.monotonic())) for i in numbers]
        said = [processes.said(i) for i in numbers]
    assert codes == [0] * len(commands), "\n\n".join(said)
    return said


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


def train(*options, processes=1, devices=1):
    """Return the command of each process."""
    run = [EXAMPLE, *TRAINING.split(), "--devices", devices, *options]
    if processes == 1:
        return [run]
    run += ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", processes]
    return [[*run, "--process", process] for process in range(processes)]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The function that returns where so many processes left what they computed."""

    @functools.cache
    def run(processes, devices):
        folder = tmp_path_factory.mktemp("ran")
        task = "strategies" if processes == 2 else "rows"
        work(task, folder, processes, devices)
        return folder

    return run


# Processes and the devices of each.
SHAPES = [(2, 2), pytest.param((4, 1), marks=pytest.mark.slow)]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=["2x2", "4x1"])
by_strategy = pytest.mark.parametrize(
    ("shape", "strategy"),
    [
        *(((2, 2), strategy) for strategy in worker.SPECS),
        *slow(((4, 1), "rows")),
    ],
    ids=[*(f"2x2-{strategy}" for strategy in worker.SPECS), "4x1-rows"],
)


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


@by_strategy
def test_processes_compute_what_the_oracle_does(ran, shape, by_oracle, strategy):
    found = np.load(ran(*shape) / f"{strategy}.npz")
    assert by_oracle.keys() < set(found)
    for name, expected in by_oracle.items():
        np.testing.assert_allclose(
            found[name], expected, rtol=1e-5, atol=1e-5, err_msg=name
        )


@by_strategy
def test_processes_train_as_one_device(ran, shape, on_one_device, strategy):
    found = np.load(ran(*shape) / f"{strategy}.npz")
    for name, expected in on_one_device.items():
        np.testing.assert_allclose(
            found[name], expected, rtol=1e-5, atol=1e-5, err_msg=name
        )


@by_shape
def test_sizes_that_differ_are_found_by_all_processes(ran, shape):
    for process in range(shape[0]):
        said = json.loads((ran(*shape) / f"blocks{process}.json").read_text())
        assert f"process {process} has (8, 4, ({10 + process},))" in said["capacity"]
        assert f"process {process} has ({8 * (1 + process)}, 4, (" in said["batch_size"]
        for what in ("capacity", "batch_size"):
            other = 0 if process else 1
            assert f"process {other} has " in said[what]
        assert said["fine"] == ""


@by_shape
def test_a_block_that_does_not_fit_is_found_by_the_process_that_has_it(ran, shape):
    for process in range(shape[0]):
        said = json.loads((ran(*shape) / f"blocks{process}.json").read_text())
        if process != 1:
            assert said["block"] == ""
            continue
        assert said["block"] == (
            "`capacity` must be at least the ids of a block of `bags['tags']`, "
            f"12 in block {shape[1] - 1} of this process; "
            "got 10."
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "restored"),
    [(1, {"8": "columns", "7": "rows", "1": "replicated"}), (3, {"3": "rows"})],
)
def test_checkpoints_go_on_with_other_devices(ran, processes, restored):
    """Bit by bit the same, and so are the losses that follow; see the worker."""
    devices = 8 if processes == 1 else 1
    said = work("restore", ran(2, 2), processes, devices)
    assert dict(re.findall(r"(\d) devices, (\w+): restored", said[0])) == restored


def read_losses(path):
    """Return the loss of each step, and how often it was taken."""
    losses, counts = {}, {}
    for line in path.read_text().splitlines():
        step, loss = line.split()
        losses[int(step)] = float(loss)
        counts[int(step)] = counts.get(int(step), 0) + 1
    return losses, counts


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of the example on one device, and what it prints."""
    path = tmp_path_factory.mktemp("alone") / "losses.txt"
    [said] = succeed(train("--losses", path))
    losses, _ = read_losses(path)
    assert list(losses) == list(range(1, 121))
    return losses, said


def assert_same_losses(found, expected):
    steps = list(expected)
    assert list(found) == steps
    np.testing.assert_allclose(
        [found[step] for step in steps], list(expected.values()), rtol=0, atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(1, 8), (2, 2)])
def test_example_is_the_same_on_any_devices(alone, tmp_path, processes, devices):
    path = tmp_path / "losses.txt"
    commands = train("--losses", path, processes=processes, devices=devices)
    first, *others = succeed(commands)
    losses, _ = read_losses(path)
    assert_same_losses(losses, alone[0])
    measured = r"the model +(\d\.\d+) +(\d\.\d+)"
    [found], [expected] = re.findall(measured, first), re.findall(measured, alone[1])
    np.testing.assert_allclose(
        np.array(found, float), np.array(expected, float), atol=1e-3
    )
    for said in others:
        assert "AUC" not in said
        assert "examples" not in said


def wait_for_steps(processes, path, count, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists() or path.read_text().count("\n") < count:
        ended = [one.poll() for one in processes.all]
        if ended != [None] * len(ended) or time.monotonic() > end:
            pytest.fail("\n\n".join(map(processes.said, range(len(ended)))))
        time.sleep(0.01)


def test_example_goes_on_after_a_process_was_killed(alone, tmp_path):
    path, saved = tmp_path / "losses.txt", tmp_path / "saved"
    options = ["--losses", path, "--checkpoint", saved, "--save-every", 20]
    heartbeat = 10
    commands = train(*options, "--heartbeat", heartbeat, processes=2)
    with Processes(commands) as processes:
        wait_for_steps(processes, path, 30)
        processes.all[1].send_signal(signal.SIGKILL)
        code, said = processes.wait(0, heartbeat), processes.said(0)
    assert code == 1, said
    steps = [int(one.name) for one in saved.iterdir() if one.name.isdigit()]
    last = max(steps)
    assert 20 <= last < 120
    assert "Process 0 of 2 stopped" in said
    assert f"The last checkpoint in {saved} is that after step {last}." in said
    [said] = succeed(train(*options, "--strategy", "columns", devices=8))
    assert f"Going on after step {last}, from {saved}" in said
    losses, counts = read_losses(path)
    assert_same_losses(losses, alone[0])
    assert {counts[step] for step in range(1, last + 1)} == {1}


@pytest.mark.slow
def test_example_ends_where_a_process_hangs(tmp_path):
    path = tmp_path / "losses.txt"
    heartbeat = 5
    commands = train("--losses", path, "--heartbeat", heartbeat, processes=2)
    with Processes(commands) as processes:
        wait_for_steps(processes, path, 5)
        processes.all[1].send_signal(signal.SIGSTOP)
        code, said = processes.wait(0, 3 * heartbeat), processes.said(0)
    assert code not in (0, None), said
    assert "another task died" in said


@pytest.mark.slow
def test_example_ends_where_the_first_process_is_killed_early():
    options = ["--heartbeat", 10, "--steps", 100_000]
    with contextlib.ExitStack() as stack:
        started = []
        for seconds in (0, 1, 2, 4):
            commands = train(*options, processes=2)
            started.append(stack.enter_context(Processes(commands)))
            time.sleep(seconds)
            started[-1].all[0].send_signal(signal.SIGKILL)
        for processes in started:
            code, said = processes.wait(1, 60), processes.said(1)
            assert code not in (0, None), said
            assert "another task died" in said or "Process 1 of 2 stopped" in said


@pytest.mark.slow
def test_example_refuses_the_checkpoint_of_another_run(tmp_path):
    options = ["--checkpoint", tmp_path / "saved", "--steps", 3]
    succeed(train(*options))
    with Processes(train(*options, "--seed", 1)) as processes:
        code, said = processes.wait(0, 60), processes.said(0)
    assert code == 1
    assert f"{tmp_path / 'saved'} is of another run" in said

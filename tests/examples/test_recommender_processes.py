"""The recommender, trained by several processes that are really started."""

import contextlib
import io
import re
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from meshes import some_devices
from processes import Processes, free_port, succeed
from programs import load_program

pytestmark = pytest.mark.standard_promotion
EXAMPLE = Path(__file__).parents[2] / "examples" / "train_recommender.py"
TRAINING = "--rows 300 --features 8 --batch-size 168 --steps 120 --test-examples 500"


def train(*options, processes=1, devices=1):
    """Return the command of each process."""
    run = [EXAMPLE, *TRAINING.split(), "--devices", devices, *options]
    if processes == 1:
        return [run]
    run += ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", processes]
    return [[*run, "--process", process] for process in range(processes)]


def train_here(*options, devices):
    """Train in this process, on some of its devices; return what is printed."""
    mesh = jax.make_mesh((devices,), ("x",), devices=some_devices(devices))
    printed = io.StringIO()
    with load_program(EXAMPLE) as example, contextlib.redirect_stdout(printed):
        example.find_devices = lambda _: mesh
        example.main([*TRAINING.split(), *map(str, options)])
    return printed.getvalue()


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
    output = train_here("--losses", path, devices=1)
    losses, _ = read_losses(path)
    assert list(losses) == list(range(1, 121))
    return losses, output


def assert_same_losses(found, expected):
    steps = list(expected)
    assert list(found) == steps
    np.testing.assert_allclose(
        [found[step] for step in steps], list(expected.values()), rtol=0, atol=1e-4
    )


@pytest.mark.slow
def test_example_is_the_same_on_any_devices(alone, tmp_path):
    here, shared = tmp_path / "here.txt", tmp_path / "shared.txt"
    outputs = {here: train_here("--losses", here, devices=4)}
    commands = train("--losses", shared, processes=2, devices=2)
    outputs[shared], other = succeed(commands)
    assert "AUC" not in other
    assert "examples" not in other
    measured = r"model +(\d\.\d+) +(\d\.\d+)"
    [expected] = re.findall(measured, alone[1])
    for path, output in outputs.items():
        losses, _ = read_losses(path)
        assert_same_losses(losses, alone[0])
        [found] = re.findall(measured, output)
        np.testing.assert_allclose(
            np.array(found, float), np.array(expected, float), atol=1e-3
        )


def wait_for_steps(processes, path, count, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists() or path.read_text().count("\n") < count:
        ended = [one.poll() for one in processes.all]
        if ended != [None] * len(ended) or time.monotonic() > end:
            pytest.fail("\n\n".join(map(processes.output, range(len(ended)))))
        time.sleep(0.01)


def test_example_goes_on_after_a_process_was_killed(alone, tmp_path):
    path, saved = tmp_path / "losses.txt", tmp_path / "saved"
    options = ["--losses", path, "--checkpoint", saved, "--save-every", 20]
    heartbeat = 10
    commands = train(*options, "--heartbeat", heartbeat, processes=2)
    with Processes(commands) as processes:
        wait_for_steps(processes, path, 30)
        processes.all[1].send_signal(signal.SIGKILL)
        code, output = processes.wait(0, heartbeat), processes.output(0)
    assert code == 1, output
    steps = [int(one.name) for one in saved.iterdir() if one.name.isdigit()]
    last = max(steps)
    assert 20 <= last < 120
    assert "Process 0 of 2 stopped" in output
    assert f"The last checkpoint in {saved} is of step {last}." in output
    output = train_here(*options, "--strategy", "column_wise", devices=4)
    assert f"Resuming after step {last}, from {saved}" in output
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
        code, output = processes.wait(0, 3 * heartbeat), processes.output(0)
    assert code not in (0, None), output
    assert "another task died" in output


# Two runs at a time: more of them are slow to import on two cores.
@pytest.mark.slow
@pytest.mark.parametrize("delays", [(0, 1), (2, 4)])
def test_example_ends_where_the_first_process_is_killed_early(delays):
    options = ["--heartbeat", 10, "--steps", 100_000]
    with contextlib.ExitStack() as stack:
        started = []
        for seconds in delays:
            commands = train(*options, processes=2)
            started.append(stack.enter_context(Processes(commands)))
            time.sleep(seconds)
            started[-1].all[0].send_signal(signal.SIGKILL)
        for processes in started:
            code, output = processes.wait(1, 60), processes.output(1)
            assert code not in (0, None), output
            assert "another task died" in output or "Process 1 of 2 stopped" in output


@pytest.mark.slow
def test_example_refuses_the_checkpoint_of_another_run(tmp_path):
    options = ["--checkpoint", tmp_path / "saved", "--steps", 3]
    train_here(*options, devices=1)
    with Processes(train(*options, "--seed", 1)) as processes:
        code, output = processes.wait(0, 60), processes.output(0)
    assert code == 1
    assert f"{tmp_path / 'saved'} is of another run" in output

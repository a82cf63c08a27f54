"""The benchmarks, run as a user would, on tiny tables. No time decides a test."""

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from programs import load_program

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
QUICK = ["--quick", "--workload", "text classifier"]
QUICK_STEP = ["--quick", "--workload", "step"]


def program(file):
    return load_program(FOLDER / f"{file}.py")


@pytest.fixture(scope="module")
def benchmark():
    with program("embedding_bag") as module:
        yield module


@pytest.fixture(scope="module")
def steps():
    with program("training_step") as module:
        yield module


@pytest.fixture
def no_torch(monkeypatch):
    find = importlib.util.find_spec
    absent = lambda name: None if name in ("torch", "fbgemm_gpu") else find(name)
    monkeypatch.setattr(importlib.util, "find_spec", absent)


@pytest.fixture
def no_compiler(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "COMPILE", ("no-such-compiler",))


def rows_of_table(text):
    """Return the cells of each row by column."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    names, rule, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines
    )
    assert set("".join(rule)) == set("-:")
    return [dict(zip(names, row, strict=True)) for row in rows]


@pytest.mark.usefixtures("no_compiler")
def test_every_measurement_is_a_row_and_every_side_a_column(
    benchmark, tmp_path, capsys
):
    pytest.importorskip("torch", reason="one of the sides is PyTorch")
    path = tmp_path / "a.json"
    benchmark.main([*QUICK, "--json", str(path)])
    out = capsys.readouterr().out
    rows = rows_of_table(out)
    assert [row["measurement"] for row in rows] == [
        "sum",
        "mean",
        "weighted sum",
        "max",
        "bfloat16 sum",
        "sum and gradient",
    ]
    assert {row["workload"] for row in rows} == {"text classifier"}
    for row in rows:
        for column in ("jbag (ms)", "reference (ms)", "torch (ms)", "x torch"):
            assert float(row[column]) >= 0
        assert float(row["x reference"]) >= 0
        assert row["of gather bandwidth"] == "-"
        has_csr = row["measurement"] in ("sum", "weighted sum")
        assert (row["JAX's CSR (ms)"] != "-") == has_csr
    assert "table 10000 x 10" in out
    assert "No gather bandwidth: " in out
    results = json.loads(path.read_text())
    assert [result["measurement"] for result in results] == [
        row["measurement"] for row in rows
    ]
    assert all(result["milliseconds"]["jbag"] > 0 for result in results)


@pytest.mark.usefixtures("no_torch", "no_compiler")
def test_column_of_torch_is_left_out_where_it_is_missing(benchmark, capsys):
    benchmark.main([*QUICK, "--measure", "sum"])
    out = capsys.readouterr().out
    (row,) = rows_of_table(out)
    assert not [column for column in row if "torch" in column]
    assert "no column of torch" in out


@pytest.mark.usefixtures("no_torch", "no_compiler")
def test_huge_pages_have_columns_of_their_own(benchmark, monkeypatch, capsys):
    moved = []
    monkeypatch.setattr(benchmark, "to_huge_pages", lambda x: moved.append(x) or x)
    benchmark.main([*QUICK, "--measure", "sum", "sum and gradient"])
    forward, gradient = rows_of_table(capsys.readouterr().out)
    assert len(moved) == 1
    assert float(forward["jbag, huge pages (ms)"]) >= 0
    assert gradient["jbag, huge pages (ms)"] == "-"
    assert forward["of gather bandwidth, huge pages"] == "-"


@pytest.mark.usefixtures("no_torch")
def test_gather_bandwidth_is_measured_with_a_compiler(benchmark, capsys):
    if shutil.which("c++") is None:
        pytest.skip("the program that measures it is in C++")
    benchmark.main([*QUICK, "--measure", "max"])
    (row,) = rows_of_table(capsys.readouterr().out)
    assert row["of gather bandwidth"].endswith("%")


@pytest.mark.usefixtures("no_torch", "no_compiler")
def test_side_that_computes_something_else_is_named(benchmark, monkeypatch):
    wrong = lambda case: lambda _: np.zeros((case.workload.B, case.workload.D))
    monkeypatch.setitem(benchmark.SIDES, "reference", wrong)
    with pytest.raises(SystemExit, match="reference and jbag differ"):
        benchmark.main([*QUICK, "--measure", "sum"])


@pytest.mark.parametrize(
    "workload", ["wide vocabulary", "Zipf ids", "one huge bag", "64 rows"]
)
def test_batches_use_every_slot_and_have_the_same_sizes(benchmark, workload):
    (chosen,) = [each for each in benchmark.WORKLOADS if each.name == workload]
    B, N = chosen.B, chosen.B * chosen.mean_length
    for ids, offsets, weights in benchmark.make_batches(chosen):
        assert ids.shape == weights.shape == (N,)
        assert offsets.shape == (B + 1,)
        assert (offsets[0], offsets[-1]) == (0, N)
        assert np.all(np.diff(offsets) >= 0)
        assert ids.min() >= 0
        assert ids.max() < chosen.V
        longest = np.diff(offsets).max()
        assert (longest >= N // 2) == (workload == "one huge bag")
        common = np.unique(ids, return_counts=True)[1].max()
        assert (common > N / 100) == (workload in ("Zipf ids", "64 rows"))


@pytest.mark.usefixtures("no_torch", "no_compiler")
def test_plot_is_a_picture(benchmark, tmp_path):
    pytest.importorskip("matplotlib", reason="plots are made with matplotlib")
    path = tmp_path / "a.png"
    benchmark.main([*QUICK, "--measure", "sum", "max", "--plot", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options", [["--rounds", "0"], ["--measure", "speed"], ["--quick", "--write"]]
)
def test_options_that_make_no_sense_are_refused(benchmark, options, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(options)
    assert "error: " in capsys.readouterr().err


def sides_of_steps(row):
    """Return the names of the sides that were measured, after checking the row."""
    times = {name: cell for name, cell in row.items() if name.endswith(" (ms)")}
    measured = {name for name, cell in times.items() if cell != "-"}
    assert all(float(times[name]) >= 0 for name in measured)
    assert float(row["extra (MB)"]) >= 0
    return {name.removesuffix(" (ms)") for name in measured}


def test_steps_of_every_side_agree(steps, monkeypatch, tmp_path, capsys):
    pytest.importorskip("torch", reason="one of the sides is PyTorch")
    for side in ("fbgemm", "linen", "nnx"):
        monkeypatch.delitem(steps.SIDES, side)
    monkeypatch.delitem(steps.PEERS, "fbgemm")
    path = tmp_path / "a.json"
    picture = tmp_path / "a.png"
    names = ["row-wise Adagrad", "Adam"]
    files = ["--json", str(path), "--plot", str(picture)]
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam needs it.
        steps.main([*QUICK_STEP, "--optimizer", *names, *files])
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "table 10000 x 64" in out
    rows = {row["optimizer"]: row for row in rows_of_table(out)}
    assert {name: sides_of_steps(row) for name, row in rows.items()} == {
        "row-wise Adagrad": {"jbag"},
        "Adam": {"jbag", "torch", "optax"},
    }
    assert rows["row-wise Adagrad"]["x peer"] == "-"
    assert float(rows["Adam"]["x peer"]) >= 0
    results = json.loads(path.read_text())
    assert [result["optimizer"] for result in results] == names
    assert all(result["milliseconds"]["jbag"] > 0 for result in results)


@pytest.mark.usefixtures("no_torch")
def test_steps_through_flax_agree_and_missing_peers_have_no_columns(
    steps, monkeypatch, capsys
):
    monkeypatch.delitem(steps.SIDES, "optax")
    steps.main([*QUICK_STEP, "--optimizer", "SGD"])
    out = capsys.readouterr().out
    (row,) = rows_of_table(out)
    assert sides_of_steps(row) == {"jbag", "linen", "nnx"}
    assert not [column for column in row if "torch" in column or "fbgemm" in column]
    assert "no column of torch" in out
    assert "no column of fbgemm" in out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of FBGEMM's own parts
def test_steps_of_fbgemm_agree(steps, monkeypatch, capsys):
    pytest.importorskip("fbgemm_gpu", reason="one of the sides is FBGEMM")
    for side in ("torch", "optax", "linen", "nnx"):
        monkeypatch.delitem(steps.SIDES, side)
    monkeypatch.delitem(steps.PEERS, "torch")
    steps.main([*QUICK_STEP, "--optimizer", "SGD", "Adagrad", "row-wise Adagrad"])
    for row in rows_of_table(capsys.readouterr().out):
        assert sides_of_steps(row) == {"jbag", "fbgemm"}


def test_step_to_another_place_is_named(steps, monkeypatch):
    sides = {"jbag": constant_side(0), "optax": constant_side(1)}
    monkeypatch.setattr(steps, "SIDES", sides)
    monkeypatch.setattr(steps, "PEERS", {})
    with pytest.raises(SystemExit, match="optax and jbag differ"):
        steps.main([*QUICK_STEP, "--optimizer", "SGD"])


def constant_side(value):
    """Return a side of the steps whose table is constant."""
    return lambda case: lambda _: np.full((case.workload.V, 1), value, np.float32)


def test_steps_that_take_long_are_fewer(steps, monkeypatch):
    monkeypatch.setattr(steps, "PATIENCE", 0.0)
    called = []
    times = steps.time_in_turns({"slow": called.append}, rounds=3)
    assert called == [1, 2, 7, 8, 13, 14]
    assert times["slow"] >= 0


@pytest.mark.parametrize(
    "options", [["--rounds", "0"], ["--optimizer", "speed"], ["--quick", "--write"]]
)
def test_options_of_steps_that_make_no_sense_are_refused(steps, options, capsys):
    with pytest.raises(SystemExit):
        steps.main(options)
    assert "error: " in capsys.readouterr().err


def test_text_classifier_is_measured_beside_fasttext(tmp_path, capsys):
    for name in ("train", "test"):
        lines = [f"__label__{i % 3} word{i % 3} and {i % 7}\n" for i in range(300)]
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    peer = tmp_path / "python"
    figures = {"accuracy": 0.5, "training (s)": 1.25, "predicted (texts/s)": 1234.5}
    peer.write_text(f"#!/bin/sh\necho read\necho '{json.dumps(figures)}'\n")
    peer.chmod(0o755)
    files = ["--train", str(tmp_path / "train"), "--test", str(tmp_path / "test")]
    with program("text_classifier") as module:
        picture = tmp_path / "a.png"
        options = ["--fasttext", str(peer), "--runs", "1", "--plot", str(picture)]
        module.main([*files, *options, "--name", "made"])
        assert picture.read_bytes().startswith(b"\x89PNG")
        ours, theirs = rows_of_table(capsys.readouterr().out)
        assert (ours.pop("texts"), ours.pop("side")) == ("made", "jbag")
        assert ours.pop("accuracy") == "1.0000"
        assert all(float(cell.replace(",", "")) > 0 for cell in ours.values())
        assert set(theirs) >= {"process (s)", "memory (MB)"}
        expected = {"accuracy": "0.5000", "training (s)": "1.25"}
        expected |= {"predicted (texts/s)": "1,234", "trained (M tokens/s)": "-"}
        assert theirs.items() >= expected.items()
        peer.write_text("#!/bin/sh\nexit 3\n")
        with pytest.raises(SystemExit, match="python failed"):
            module.main([*files, "--fasttext", str(peer), "--runs", "1"])


def test_the_benchmark_of_meshes_compares_strategies_and_collections(tmp_path, capsys):
    if len(jax.devices("cpu")) < 4:
        pytest.skip("needs 4 devices of the CPU")
    with program("sharding") as module:
        picture = tmp_path / "a.png"
        module.main(["--quick", "--devices", "4", "--plot", str(picture)])
        assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    steps, loads, collections = map(rows_of_table, out.strip().split("\n\n")[1:])
    sides = {row["side"]: row for row in steps}
    assert list(sides) == [
        "row_wise",
        "column_wise",
        "data_parallel",
        "jit, rows",
        "jit, dense",
    ]
    # Bytes are no matter of time: they are the same wherever this runs.
    assert float(sides["jit, rows"]["sent (MB)"]) > 2 * float(
        sides["row_wise"]["sent (MB)"]
    )
    for row in loads:
        assert float(row["dealt"]) < 1.5
    assert float(loads[2]["in order"]) > 1.5
    assert {row["ids a bag"] for row in collections} == {"1", "8"}
    assert all(float(row["x one"]) > 0 for row in collections)


def test_the_benchmark_for_gpus_measures_what_there_is(tmp_path, capsys):
    file = tmp_path / "gpu.json"
    arguments = ["--quick", "--workload", "main", "--json", str(file)]
    with program("gpu") as module:
        module.main([*arguments, "--measure", "sum", "sum and gradient", "step Adam"])
    rows = rows_of_table(capsys.readouterr().out)
    assert [row["measurement"] for row in rows] == [
        "sum",
        "sum and gradient",
        "step Adam",
    ]
    for row, result in zip(rows, json.loads(file.read_text()), strict=True):
        assert result["measurement"] == row["measurement"]
        assert {"jbag", "xla"} <= set(result["milliseconds"])
        assert all(time > 0 for time in result["milliseconds"].values())


def test_the_benchmark_for_tpus_measures_what_there_is(tmp_path, capsys):
    file = tmp_path / "tpu.json"
    arguments = ["--quick", "--workload", "D = 64", "--json", str(file)]
    names = ["sum", "sum and gradient", "step Adam"]
    with program("tpu") as module:
        module.main([*arguments, "--measure", *names])
        sides = module.available_sides()
    rows = rows_of_table(capsys.readouterr().out)
    assert [row["measurement"] for row in rows] == names
    for row, result in zip(rows, json.loads(file.read_text()), strict=True):
        assert result["milliseconds"].keys() == sides.keys()
        assert all(time > 0 for time in result["milliseconds"].values())
        assert float(row["copies"]) >= 0
        assert row["of HBM"].endswith("%")


@pytest.mark.standard_promotion
def test_the_benchmark_of_vocabularies_has_a_row_a_number_of_probes(capsys):
    with program("vocabulary") as module:
        module.main(["--quick", "--probes", "4", "70"])
    rows = rows_of_table(capsys.readouterr().out)
    assert [row["probes"] for row in rows] == ["4", "70"]
    for row in rows:
        assert all(float(time) > 0 for name, time in row.items() if "(ms)" in name)
        # Beside the batch's arrays; the table and the states take 20 MB.
        assert float(row["extra (MB)"]) < 4


def test_options_of_the_benchmark_of_vocabularies_are_checked():
    with program("vocabulary") as module:
        for wrong in (["--quick", "--write"], ["--rounds", "0"], ["--probes", "0"]):
            with pytest.raises(SystemExit):
                module.main(wrong)

"""The example that trains a recommender, run as a user would."""

import itertools
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from meshes import some_devices
from programs import Terminal, load_program

import jbag

pytestmark = pytest.mark.standard_promotion
PATH = Path(__file__).parents[2] / "examples" / "train_recommender.py"
TINY = "--rows 300 --steps 200 --batch-size 1024 --features 8 --test-examples 20000"


@pytest.fixture(scope="module")
def example():
    with load_program(PATH) as module:
        yield module


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4,), ("x",), devices=some_devices(4))


@pytest.fixture(scope="module")
def drawn(example):
    teacher = example.make_teacher(rows=1000, seed=0)
    return teacher, example.draw_batch(teacher, 100_000, (0, 1, 2))


@pytest.mark.parametrize("levels", [2, 20, 10**6], ids="{} levels".format)
def test_auc_is_the_share_of_pairs_in_order(example, levels):
    rng = np.random.default_rng(levels)
    clicks = rng.integers(0, 2, 300).astype(np.float32)
    scores = rng.integers(0, levels, 300) + clicks
    positive, negative = scores[clicks == 1][:, None], scores[clicks == 0]
    expected = np.mean((positive > negative) + 0.5 * (positive == negative))
    assert example.auc(clicks, scores) == pytest.approx(expected, abs=1e-12)


def test_auc_of_one_class_is_no_number(example):
    scores = np.arange(3.0)
    assert math.isnan(example.auc(np.ones(3), scores))
    assert math.isnan(example.auc(np.zeros(3), scores))


def test_log_loss_is_that_of_the_probabilities(example):
    log_odds = np.log([0.8 / 0.2, 0.3 / 0.7])
    expected = -np.log([0.8, 0.7]).mean()
    assert example.log_loss(np.array([1, 0]), log_odds) == pytest.approx(expected)


def test_the_teacher_is_calibrated(drawn):
    _, batch = drawn
    probabilities = 1 / (1 + np.exp(-batch.log_odds))
    for part in np.array_split(np.argsort(probabilities), 20):
        p = probabilities[part]
        noise = np.sqrt(np.sum(p * (1 - p))) / len(p)
        assert abs(batch.clicks[part].mean() - p.mean()) < 4 * noise


def test_log_odds_are_dot_products_of_the_factors(drawn):
    teacher, batch = drawn
    history, tags = batch.history.to_lists(), batch.tags.to_lists()
    assert any(not ids for ids in history)
    for i in range(50):
        user = teacher.every_user[0] + teacher.countries[batch.country[i, 0]]
        user = user + np.tanh(2 * batch.dense[i]) @ teacher.dense
        if history[i]:
            user = user + np.mean([teacher.items[j % 4096] for j in history[i]], 0)
        user = user + sum(teacher.tags[j] for j in tags[i])
        shown = teacher.every_item[0] + teacher.items[batch.item[i, 0] % 4096]
        shown = shown + teacher.categories[batch.category[i, 0]]
        assert batch.log_odds[i] == pytest.approx(user @ shown - 1, abs=1e-5)


def test_ids_are_as_popular_as_promised(example):
    rows = 10_000_000
    ids = example.draw_ids(np.random.default_rng(0), rows, 100_000)
    assert ids.dtype == np.int32
    assert ids.min() >= 0
    assert ids.max() < rows
    ranks = np.arange(16_000) * 2_654_435_761 % rows
    assert len(np.unique(ranks)) == 16_000
    assert np.isin(ids, ranks[:230]).mean() == pytest.approx(0.5, abs=0.01)
    assert np.isin(ids, ranks).mean() == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("size", [100, 1024, 3000])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_what_processes_draw_is_the_same_batch(example, drawn, size, count):
    whole = example.draw_batch(drawn[0], size, (0, 1, 5))
    edges = [size * i // count for i in range(count + 1)]
    parts = [
        example.draw_batch(drawn[0], size, (0, 1, 5), range(first, last))
        for first, last in itertools.pairwise(edges)
    ]
    for field, own in zip(whole, zip(*parts, strict=True), strict=True):
        if isinstance(field, jbag.Bags):
            lists = [bags.to_lists() for bags in own]
            assert list(itertools.chain(*lists)) == field.to_lists()
        else:
            np.testing.assert_array_equal(np.concatenate(own), field)


@pytest.mark.parametrize("size", [1, 8, 100, 4096, 100_000])
@pytest.mark.parametrize("mean", [3, 9])
def test_bags_fit_their_capacity(example, size, mean):
    capacity = example.capacity_of(size, mean)
    # Chernoff's bound on the sum of lengths: the probability that it is that large.
    a = capacity / size
    rate = a * math.log(a / mean) - (1 + a) * math.log((1 + a) / (1 + mean))
    assert math.exp(-size * rate) < 1e-10
    if size >= 4096:
        assert capacity < 1.2 * size * mean


def test_batches_have_one_shape(example, drawn, mesh):
    blocks = example.make_blocks(mesh, 256)
    stream = example.batches(drawn[0], blocks, 256, (0, 1), range(50))
    shapes = {str(jax.tree.map(jax.typeof, batch)) for batch in stream}
    assert len(shapes) == 1


def test_batches_come_in_order_and_differ(example, mesh):
    teacher = example.make_teacher(rows=100, seed=0)
    blocks = example.make_blocks(mesh, 8)
    stream = list(example.batches(teacher, blocks, 8, (0, 1), range(2, 8)))
    assert len(stream) == 6
    for number, batch in enumerate(stream, 2):
        alone = example.draw_batch(teacher, 8, (0, 1, number))
        np.testing.assert_array_equal(batch.dense, alone.dense)
        history = zip(batch.history.indices, batch.history.offsets, strict=True)
        lists = [jbag.Bags(*block).to_lists() for block in history]
        assert list(itertools.chain(*lists)) == alone.history.to_lists()
    assert len({np.asarray(batch.dense).tobytes() for batch in stream}) == 6
    assert list(example.batches(teacher, blocks, 8, (0, 1), range(0))) == []


def test_model_learns_and_is_measured_beside_its_teacher(example, capsys):
    reached, best = example.main(TINY.split())
    assert 0.75 < reached < best
    output = capsys.readouterr()
    assert f"model                 {reached:.4f}" in output.out
    assert f"teacher               {best:.4f}" in output.out
    assert "examples/s" not in output.err


def test_plot_has_every_step_and_ten_evaluations(example, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="plots are made with matplotlib")
    figures, save = [], example.plots.save
    monkeypatch.setattr(
        example.plots, "save", lambda *args: figures.append(args[0]) or save(*args)
    )
    monkeypatch.setattr(sys, "stderr", Terminal())
    path = tmp_path / "plot.png"
    options = "--rows 300 --steps 20 --batch-size 64 --features 8 --test-examples 640"
    options += " --optimizer adam"
    _, best = example.main([*options.split(), "--plot", str(path)])
    assert "examples/s, loss=" in sys.stderr.getvalue()
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = figures
    assert list(axes["loss"].lines[0].get_xdata()) == list(range(1, 21))
    assert list(axes["AUC"].lines[0].get_xdata()) == list(range(2, 21, 2))
    assert axes["AUC"].lines[1].get_ydata()[0] == best
    assert sum(bar.get_height() for bar in axes["counts"].patches) == 640


def test_bins_have_the_mean_prediction_and_the_observed_rate(example):
    clicks = np.array([0, 1, 1, 0, 1])
    probabilities = np.array([0.1, 0.2, 0.8, 0.9, 1.0])
    predicted, observed, counts = example.plots.bins_of(clicks, probabilities, 4)
    np.testing.assert_allclose(predicted, [0.15, np.nan, np.nan, 0.9])
    np.testing.assert_allclose(observed, [0.5, np.nan, np.nan, 2 / 3])
    assert counts.tolist() == [2, 0, 0, 3]


@pytest.mark.slow
def test_tables_are_saved_and_exported_in_order(example, tmp_path, capsys):
    options = "--rows 300 --steps 3 --batch-size 64 --features 8 --test-examples 64"
    options = [*options.split(), "--checkpoint", str(tmp_path / "saved")]
    path = tmp_path / "tables.npz"
    example.main(options)
    assert "Resuming" not in capsys.readouterr().out
    example.main([*options, "--strategy", "column_wise", "--export", str(path)])
    assert "Resuming after step 3, from" in capsys.readouterr().out
    tables = np.load(path)
    shapes = {name: tables[name].shape for name in tables}
    assert shapes == {
        "items": (300, 8),
        "categories": (997, 8),
        "tags": (5000, 8),
        "countries": (200, 8),
    }
    met = {name: np.zeros(len(tables[name]), bool) for name in tables}
    teacher = example.make_teacher(300, 0)
    for number in range(3):
        batch = example.draw_batch(teacher, 64, (0, 1, number))
        met["items"][batch.item] = met["items"][batch.history.indices] = True
        met["categories"][batch.category] = met["countries"][batch.country] = True
        met["tags"][batch.tags.indices] = True
    # Rows start within 0.1 of zero, and leave no faster than they are met.
    for name, own in met.items():
        assert np.abs(tables[name][~own]).max() <= 0.1
        assert np.abs(tables[name][own]).max() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        ["--rows", "0"],
        ["--rows", "2147483648"],
        ["--steps", "-1"],
        ["--optimizer", "best"],
        ["--learning-rate", "nan"],
        ["--seed", "-1"],
        ["--devices", "0"],
        ["--processes", "2", "--process", "2"],
        ["--strategy", "table_wise"],
        ["--save-every", "0"],
        ["--export", "tables.npz", "--processes", "2"],
    ],
    ids=" ".join,
)
def test_options_that_make_no_sense_are_refused(example, options, capsys):
    with pytest.raises(SystemExit):
        example.main(options)
    assert "error: " in capsys.readouterr().err

"""Draw figures of training: losses, a confusion matrix, F1, a calibration curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jbag

READABLE = 30  # classes whose numbers can be read in a figure


def make_axes(mosaic: list[Any], width: float, height: float, **sizes: Any) -> Any:
    """Return axes by the names in the mosaic; the size of the figure is in inches."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure.subplot_mosaic(mosaic, **sizes)


def save(axes: dict[str, Any], path: str | Path) -> None:
    """Write the figure of the axes, in the format of the path's suffix."""
    figure = next(iter(axes.values())).figure
    with jbag.atomic_write(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:] or "png")


def draw_loss(axes: Any, losses: Sequence[float], unit: str, first: int = 0) -> None:
    """Draw the loss of each step after step `first`, and its moving average."""
    window = max(1, len(losses) // 50)
    means = np.convolve(losses, np.full(window, 1 / window), "valid")
    steps = first + 1 + np.arange(len(losses))
    axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=0.8, label="one step")
    axes.plot(steps[window - 1 :], means, color="C0", label=f"mean of {window} steps")
    axes.set(title="training loss", xlabel="step", ylabel=f"cross-entropy ({unit})")
    axes.legend()


def draw_confusion(axes: Any, counts: np.ndarray, labels: Sequence[str]) -> None:
    """Draw a confusion matrix, [true, predicted]: shares as colors, and the counts."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.figure.colorbar(image, label="share of the true class", fraction=0.05)
    axes.set(title="confusion (number of texts)", xlabel="predicted", ylabel="true")
    names, size = short_names(labels)
    axes.set_xticks(range(len(labels)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(labels)), names, fontsize=size)
    for (i, j), count in np.ndenumerate(counts):
        if count and len(labels) <= READABLE:
            color = "white" if shares[i, j] > 0.5 else "black"
            options = {"ha": "center", "va": "center", "color": color, "fontsize": 7}
            axes.text(j, i, f"{count}", **options)


def draw_f1(axes: Any, f1: np.ndarray, labels: Sequence[str]) -> None:
    """Draw the F1 of each class as a bar, the highest on top."""
    order = np.argsort(f1, kind="stable")
    bars = axes.barh(range(len(f1)), f1[order], color="C0")
    names, size = short_names([labels[i] for i in order])
    axes.set_yticks(range(len(f1)), names, fontsize=size)
    axes.set(title="F1 by class", xlabel="F1", ylim=(-0.6, len(f1) - 0.4))
    axes.set(xlim=(0, 1.15), xticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    if len(labels) <= READABLE:
        axes.bar_label(bars, fmt="{:.2f}", fontsize=7, padding=2)


def short_names(labels: Sequence[str]) -> tuple[list[str], int]:
    """Return names that fit an axis, and the size of their font."""
    # Omit more than 100 names; escape the dollar sign, which starts mathematics.
    names = [a[:20].replace("$", r"\$") if len(labels) <= 100 else "" for a in labels]
    return names, 8 if len(labels) <= READABLE else 6


def bins_of(
    clicks: np.ndarray, probabilities: np.ndarray, num_bins: int = 20
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean prediction, the observed rate and the count of each bin, [bins].

    Bins have equal widths; the first two are NaN where a bin is empty.
    """
    bins = np.minimum((probabilities * num_bins).astype(int), num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    sizes = np.where(counts, counts, np.nan)
    predicted = np.bincount(bins, probabilities, num_bins) / sizes
    return predicted, np.bincount(bins, clicks, num_bins) / sizes, counts


def draw_calibration(
    axes: Any, below: Any, clicks: np.ndarray, probabilities: np.ndarray
) -> None:
    """Draw observed rates by predicted rates, and below them the counts of the bins."""
    predicted, observed, counts = bins_of(clicks, probabilities)
    deviation = np.sqrt(observed * (1 - observed) / np.maximum(counts, 1))
    axes.plot([0, 1], [0, 1], color="gray", linestyle="--", label="calibrated")
    options = {"fmt": "o-", "markersize": 3, "label": "model, ± 2 standard errors"}
    axes.errorbar(predicted, observed, 2 * deviation, **options)
    axes.set(title="calibration", ylabel="observed click rate", xlim=(0, 1))
    axes.set(ylim=(0, 1))
    axes.legend()
    width = 1 / len(counts)
    below.bar((np.arange(len(counts)) + 0.5) * width, counts, 0.9 * width)
    below.set(xlabel="predicted click rate", ylabel="examples", xlim=(0, 1))
    below.set_yscale("log")
    below.set_ylim(bottom=0.8)  # so that a bin of one example has a bar

"""Pictures of a training run."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

_INK, _PALE = "#30343b", "#d9dce1"
_LAYERS = ("#1b6ca8", "#e07a1f", "#2f9e6e", "#8e4fa8", "#b83b4b")
_LINE: dict[str, Any] = {"lw": 1.6, "solid_joinstyle": "round", "solid_capstyle": "round"}


def curves(history: dict[str, Any], title: str, path: Path) -> None:
    """Loss, test error, and RMS of gradients and updates, on log scales, into a PNG file.

    Args:
        history: "epochs", a list of {"epoch", "train_loss", "test_error"}, and "steps", a
            list of {"epoch", "loss", "gradient", "update"}, where the last two map the
            name of a layer to its RMS, and "epoch" may be fractional.
        title: of the whole picture.
        path: where to write.
    """
    epochs, steps = history["epochs"], history["steps"]
    figure = Figure(figsize=(11, 7.4), dpi=130, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr]
    figure.suptitle(title, fontsize=13, fontweight="bold", color=_INK)
    (loss, error), (gradient, update) = figure.subplots(2, 2, sharex=True)

    at = np.array([row["epoch"] for row in epochs])
    sampled = np.array([row["epoch"] for row in steps])
    batch_loss = [row["loss"] for row in steps]
    loss.plot(sampled, batch_loss, color=_LAYERS[0], lw=0.8, alpha=0.4, label="batches")
    loss.plot(at - 0.5, [row["train_loss"] for row in epochs], label="epochs", **_dots(_INK))
    _dress(loss, "Training loss", "cross-entropy", legend=True)
    error.plot(at, [row["test_error"] for row in epochs], **_dots(_LAYERS[4]))
    last = epochs[-1]["test_error"]
    _dress(error, f"Test error ({last:.2f} % at the end)", "wrong answers (%)", legend=False)
    for axes, key, name in ((gradient, "gradient", "Gradients"), (update, "update", "Updates")):
        for layer, color in zip(steps[0][key] if steps else (), _LAYERS, strict=False):
            values = np.array([row[key][layer] for row in steps])
            axes.plot(sampled, values, color=color, lw=0.7, alpha=0.3)
            axes.plot(sampled, _smooth(values), color=color, label=layer, **_LINE)
        _dress(axes, f"{name} of the weights", "root mean square", legend=bool(steps))
        axes.set_xlabel("epoch", color=_INK)
    error.set_xlim(0, at[-1] * 1.01)
    figure.savefig(path)


def _dots(color: str) -> dict[str, Any]:
    return {"color": color, "marker": "o", "ms": 3.5, **_LINE}


def _smooth(values: np.ndarray) -> np.ndarray:
    """Moving geometric mean over a twentieth of the values, over fewer at the ends."""
    window = np.ones(len(values) // 20 | 1)
    sums = np.convolve(np.log(np.maximum(values, 1e-30)), window, "same")
    return np.exp(sums / np.convolve(np.ones(len(values)), window, "same"))


def _dress(axes: Axes, title: str, ylabel: str, *, legend: bool) -> None:
    axes.set_yscale("log")
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.set_ylabel(ylabel, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(which="both", color=_INK, labelcolor=_INK)
    axes.grid(which="major", color=_PALE, lw=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter(NullFormatter())
    if low > 1e-3 and high / low < 1000:  # powers of ten alone would be too few
        subs = (1, 2, 5) if high / low > 20 else (1, 1.5, 2, 2.5, 3, 4, 5, 7)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    if legend:
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK)

"""A picture of a plan: what each peer holds, in stacked bars."""

from collections.abc import Sequence
from pathlib import Path

from .planner import KINDS, Cost

_COLOURS = ("#30638e", "#7fb2d6", "#b8d8e8", "#d1495b", "#edae49", "#b8bcc2")


def draw(costs: Sequence[Cost], limit: float | None, title: str, path: Path) -> None:
    """Write a PNG of one bar a peer.

    Args:
        costs: the first at the top; those named "Sharded..." stand out.
        limit: bytes at which to draw a line.
        path: it is overwritten.

    Raises:
        ValueError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError(f"--picture needs {error.name}: pip install matplotlib") from None
    figure = Figure(figsize=(10, 1.6 + 0.45 * len(costs)), layout="constrained")
    axes = figure.subplots()
    rows = range(len(costs))[::-1]
    left = [0.0] * len(costs)
    for kind, colour in zip(KINDS, _COLOURS, strict=True):
        widths = [cost.memory.get(kind, 0) / 1e9 for cost in costs]
        if any(widths):
            axes.barh(rows, widths, left=left, height=0.65, color=colour, label=kind)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, cost in zip(rows, costs, strict=True):
        axes.annotate(
            f"{cost.peak / 1e9:.3g} GB",
            (cost.peak / 1e9, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # over the limit's line
            weight="bold" if cost.peer.startswith("Sharded") else "normal",
        )
    if limit is not None:
        axes.axvline(limit / 1e9, color="#333333", linestyle=":", linewidth=1)
    axes.set_yticks(rows, [cost.peer for cost in costs])
    axes.set_xlim(0, 1.12 * max(*left, (limit or 0) / 1e9))
    axes.set_xlabel("GB of one rank at its peak, without activations")
    axes.set_title(title, loc="left", fontsize=11, weight="bold")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(KINDS), frameon=False)
    figure.savefig(path, dpi=150, facecolor="white", format="png")

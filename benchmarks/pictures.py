"""Pictures of what was measured: bars of medians for tables, lines for growth."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .report import REFERENCE, Growth, Section, Table, rounded

COLOURS = {"ours": "#d1495b", "theirs": "#30638e", "yardstick": "#b8bcc2"}
LINES = {
    "ours": ("#edae49", "#8d5a97"),
    "theirs": ("#30638e", "#00798c", "#58a618", "#7f8c8d", "#34495e", "#a3b8cc"),
}
TABLES_A_PICTURE = 4
NAMES = {"ours": "adadelta-dist", "theirs": "others", "yardstick": "yardstick"}


def draw(section: Section, stem: Path) -> list[Path]:
    """The pictures of a section, which begin with `stem`: four tables each, or all charts."""
    tables = [part for part in section if isinstance(part, Table) and part.rows]
    charts = [part for part in section if isinstance(part, Growth)]
    pages = [tables[i : i + TABLES_A_PICTURE] for i in range(0, len(tables), TABLES_A_PICTURE)]
    files = []
    for number, page in enumerate(pages, 1):
        files.append(stem.with_name(f"{stem.name}{f'-{number}' if len(pages) > 1 else ''}.png"))
        _bars(page, files[-1])
    if charts:
        files.append(stem.with_name(f"{stem.name}.png"))
        _lines(charts, files[-1])
    return files


def _bars(tables: Sequence[Table], path: Path) -> None:
    """Medians with min .. max, and the ratio behind each; two tables in a row."""
    rows = [[i, i + 1] for i in range(0, len(tables) - 1, 2)]
    if len(tables) % 2:
        rows.append([len(tables) - 1] * 2)
    heights = [1 + max(len(tables[i].rows) for i in row) for row in rows]
    figure, axes = plt.subplot_mosaic(
        rows,
        figsize=(16, 0.3 * sum(heights) + 0.8 * len(rows) + 0.5),
        height_ratios=heights,
        layout="constrained",
    )
    for i, table in enumerate(tables):
        _draw_bars(axes[i], table)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, NAMES.values(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


def _draw_bars(axes: Any, table: Table) -> None:
    rows = table.rows[::-1]
    spread = [
        [row.median - min(row.values) for row in rows],
        [max(row.values) - row.median for row in rows],
    ]
    right = max(max(row.values) for row in rows) or 1.0
    axes.barh(
        [row.peer for row in rows],
        [row.median for row in rows],
        color=[COLOURS[row.role] for row in rows],
        height=0.7,
        xerr=spread,
        error_kw={"ecolor": "#33333380", "elinewidth": 1, "capsize": 2},
    )
    for y, row in enumerate(rows):
        label = f"{rounded(row.median)} {table.unit}   {row.ratio:.2f}"
        weight = "bold" if row.peer == REFERENCE else "normal"
        axes.text(max(row.values) + right * 0.015, y, label, va="center", weight=weight, fontsize=8)
    axes.set_title(table.title, loc="left", fontsize=10, weight="bold")
    axes.set_xlim(0, right * 1.25)
    axes.set_xlabel(f"{table.unit}, and the ratio to {REFERENCE}", color="#555555", fontsize=8)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _lines(charts: Sequence[Growth], path: Path) -> None:
    """Both axes logarithmic, for what grows by factors."""
    columns = 2 if len(charts) > 1 else 1
    height = -(-len(charts) // columns)
    figure, grid = plt.subplots(
        height, columns, figsize=(8 * columns, 4.6 * height), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(charts) :]:
        axes.remove()
    for axes, chart in zip(grid.flat, charts, strict=False):
        palette = {role: cycle(colours) for role, colours in LINES.items()}
        for peer, line in chart.lines.items():
            role = chart.roles[peer]
            axes.plot(
                list(line),
                list(line.values()),
                label=peer,
                color=COLOURS["ours"] if peer == REFERENCE else next(palette[role]),
                linewidth=2.4 if role == "ours" else 1.4,
                linestyle="-" if role == "ours" else "--",
                marker="o",
                markersize=3,
            )
        axes.set(xscale="log", yscale="log", xlabel=chart.label, ylabel="ms")
        axes.set_title(chart.title, loc="left", fontsize=10, weight="bold")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)

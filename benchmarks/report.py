"""What the benchmarks found: tables, the markdown report and the picture."""

import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

OURS, THEIRS, YARDSTICK = "#d1495b", "#30638e", "#b8bcc2"


@dataclass(frozen=True)
class Timing:
    """One peer's repetitions.

    Args:
        peer: its name.
        seconds: one for each repetition; peers of a table alternate, so that the i-th
            of one was taken next to the i-th of another.
        ours: whether it is this package.
        yardstick: whether it is no optimizer, but a bound to compare with.
        extra: further columns, by heading.
    """

    peer: str
    seconds: Sequence[float]
    ours: bool = False
    yardstick: bool = False
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def colour(self) -> str:
        return OURS if self.ours else YARDSTICK if self.yardstick else THEIRS


@dataclass(frozen=True)
class Table:
    """The peers of one setting.

    Args:
        title: the setting.
        note: how to read it.
        timings: one for each peer.
        baseline: the peer that ratios refer to.
        skipped: why, by peer.
    """

    title: str
    note: str
    timings: Sequence[Timing]
    baseline: str
    skipped: dict[str, str] = field(default_factory=dict)

    def ratio(self, timing: Timing) -> float:
        """Median over the repetitions of this peer's time divided by the baseline's."""
        base = next(other for other in self.timings if other.peer == self.baseline)
        pairs = zip(timing.seconds, base.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def markdown(self) -> str:
        extras = list(dict.fromkeys(key for timing in self.timings for key in timing.extra))
        head = ["peer", "median ms", "min .. max ms", "ratio", *extras]
        rows = [head, ["---", *["---:"] * (len(head) - 1)]]
        for timing in self.timings:
            low, high = min(timing.seconds), max(timing.seconds)
            rows.append(
                [
                    timing.peer,
                    _ms(timing.median),
                    f"{_ms(low)} .. {_ms(high)}",
                    f"{self.ratio(timing):.2f}",
                    *(timing.extra.get(key, "") for key in extras),
                ]
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        cells = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
        lines = [f"| {' | '.join(row)} |" for row in cells]
        skips = [f"\nSkipped: {peer}: {reason}" for peer, reason in self.skipped.items()]
        return "\n".join([f"### {self.title}", "", self.note, "", *lines, *skips])


def report(tables: Sequence[Table], date: str, command: str) -> str:
    """The markdown file: where it was measured, then the tables."""
    facts = [
        f"# Benchmarks, {date}",
        "",
        f"- Command: `{command}`",
        f"- Machine: {_cpu_model()}, {os.cpu_count()} cores, "
        f"load average of the last minute {os.getloadavg()[0]:.1f}",
        f"- Python {platform.python_version()}, torch {torch.__version__}, "
        f"{platform.system()} {platform.machine()}",
        f"- Commit: {_commit()}",
        "",
        "Peers alternate in each repetition. A ratio is a peer's time divided by that of the",
        "baseline in the same repetition, as the median over the repetitions: below 1 is less",
        "time than the baseline, above 1 is more.",
        "",
        f"![bars]({date}.png)",
    ]
    return "\n".join(facts) + "\n\n" + "\n\n".join(table.markdown() for table in tables) + "\n"


def picture(tables: Sequence[Table], path: Path) -> None:
    """Bars of the medians with min .. max, and the ratio behind each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [[i, i + 1] for i in range(0, len(tables) - 1, 2)]
    if len(tables) % 2:
        rows.append([len(tables) - 1] * 2)
    heights = [1 + max(len(tables[i].timings) for i in row) for row in rows]
    figure, axes = plt.subplot_mosaic(
        rows,  # type: ignore[arg-type]
        figsize=(16, 0.42 * sum(heights) + 0.6 * len(rows) + 0.5),
        height_ratios=heights,
        layout="constrained",
    )
    for i, table in enumerate(tables):
        _draw(axes[i], table)  # type: ignore[index]
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)  # type: ignore[union-attr]
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (OURS, THEIRS, YARDSTICK)]
    names = ["adadelta-dist", "torch", "yardstick"]
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def _draw(axes: Any, table: Table) -> None:
    timings = table.timings[::-1]
    medians = [timing.median * 1e3 for timing in timings]
    spread = [
        [(timing.median - min(timing.seconds)) * 1e3 for timing in timings],
        [(max(timing.seconds) - timing.median) * 1e3 for timing in timings],
    ]
    right = max(max(timing.seconds) for timing in timings) * 1e3
    bars = axes.barh(
        [timing.peer for timing in timings],
        medians,
        color=[timing.colour for timing in timings],
        height=0.68,
        xerr=spread,
        error_kw={"ecolor": "#33333380", "elinewidth": 1, "capsize": 2},
    )
    for timing, bar in zip(timings, bars, strict=True):
        y = bar.get_y() + bar.get_height() / 2
        label = f"{_ms(timing.median)} ms   ratio {table.ratio(timing):.2f}"
        weight = "bold" if timing.ours else "normal"
        axes.text(max(timing.seconds) * 1e3 + right * 0.015, y, label, va="center", weight=weight)
    base = next(timing for timing in timings if timing.peer == table.baseline)
    axes.axvline(base.median * 1e3, color=THEIRS, linestyle=":", linewidth=1, zorder=0)
    axes.set_title(table.title, loc="left", fontsize=11, weight="bold")
    axes.set_xlim(0, right * 1.3)
    axes.set_xlabel(f"ms; ratio to {table.baseline}", color="#555555")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "not available"
    return done.stdout.strip()

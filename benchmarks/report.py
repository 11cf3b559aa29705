"""What the benchmarks found, as tables, and the markdown report with its summary."""

import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

REFERENCE = "ShardedAdadelta"
"""The peer that all ratios refer to: ours with its defaults."""


@dataclass(frozen=True)
class Row:
    """One peer's values.

    Args:
        peer: its name.
        values: one a turn, or one a rank.
        beside: the reference's, taken next to each of them.
        role: "ours", "theirs" or "yardstick".
        extra: further columns, by heading.
    """

    peer: str
    values: Sequence[float]
    beside: Sequence[float]
    role: str = "theirs"
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def ratio(self) -> float:
        """The median of its values over the reference's: above 1 the reference needs less."""
        return statistics.median(
            mine / max(theirs, 1e-9) for mine, theirs in zip(self.values, self.beside, strict=True)
        )


@dataclass(frozen=True)
class Table:
    """The peers of one setting.

    Args:
        title: the setting.
        short: the same as the heading of a column of the summary.
        note: how to read it.
        rows: one for each peer.
        unit: of the values.
        skipped: why, by peer.
    """

    title: str
    short: str
    note: str
    rows: Sequence[Row]
    unit: str = "ms"
    skipped: Mapping[str, str] = field(default_factory=dict)

    def markdown(self) -> str:
        extras = list(dict.fromkeys(key for row in self.rows for key in row.extra))
        head = ["peer", f"median {self.unit}", f"min .. max {self.unit}", "ratio", *extras]
        cells = [
            [
                row.peer,
                rounded(row.median),
                f"{rounded(min(row.values))} .. {rounded(max(row.values))}",
                f"{row.ratio:.2f}",
                *(row.extra.get(key, "") for key in extras),
            ]
            for row in self.rows
        ]
        skips = [f"\nSkipped: {peer}: {reason}." for peer, reason in self.skipped.items()]
        rows = [self.note, "", grid(head, cells)] if cells else []
        return "\n".join([f"### {self.title}", "", *rows, *skips])


@dataclass(frozen=True)
class Growth:
    """How milliseconds grow with something.

    Args:
        title, note: as of a `Table`.
        label: what grows.
        lines: by peer, the median for each size that was measured.
        roles: by peer.
    """

    title: str
    note: str
    label: str
    lines: Mapping[str, Mapping[int, float]]
    roles: Mapping[str, str]

    def markdown(self) -> str:
        sizes = sorted({size for line in self.lines.values() for size in line})
        cells = [
            [peer, *(rounded(line[size]) if size in line else "" for size in sizes)]
            for peer, line in self.lines.items()
        ]
        head = [f"ms, by {self.label}", *(f"{size:,}" for size in sizes)]
        return "\n".join([f"### {self.title}", "", self.note, "", grid(head, cells)])


Section = Sequence[Table | Growth]


def report(
    sections: Mapping[str, Section],
    pictures: Mapping[str, Sequence[str]],
    settings: str,
    facts: str,
) -> str:
    """The markdown file: summary, where it was measured, who took part, and the tables.

    Args:
        sections: by name.
        pictures: files of each section, next to the report.
        settings, facts: lists in markdown.
    """
    parts = [
        "## Summary",
        f"Each number is what a peer needs divided by what `{REFERENCE}` with its defaults needs "
        "next to it, as the median over the turns: above 1 ours needs less, below 1 ours needs "
        "more.",
        *filter(None, (_summary(name, section) for name, section in sections.items())),
        "## Where and how",
        facts,
        "Peers take turns, each time in another order. Ratios are to the reference in the same "
        "turn, as the median over the turns.",
        "### Peers",
        settings,
    ]
    for name, section in sections.items():
        parts += [f"## {name}"]
        parts += [f"![{name}]({file})" for file in pictures[name]]
        parts += [part.markdown() for part in section]
    return "\n\n".join(parts) + "\n"


def _summary(name: str, section: Section) -> str:
    """Ratios by peer and table."""
    tables = [part for part in section if isinstance(part, Table) and part.rows]
    if not tables:
        return ""
    ratios: dict[str, dict[str, str]] = {}
    order = {"theirs": 0, "yardstick": 1, "ours": 2}
    rows = sorted((row for table in tables for row in table.rows), key=lambda r: order[r.role])
    for row in rows:
        ratios.setdefault(row.peer, {})
    for table in tables:
        for row in table.rows:
            ratios[row.peer][table.short] = f"{row.ratio:.2f}"
    ratios.pop(REFERENCE, None)
    head = [f"{name}: ratio", *(table.short for table in tables)]
    return grid(
        head, [[peer, *(found.get(h, "") for h in head[1:])] for peer, found in ratios.items()]
    )


def grid(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table in markdown."""
    rows = [list(head), ["---", *["---:"] * (len(head) - 1)], *(list(row) for row in cells)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        f"| {' | '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))} |"
        for row in rows
    )


def rounded(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def facts(command: str) -> str:
    """Hardware, versions, commit and command."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {_version(name)}" for name in ("numpy", "deepspeed"))
    lines = [
        f"Command: `{command}`",
        f"Machine: {_cpu_model()}, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"load average of the last minute {os.getloadavg()[0]:.1f} at the start",
        f"Python {platform.python_version()}, torch {torch.__version__}, {versions}, "
        f"{platform.system()} {platform.release()} {platform.machine()}",
        f"Commit: {_commit()}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


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

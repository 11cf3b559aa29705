"""What commands print: tables, progress and errors; plain text where there is no terminal."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


@contextmanager
def errors() -> Iterator[None]:
    """What may go wrong with a user's files and numbers, in one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        Console(stderr=True).print(f"error: {printable(error)}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, to be told of (done, total) bytes."""
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[str] = ()
) -> None:
    """A table on a terminal; elsewhere an empty line and aligned columns.

    Args:
        right: the columns to align to the right.
    """
    console = Console()
    if console.is_terminal:
        table = Table()
        for name in header:
            table.add_column(name, justify="right" if name in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
    else:
        print()
        for line in _aligned([header, *rows]):
            print(line)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(map(str.ljust, row, widths)).rstrip()


def printable(text: Any) -> str:
    """Text from a file, without what would steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))

"""The command `adadelta-dist`."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import typer
    from rich.console import Console
    from rich.filesize import decimal
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError as error:
    raise SystemExit(
        f"error: adadelta-dist needs {error.name}: pip install 'adadelta-dist[cli]'"
    ) from None

from . import convert as conversion
from .inspection import Description, ParameterDescription, describe
from .sources import is_deepspeed

app = typer.Typer(
    help="Look into checkpoints, and convert them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def commands() -> None:
    """Look into checkpoints, and convert them."""


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint's folder, or a file of torch.save.")],
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Say what is in a checkpoint, and whether it is intact. Exit status 1 if it is not."""
    with _errors():
        found = describe(path)
    if as_json:
        print(json.dumps(asdict(found), indent=1))
    else:
        _show(found)
    raise typer.Exit(1 if found.intact is False else 0)


@app.command()
def convert(
    src: Annotated[Path, typer.Argument(help="A checkpoint's folder, or a file of torch.save.")],
    dst: Annotated[Path, typer.Argument(help="What to write; it must not exist.")],
    to: Annotated[
        Literal["torch", "dcp", "universal"],
        typer.Option(
            help="torch: one file of torch.save. dcp: a folder to resume from. universal: a folder "
            "that DeepSpeed resumes from."
        ),
    ],
) -> None:
    """Write a checkpoint in another form. It appears whole or not at all."""
    with _errors(), _progress_bar() as on_progress:
        if to != "universal" and not is_deepspeed(src):
            conversion.convert(src, dst, to, on_progress)
        else:
            _deepspeed().convert(src, dst, to, on_progress)
    print(f"wrote {_printable(dst)}")


def _deepspeed() -> Any:
    """The conversions that need DeepSpeed, which takes seconds to import."""
    try:
        return import_module(f"{__package__}.strategies.deepspeed_convert")
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise ValueError(
            "DeepSpeed's checkpoints need DeepSpeed: pip install 'adadelta-dist[deepspeed]'"
        ) from None


@contextmanager
def _errors() -> Iterator[None]:
    """What may go wrong with a user's files, in one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        Console(stderr=True).print(f"error: {_printable(error)}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show(found: Description) -> None:
    for line in _summary(found):
        print(line)
    console = Console()
    header = ("parameter", "shape", "dtype", "size", "group", "steps", "state")
    rows = [_row(parameter) for parameter in found.parameters]
    if not rows:
        return
    if console.is_terminal:
        table = Table()
        for name in header:
            right = name in ("size", "group", "steps", "state")
            table.add_column(name, justify="right" if right else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
    else:
        print()
        for line in _aligned([header, *rows]):
            print(line)


def _summary(found: Description) -> Iterator[str]:
    kinds = {
        "adadelta-dist": "checkpoint of adadelta-dist",
        "dcp": "folder of torch.distributed.checkpoint",
        "torch": "file of torch.save",
    }
    yield f"{_printable(found.path)}: {kinds[found.kind]}"
    intact = {True: "yes", False: "NO", None: "unknown, for it has no checksums"}
    yield f"intact: {intact[found.intact]}"
    yield from (f"  {_printable(problem)}" for problem in found.problems)
    if found.saved_at:
        versions = ", ".join(f"{name} {number}" for name, number in found.versions.items())
        saved = f"{found.saved_at} by {_count(found.world_size, 'rank')}, with {versions}"
        yield f"saved: {_printable(saved)}"
    if found.optimizer:
        yield f"optimizer: {_printable(found.optimizer)}, {decimal(found.optimizer_nbytes)}"
    for i, group in enumerate(found.groups):
        options = ", ".join(f"{key} {value}" for key, value in group.items() if key != "params")
        yield f"  group {i}: {_count(group['params'], 'parameter')}, {_printable(options)}"
    if found.model_nbytes:
        yield f"model: {decimal(found.model_nbytes)}"
    if found.extra_ranks:
        yield f"extra: of ranks {', '.join(map(str, found.extra_ranks))}"


def _row(parameter: ParameterDescription) -> tuple[str, ...]:
    shape, steps, state = parameter.shape, parameter.steps, parameter.state_nbytes
    return (
        _printable(parameter.name),
        "?" if shape is None else " x ".join(map(str, shape)) or "scalar",
        parameter.dtype or "?",
        decimal(parameter.nbytes),
        "-" if parameter.group is None else str(parameter.group),
        "-" if steps is None else f"{steps:g}",
        "-" if state is None else decimal(state),
    )


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(map(str.ljust, row, widths)).rstrip()


def _count(number: int | None, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _printable(text: Any) -> str:
    """Text from a checkpoint, without what would steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


if __name__ == "__main__":
    app()

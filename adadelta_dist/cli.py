"""The command `adadelta-dist`."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import typer
    from rich.filesize import decimal

    from .planning.command import plan
    from .terminal import errors, printable, progress_bar, show_table
except ModuleNotFoundError as error:
    raise SystemExit(
        f"error: adadelta-dist needs {error.name}: pip install 'adadelta-dist[cli]'"
    ) from None

from .checkpoints import convert as conversion
from .checkpoints.inspection import Description, ParameterDescription, describe
from .checkpoints.sources import is_deepspeed

app = typer.Typer(
    help="Look into checkpoints, convert them, and plan what training will cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def commands() -> None:
    """Look into checkpoints, convert them, and plan what training will cost."""


app.command()(plan)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint's folder, or a file of torch.save.")],
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Say what is in a checkpoint, and whether it is intact. Exit status 1 if it is not."""
    with errors():
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
    with errors(), progress_bar() as on_progress:
        if to != "universal" and not is_deepspeed(src):
            conversion.convert(src, dst, to, on_progress)
        else:
            _deepspeed().convert(src, dst, to, on_progress)
    print(f"wrote {printable(dst)}")


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


def _show(found: Description) -> None:
    for line in _summary(found):
        print(line)
    header = ("parameter", "shape", "dtype", "size", "group", "steps", "state")
    rows = [_row(parameter) for parameter in found.parameters]
    if rows:
        show_table(header, rows, right=("size", "group", "steps", "state"))


def _summary(found: Description) -> Iterator[str]:
    kinds = {
        "adadelta-dist": "checkpoint of adadelta-dist",
        "dcp": "folder of torch.distributed.checkpoint",
        "torch": "file of torch.save",
    }
    yield f"{printable(found.path)}: {kinds[found.kind]}"
    intact = {True: "yes", False: "NO", None: "unknown, for it has no checksums"}
    yield f"intact: {intact[found.intact]}"
    yield from (f"  {printable(problem)}" for problem in found.problems)
    if found.saved_at:
        versions = ", ".join(f"{name} {number}" for name, number in found.versions.items())
        saved = f"{found.saved_at} by {_count(found.world_size, 'rank')}, with {versions}"
        yield f"saved: {printable(saved)}"
    if found.optimizer:
        yield f"optimizer: {printable(found.optimizer)}, {decimal(found.optimizer_nbytes)}"
    for i, group in enumerate(found.groups):
        options = ", ".join(f"{key} {value}" for key, value in group.items() if key != "params")
        yield f"  group {i}: {_count(group['params'], 'parameter')}, {printable(options)}"
    if found.model_nbytes:
        yield f"model: {decimal(found.model_nbytes)}"
    if found.extra_ranks:
        yield f"extra: of ranks {', '.join(map(str, found.extra_ranks))}"


def _row(parameter: ParameterDescription) -> tuple[str, ...]:
    shape, steps, state = parameter.shape, parameter.steps, parameter.state_nbytes
    return (
        printable(parameter.name),
        "?" if shape is None else " x ".join(map(str, shape)) or "scalar",
        parameter.dtype or "?",
        decimal(parameter.nbytes),
        "-" if parameter.group is None else str(parameter.group),
        "-" if steps is None else f"{steps:g}",
        "-" if state is None else decimal(state),
    )


def _count(number: int | None, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


if __name__ == "__main__":
    app()

"""`adadelta-dist convert` where one side is DeepSpeed's."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from adadelta_dist.checkpoints import convert as conversion
from adadelta_dist.checkpoints.content import Content, Value
from adadelta_dist.checkpoints.convert import Progress
from adadelta_dist.checkpoints.sources import is_deepspeed
from adadelta_dist.functional import ACCUMULATORS
from adadelta_dist.state import MASTER

from .deepspeed_checkpoint import Checkpoint, one_step
from .deepspeed_reading import read_deepspeed
from .deepspeed_universal import read_universal, write_universal


def convert(
    src: Path,
    dst: Path,
    to: Literal["torch", "dcp", "universal"],
    on_progress: Progress | None = None,
) -> None:
    """As `checkpoints.convert.convert`, from DeepSpeed's folders and to universal ones.

    Args:
        src: what `engine.save_checkpoint` wrote, a universal folder, or, to "universal", any
            checkpoint that `adadelta_dist.checkpoints.convert.convert` reads.
        dst: a path that does not exist.
        to: the form to write.
        on_progress: called as bytes are read and written.

    Raises:
        OSError: a file is missing, or cannot be written; `dst` exists.
        ValueError: `src` is damaged, of another optimizer, or without parameters' names.
    """
    if to != "universal":
        conversion.convert(src, dst, to, on_progress, read=lambda path: _content(_read(path)))
        return
    checkpoint = _read(src) if is_deepspeed(src) else _checkpoint(src)
    write_universal(_counted(checkpoint, on_progress), dst)


def _read(path: Path) -> Checkpoint:
    return read_universal(path) if (path / "zero").is_dir() else read_deepspeed(path)


def _content(checkpoint: Checkpoint) -> Content:
    def master(name: str, key: str) -> Value:
        read = partial(checkpoint.read, name, key)
        return Value(read, tuple(checkpoint.shapes[name]), torch.float32)

    def held(tensor: Tensor) -> Value:
        return Value(lambda: tensor, tuple(tensor.shape), tensor.dtype)

    model = {name: master(name, "fp32") for name in checkpoint.shapes}
    model |= {name: held(tensor) for name, tensor in checkpoint.rest.items()}
    step = torch.tensor(checkpoint.step)
    state = {
        name: {"step": held(step)} | {key: master(name, key) for key in ACCUMULATORS}
        for name in checkpoint.shapes
    }
    return Content(model, state, checkpoint.groups)


def _checkpoint(src: Path) -> Checkpoint:
    content = conversion.read_intact(src)
    conversion.check_names(content, src)
    names = content.names()
    lacking = [name for name in names if name not in content.model]
    if not names or lacking:
        raise ValueError(
            f"{src} has no {'optimizer' if not names else 'model'}: a universal checkpoint needs "
            'both. Save {"model": ..., "optimizer": ...}.'
        )
    shapes = {name: torch.Size(content.model[name].shape or ()) for name in names}

    def read(name: str, key: str) -> Tensor:
        entry: Mapping[str, Value] = content.state.get(name, {})
        if key == "fp32":
            key, value = MASTER, entry.get(MASTER, content.model[name])
        elif key not in entry:
            return torch.zeros(shapes[name])
        else:
            value = entry[key]
        tensor: Tensor = value.read().float()
        if tensor.shape != shapes[name]:
            raise ValueError(f"{src}: {key} of {name!r} has another shape than the parameter")
        return tensor

    steps = {n: float(e["step"].read()) for n, e in content.state.items() if e}
    # Frozen parameters have no state, or zeros; DeepSpeed keeps one step for all.
    step = one_step({name: count for name, count in steps.items() if count})
    rest = {name: v.read() for name, v in content.model.items() if name not in shapes}
    return Checkpoint(shapes, [dict(group) for group in content.groups], read, step, rest)


def _counted(checkpoint: Checkpoint, on_progress: Progress | None) -> Checkpoint:
    """The same, and every tensor that is read is reported."""
    if on_progress is None:
        return checkpoint
    tensors = 1 + len(ACCUMULATORS)
    total = tensors * sum(4 * shape.numel() for shape in checkpoint.shapes.values())
    done = 0
    report: Callable[[int, int], Any] = on_progress

    def read(name: str, key: str) -> Tensor:
        nonlocal done
        tensor = checkpoint.read(name, key)
        done += 4 * tensor.numel()
        report(done, total)
        return tensor

    return Checkpoint(**{**vars(checkpoint), "read": read})

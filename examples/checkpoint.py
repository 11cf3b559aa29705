"""Checkpoints that go on with any number of ranks."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_checkpoint(path: Path, sizes: list[int]) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"--resume: there is no file {path}")
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        saved = checkpoint["sizes"]
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"--resume: {path} is not a checkpoint of this example") from error
    if saved != sizes:
        raise ValueError(f"--resume: {path} is of a {saved} perceptron, this one is {sizes}")
    return checkpoint


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a file that is there as a whole or not at all, whatever interrupts this."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            torch.save(_compact(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _compact(value: Any) -> Any:
    """The same with every tensor copied: a view would be saved with all that it views."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _compact(item) for key, item in value.items()}
    return [_compact(item) for item in value] if isinstance(value, list) else value

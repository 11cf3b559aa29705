"""`load_checkpoint`: check everything, read beside what is there, and only then change it."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from ..adadelta import check_values
from ..agreement import agreement, digest
from ..groups import Group
from . import folder
from .history import checkpoints_in
from .matching import match
from .named_state import group_of, named_state, optimizer_state_dict
from .reading import CheckpointError, load_plain, read_into
from .saving import settle

_NOT_STRICT = StateDictOptions(strict=False)


@dataclass(frozen=True)
class Loaded:
    """What `load_checkpoint` found.

    Args:
        path: the checkpoint that was loaded.
        extra: what the rank of this number saved as `extra`; what rank 0 saved where it has
            none of its own; None where that has none either.
        skipped: with `strict=False`, a line for whatever does not match.
    """

    path: Path
    extra: Any
    skipped: tuple[str, ...]


def load_checkpoint(
    path: str | PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    strict: bool = True,
) -> Loaded:
    """Load what `save_checkpoint` wrote, at any world size and bucket size. Collective.

    The checksums of all files are compared first, each rank reading its share; then the
    checkpoint is read into host memory, as much as this rank owns; and only when that
    has gone well on every rank are optimizer and model changed.

    Folders of plain `torch.distributed.checkpoint` with `{"model": ..., "optimizer": ...}`
    by parameters' names load as well; they have no checksums.

    Args:
        path: a checkpoint, or the folder that holds a run's checkpoints: then the newest.
        model, optimizer: as for `save_checkpoint`; they need not be of the same kind as
            those that were saved.
        strict: True: raise if anything is missing, too much or of another shape; False:
            load what matches, leave the rest as it is, and list it.

    Returns:
        What was loaded from where, `extra`, and what was left out.

    Raises:
        FileNotFoundError: there is no such folder, or no complete checkpoint in it.
        CheckpointError: it is damaged, or does not match.
        ValueError: it holds another optimizer's state, hyperparameters out of range, or a pickle
            with code in it.
        RankError: another rank failed, or sees another checkpoint.

    Whichever of these it is, nothing has changed. Hooks and `set_extra_state` of the model are
    the exception: what they raise leaves the optimizer as it was, but of the model they know best.
    """
    group = group_of(optimizer)
    settle()
    with agreement(group, "load_checkpoint") as mine:
        source = _resolve(Path(path))
        _check_intact(source, group)
        mine.facts.append(f"checkpoint {source.name}, checksums {_sums_of(source)}")
    with agreement(group, "load_checkpoint"):  # by now it is known to be intact
        current = named_state(model, optimizer)
        plan = match(source, current)
        if strict and plan.skipped:
            raise CheckpointError(
                f"{source} does not match: {'; '.join(plan.skipped[:5])}"
                f"{f'; and {len(plan.skipped) - 5} more' if len(plan.skipped) > 5 else ''}. "
                "strict=False loads what matches."
            )
        extra = _extra(source, group.rank)
        for values in plan.optimizer["param_groups"]:
            check_values(values)
    read_into(plan.target, source, process_group=group.process_group)
    with agreement(group, "load_checkpoint"):  # the model's own hooks may raise
        # `match` was strict; torch would miss the second name of a module in a wrapped model.
        set_model_state_dict(model, plan.target["model"], options=_NOT_STRICT)
    optimizer.load_state_dict(optimizer_state_dict(plan.optimizer))
    return Loaded(source, extra, plan.skipped)


def _resolve(path: Path) -> Path:
    if (path / ".metadata").is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"path {path}: there is no such folder")
    complete = checkpoints_in(path)
    if not complete:
        raise FileNotFoundError(f"path {path} is no complete checkpoint, and holds none")
    return complete[-1]


def _check_intact(source: Path, group: Group) -> None:
    problems = folder.verify(source, group.rank, group.world_size)
    if problems:
        others = [other for other in checkpoints_in(source.parent) if other != source]
        remedy = f" {others[-1]} is the newest of the others." if others else ""
        raise CheckpointError(f"{source} is damaged: {'; '.join(problems)}.{remedy}")


def _sums_of(source: Path) -> str:
    sums = source / folder.SUMS
    return digest([sums.read_text()]).hex() if sums.exists() else "unknown"


def _extra(source: Path, rank: int) -> Any:
    for name in (f"extra-{rank}.pt", "extra-0.pt"):
        if (source / name).exists():
            return load_plain(source / name)
    return None

"""`save_checkpoint`: every rank writes what it owns, and the folder appears when all are done."""

import io
import os
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import save
from torch.utils._pytree import tree_map_only

from . import collectives, folder
from .agreement import agreement
from .groups import Group
from .history import prune
from .named_state import group_of, named_state
from .reading import CheckpointError, as_checkpoint_error, load_plain
from .writing import StreamingWriter

_writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adadelta-dist checkpoint")
_in_flight: list[Future[Path]] = []


@dataclass(frozen=True)
class _Work:
    """What a save writes, whoever runs it."""

    path: Path
    state: dict[str, Any]
    extra: bytes | None
    optimizer: str
    keep: int | None


def save_checkpoint(
    path: str | PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    extra: Any = None,
    keep: int | None = None,
) -> Path:
    """Write one checkpoint: a folder that appears whole or not at all. Collective.

    Each rank writes the slices that it owns and its share of the model, with no gather; the
    folder is one of `torch.distributed.checkpoint`, with checksums and a manifest
    (docs/checkpoints.md). It is written beside `path` under a temporary name, and renamed
    when all ranks are done.

    Args:
        path: the folder to make, on storage that all ranks see; its parents are made.
        model: whose parameters the optimizer has; DistributedDataParallel, FSDP2 and
            compiled models are fine.
        optimizer: `ShardedAdadelta`, `Adadelta` or `torch.optim.Adadelta`.
        extra: this rank's own tensors and plain values, such as the epoch and the states of
            random generators: what `torch.load(weights_only=True)` can read.
        keep: leave only the newest `keep` checkpoints in the parent folder, and clear it of
            what saves that died have left. None: remove nothing.

    Returns:
        `path`.

    Raises:
        FileExistsError: `path` exists.
        CheckpointError: a rank could not write, or an asynchronous save before this failed.
        TypeError, ValueError: an optimizer of another kind or of another model; `extra` that
            could not be read again; `keep` below 1.
        RankError: another rank failed, or has another `path`.
    """
    group = group_of(optimizer)
    settle()
    return _write(group, _prepare(group, path, model, optimizer, extra, keep))


def async_save_checkpoint(
    path: str | PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    extra: Any = None,
    keep: int | None = None,
) -> Future[Path]:
    """`save_checkpoint` that only copies, and writes while training goes on. Collective.

    One save is in flight at a time: the next save or load waits for it, and raises its
    error. Leaving the program waits too; wait before `destroy_process_group`.

    Returns:
        A future whose `result()` waits for the folder, and raises what went wrong.
    """
    group = group_of(optimizer)
    settle()
    work = _prepare(group, path, model, optimizer, extra, keep)
    copied = tree_map_only(Tensor, _on_host, work.state)
    apart = collectives.open_background(group)
    future = _writer.submit(_write, apart, replace(work, state=copied))
    _in_flight.append(future)
    return future


def settle() -> None:
    """Wait for the asynchronous save in flight, if there is one.

    Raises:
        CheckpointError: it failed.
    """
    while _in_flight:
        future = _in_flight.pop()
        try:
            future.result()
        except Exception as error:
            raise CheckpointError(f"the asynchronous save before this failed: {error}") from error


def _prepare(
    group: Group,
    path: str | PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: Any,
    keep: int | None,
) -> _Work:
    """Check everything that can be checked before anything is written. Collective."""
    with agreement(group, "save_checkpoint") as mine:
        mine.facts += [f"path={os.fspath(path)}", f"keep={keep}"]
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be at least 1, or None to remove nothing; got {keep}")
        path = Path(os.path.abspath(path))
        if os.path.lexists(path):
            raise FileExistsError(f"path {path} exists: remove it, or give another name")
        state = named_state(model, optimizer)
        work = _Work(path, state, _packed(extra), type(optimizer).__name__, keep)
    return work


def _packed(extra: Any) -> bytes | None:
    """`extra` as the bytes of a file, which are known to load again."""
    if extra is None:
        return None
    file = io.BytesIO()
    torch.save(extra, file)
    try:
        load_plain(io.BytesIO(file.getvalue()), what="extra")
    except ValueError as error:
        raise TypeError(f"{error}. Give extra as tensors and plain values") from None
    return file.getvalue()


def _write(group: Group, work: _Work) -> Path:
    """All of a save that needs no model and no optimizer. Collective."""
    temporary = Path()
    with agreement(group, "save_checkpoint"):
        if group.rank == 0:
            try:
                work.path.parent.mkdir(parents=True, exist_ok=True)
                temporary = folder.temporary_name(work.path)
                temporary.mkdir()
            except OSError as error:
                raise CheckpointError(f"path {work.path} could not be made: {error}") from error
    temporary = Path(collectives.all_gather_object(group, str(temporary))[0])
    try:
        with agreement(group, "save_checkpoint"):
            written = _write_files(group, work, temporary)
            sums = folder.sums_of(temporary, written)
        everyones = collectives.all_gather_object(group, sums)
        with agreement(group, "save_checkpoint"):
            if group.rank == 0:
                _publish(work, temporary, {k: v for sums in everyones for k, v in sums.items()})
    except BaseException:
        if group.rank == 0:
            folder.discard(temporary)
        raise
    return work.path


def _write_files(group: Group, work: _Work, temporary: Path) -> list[str]:
    """Write this rank's files; returns their names. Collective."""
    written = []
    if group.rank == 0:
        parameters = _parameters(work.state)
        groups = work.state["optimizer"]["param_groups"]
        folder.write_manifest(
            temporary,
            world_size=group.world_size,
            optimizer=work.optimizer,
            parameters=parameters,
            groups=groups,
        )
        written += [folder.MANIFEST, ".metadata"]
    if work.extra is not None:
        name = f"extra-{group.rank}.pt"
        (temporary / name).write_bytes(work.extra)
        written.append(name)
    with as_checkpoint_error(f"{work.path} could not be written"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        save(
            work.state,
            storage_writer=StreamingWriter(temporary),
            process_group=group.process_group,
            no_dist=group.process_group is None,
        )
    written += [file.name for file in temporary.glob(f"__{group.rank}_*")]
    for name in written:
        folder.sync(temporary / name)
    return written


def _parameters(state: dict[str, Any]) -> dict[str, Tensor]:
    groups = state["optimizer"]["param_groups"]
    return {name: state["model"][name] for group in groups for name in group["params"]}


def _publish(work: _Work, temporary: Path, sums: dict[str, str]) -> None:
    unseen = sorted(name for name in sums if not (temporary / name).exists())
    if unseen:
        raise CheckpointError(
            f"rank 0 does not see {unseen[0]}, which another rank has written: path {work.path} "
            "must be on storage that all ranks share"
        )
    folder.write_sums(temporary, sums)
    folder.sync(temporary / folder.SUMS)
    folder.sync(temporary)
    folder.publish(temporary, work.path)
    if work.keep is not None:
        prune(work.path.parent, work.keep)


def _on_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, which the next step leaves alone."""
    return tensor.detach().to("cpu", copy=True)

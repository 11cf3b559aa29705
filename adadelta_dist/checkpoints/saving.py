"""`save_checkpoint`: every rank writes what it owns, and the folder appears when all are done."""

import atexit
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict
from torch.distributed.tensor import DTensor

from .. import collectives, communicators
from ..agreement import agreement
from ..flat_slice import FlatSlice
from ..groups import Group
from . import folder, staging
from .history import prune
from .named_state import group_of, named_state
from .reading import CheckpointError, as_checkpoint_error, load_plain
from .writing import StreamingWriter

_writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adadelta-dist checkpoint")
_in_flight: list[Future[Path]] = []


@dataclass(frozen=True)
class _Work:
    """What a save writes, whoever runs it; `parameters` for their names and shapes."""

    path: Path
    state: dict[str, Any]
    parameters: dict[str, Tensor]
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
        TypeError, ValueError: an optimizer of another kind or of another model; a value, in
            `extra` or elsewhere, that could not be read again; `keep` below 1.
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
    error. Leaving the program waits too; wait before `destroy_process_group`. The copies, this
    rank's share of the checkpoint, stay in host memory for the next save to write over.

    Returns:
        A future whose `result()` waits for the folder, and raises what went wrong.
    """
    group = group_of(optimizer)
    settle()
    work = _prepare(group, path, model, optimizer, extra, keep, copy=True)
    apart = communicators.open_background(group)
    future = _writer.submit(_write_behind, apart, work)
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


atexit.register(settle)  # an error that nobody has asked for is printed, not lost


def _prepare(
    group: Group,
    path: str | PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: Any,
    keep: int | None,
    *,
    copy: bool = False,
) -> _Work:
    """Check everything that can be checked before anything is written. Collective.

    Args:
        copy: whether to have the tensors copied to host memory.
    """
    with agreement(group, "save_checkpoint") as mine:
        path = Path(os.path.abspath(path))
        mine.facts += [f"path={path}", f"keep={keep}"]
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be at least 1, or None to remove nothing; got {keep}")
        if os.path.lexists(path):
            raise FileExistsError(f"path {path} exists: remove it, or give another name")
        whole = named_state(model, optimizer)
        _check_readable(whole)
        named = chain.from_iterable(g["params"] for g in whole["optimizer"]["param_groups"])
        parameters = {name: whole["model"][name] for name in named}
        state = _own_share(whole, parameters.keys(), group)
        packed = None if extra is None else _packed("extra", extra)
        if copy:
            state = staging.copied(state)
        work = _Work(path, state, parameters, packed, type(optimizer).__name__, keep)
    return work


def _own_share(state: dict[str, Any], parameters: Iterable[str], group: Group) -> dict[str, Any]:
    """What this rank writes: its slices, and its part of what is equal on all ranks.

    Parameters and whole optimizer state are dealt out by size. What else the model has, such as
    running statistics, need not be equal, and comes from rank 0.
    """
    entries = state["optimizer"]["state"]
    equal = [(state["model"], name) for name in sorted(parameters)]
    equal += [(entries[name], key) for name in sorted(entries) for key in sorted(entries[name])]
    equal = [(at, key) for at, key in equal if _is_whole(at[key])]
    written_by: dict[tuple[int, str], int] = {}
    loads = [0] * group.world_size
    for at, key in sorted(equal, key=lambda item: -item[0][item[1]].nbytes):
        least = loads.index(min(loads))
        loads[least] += at[key].nbytes
        written_by[id(at), key] = least

    def own(at: dict[str, Any]) -> dict[str, Any]:
        return {
            key: value
            for key, value in at.items()
            if not _is_whole(value) or written_by.get((id(at), key), 0) == group.rank
        }

    shared = {"state": {n: own(e) for n, e in entries.items()}}
    return {"model": own(state["model"]), "optimizer": state["optimizer"] | shared}


def _is_whole(value: Any) -> bool:
    """Whether it is a tensor of which every rank has all, rather than a part or a value."""
    return isinstance(value, Tensor) and not isinstance(value, FlatSlice | DTensor)


def _check_readable(state: dict[str, Any]) -> None:
    """Whether what is no tensor, such as an extra state of a module, will load again."""
    for name, entry in state["optimizer"]["state"].items():
        nested = [key for key, value in entry.items() if isinstance(value, Mapping)]
        if nested:
            raise TypeError(
                f"optimizer state {nested[0]!r} of {name} cannot be saved: it is a mapping. Give "
                "tensors and plain values, each under a key of its own"
            )
    leaves, _ = flatten_state_dict(state)
    _check_keys(state["model"], "model")
    _check_keys(state["optimizer"]["param_groups"], "optimizer.param_groups")
    for key, value in leaves.items():
        if isinstance(value, Tensor) and value.is_quantized:
            raise TypeError(f"{key} cannot be saved: it is quantized. Save its int_repr()")
        if not (isinstance(value, Tensor) or type(value) in (bool, int, float, str)):
            _packed(key, value)


def _check_keys(value: Any, at: str) -> None:
    """Whether all keys are text, as `torch.distributed.checkpoint` would make them."""
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        if not isinstance(key, str):
            raise TypeError(
                f"{at} cannot be saved: its key {key!r} is {type(key).__name__}, and would come "
                "back as text. Use keys of text, or pairs in a tuple"
            )
        _check_keys(inner, f"{at}.{key}")
    for i, inner in enumerate(value) if isinstance(value, list) else ():
        _check_keys(inner, f"{at}.{i}")


def _packed(what: str, value: Any) -> bytes:
    """A value as the bytes of a file, which are known to load again."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        load_plain(io.BytesIO(file.getvalue()), what=what)
    except Exception as error:  # pickling may run into anything
        raise TypeError(f"{what} cannot be saved: {error}. Give tensors and plain values") from None
    return file.getvalue()


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn an error of the file system into a sentence; that `path` exists is one already."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}") from error


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
        # A rank that cannot write its own files must not miss the collectives of the next block.
        with agreement(group, "save_checkpoint"), _disk_errors(work.path):
            written = _write_own(group, work, temporary)
        with agreement(group, "save_checkpoint"), _disk_errors(work.path):
            written += _write_tensors(group, work, temporary)
            for name in written:
                folder.sync(temporary / name)
            sums = folder.sums_of(temporary, written)
        everyones = collectives.all_gather_object(group, sums)
        with agreement(group, "save_checkpoint"), _disk_errors(work.path):
            if group.rank == 0:
                _publish(work, temporary, {k: v for sums in everyones for k, v in sums.items()})
    except BaseException:
        if group.rank == 0:
            folder.discard(temporary)
        raise
    return work.path


def _write_behind(group: Group, work: _Work) -> Path:
    """`_write` of copies, whose memory the next save takes. Collective."""
    try:
        return _write(group, work)
    finally:
        staging.give_back(work.state)


def _write_own(group: Group, work: _Work, temporary: Path) -> list[str]:
    """Write what needs no other rank; returns the files' names."""
    written = []
    if group.rank == 0:
        groups = work.state["optimizer"]["param_groups"]
        folder.write_manifest(
            temporary,
            world_size=group.world_size,
            optimizer=work.optimizer,
            parameters=work.parameters,
            groups=groups,
        )
        written.append(folder.MANIFEST)
    if work.extra is not None:
        name = f"extra-{group.rank}.pt"
        (temporary / name).write_bytes(work.extra)
        written.append(name)
    return written


def _write_tensors(group: Group, work: _Work, temporary: Path) -> list[str]:
    """Write this rank's part of the state; returns the files' names. Collective."""
    with as_checkpoint_error(f"{work.path} could not be written"):
        # Not `save`, which warns where there is no process group: filters of warnings belong to
        # the whole process, and this may be a thread beside training.
        _save_state_dict(
            work.state,
            StreamingWriter(temporary),
            process_group=group.process_group,
            no_dist=group.process_group is None,
        )
    own = [file.name for file in temporary.glob(f"__{group.rank}_*")]
    return [*own, ".metadata"] if group.rank == 0 else own


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
        try:
            prune(work.path, work.keep)
        except OSError as error:
            raise CheckpointError(
                f"{work.path} is complete, but of those before it not all but the newest "
                f"{work.keep} could be removed: {error}"
            ) from error

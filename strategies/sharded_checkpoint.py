"""A checkpoint as a folder, into which every rank writes what it owns.

It is laid out as Lightning's FSDPStrategy does: `torch.distributed.checkpoint` holds "model"
and "optimizer_0", "optimizer_1", ..., the optimizers' state by the names of parameters, and
`meta.pt` holds the rest. `python -m lightning.pytorch.utilities.consolidate_checkpoint` makes
one file of it.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save as write
from torch.utils._pytree import tree_map_only

from adadelta_dist import ShardedAdadelta, groups
from adadelta_dist.agreement import agreement
from adadelta_dist.checkpoints.folder import sync
from adadelta_dist.checkpoints.reading import SafeReader, as_checkpoint_error, read_into
from adadelta_dist.checkpoints.writing import StreamingWriter
from adadelta_dist.groups import Group

_META = "meta.pt"


@dataclass(frozen=True)
class OnDisk:
    """The state of one optimizer, which is read once that optimizer exists."""

    path: Path
    key: str


def is_folder(path: Path) -> bool:
    return (path / _META).is_file()


def save(group: Group, checkpoint: dict[str, Any], path: Path, module: nn.Module) -> None:
    """Write Lightning's checkpoint, whose optimizer states come from `by_name`. Collective.

    The folder appears, or takes the place of an older one, when it is complete. Parameters, which
    are equal, come from whichever rank has least to write; buffers, which need not be, from rank 0.
    """
    rest = dict(checkpoint)
    tensors = rest.pop("state_dict")
    if group.rank != 0:
        equal = dict(module.named_parameters())
        tensors = {name: value for name, value in tensors.items() if name in equal}
    content = {"model": tensors}
    for i, state in enumerate(rest.pop("optimizer_states", ())):
        content[f"optimizer_{i}"] = state
    unfinished = path.with_name(f"{path.name}.unfinished")
    with agreement(group, f"saving {path}"):
        if group.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
    with agreement(group, f"saving {path}"), as_checkpoint_error(f"{path} could not be written"):
        writer = StreamingWriter(unfinished)
        write(content, storage_writer=writer, process_group=group.process_group)
        for file in unfinished.glob(f"__{group.rank}_*"):
            sync(file)
    with agreement(group, f"saving {path}"):
        if group.rank == 0:
            torch.save(rest, unfinished / _META)
            for file in (unfinished / _META, unfinished / ".metadata", unfinished):
                sync(file)
            _replace(unfinished, path)


def load(path: Path, module: nn.Module, *, strict: bool, weights_only: bool) -> dict[str, Any]:
    """Lightning's checkpoint: the model on the CPU, the optimizers as `OnDisk`. Collective.

    Raises:
        ValueError: the checkpoint is of another model, and `strict`.
    """
    group = groups.join(None)
    with agreement(group, f"loading {path}"):
        metadata = _metadata(path)
        saved = {keys[1] for keys in _paths(metadata).values() if keys[0] == "model"}
        own: dict[str, Any] = module.state_dict()
        if strict and saved != own.keys():
            lacks, more = sorted(own.keys() - saved), sorted(saved - own.keys())
            raise ValueError(f"{path} is of another model: it lacks {lacks} and has {more} besides")
        checkpoint: dict[str, Any] = torch.load(
            path / _META, map_location="cpu", weights_only=weights_only
        )
    model = {
        name: torch.empty_like(value, device="cpu") if isinstance(value, Tensor) else value
        for name, value in own.items()
        if name in saved
    }
    read_into({"model": model}, path, process_group=group.process_group)
    checkpoint["state_dict"] = model
    keys = sorted({k[0] for k in _paths(metadata).values() if k[0].startswith("optimizer_")})
    if keys:
        ordered = sorted(keys, key=lambda key: int(key.removeprefix("optimizer_")))
        checkpoint["optimizer_states"] = [OnDisk(path, key) for key in ordered]
    return checkpoint


def by_name(optimizer: ShardedAdadelta, module: nn.Module) -> dict[str, Any]:
    """The optimizer's state dict with the names of the module's parameters as keys."""
    state_dict = optimizer.state_dict()
    known = {p: name for name, p in module.named_parameters()}
    ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    names = {i: known.get(p, f"parameter {i}") for i, p in zip(ids, params, strict=True)}
    return {
        "state": {names[i]: entry for i, entry in state_dict["state"].items()},
        "param_groups": [
            group | {"params": [names[i] for i in group["params"]]}
            for group in state_dict["param_groups"]
        ],
    }


def load_optimizer(saved: OnDisk, optimizer: ShardedAdadelta, module: nn.Module) -> None:
    """Read what this rank owns, at whatever world size it was saved. Collective.

    Raises:
        ValueError: the saved groups have other parameters, or masters that would be dropped.
    """
    with agreement(optimizer._group, f"loading {saved.path}"):
        metadata = _metadata(saved.path)
        own = by_name(optimizer, module)
        there = _empty_groups(metadata, saved.key)
        paths = [keys for keys in _paths(metadata).values() if keys[:2] == (saved.key, "state")]
        kinds: dict[Any, set[Any]] = {}
        for _, _, name, *kind in paths:
            kinds.setdefault(name, set()).update(kind[:1])
        state = {
            name: {kind: value for kind, value in entry.items() if kind in kinds[name]}
            for name, entry in own["state"].items()
            if name in kinds
        }
        if dropped := [n for n, entry in state.items() if "master" in kinds[n] - entry.keys()]:
            raise ValueError(
                f"{saved.path}: the master of {dropped[0]} would be dropped: this model has it in "
                "full precision. Train with the precision it was saved with, or convert it"
            )
    state = tree_map_only(Tensor, partial(torch.zeros_like, device="cpu"), state)  # not in place
    content = {saved.key: {"state": state, "param_groups": there}}
    read_into(content, saved.path, process_group=optimizer._group.process_group)
    here = [group["params"] for group in own["param_groups"]]
    theirs = [group["params"] for group in there]
    if list(map(sorted, here)) != list(map(sorted, theirs)):
        raise ValueError(
            f"{saved.path}: {saved.key} has the parameter groups {theirs}, and this model {here}"
        )
    ordered = [group | {"params": params} for group, params in zip(there, here, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": ordered})


def remove(path: Path) -> None:
    """Remove such a folder, or a link to one, if there is one."""
    if path.is_symlink() and is_folder(path):
        path.unlink()
    elif is_folder(path):
        shutil.rmtree(path)


def _replace(new: Path, path: Path) -> None:
    """Put the folder `new` in the place of what `path` names now, a folder, file or nothing."""
    old = path.with_name(f"{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.is_dir() and not path.is_symlink():
        path.rename(old)
    else:
        path.unlink(missing_ok=True)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _metadata(path: Path) -> Metadata:
    return SafeReader(path).read_metadata()


def _paths(metadata: Metadata) -> Mapping[str, tuple[Any, ...]]:
    """Where each flat key was in the nested dict."""
    paths: Mapping[str, tuple[Any, ...]] = metadata.planner_data
    return paths


def _empty_groups(metadata: Metadata, key: str) -> list[dict[str, Any]]:
    """The saved parameter groups, with places for their values."""
    groups: dict[int, dict[str, Any]] = {}
    for flat, keys in _paths(metadata).items():
        if keys[:2] == (key, "param_groups"):
            stored = metadata.state_dict_metadata[flat]
            place = None
            if isinstance(stored, TensorStorageMetadata):
                place = torch.empty(stored.size, dtype=stored.properties.dtype, device="cpu")
            groups.setdefault(keys[2], {})[keys[3]] = place
    return [groups[i] for i in sorted(groups)]

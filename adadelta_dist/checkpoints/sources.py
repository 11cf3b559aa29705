"""The content of a checkpoint from where it is stored, read value by value."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from .content import (
    Content,
    Value,
    flatten,
    optimizer_root,
    parse_optimizer,
    take_model,
    take_optimizer,
)
from .reading import SafeLoadPlanner, SafeReader, load_plain


def read(path: Path) -> Content:
    """The content of a checkpoint of whatever form.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no checkpoint, damaged, or holds code.
    """
    if path.is_dir() and not (path / ".metadata").exists():
        raise ValueError(f"{path} is not a checkpoint: it has no .metadata")
    try:
        return read_dcp(path) if path.is_dir() else read_torch(path)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} holds no state dicts as torch writes them ({reason})") from error


def is_deepspeed(path: Path) -> bool:
    """Whether it is a folder of DeepSpeed's: of a tag, above the tags, or universal."""
    return (path / "latest").is_file() or any(path.glob("*mp_rank_*_model_states.pt"))


def read_dcp(path: Path) -> Content:
    """The content of a folder of `torch.distributed.checkpoint`, ours or not.

    Only what tells its groups is read at once.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged, or holds code, or several optimizers.
    """
    reader = SafeReader(path)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, True)
    # Paths come in the state dict's order. The metadata's own order depends on which rank wrote
    # what, and optimizers load their state by order.
    paths = dict(metadata.planner_data or {})
    for key in metadata.state_dict_metadata:
        paths.setdefault(key, (key,))
    values = {tuple(at): _stored(reader, metadata, key) for key, at in paths.items()}
    optimizer, rest = take_optimizer(values, optimizer_root(values))
    state, groups, named = parse_optimizer(optimizer)
    model, others = take_model(rest, (name for group in groups for name in group["params"]))
    return Content(model, state, groups, named, others, _extra(path))


def read_torch(path: Path) -> Content:
    """The content of a file of `torch.save`; its tensors stay in the file until they are read.

    It holds {"model": ..., "optimizer": ...}, or either's state dict alone. What else it
    holds becomes the `extra` of rank 0.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged, holds code, or no state dict.
    """
    loaded = load_plain(path, mmap=True)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, wanted a dict of state dicts")
    if {"state", "param_groups"} <= loaded.keys():
        loaded = {"optimizer": loaded}
    elif loaded and all(isinstance(value, Tensor) for value in loaded.values()):
        loaded = {"model": loaded}
    others = {key: value for key, value in loaded.items() if key not in ("model", "optimizer")}
    if len(others) == len(loaded):
        raise ValueError(f"{path} holds {sorted(map(str, others))}, wanted 'model', 'optimizer'")
    model = {name: _held(value) for name, value in loaded.get("model", {}).items()}
    optimizer = flatten(loaded.get("optimizer", {}))
    state, groups, named = parse_optimizer({at: _held(v) for at, v in optimizer.items()})
    extra = others.get("extra")
    if len(others) != 1 or not isinstance(extra, Mapping) or any(type(r) is not int for r in extra):
        extra = {0: others} if others else {}
    by_rank = {rank: _held(value) for rank, value in extra.items()}
    return Content(model, state, groups, named, extra=by_rank)


def _stored(reader: SafeReader, metadata: Metadata, key: str) -> Value:
    meta, read = metadata.state_dict_metadata[key], partial(_load, reader, metadata, key)
    if isinstance(meta, TensorStorageMetadata):
        return Value(read, tuple(meta.size), meta.properties.dtype)
    return Value(read)


def _load(reader: SafeReader, metadata: Metadata, key: str) -> Any:
    meta = metadata.state_dict_metadata[key]
    into: dict[str, Any] = {key: None}
    planner = SafeLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        if isinstance(meta, TensorStorageMetadata):
            into[key] = torch.empty(meta.size, dtype=meta.properties.dtype, device="cpu")
        planner.set_up_planner(into, metadata, True)
        reader.read_data(create_default_local_load_plan(into, metadata), planner).wait()
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"{reader.path} is damaged: {type(error).__name__}: {error}") from error
    return into[key]


def _extra(folder: Path) -> dict[int, Value]:
    files = {file.stem.removeprefix("extra-"): file for file in folder.glob("extra-*.pt")}
    ranks = sorted((int(rank), file) for rank, file in files.items() if rank.isdecimal())
    return {rank: Value(partial(load_plain, file)) for rank, file in ranks}


def _same(value: Any) -> Any:
    return value


def _held(value: Any) -> Value:
    """A value that is in memory, or mapped from a file, already."""
    if isinstance(value, Tensor):
        return Value(partial(_same, value), tuple(value.shape), value.dtype)
    return Value(partial(_same, value))

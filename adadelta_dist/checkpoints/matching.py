"""What of a checkpoint fits a model and an optimizer, found before any tensor is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX
from torch.optim.optimizer import _get_scalar_dtype
from torch.utils._pytree import tree_map_only

from ..functional import ACCUMULATORS
from .content import foreign_state
from .reading import SafeReader
from .sources import read

_MODEL, _STATE, _GROUPS = "model.", "optimizer.state.", "optimizer.param_groups"

Groups = list[dict[str, Any]]
Saved = dict[str, Any]
"""DCP's metadata by key."""


@dataclass(frozen=True)
class Match:
    """What to read of a checkpoint, and what comes of it.

    Args:
        target: `{"model": ..., "optimizer": {"state": ...}}` by name, tensors in host memory
            for `torch.distributed.checkpoint.load` to fill.
        optimizer: `{"state", "param_groups"}` by name, to be loaded afterwards: tensors of
            `target`, and current ones where the checkpoint has none that fit. A parameter that
            was saved without state has none: it begins anew.
        skipped: a line for whatever does not match.
    """

    target: dict[str, Any]
    optimizer: dict[str, Any]
    skipped: tuple[str, ...]


def match(source: Path, current: Mapping[str, Any]) -> Match:
    """Compare a checkpoint with what is there.

    Args:
        source: its folder.
        current: `named_state` of model and optimizer.

    Raises:
        ValueError: the checkpoint holds no state of Adadelta under parameters' names.
    """
    metadata = SafeReader(source).read_metadata()
    saved = metadata.state_dict_metadata
    groups = _read_groups(source, saved)
    skipped: list[str] = []
    tensors = current["model"] | _extra_states(metadata, current["model"])
    model = _match_model(saved, tensors, skipped)
    read = _match_state(saved, groups, current, skipped)
    state = _kept(groups, current["optimizer"], saved) | read
    merged = _match_groups(groups, current["optimizer"]["param_groups"], skipped)
    return Match(
        {"model": model, "optimizer": {"state": read}},
        {"state": state, "param_groups": merged},
        tuple(skipped),
    )


def _extra_states(metadata: Metadata, model: Mapping[str, Any]) -> dict[str, Any]:
    """Room for extra states of modules that were saved in another structure than they have now.

    What a module returned from `get_extra_state` goes to `set_extra_state` as it was, be it
    longer by now or with other keys; but that mappings were empty is not in the checkpoint.
    """
    saved = metadata.state_dict_metadata
    states: dict[str, Any] = {}
    keys: dict[str, set[str]] = {}
    for key, path in (metadata.planner_data or {}).items():
        root, name = (*path, "")[:2]
        if root == "model" and name in model and str(name).endswith(_EXTRA_STATE_KEY_SUFFIX):
            meta, room = saved[key], None
            if isinstance(meta, TensorStorageMetadata):
                room = torch.empty(meta.size, dtype=meta.properties.dtype, device="cpu")
            set_element(states, path[1:], room)
            keys.setdefault(name, set()).add(key)

    def has_changed(name: str) -> bool:
        now, _ = flatten_state_dict({_MODEL + name: model[name]})
        return now.keys() != keys[name] or any(_difference(saved[k], v) for k, v in now.items())

    return {name: state for name, state in states.items() if has_changed(name)}


def _match_model(saved: Saved, tensors: Mapping[str, Any], skipped: list[str]) -> dict[str, Any]:
    target: dict[str, Any] = {}
    known: set[str] = set()
    for name, value in tensors.items():
        leaves, _ = flatten_state_dict({_MODEL + name: value})
        known |= leaves.keys()
        problems = [_difference(saved.get(key), leaf) for key, leaf in leaves.items()]
        if any(problems):
            skipped.append(f"{name} {next(filter(None, problems))}")
        else:
            target[name] = _empty_like(value)
    strangers = [key for key in saved if key.startswith(_MODEL) and key not in known]
    skipped += [f"{key.removeprefix(_MODEL)} is in the checkpoint alone" for key in strangers]
    return target


def _match_state(
    saved: Saved, groups: Groups, current: Mapping[str, Any], skipped: list[str]
) -> dict[str, dict[str, Tensor]]:
    """Tensors to read the state of each parameter into."""
    target: dict[str, dict[str, Tensor]] = {}
    keys = _state_keys(saved)
    own, theirs = _names(current["optimizer"]["param_groups"]), _names(groups)
    for name in own:
        p, entry = current["model"][name], current["optimizer"]["state"].get(name, {})
        if name not in theirs:
            skipped.append(f"optimizer state of {name} is not in the checkpoint")
            continue
        unknown = keys.get(name, set()) - {"step", *ACCUMULATORS, *entry}
        skipped += [f"{key} of {name} is in the checkpoint alone" for key in sorted(unknown)]
        fresh = dict.fromkeys(ACCUMULATORS, p) | {
            "step": torch.zeros((), dtype=_get_scalar_dtype(), device="cpu")
        }
        wanted = {
            key: _empty_like((fresh | entry)[key])
            for key in sorted(keys.get(name, set()) - unknown)
        }
        problems = [
            f"{key} of {name} {problem}"
            for key, tensor in wanted.items()
            if (problem := _difference(saved[f"{_STATE}{name}.{key}"], tensor))
        ]
        skipped += problems
        if wanted and not problems:
            target[name] = wanted
    strangers = [name for name in theirs if name not in own]
    skipped += [f"optimizer state of {name} is in the checkpoint alone" for name in strangers]
    return target


def _kept(groups: Groups, optimizer: Mapping[str, Any], saved: Saved) -> dict[str, Any]:
    """Current state of the parameters that the checkpoint lacks, or has with state unfit."""
    without_state = set(_names(groups)) - _state_keys(saved).keys()
    return {n: entry for n, entry in optimizer["state"].items() if n not in without_state}


def _match_groups(groups: Groups, current: Groups, skipped: list[str]) -> Groups:
    """The current groups with the hyperparameters of the saved ones of the same parameters."""
    if len(groups) != len(current):
        skipped.append(
            f"the checkpoint has {len(groups)} parameter groups, the optimizer {len(current)}"
        )
    by_params = {frozenset(group["params"]): group for group in groups}
    merged = []
    for g, group in enumerate(current):
        found = by_params.get(frozenset(group["params"]))
        if found is None:
            skipped.append(f"no group of the checkpoint has the parameters of group {g}")
        own = {key: group[key] for key in ("params", "param_names")}
        new = {key: _like(value, group.get(key)) for key, value in (found or {}).items()}
        merged.append(group | new | own)
    return merged


def _like(value: Any, current: Any) -> Any:
    """A Tensor hyperparameter where the current one is, and learned if that is."""
    if isinstance(value, Tensor) and isinstance(current, Tensor):
        return value.to(current.device).requires_grad_(current.requires_grad)
    return value


def _state_keys(saved: Saved) -> dict[str, set[str]]:
    """What state was saved of which parameter."""
    keys: dict[str, set[str]] = {}
    for key in saved:
        if key.startswith(_STATE):
            name, _, kind = key.removeprefix(_STATE).rpartition(".")
            keys.setdefault(name, set()).add(kind)
    return keys


def _read_groups(source: Path, saved: Saved) -> Groups:
    """The saved parameter groups.

    Raises:
        ValueError: there are none where `save_checkpoint` puts them, or of another optimizer.
    """
    content = read(source)
    if foreign := foreign_state(content):
        raise ValueError(
            f"{source} is of another optimizer: this holds {foreign}; Adadelta's is "
            f"{', '.join(ACCUMULATORS)}"
        )
    if not any(key.startswith(_GROUPS) for key in saved):
        raise ValueError(
            f"{source} has no optimizer.param_groups: save "
            '{"model": ..., "optimizer": ...}, or use adadelta-dist convert'
        )
    return [dict(group) for group in content.groups]


def _names(groups: Sequence[Mapping[str, Any]]) -> dict[str, None]:
    return dict.fromkeys(name for group in groups for name in group["params"])


def _difference(saved: Any, value: Any) -> str | None:
    if saved is None:
        return "is not in the checkpoint"
    if isinstance(saved, TensorStorageMetadata) != isinstance(value, Tensor):
        return "is a tensor on one side only"
    if not isinstance(value, Tensor):
        return None
    if tuple(saved.size) != tuple(value.shape):
        return f"has shape {tuple(saved.size)} in the checkpoint, {tuple(value.shape)} here"
    if value.layout == torch.strided and any(
        n > 1 and step == 0 for n, step in zip(value.shape, value.stride(), strict=True)
    ):
        return "is expanded here, so that its elements share memory and cannot be loaded"
    if saved.properties.dtype.is_complex != value.is_complex():
        kinds = ("real", "complex") if value.is_complex() else ("complex", "real")
        return f"is {kinds[0]} in the checkpoint, {kinds[1]} here"
    return None


def _empty_like(value: Any) -> Any:
    """Memory to read tensors into; values that are none are replaced by what is read."""
    return tree_map_only(Tensor, lambda tensor: torch.zeros_like(tensor, device="cpu"), value)

"""What must be equal on every rank, as lines of text that a message can quote."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .functional import HYPERPARAMETERS
from .layout import storage_order

ParamGroup = Mapping[str, Any]


def named(g: int, group: ParamGroup) -> list[tuple[str, Tensor]]:
    """The parameters of group `g`, each once, with a name for messages."""
    unique = list(dict.fromkeys(group["params"]))
    given = dict(zip(group["params"], group.get("param_names", ()), strict=False))
    return [(given.get(p, f"parameter {i} of group {g}"), p) for i, p in enumerate(unique)]


def facts(groups: Sequence[ParamGroup], first: int = 0) -> list[str]:
    """What must be equal on every rank, a line each; `first` is the index of groups[0]."""
    parameters = [
        f"{name}: {tuple(p.shape)}, {p.dtype}, {p.device.type}, "
        f"memory order {storage_order(p.shape, p.stride())}"
        for g, group in enumerate(groups, first)
        for name, p in named(g, group)
    ]
    return [*parameters, *hyperparameters(groups, first)]


def hyperparameters(groups: Sequence[ParamGroup], first: int = 0) -> list[str]:
    return [
        f"group {g}: {name}={plain(group[name])}"
        for g, group in enumerate(groups, first)
        for name in HYPERPARAMETERS
    ]


def plain(value: Any) -> Any:
    """A value to compare between ranks; a tensor on an accelerator is not waited for."""
    if isinstance(value, Tensor):
        return value.item() if value.device.type == "cpu" else "a tensor"
    return float(value)

"""What must be equal on every rank, as lines of text that a message can quote."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .functional import HYPERPARAMETERS
from .layout import storage_order

ParamGroup = Mapping[str, Any]


def named(g: int, group: dict[str, Any]) -> dict[str, Tensor]:
    """The group's parameters by name, each once."""
    unique = list(dict.fromkeys(group["params"]))
    given = dict(zip(group["params"], group.get("param_names", ()), strict=False))
    return {given.get(p, f"parameter {i} of group {g}"): p for i, p in enumerate(unique)}


def facts(groups: Sequence[dict[str, Any]]) -> list[str]:
    """What must be equal on every rank, a line each."""
    parameters = [
        f"{name}: {tuple(p.shape)}, {p.dtype}, {p.device.type}, "
        f"memory order {storage_order(p.shape, p.stride())}"
        for g, group in enumerate(groups)
        for name, p in named(g, group).items()
    ]
    return [*parameters, *hyperparameters(groups)]


def hyperparameters(groups: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"group {g}: {name}={plain(group[name])}"
        for g, group in enumerate(groups)
        for name in HYPERPARAMETERS
    ]


def plain(value: Any) -> Any:
    """A value to compare between ranks; a tensor on an accelerator is not waited for."""
    if isinstance(value, Tensor):
        return value.item() if value.device.type == "cpu" else "a tensor"
    return float(value)

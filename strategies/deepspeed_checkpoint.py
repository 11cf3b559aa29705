"""A checkpoint between the forms: DeepSpeed's, its universal one, and torch's own.

Beside tensors DeepSpeed stores plain data and objects of four classes of its own
(`SAFE_CLASSES`). Its files are read with `weights_only=True`, these four allowed.
"""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from adadelta_dist.functional import ACCUMULATORS
from adadelta_dist.state import MASTER

from .deepspeed_state import UNIVERSAL

SAFE_CLASSES = [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
"""What DeepSpeed's files may hold besides tensors and plain data."""


@dataclass(frozen=True)
class Checkpoint:
    """Model and Adadelta's state, by parameter name; no tensor is copied before it is read.

    Args:
        shapes: of every parameter that the optimizer has, in the model's names.
        groups: hyperparameters of each group, with the names of its parameters in "params".
        read: whole fp32 tensor of a parameter: `read(name, "fp32")`, or one of `ACCUMULATORS`.
        step: how many steps were taken.
        rest: what else the model has: buffers, frozen parameters, second names of tied ones.
        engine: what DeepSpeed's engine keeps: its counters, the scheduler, the client's state.
        scaler: what its optimizer keeps beside the state: the loss scale.
    """

    shapes: dict[str, torch.Size]
    groups: list[dict[str, Any]]
    read: Callable[[str, str], Tensor]
    step: float
    rest: dict[str, Tensor] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


def load(path: Path) -> Any:
    """What a file of DeepSpeed holds, mapped into memory, with `weights_only=True`.

    Raises:
        ValueError: the file is damaged, or holds objects of another class.
    """
    try:
        with torch.serialization.safe_globals(SAFE_CLASSES):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("GLOBAL ")[2].partition(" ")[0] or "something unreadable"
        raise ValueError(
            f"{path} holds {reason}, and only tensors, plain data and DeepSpeed's own "
            f"{', '.join(c.__name__ for c in SAFE_CLASSES)} are read. Keep other objects out of "
            "client_state."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged, or not a file of torch.save: {error}") from error


def to_torch(checkpoint: Checkpoint) -> dict[str, Any]:
    """{"model": state dict, "optimizer": state dict of `torch.optim.Adadelta`} with names.

    Parameters are DeepSpeed's fp32 masters, whatever the model computes in.
    """
    model = {name: checkpoint.read(name, "fp32") for name in checkpoint.shapes} | checkpoint.rest
    groups: list[dict[str, Any]] = []
    state: dict[int, dict[str, Tensor]] = {}
    for group in checkpoint.groups:
        first = len(state)
        for name in group["params"]:
            values = {key: checkpoint.read(name, key) for key in ACCUMULATORS}
            state[len(state)] = {"step": torch.tensor(checkpoint.step), **values}
        ids = list(range(first, len(state)))
        groups.append(group | {"params": ids, "param_names": list(group["params"])})
    return {"model": model, "optimizer": {"state": state, "param_groups": groups}}


def from_torch(model: dict[str, Tensor], optimizer: dict[str, Any]) -> Checkpoint:
    """A checkpoint of torch's form.

    Args:
        model: state dict of the module.
        optimizer: state dict of Adadelta, with "param_names" in each group, or with
            names for ids (as `torch.distributed.checkpoint.state_dict` makes them).

    Raises:
        ValueError: no names, names or shapes that the model lacks, another optimizer's
            state, or parameters at different steps.
    """
    groups: list[dict[str, Any]] = []
    entries: dict[str, dict[str, Any]] = {}
    for group in optimizer["param_groups"]:
        names = group.get("param_names", group["params"])
        if not all(isinstance(name, str) for name in names):
            raise ValueError(
                "the optimizer's state dict does not name its parameters. Build the optimizer with "
                "model.named_parameters(), so that its groups have param_names."
            )
        entries |= {
            name: optimizer["state"].get(key, {})
            for name, key in zip(names, group["params"], strict=True)
        }
        hyper = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        groups.append(hyper | {"params": list(names)})
    check_adadelta(groups, entries)
    strangers = [name for name in entries if name not in model]
    if strangers:
        raise ValueError(f"the optimizer has {strangers[0]!r}, which the model lacks")
    # Frozen parameters have no state, or zeros; DeepSpeed keeps one step for all.
    used = {name: float(e["step"]) for name, e in entries.items() if e and float(e["step"])}
    step = one_step(used)

    def read(name: str, key: str) -> Tensor:
        whole = model[name].detach().float()
        if key == "fp32":  # a half-precision parameter is its master rounded
            key, default = MASTER, whole
        else:
            default = torch.zeros_like(whole)
        tensor: Tensor = entries[name].get(key, default)
        return tensor.float()

    for name in entries:
        for key in ("fp32", *ACCUMULATORS):
            if read(name, key).shape != model[name].shape:
                raise ValueError(f"{key} of {name!r} has another shape than the parameter")
    rest = {name: tensor for name, tensor in model.items() if name not in entries}
    return Checkpoint({n: model[n].shape for n in entries}, groups, read, step, rest)


def check_adadelta(
    groups: Sequence[dict[str, Any]], entries: dict[Any, dict[str, Any]] | None = None
) -> None:
    """Whether this is Adadelta's state, under torch's names or a universal checkpoint's.

    Raises:
        ValueError: it is not.
    """
    for group in groups:
        if "rho" not in group or "betas" in group or "momentum" in group:
            raise ValueError(
                "the checkpoint holds the state of another optimizer than Adadelta: its groups "
                f"have {', '.join(sorted(k for k in group if k != 'params'))}"
            )
    for name, entry in (entries or {}).items():
        if entry and not all(key in entry or UNIVERSAL[key] in entry for key in ACCUMULATORS):
            raise ValueError(f"the state of {name!r} holds {sorted(entry)}: it is not Adadelta's")


def one_step(steps: dict[str, float]) -> float:
    """The step that all have in common.

    Raises:
        ValueError: they differ.
    """
    if len(set(steps.values())) > 1:
        low, high = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
        raise ValueError(
            f"mixed steps: {low} is at step {steps[low]:g}, {high} at {steps[high]:g}. DeepSpeed "
            "keeps one step for all; shards of different checkpoints do not fit together."
        )
    return next(iter(steps.values()), 0.0)

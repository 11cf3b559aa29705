"""The state of model and optimizer under the parameters' names, as checkpoints hold it.

    {"model": {name: tensor}, "optimizer": {"state": {name: {"step": ..., ...}},
                                            "param_groups": [{"params": [names], ...}]}}

It is the form of `torch.distributed.checkpoint.state_dict.get_state_dict`. That function
itself steps an optimizer without state, hooks and all, and its counterpart drops the state of
frozen parameters; this one reads only.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import _get_fqns, get_model_state_dict

from .. import groups
from ..groups import Group
from ..state_dicts import StateDicts


def group_of(optimizer: torch.optim.Optimizer) -> Group:
    """The ranks that save and load together: a sharded optimizer's own, else all of the job.

    Raises:
        TypeError: not an Adadelta.
        ValueError: replicas that are not all of the job.
    """
    if not isinstance(optimizer, torch.optim.Adadelta):
        raise TypeError(
            f"optimizer is {type(optimizer).__module__}.{type(optimizer).__qualname__}, wanted "
            "ShardedAdadelta, Adadelta or torch.optim.Adadelta. A wrapped optimizer is unwrapped "
            "first; ZeroRedundancyOptimizer's consolidated state dict loads by load_state_dict."
        )
    if not isinstance(optimizer, StateDicts):
        return groups.join(None)
    group = optimizer._group
    if group.replicas is None:
        return group
    world = groups.join(None)
    if group.world_size * group.replicas.world_size != world.world_size:
        raise ValueError(
            f"optimizer: {group.replicas.world_size} replicas of {group.world_size} shards are not "
            f"the {world.world_size} ranks of the job. Save what state_dict() returns with "
            "torch.distributed.checkpoint, and a process group of those ranks."
        )
    return world


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """State dicts of both, by name; tensors are those of model and optimizer, not copies.

    Raises:
        ValueError: the optimizer has a parameter that the model lacks; the model is on the
            meta device.
    """
    tensors = get_model_state_dict(model)
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.is_meta:
            raise ValueError(
                f"{name} is on the meta device, without values: call model.to_empty(device=...) "
                "before the optimizer is built"
            )
    names = named_groups(model, optimizer, tensors.keys())
    # Not the optimizer's own method, which may give a consolidated whole on one rank.
    own = torch.optim.Optimizer.state_dict(optimizer)
    by_id = dict(zip(_ids(own["param_groups"]), chain.from_iterable(names), strict=True))
    state = {by_id[i]: entry for i, entry in own["state"].items()}
    # Whoever reads it with a state dict that has `param_names` wants them to be there.
    named = [
        {key: _plain(value) for key, value in group.items()}
        | {"params": list(n), "param_names": list(n)}
        for group, n in zip(own["param_groups"], names, strict=True)
    ]
    return {"model": tensors, "optimizer": {"state": state, "param_groups": named}}


def optimizer_state_dict(named: dict[str, Any]) -> dict[str, Any]:
    """`{"state", "param_groups"}` by name as `Optimizer.load_state_dict` takes it: by number."""
    numbers = {n: i for i, n in enumerate(_ids(named["param_groups"]))}
    numbered_groups = []
    for group in named["param_groups"]:
        numbered = group | {"params": [numbers[name] for name in group["params"]]}
        del numbered["param_names"]  # the optimizer keeps its own, if it has any
        numbered_groups.append(numbered)
    state = {numbers[name]: entry for name, entry in named["state"].items()}
    return {"state": state, "param_groups": numbered_groups}


def named_groups(
    model: nn.Module, optimizer: torch.optim.Optimizer, keys: Sequence[str] | Any
) -> list[list[str]]:
    """The names of the optimizer's parameters, by group.

    Args:
        keys: of the model's state dict: names without the prefixes of wrappers.
    """
    # As the state dict's own keys were made: a child may be called like a wrapper's prefix.
    names = {p: next(iter(_get_fqns(model, name))) for name, p in model.named_parameters()}
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            if names.get(p) not in keys:
                raise ValueError(
                    f"parameter {i} of group {g}, of shape {tuple(p.shape)}, is in the optimizer "
                    "and not in the model: pass the model that the optimizer was built with"
                )
    return [[names[p] for p in group["params"]] for group in optimizer.param_groups]


def _plain(value: Any) -> Any:
    """A number of numpy, as schedules make them, as Python's own: no code is needed to read it."""
    return value.item() if isinstance(value, np.generic) else value


def _ids(groups: Sequence[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(group["params"] for group in groups))

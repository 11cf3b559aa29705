"""Clip averaged gradients, wherever they are."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adadelta_dist import ShardedAdadelta, ShardPolicy
from adadelta_dist.scaling import is_nonfinite


def clip_grad_value_(optimizer: Optimizer, clip_value: float, *, scaled: bool = False) -> None:
    """Clamp the averaged gradients to [-clip_value, clip_value]. Collective.

    As `torch.nn.utils.clip_grad_value_` in one process. With more ranks only the averaged
    shards are clamped; `p.grad` stays the local gradient. Where steps of gradients that are not
    finite are skipped, these stay so: an inf that was clamped would be stepped with.

    Args:
        scaled: a `GradScaler` skips such steps, and has not looked at these gradients yet.
    """
    policy = optimizer._policy if isinstance(optimizer, ShardedAdadelta) else ShardPolicy()
    skips = scaled or policy.skip_nonfinite
    if not isinstance(optimizer, ShardedAdadelta) or (
        optimizer._group.world_size == 1 and policy.stage == 1
    ):
        grads = (p.grad for p in parameters(optimizer) if p.grad is not None)
        if not (skips and is_nonfinite(grads)):
            torch.nn.utils.clip_grad_value_(parameters(optimizer), clip_value)
        return
    reducer = optimizer._reducer
    reducer.begin_clip()
    optimizer._reduce(f"clip_grad_value_({clip_value})", None)
    reducer.end_clip()
    for bucket in reducer.buckets:
        bucket.wait()
        if not (skips and is_nonfinite([bucket.grad_shard])):
            bucket.grad_shard.clamp_(-clip_value, clip_value)


def scale_of(optimizer: Optimizer, scaler: Any) -> float:
    """What gradients are multiplied by when they are clipped.

    Args:
        scaler: a `torch.amp.GradScaler`, or None. At several ranks `step` unscales, after this.
    """
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())


def parameters(optimizer: Optimizer) -> Iterable[Tensor]:
    """All parameters, group by group."""
    return (p for group in optimizer.param_groups for p in group["params"])

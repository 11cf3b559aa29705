"""`differentiable=True` with a learning rate or weight decay that is learned itself.

torch's step scales by them as numbers: through it gradients reach parameters and gradients,
and a Tensor that requires one is a TypeError. Here they reach `lr` and `weight_decay` too.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from . import functional


def wanted(group: Mapping[str, Any]) -> bool:
    """Whether gradients are to flow into hyperparameters of this group."""
    return group["differentiable"] and any(map(_flows, (group["lr"], group["weight_decay"])))


def eager_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    square_avgs: Sequence[Tensor],
    acc_deltas: Sequence[Tensor],
    steps: Sequence[Tensor],
    group: Mapping[str, Any],
) -> None:
    """`functional.eager_`, bit by bit, as a function of `lr` and `weight_decay` as well.

    torch's own step is asked for the updates alone; both scaled sums are taken here.
    """
    signed = [-grad if group["maximize"] else grad for grad in grads]
    pairs = zip(signed, params, strict=True)
    decayed = [_scaled_sum(grad, p, group["weight_decay"]) for grad, p in pairs]
    updates = [torch.zeros_like(p) for p in params]
    bare = {**group, "lr": -1.0, "weight_decay": 0.0, "maximize": False}
    functional.eager_(updates, decayed, square_avgs, acc_deltas, steps, bare)
    for p, update in zip(params, updates, strict=True):
        p.copy_(_scaled_sum(p, update, -group["lr"]))


def _flows(value: float | Tensor) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.requires_grad


def _scaled_sum(x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    if _flows(scale):
        kept = y.clone()  # of a parameter, which the step overwrites
        return _ScaledSum.apply(x, kept, scale.reshape(()))  # type: ignore[no-any-return, no-untyped-call]
    return x if scale == 0 else x.add(y, alpha=scale)  # type: ignore[arg-type]


class _ScaledSum(torch.autograd.Function):
    """`x.add(y, alpha=scale)`, rounded as that is, with a gradient of the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(y, scale)
        return x.add(y, alpha=scale.item())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, scale = ctx.saved_tensors
        return grads[0], grads[0] * scale, (grads[0] * y.conj()).sum().real.to(scale)

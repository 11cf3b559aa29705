"""`differentiable=True` on several ranks: an average that gradients flow through.

Nothing is sharded then: every rank takes the whole step, in torch's own functional form, on
averaged gradients. What flows back through the average is summed over the ranks, so the
objective is the sum of all ranks' losses. Of what every rank has a copy (what parameters began
with, a learned `lr`), each rank's derivative is with respect to its own copy: add them up.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import collectives, fingerprint, scaling
from .agreement import agreement
from .groups import Group
from .memory import flatten


class _Average(torch.autograd.Function):
    """The mean over the ranks; its gradient is the mean of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return collectives.average(group, flat)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Average.apply(grads[0].contiguous(), ctx.group), None  # type: ignore[no-untyped-call]


@contextmanager
def averaged_grads(optimizer: Optimizer, group: Group) -> Iterator[None]:
    """Within it `p.grad` is the average over the ranks, and a function of it. Collective.

    A gradient that some rank has counts as zero where it is missing.

    Raises:
        RankError: the ranks have other hyperparameters.
        RuntimeError: a gradient is sparse, or scaled.
    """
    param_groups = optimizer.param_groups
    params = [p for param_group in param_groups for p in dict.fromkeys(param_group["params"])]
    with warnings.catch_warnings():  # parameters are functions of others here, not leaves
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not")
        own = [p.grad for p in params]
    with agreement(group, "ShardedAdadelta.step") as mine:
        mine.facts.extend(fingerprint.hyperparameters(param_groups))
        if any(grad is not None and grad.layout != torch.strided for grad in own):
            raise RuntimeError("Adadelta does not support sparse gradients")
        if scaling.is_scaled(optimizer):
            raise RuntimeError(
                "differentiable=True on several ranks under a GradScaler, which changes gradients "
                "in place and skips steps. Train in float32 or bfloat16, which need none."
            )
    flags = [grad is not None for grad in own]
    here = torch.tensor(flags, dtype=torch.uint8, device="cpu")
    anywhere = collectives.combine(group, here, "max").tolist()
    grad_of = dict(zip(params, own, strict=True))
    present = [p for p, there in zip(params, anywhere, strict=True) if there]
    kinds: dict[Any, list[Tensor]] = {}
    for p in present:
        kinds.setdefault((p.dtype, p.device), []).append(p)
    try:
        for alike in kinds.values():  # one average a kind: backward meets it once on each rank
            grads = [torch.zeros_like(p) if (g := grad_of[p]) is None else g for p in alike]
            order = [tuple(range(grad.dim())) for grad in grads]
            flat = torch.cat([flatten(g, o) for g, o in zip(grads, order, strict=True)])
            whole: Tensor = _Average.apply(flat, group)  # type: ignore[no-untyped-call]
            pieces = whole.split([g.numel() * (2 if g.is_complex() else 1) for g in grads])
            for p, piece in zip(alike, pieces, strict=True):
                typed = torch.view_as_complex(piece.view(-1, 2)) if p.is_complex() else piece
                p.grad = typed.view(p.shape)
        yield
    finally:
        for p, grad in zip(params, own, strict=True):
            p.grad = grad

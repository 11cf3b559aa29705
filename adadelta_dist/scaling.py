"""Gradients that were scaled, and steps that are skipped: on every rank, or on none.

`torch.amp.GradScaler` looks at the gradients of its own rank. It calls a `step` that
declares `_step_supports_amp_scaling` whatever it has seen, and leaves two attributes for
it: `grad_scale` (None after `unscale_`) and `found_inf`. Here the averaged shards decide,
which every rank's gradients have gone into, and the scaler hears what all ranks have found.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from . import collectives
from .capture import is_capturing
from .groups import Group


def is_scaled(optimizer: Optimizer) -> bool:
    """Whether a `GradScaler` has called this step."""
    return getattr(optimizer, "found_inf", None) is not None


def check_unscaled(optimizer: Optimizer, stage: int) -> None:
    """Refuse to take gradients for unscaled that `unscale_` did not see.

    Raises:
        RuntimeError: they are in shards.
    """
    if stage == 2 and is_scaled(optimizer) and getattr(optimizer, "grad_scale", None) is None:
        raise RuntimeError(
            "scaler.unscale_(optimizer) at stage 2 finds no gradients in p.grad. Leave it out; to "
            "clip, call optimizer.clip_grad_norm_(max_norm * scaler.get_scale())."
        )


def inverse_scale(optimizer: Optimizer) -> float:
    """What to multiply gradients by: 1 without a scaler and after `unscale_`."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None or is_capturing():  # where a scaler is refused, by all ranks
        return 1.0
    return 1.0 / float(scale)


@contextmanager
def forgotten_on_error(optimizer: Optimizer) -> Iterator[None]:
    """Where a step fails torch leaves its two attributes, and the next step would go by them."""
    try:
        yield
    except Exception:
        for name in ("grad_scale", "found_inf"):
            optimizer.__dict__.pop(name, None)
        raise


def is_nonfinite(tensors: Iterable[Tensor]) -> bool:
    """Whether any of them has an inf or NaN."""
    norms = [torch.linalg.vector_norm(t, float("inf")) for t in tensors if t.numel()]
    return not all(map(torch.isfinite, norms))


def any_nonfinite(group: Group, shards: Sequence[Tensor], optimizer: Optimizer) -> bool:
    """Whether the scaler of any rank has found an inf or NaN, or any shard has one. Collective."""
    here = bool(getattr(optimizer, "found_inf", 0)) or is_nonfinite(shards)
    return bool(collectives.most(group, int(here)))


def tell_scaler(optimizer: Optimizer, found: bool) -> None:
    """Let the scaler that has called this step know what all ranks have found.

    Its `update` reads what it saw on its own rank, and hands no reference to itself to the
    step, except by an argument that torch is about to remove and warns of. So it is looked
    for among the callers. A scaler of another kind can read `optimizer.found_inf`.
    """
    if isinstance(seen := getattr(optimizer, "found_inf", None), Tensor):
        seen.fill_(found)
    scaler = _caller()
    if scaler is not None:
        by_device: dict[Any, Tensor] = scaler._found_inf_per_device(optimizer)
        if not by_device:  # this rank has no gradient at all, and `update` asks for one answer
            by_device[torch.device("cpu")] = torch.zeros((), dtype=torch.float32)
        for at_device in by_device.values():
            at_device.fill_(found)


def _caller() -> GradScaler | None:
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        caller = frame.f_locals.get("self")
        if isinstance(caller, GradScaler):
            return caller
    return None

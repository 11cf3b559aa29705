"""What an optimizer does to the weights, and what it keeps."""

from typing import Any

import torch
from torch import Tensor, nn

from adadelta_dist import FlatSlice


class StepRecorder:
    """RMS of gradient and update of each layer's weights, every few steps, by the step hooks.

    The gradient is this rank's own, for `step()` leaves the average in the optimizer.

    Attributes:
        latest: {"gradient": RMS by layer, "update": RMS by layer} of the last sampled step.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, every: int, steps_done: int
    ) -> None:
        self.latest: dict[str, dict[str, float]] = {}
        self._weights = {
            name.removesuffix(".weight"): p
            for name, p in model.named_parameters()
            if name.endswith(".weight")
        }
        self._every, self._step = every, steps_done
        self._before: dict[str, Tensor] = {}
        optimizer.register_step_pre_hook(self._pre_step)
        optimizer.register_step_post_hook(self._post_step)

    def _pre_step(self, *_: Any) -> None:
        self._step += 1
        if self._step % self._every == 0:
            grads = {name: p.grad for name, p in self._weights.items() if p.grad is not None}
            self.latest = {"gradient": {name: rms(grad) for name, grad in grads.items()}}
            self._before = {name: p.detach().clone() for name, p in self._weights.items()}

    def _post_step(self, *_: Any) -> None:
        if self._step % self._every == 0:
            changes = {name: p.detach() - self._before[name] for name, p in self._weights.items()}
            self.latest["update"] = {name: rms(change) for name, change in changes.items()}


def rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What this rank keeps of the state."""
    entries = [value for entry in optimizer.state.values() for value in entry.values()]
    kept = [entry.local if isinstance(entry, FlatSlice) else entry for entry in entries]
    return sum(tensor.numel() * tensor.itemsize for tensor in kept)


def replicated_bytes(model: nn.Module) -> int:
    """What every rank would keep with torch.optim.Adadelta."""
    twins = [p.detach().clone() for p in model.parameters()]
    for twin in twins:
        twin.grad = torch.zeros_like(twin)
    optimizer = torch.optim.Adadelta(twins)
    optimizer.step()
    return state_bytes(optimizer)

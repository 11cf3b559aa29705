"""The parameters and gradients of one bucket in flat memory.

A parameter's data live in its bucket's `flat_param` from construction on, in its own
memory order, so that an all-gather into the bucket is all it takes to update it.
Gradients are made by torch as ever; `take` copies one that is complete into `flat_grad`
and lets `p.grad` be a view there.
"""

import weakref
from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import is_

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from . import collectives
from .collectives import Group, Pending
from .layout import Bucket, Interval, storage_order


def unflatten(flat: Tensor, like: Tensor, order: Sequence[int]) -> Tensor:
    """A view of `flat` (real, one-dimensional) with the shape of `like`.

    Args:
        flat: as many elements as `like`, twice as many if `like` is complex.
        order: the dimensions of `like` from slowest to fastest (`storage_order`).
    """
    if like.is_complex():
        flat = torch.view_as_complex(flat.view(-1, 2))
    inverse = sorted(range(len(order)), key=lambda position: order[position])
    return flat.view([like.shape[dim] for dim in order]).permute(inverse)


def flatten(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """The inverse of `unflatten`: real and one-dimensional; a view where memory allows."""
    flat = tensor.permute(tuple(order)).reshape(-1)
    return torch.view_as_real(flat).view(-1) if tensor.is_complex() else flat


class FlatBucket:
    """The tensors of one bucket on this rank.

    Args:
        plan: the layout of the bucket.
        group: the ranks that share it.
        params: the parameters of the slots, in order; their data move into the bucket.
        names: how to call them in messages.
        averaged: gradients come averaged already, and only this rank's shard is kept.

    Attributes:
        flat_param: [numel], all parameters of the bucket.
        grad_shard: [shard_numel], the averaged gradients that this rank owns.
        present: by slot, whether any rank had a gradient at the last reduction.
    """

    def __init__(
        self,
        plan: Bucket,
        group: Group,
        params: Sequence[Tensor],
        names: Sequence[str],
        *,
        averaged: bool,
    ) -> None:
        self.plan, self.group = plan, group
        self.params, self.names = list(params), list(names)
        self.orders = [storage_order(p.shape, p.stride()) for p in params]
        self.flat_param = self._empty(plan.numel)
        self.flat_grad = None if averaged else self._empty(plan.numel)
        self.grad_shard = self._empty(plan.shard_numel)
        if group.world_size == 1 and self.flat_grad is not None:
            self.grad_shard = self.flat_grad
        self._is_complex = self.params[0].is_complex()
        self._all_runs = plan.runs([True] * len(params), group.rank)
        self.present = [False] * len(params)
        self.launched = False
        self.accumulating = False
        self.ready: set[int] = set()
        self.expected = 0
        self._param_views = self.views_of(self.flat_param)
        self._grad_views = [] if self.flat_grad is None else self.views_of(self.flat_grad)
        self._is_zero = [True] * len(params)
        self._seen: list[Tensor | None] = []
        self._seen_versions: list[int] = []
        self._version = -1
        self._pending: list[Pending] = []
        weakref.finalize(self, _abandon, self._pending).atexit = False
        for param, view in zip(self.params, self._param_views, strict=True):
            view.copy_(param.detach())
            param.data = view

    @property
    def own_param(self) -> Tensor:
        """[shard_numel]: the parameters that this rank owns, a view."""
        own = self.plan.shard(self.group.rank)
        return self.flat_param[own.start : own.stop]

    def own_runs(self) -> list[Interval]:
        """Where in its shard this rank has gradients to step with."""
        if all(self.present):  # the common case, and a slow loop otherwise
            return self._all_runs
        return self.plan.runs(self.present, self.group.rank)

    def typed(self, flat: Tensor) -> Tensor:
        """Flat memory as the parameters' own dtype: complex where they are."""
        return torch.view_as_complex(flat.view(-1, 2)) if self._is_complex else flat

    def views_of(self, flat: Tensor) -> list[Tensor]:
        """The slots of a tensor [numel], each in its parameter's shape and strides."""
        return [
            unflatten(flat[slot.start : slot.interval.stop], p, order)
            for slot, p, order in zip(self.plan.slots, self.params, self.orders, strict=True)
        ]

    def reclaim_params(self) -> None:
        """Adopt the values of parameters whose storage was replaced since the last step.

        Raises:
            RuntimeError: a parameter has another shape, dtype or device by now.
        """
        if all(map(Tensor.is_set_to, self.params, self._param_views)):
            return
        for name, p, view in zip(self.names, self.params, self._param_views, strict=True):
            if p.is_set_to(view):
                continue
            if (p.shape, p.dtype, p.device) != (view.shape, view.dtype, view.device):
                raise RuntimeError(
                    f"{name} was {_described(view)} when ShardedAdadelta was built and is "
                    f"{_described(p)} now. Build the optimizer last, after model.to(...), "
                    ".half() and whatever else replaces parameters."
                )
            view.copy_(p.detach().clone())  # it may be another view of the same memory
            p.data = view

    def take(self, i: int) -> bool:
        """Move the new gradient of slot `i` into flat memory; False if it must stay."""
        grad, view = self.params[i].grad, self._grad_views[i]
        if grad is None or grad.requires_grad or grad.layout != torch.strided:
            return False
        if grad is not view:
            view.copy_(grad)
            self.params[i].grad = view
            self._is_zero[i] = False
        return True

    def launch(self) -> None:
        """Bring all gradients into flat memory and start their reduction. Collective."""
        self.wait()
        self._seen = [p.grad for p in self.params]
        if self._grad_views and all(map(is_, self._seen, self._grad_views)):
            self._seen_versions = [-1] * len(self._seen)
            self._is_zero = [False] * len(self._seen)
        else:
            self._seen_versions = [self._collect(i, grad) for i, grad in enumerate(self._seen)]
        self.launched, self.accumulating = True, False
        flat = self.flat_grad
        if flat is not None:
            self._pending.append(collectives.reduce_scatter(self.group, flat, self.grad_shard))
            self._version = flat._version

    def expect(self) -> None:
        """Count the gradients that this backward can make (parameters may freeze and thaw)."""
        self.expected = sum(p.requires_grad for p in self.params)

    def is_full(self) -> bool:
        """Whether every gradient that backward can make is there."""
        return len(self.ready) == self.expected

    def wait(self) -> None:
        """Return when `grad_shard` holds the averaged gradients."""
        while self._pending:
            self._pending.pop().wait()

    def gather(self) -> Pending:
        """Start giving every rank the parameters that the others own. Collective."""
        return collectives.all_gather(self.group, self.flat_param)

    def is_current(self) -> bool:
        """Whether the gradients are still those that were launched."""
        if self.flat_grad is not None and self.flat_grad._version != self._version:
            return False
        return all(
            p.grad is seen and (seen is None or version < 0 or seen._version == version)
            for p, seen, version in zip(self.params, self._seen, self._seen_versions, strict=True)
        )

    def reset(self) -> None:
        """Begin a new iteration."""
        self.launched, self.accumulating = False, False
        self.ready.clear()
        self._seen, self._seen_versions = [], []

    def check_grads(self) -> None:
        """Raise torch's error if a gradient is sparse."""
        for p in self.params:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise RuntimeError("Adadelta does not support sparse gradients")

    def _collect(self, i: int, grad: Tensor | None) -> int:
        """Put one gradient, or zeros, in its place.

        Returns:
            The version that the gradient had, or -1 where there is none to compare:
            without a gradient, and in flat memory, which has a version of its own.
        """
        if grad is None or grad.layout != torch.strided:
            if not self._is_zero[i]:
                self._place(i).zero_()
                self._is_zero[i] = True
            return -1
        self._is_zero[i] = False
        if self._grad_views:
            if grad is self._grad_views[i]:
                return -1
            self._grad_views[i].copy_(grad.detach())
        else:
            part = self.plan.slice(self.plan.slots[i], self.group.rank)
            own = flatten(grad.detach(), self.orders[i])[part.start : part.stop]
            self._place(i).copy_(own)
        return grad._version

    def _place(self, i: int) -> Tensor:
        """Where the gradient of slot `i` goes: all of it, or what this rank owns of it."""
        if self._grad_views:
            return self._grad_views[i]
        at = self.plan.place(self.plan.slots[i], self.group.rank)
        return self.grad_shard[at.start : at.stop]

    def _empty(self, numel: int) -> Tensor:
        first = self.params[0]
        return torch.zeros(numel, dtype=first.dtype.to_real(), device=first.device)


def check_memory(params: Iterable[Tensor]) -> None:
    """Refuse parameters that cannot move into a bucket.

    Raises:
        TypeError: a DTensor, or not a dense tensor.
        ValueError: two parameters share memory.
    """
    extents = []
    for p in dict.fromkeys(params):
        if isinstance(p, DTensor):
            raise TypeError("ShardedAdadelta got a DTensor, which is sharded already: use Adadelta")
        if p.layout != torch.strided:
            raise TypeError(f"ShardedAdadelta needs dense parameters, got one of layout {p.layout}")
        if p.numel() and p.device.type != "meta":
            span = 1 + sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))
            extents.append((p.data_ptr(), p.data_ptr() + span * p.element_size()))
    for (_, stop), (start, _) in pairwise(sorted(extents)):
        if start < stop:
            raise ValueError(
                "two parameters share memory. Tie weights by using one Parameter object in both "
                "places, not two that view the same data."
            )


def _abandon(pending: Sequence[Pending]) -> None:
    for reduction in pending:
        reduction.abandon()


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}"

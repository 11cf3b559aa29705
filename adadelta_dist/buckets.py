"""The parameters and gradients of one bucket in flat memory.

A parameter's data live in its bucket's `flat_param` from construction on, in its own
memory order, so that an all-gather into the bucket is all it takes to update it.
Gradients are made by torch as ever; `take` copies one that is complete into `flat_grad`
and lets `p.grad` be a view there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import collectives, fingerprint
from .capture import check_warm
from .collectives import Pending
from .groups import Group
from .layout import Bucket, Interval, ParamSpec, bucket_limit, plan_layout, storage_order
from .lending import Lending
from .memory import Places, checksum, flatten, unflatten, zeros
from .policy import ShardPolicy
from .precision import precision_of
from .reduction import Reduction


class FlatBucket:
    """The tensors of one bucket on this rank.

    Args:
        plan: the layout of the bucket.
        group: the ranks that share it.
        params: the parameters of the slots, in order; their data move into the bucket.
        names: how to call them in messages.
        policy: of the optimizer. Where gradients come averaged already, only this rank's
            shard of them is kept.

    Attributes:
        flat_param: [numel], all parameters of the bucket.
        group_index: of the parameter group that they belong to.
        grad_shard: [shard_numel], the averaged gradients that this rank owns; float32 where
            parameters are half precision, but with one rank, where it is `flat_grad`.
        present: by slot, whether any rank had a gradient at the last reduction.
        reduction: of its gradients.
    """

    def __init__(
        self,
        plan: Bucket,
        group: Group,
        params: Sequence[Tensor],
        names: Sequence[str],
        policy: ShardPolicy,
    ) -> None:
        self.plan, self.group = plan, group
        self.params, self.names = list(params), list(names)
        self.orders = [storage_order(p.shape, p.stride()) for p in params]
        self.precision = precision_of(policy, self.params[0].dtype)
        self.is_hooked = policy.gradients == "local"
        self.flat_param = self._zeros(plan.numel)
        keeps_gradients = policy.gradients == "local" and policy.stage == 1
        self.flat_grad = self._zeros(plan.numel) if keeps_gradients else None
        self.grad_shard = self._zeros(plan.shard_numel, self.precision.compute)
        if group.world_size == 1 and self.flat_grad is not None:
            self.grad_shard = self.flat_grad
        self.group_index: int = plan.kind[0]
        self._is_complex = self.params[0].is_complex()
        self._all_runs = plan.runs([True] * len(params), group.rank)
        self.present = [False] * len(params)
        self.launched = False
        self.accumulating = False
        self.ready: set[int] = set()
        self.expected = 0
        self._param_views = self.views_of(self.flat_param)
        self._param_places = Places(self._param_views)
        self._lending = Lending([] if self.flat_grad is None else self.views_of(self.flat_grad))
        self._is_zero = [True] * len(params)
        self._grads: list[Tensor | None] = []
        self._seen: list[Tensor | None] = []
        self._seen_versions: list[int] = []
        self._in_place = False  # all that was seen, in flat memory
        self._had_gradients = [False] * len(params)
        self._is_local = False  # `grad_shard` holds what the replicas have not seen
        self._version = -1
        self._checksum: Tensor | None = None
        wire = self.precision.reduce
        self.reduction = Reduction(group, wire, self.flat_param, self.grad_shard)
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
        try:
            if self._param_places.hold(self.params):
                return  # the common case, and a slow loop otherwise
        except NotImplementedError:  # torch's, of tensors without memory
            raise RuntimeError(
                f"{self.names[0]} was {_described(self.params[0])} when ShardedAdadelta was built: "
                "no values to step on. Build the optimizer last, after model.to_empty(...)."
            ) from None
        for name, p, view in zip(self.names, self.params, self._param_views, strict=True):
            if (p.shape, p.dtype, p.device) != (view.shape, view.dtype, view.device):
                raise RuntimeError(
                    f"{name} was {_described(view)} when ShardedAdadelta was built and is "
                    f"{_described(p)} now. Build the optimizer last, after model.to(...), "
                    ".half(), .to_empty() and whatever else replaces parameters."
                )
            if p.is_set_to(view):
                continue
            check_warm(f"{name} was replaced, and is adopted")
            view.copy_(p.detach().clone())  # it may be another view of the same memory
            p.data = view

    def take(self, i: int) -> bool:
        """Move the new gradient of slot `i` into flat memory; False if it must stay."""
        grad, place = self.params[i].grad, self._lending.places[i]
        if grad is None or grad.requires_grad or grad.layout != torch.strided:
            return False
        if grad.shape != place.shape:  # `reclaim_params` has the words for it
            return False
        if not grad.is_set_to(place):
            self._lending.take_back(i)
            place.copy_(grad)
            self.params[i].grad = self._lending.lent[i]
            self._is_zero[i] = False
        return True

    def launch(self, *, in_backward: bool = False, final: bool = False) -> None:
        """Bring all gradients into flat memory and start their reduction. Collective.

        Args:
            in_backward: rather than right after `check_grads`.
            final: nothing comes between this and the step. Else the user may still change
                gradients, perhaps through `.data` or numpy, which no version counter sees: keep
                a checksum.
        """
        self.reduction.wait()
        if in_backward:
            self._grads = [p.grad for p in self.params]
        self._seen = self._grads
        if not self._lending.places:  # a clip may have made the rest NaN
            self.grad_shard.zero_()
            self._is_zero = [True] * len(self._seen)
        self._in_place = self._lending.hold(self._seen)
        if self._in_place:
            self._is_zero = [False] * len(self._seen)
        else:
            self._seen_versions = [self._collect(i, grad) for i, grad in enumerate(self._seen)]
        self.launched, self.accumulating = True, False
        flat = self.flat_grad
        if flat is not None:
            self._is_local = True
            self.reduction.start(flat, self.grad_shard)
            self._version = flat._version
        sent = self.grad_shard if flat is None else flat
        self._checksum = None if final else checksum(sent)  # while it travels

    def has_gradients(self) -> list[bool]:
        """By slot, whether this rank had a gradient at the last `check_grads`."""
        return self._had_gradients

    def is_launched(self, i: int) -> bool:
        """Whether the gradient of slot `i` is what was launched, edited or added to or not."""
        grad = self.params[i].grad
        if grad is None or not self._seen:
            return False
        return grad is self._seen[i] or grad.requires_grad  # to that is added out of place

    def has_launched(self) -> bool:
        """Whether gradients are left of those that were launched, edited or replaced or not."""
        if self.is_hooked and not self.accumulating:  # no backward has put others there since
            return self.launched and any(p.grad is not None for p in self.params)
        return any(map(self.is_launched, range(len(self.params))))

    def expect(self) -> None:
        """Count the gradients that this backward can make (parameters may freeze and thaw)."""
        self.expected = sum(p.requires_grad for p in self.params)

    def is_full(self) -> bool:
        """Whether every gradient that backward can make is there."""
        return len(self.ready) == self.expected

    def wait(self) -> None:
        """Return when `grad_shard` holds the averaged gradients. Collective with replicas."""
        self.reduction.wait()
        if self._is_local:
            self._is_local = False
            collectives.average_replicas(self.group, self.grad_shard)

    def gather(self) -> Pending:
        """Start giving every rank the parameters that the others own. Collective."""
        return collectives.all_gather(self.group, self.flat_param, self.precision.gather)

    def is_current(self) -> bool:
        """Whether the gradients were at the last `check_grads` still those that were launched."""
        flat = self.flat_grad
        if flat is not None and flat._version != self._version:
            return False
        same = (
            self._lending.hold(self._grads)
            if self._in_place
            else all(map(self._is_as_seen, range(len(self._grads)), self._grads))
        )
        if not same or self._checksum is None:
            return same
        now = self._own_gradients() if flat is None else flat
        return bool((self._checksum == checksum(now)).all())

    def reset(self) -> None:
        """Begin a new iteration."""
        self.launched, self.accumulating = False, False
        self.ready.clear()
        self._grads, self._seen, self._seen_versions = [], [], []

    def check_grads(self) -> None:
        """Take note of the gradients that are here; raise torch's error if one is sparse."""
        grads = self._grads = [p.grad for p in self.params]
        self._had_gradients = [grad is not None for grad in grads]
        if self._lending.are_lent(grads):
            return  # the common case, and a slow loop otherwise
        if any(grad is not None and grad.layout != torch.strided for grad in grads):
            raise RuntimeError("Adadelta does not support sparse gradients")

    def _is_as_seen(self, i: int, grad: Tensor | None) -> bool:
        """Whether the gradient of slot `i` is still what was launched."""
        seen, version = self._seen[i], self._seen_versions[i]
        if grad is None or seen is None:
            return grad is seen
        if version < 0:
            return self._lending.holds(i, grad)
        if grad is not seen or grad._version != version:
            return False
        if self._checksum is None or not self._lending.places:
            return True
        place = self._lending.places[i]  # a copy, of which alone there is a checksum
        return torch.allclose(grad.to(place.dtype), place, rtol=0, atol=0, equal_nan=True)

    def _collect(self, i: int, grad: Tensor | None) -> int:
        """Put one gradient, or zeros, in its place.

        Returns:
            The version that the gradient had, or -1 where there is none to compare:
            without a gradient, and in flat memory, which has a version of its own.
        """
        if grad is None or grad.layout != torch.strided:
            if not self._is_zero[i]:
                if self._lending.places:
                    self._lending.take_back(i)
                self._place(i).zero_()
                self._is_zero[i] = True
            return -1
        self._is_zero[i] = False
        if self._lending.places:
            if grad.is_set_to(self._lending.places[i]):
                return -1
            self._lending.take_back(i)
            self._lending.places[i].copy_(grad.detach())
        else:
            self._place(i).copy_(self._own_part(i, grad))
        return grad._version

    def _place(self, i: int) -> Tensor:
        """Where the gradient of slot `i` goes: all of it, or what this rank owns of it."""
        if self._lending.places:
            return self._lending.places[i]
        return self._in_shard(i, self.grad_shard)

    def _in_shard(self, i: int, shard: Tensor) -> Tensor:
        at = self.plan.place(self.plan.slots[i], self.group.rank)
        return shard[at.start : at.stop]

    def _own_part(self, i: int, grad: Tensor) -> Tensor:
        """What this rank owns of the gradient of slot `i`."""
        part = self.plan.slice(self.plan.slots[i], self.group.rank)
        return flatten(grad.detach(), self.orders[i])[part.start : part.stop]

    def _own_gradients(self) -> Tensor:
        """[shard_numel]: what this rank owns of all gradients, as a launch would take it."""
        own = torch.zeros_like(self.grad_shard)
        for i, grad in enumerate(self._grads):
            if grad is not None:
                self._in_shard(i, own).copy_(self._own_part(i, grad))
        return own

    def _zeros(self, numel: int, dtype: torch.dtype | None = None) -> Tensor:
        first = self.params[0]
        return zeros(numel, dtype or first.dtype.to_real(), first.device)


def make_buckets(
    param_groups: Sequence[Mapping[str, Any]],
    first: int,
    group: Group,
    policy: ShardPolicy,
    kind: type[FlatBucket] = FlatBucket,
) -> list[FlatBucket]:
    """Move the parameters of the parameter groups from index `first` on into buckets."""
    params, names, specs = [], [], []
    for g, param_group in enumerate(param_groups[first:], first):
        for name, p in fingerprint.named(g, param_group):
            numel = p.numel() * (2 if p.is_complex() else 1)
            specs.append(ParamSpec(numel, p.dtype.to_real().itemsize, (g, p.dtype, p.device)))
            params.append(p)
            names.append(name)
    limit = bucket_limit(policy.bucket_mb, group.world_size)
    buckets = []
    for plan in plan_layout(specs, group.world_size, limit):
        indices = [slot.param for slot in plan.slots]
        of_bucket = [params[i] for i in indices], [names[i] for i in indices]
        buckets.append(kind(plan, group, *of_bucket, policy))
    return buckets


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}"

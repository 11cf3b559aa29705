"""Gradients of which each rank keeps its shard alone (ZeRO stage 2).

A gradient that is complete is copied into its bucket's flat memory, and `p.grad` is None
again. A full bucket is reduced, its average is added to this rank's shard, and the flat
memory is freed.

Every backward reduces every bucket once, in one order: what is not full when backward ends
is reduced then. Ranks need not have equally many backwards: `reduce` has those that are
behind send zeros. Since sums are linear, it does not matter which gradients go with which
reduction, as long as all have gone.
"""

import weakref
from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from . import collectives
from .buckets import FlatBucket
from .groups import Group
from .reducer import GradientReducer

_PATIENCE_S = 1.0


class FreedBucket(FlatBucket):
    """A bucket that has memory for its gradients only until they are reduced."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._held: Tensor | None = None
        self._held_views: list[Tensor] = []
        self._taken = self._none()
        self.has_gradient = self._none()

    def take(self, i: int) -> bool:
        """Move the new gradient of slot `i` into flat memory; False if it must stay."""
        grad, p = self.params[i].grad, self.params[i]
        if grad is None or grad.layout != torch.strided or grad.shape != p.shape:
            return False
        if self._held is None:
            self._held = self._zeros(self.plan.numel)
            self._held_views = self.views_of(self._held)
        # Twice before a reduction: after `no_sync`, or in a backward within a backward.
        write = self._held_views[i].add_ if self._taken[i] else self._held_views[i].copy_
        write(grad.detach())
        self._taken[i] = self.has_gradient[i] = True
        p.grad = None
        return True

    def launch(self, *, in_backward: bool = False, final: bool = False) -> None:
        """Start the reduction of all gradients that are there, or of zeros. Collective."""
        for i in range(len(self.params)):
            self.take(i)
        flat = self._zeros(self.plan.numel) if self._held is None else self._held
        self._held, self._held_views, self._taken = None, [], self._none()
        self.ready.clear()
        self._is_local = True
        self.reduction.start_adding(flat, self.grad_shard)

    def is_reduced(self, within_s: float) -> bool:
        """Whether the last reduction is done, or will be within these seconds."""
        return self.reduction.is_done(within_s)

    def is_dirty(self) -> bool:
        """Whether a gradient is here that was not sent."""
        return self._held is not None or any(p.grad is not None for p in self.params)

    def has_gradients(self) -> list[bool]:
        there = super().has_gradients()
        return [a or b for a, b in zip(there, self.has_gradient, strict=True)]

    def discard(self) -> None:
        """Forget all gradients: those in flight too, but only when they have arrived."""
        self._held, self._held_views, self._taken = None, [], self._none()
        self.has_gradient = self._none()
        self._is_local = False
        self.reduction.empty(self.grad_shard)

    def reset(self) -> None:
        super().reset()
        self.discard()

    def _none(self) -> list[bool]:
        return [False] * len(self.params)


class ShardingReducer(GradientReducer):
    """Reduces every bucket once a backward, and keeps this rank's shard of the sums.

    Args:
        group: the ranks.
    """

    buckets: list[FreedBucket]  # type: ignore[assignment]

    def __init__(self, group: Group) -> None:
        super().__init__(group, overlap=True)
        self._rounds = 0
        self._zeroed_at = 0
        self._clipped_at = 0
        self._waits = True
        self._backward = -1

    def catch_up(self) -> None:
        self._end_round()
        self._catch_up()

    def reduce(
        self, facts: Sequence[str], error: Exception | None = None, *, final: bool = False
    ) -> None:
        error = self._check(error)
        self._end_round()  # of a backward that has failed
        dirty = [bucket.is_dirty() for bucket in self.buckets]
        zeroed = f"zero_grad after {self._zeroed_at} backward passes since the last step"
        try:
            clipped_anywhere, *dirty_anywhere = self._agree(
                [self.clipped, *dirty], [*facts, zeroed], error
            )
        except Exception:  # all ranks raise; but what some have sent must be answered
            self._catch_up()
            raise
        rounds = self._catch_up()
        if clipped_anywhere and (any(dirty_anywhere) or rounds > self._clipped_at):
            raise self._clipped_too_early()
        for bucket in compress(self.buckets, dirty_anywhere):
            bucket.launch()
        self._clipped_at = self._rounds

    def _catch_up(self) -> int:
        """Launch as many rounds as the rank that has launched most. Collective."""
        rounds = collectives.most(self.group, self._rounds)
        while self._rounds < rounds:
            self._launch_next()
        return rounds

    def discard(self) -> None:
        super().discard()
        self._end_round()
        self._zeroed_at = self._rounds
        for bucket in self.buckets:
            bucket.discard()

    def reset(self) -> None:
        super().reset()
        self._rounds = self._zeroed_at = 0
        self._waits = True

    def _on_gradient(self, b: int, i: int) -> None:
        if not self._sync:
            return  # whole gradients add up in `p.grad`
        with self._lock:  # backward has a thread for each device
            if self._backward != torch._C._current_graph_task_id():
                self._backward = torch._C._current_graph_task_id()
                end = _backward_end(weakref.ref(self))
                torch.autograd.Variable._execution_engine.queue_callback(end)
            if self.buckets[b].take(i):
                self.buckets[b].ready.add(i)
            if not self._counted:
                for bucket in self.buckets:
                    bucket.expect()
                self._counted = True
            while self._counted and self.buckets[self._next].is_full():
                self._launch_next()  # which ends the round with the last bucket

    def _end_round(self) -> None:
        """Launch what others may have launched in this round, and what is left here."""
        while self._next or any(bucket._held is not None for bucket in self.buckets):
            self._launch_next()

    def _launch_next(self) -> None:
        # One reduction in flight, while the next bucket fills. A rank that is ahead waits for
        # the others rather than fill its memory; but they may have no backward at all.
        if self._waits:
            self._waits = self.buckets[self._next - 1].is_reduced(within_s=_PATIENCE_S)
        self.buckets[self._next].launch()
        self._next = (self._next + 1) % len(self.buckets)
        if self._next == 0:
            self._rounds += 1
            self._counted = False


def _backward_end(reducer: "weakref.ref[ShardingReducer]") -> Callable[[], None]:
    """A callback that does not keep the reducer alive."""

    def end() -> None:
        alive = reducer()
        if alive is not None:
            alive._end_round()

    return end

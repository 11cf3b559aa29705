"""Averaging the gradients of one bucket into this rank's shard of them."""

import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import timedelta
from functools import partial

import torch
from torch import Tensor

from . import collectives
from .collectives import Pending
from .groups import Group
from .in_order import InOrder

PIECE_NUMEL = 2**20
"""Elements that a thread sends and receives at once, all ranks' together: few enough for one
piece to be converted and another to be averaged while others travel."""

PIECES_ON_THEIR_WAY = 3

_FOREVER = timedelta(days=365)
"""Nobody may ever answer what a dropped optimizer has sent. Were a thread to give up on it,
gloo would close the connections of the whole process group."""


class Reduction:
    """The reductions of one bucket, one after the other.

    Where gradients are received in the shard itself they take no memory, and all buckets may
    travel at once. Else a thread sends them piece by piece, those of one bucket after those of
    the other: backward must not wait for a rank that has not come that far.

    Args:
        group: the ranks.
        wire: the dtype in which gradients travel.
        flat: gradients of the bucket, or what is like them.
        shard: as `flat`, of the averages.

    Attributes:
        in_thread: whether a thread finishes them, for waiting blocks the host.
        in_order: where they are finished, in order with those of other buckets.
    """

    def __init__(self, group: Group, wire: torch.dtype, flat: Tensor, shard: Tensor) -> None:
        self._group, self._wire = group, wire
        self.in_thread = group.world_size > 1 and group.is_pairwise(flat.device)
        is_in_place = group.world_size <= 2 and flat.dtype == wire == shard.dtype
        self._takes_memory = self.in_thread and not is_in_place
        self.in_order = InOrder(in_thread=self.in_thread)
        self._submitted: list[Future[None]] = []
        self._pending: list[Pending] = []
        weakref.finalize(self, _abandon, self._pending).atexit = False

    def start(self, flat: Tensor, shard: Tensor) -> None:
        """Start averaging the gradients `flat` into this rank's shard. Collective."""
        if self._takes_memory:
            average = partial(_average_in_pieces, self._group, flat, self._wire, shard)
            self._submitted.append(self.in_order.submit(average))
        else:
            self._pending.append(_start(self._group, flat, self._wire, shard))

    def start_adding(self, flat: Tensor, shard: Tensor) -> None:
        """Start averaging the gradients `flat`, to be added to this rank's shard. Collective."""
        if self.in_thread:
            add_average = partial(
                _average_in_pieces, self._group, flat, self._wire, shard, add=True
            )
            self._submitted.append(self.in_order.submit(add_average))
            return
        average = torch.empty_like(shard)
        pending = _start(self._group, flat, self._wire, average)

        def add() -> None:
            pending.wait()
            shard.add_(average)

        self._submitted.append(self.in_order.submit(add))

    def empty(self, shard: Tensor) -> None:
        """Make the shard zero, when what is on its way has arrived."""
        self._submitted = [done for done in self._submitted if not done.done()]
        self._submitted.append(self.in_order.submit(shard.zero_))  # type: ignore[arg-type]

    def is_done(self, within_s: float) -> bool:
        """Whether the shard is what it will be, or is within these seconds."""
        return not self._submitted or self.in_order.is_done(self._submitted[-1], within_s)

    def wait(self) -> None:
        """Return when the shard is what it will be, or raise what went wrong on the way."""
        while self._pending:
            self._pending.pop().wait()
        submitted, self._submitted = self._submitted, []
        for done in submitted:
            self.in_order.wait(done)


def _start(
    group: Group, flat: Tensor, wire: torch.dtype, shard: Tensor, *, in_thread: bool = False
) -> Pending:
    if group.world_size > 1:
        flat = flat.to(wire)  # itself where that is its dtype
    return collectives.reduce_scatter(group, flat, shard, in_thread=in_thread)


def _average_in_pieces(
    group: Group, flat: Tensor, wire: torch.dtype, shard: Tensor, *, add: bool = False
) -> None:
    """Average the gradients into this rank's shard, or add their average to it. Collective."""
    numel = max(1, PIECE_NUMEL // group.world_size)
    rows = flat.view(group.world_size, -1)
    on_their_way: deque[tuple[Pending, Tensor, Tensor]] = deque()
    for piece, of_shard in zip(rows.split(numel, dim=1), shard.split(numel), strict=True):
        average = torch.empty_like(of_shard) if add else of_shard
        pending = _start(group, piece, wire, average, in_thread=True)
        on_their_way.append((pending, average, of_shard))
        if len(on_their_way) == PIECES_ON_THEIR_WAY:
            _finish(*on_their_way.popleft())
    for piece_on_its_way in on_their_way:
        _finish(*piece_on_its_way)


def _finish(pending: Pending, average: Tensor, of_shard: Tensor) -> None:
    pending.wait(_FOREVER)
    if average is not of_shard:
        of_shard.add_(average)


def _abandon(pending: Sequence[Pending]) -> None:
    for reduction in pending:
        reduction.abandon()

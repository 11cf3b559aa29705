"""Communication: with `groups.py` and `communicators.py` all calls of `torch.distributed`.

Everything here takes a `Group`. With one rank, or without an initialised process group,
nothing is sent. What travels in shards stays within the group; what all ranks must know
goes to its replicas too.

How a bucket travels is decided once a device, by its backend. NCCL and others have
native reduce-scatter and all-gather. gloo's are slow, so there each pair of ranks
exchanges its shards directly, and the sum is taken locally in rank order, which makes
it deterministic (docs/design.md has the measurements).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .groups import Group

# torch 2.13 renamed both; the old names warn there.
_native_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_native_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _Lane(IntEnum):
    """What a pairwise message is part of. One thread starts all of one lane, in one order."""

    GRADIENTS = 0
    STATE = 1
    PARAMETERS = 2
    GRADIENTS_IN_THREAD = 3


LANES = len(_Lane)


_abandoned: list["Pending"] = []


@dataclass(frozen=True)
class Pending:
    """A collective under way. `wait()` returns when its result may be used."""

    works: tuple[Any, ...] = ()
    finish: Callable[[], None] = lambda: None

    def wait(self, timeout: timedelta | None = None) -> None:
        """Wait, by default as long as the process group allows: then gloo closes all of it."""
        for work in self.works:
            if timeout is None:
                work.wait()
            else:
                work.wait(timeout)
        self.finish()

    def abandon(self) -> None:
        """Leave it to itself, but keep it: gloo stalls if the buffers of a message vanish."""
        if self.works:
            _abandoned.append(self)


def reduce_scatter(
    group: Group, flat: Tensor, shard: Tensor, *, in_thread: bool = False
) -> Pending:
    """Average `flat` over the ranks; each rank gets its own shard of the result.

    Collective: every rank calls it, in the same order of buckets.

    Args:
        flat: [world_size * shard_numel] or, where exchanged pairwise, [world_size, shard_numel]
            with rows that are contiguous; this rank's gradients, read until `wait()`.
        shard: [shard_numel], the result, of any dtype; may be `flat` itself with one rank.
        in_thread: it is called by the one thread that reduces, not by backward or the step:
            which of them comes first may differ from rank to rank.
    """
    if group.world_size == 1:
        if shard is not flat:
            shard.copy_(flat)
        return Pending()
    if not group.is_pairwise(flat.device):
        out = shard if shard.dtype == flat.dtype else torch.empty_like(shard, dtype=flat.dtype)
        work = _native_reduce_scatter(
            out, flat, op=dist.ReduceOp.AVG, group=group.process_group, async_op=True
        )
        return Pending((work,), lambda: None if out is shard else _copy(shard, out))
    rows = list(flat.view(group.world_size, -1))
    around = [_around(group, distance) for distance in range(1, group.world_size)]
    # Receives first. gloo sends a row when it hears that its receiver is ready, and the word that
    # we are would queue behind whatever we send: the two directions would take turns.
    first = min(source for source, _ in around) if shard.dtype == flat.dtype else None
    received = {  # one of the first two rows of the sum may be received where the sum goes
        source: shard if source == first else torch.empty_like(rows[source]) for source, _ in around
    }
    lane = _Lane.GRADIENTS_IN_THREAD if in_thread else _Lane.GRADIENTS
    works = [_receive(group, row, source, lane) for source, row in received.items()]
    works += [_send(group, rows[target], target, lane) for _, target in around]
    for source, row in received.items():
        rows[source] = row

    def average() -> None:
        _average(rows, shard)

    return Pending(tuple(works), average)


def all_gather(group: Group, flat: Tensor, wire_dtype: torch.dtype | None = None) -> Pending:
    """Give every rank all shards. Collective.

    Args:
        flat: [world_size * shard_numel]; this rank's shard of it is sent, the others
            are overwritten.
        wire_dtype: in which it travels; all of `flat` is rounded to it, on one rank too.
    """
    if wire_dtype not in (None, flat.dtype):
        wire = torch.empty_like(flat, dtype=wire_dtype)
        own = group.rank
        wire.view(group.world_size, -1)[own].copy_(flat.view(group.world_size, -1)[own])
        pending = all_gather(group, wire)
        return Pending(pending.works, lambda: _copy(flat, wire))
    if group.world_size == 1:
        return Pending()
    rows = flat.view(group.world_size, -1)
    if not group.is_pairwise(flat.device):
        work = _native_all_gather(flat, rows[group.rank], group=group.process_group, async_op=True)
        return Pending((work,))
    around = [_around(group, distance) for distance in range(1, group.world_size)]
    works = [_receive(group, rows[source], source, lane=_Lane.PARAMETERS) for source, _ in around]
    works += [_send(group, rows[group.rank], target, lane=_Lane.PARAMETERS) for _, target in around]
    return Pending(tuple(works))


def average_replicas(group: Group, shard: Tensor) -> None:
    """Average a shard over the replicas of its owner. Collective."""
    if group.replicas is not None:
        dist.all_reduce(shard, group=group.replicas.process_group)
        shard.div_(group.replicas.world_size)


def average(group: Group, flat: Tensor) -> Tensor:
    """The mean over all ranks of `flat`, which is contiguous. Collective."""
    mean = flat.clone()
    count = 1
    for ranks in (group, group.replicas):
        if ranks is not None:
            dist.all_reduce(mean, group=ranks.process_group)
            count *= ranks.world_size
    return mean.div_(count)


def broadcast(group: Group, flat: Tensor) -> None:
    """Overwrite `flat` (contiguous) with that of rank 0 (of the first replica). Collective."""
    if group.replicas is not None:
        broadcast(group.replicas, flat)
    if group.world_size > 1:
        source = dist.get_global_rank(_process_group(group), 0)
        dist.broadcast(flat, src=source, group=group.process_group)


def combine(group: Group, values: Tensor, op: str) -> Tensor:
    """Elementwise "sum" or "max" of a small tensor over all ranks. Collective."""
    if group.replicas is not None:
        values = combine(group.replicas, values, op)
    if group.world_size == 1:
        return values
    shared = values.to(group.control_device, copy=True)
    reduce_op = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op]
    dist.all_reduce(shared, op=reduce_op, group=group.control or group.process_group)
    return shared.to(values.device)


def most(group: Group, number: int) -> int:
    """The largest of the ranks' numbers. Collective."""
    return int(combine(group, torch.tensor(number, device="cpu"), "max"))


def gather_slices(group: Group, mine: Tensor, numels: Sequence[int], dst: int) -> Tensor | None:
    """Concatenate one piece from each rank, in rank order, on the CPU of `dst`. Collective.

    Args:
        mine: [numels[rank]], contiguous.
        numels: the pieces' lengths, the same list on every rank.

    Returns:
        [sum(numels)] on `dst`, None on the other ranks.
    """
    if group.rank != dst:
        if mine.numel():
            _send(group, mine, dst, lane=_Lane.STATE).wait()
        return None
    pieces = [mine if rank == dst else mine.new_empty(n) for rank, n in enumerate(numels)]
    works = [
        _receive(group, piece, rank, lane=_Lane.STATE)
        for rank, piece in enumerate(pieces)
        if rank != dst and piece.numel()
    ]
    for work in works:
        work.wait()
    return torch.cat([piece.cpu() for piece in pieces])


def scatter_slices(
    group: Group, whole: Tensor | None, mine: Tensor, numels: Sequence[int], src: int
) -> None:
    """Cut `whole` into one piece for each rank: the inverse of `gather_slices`. Collective.

    Args:
        whole: [sum(numels)] on `src`, on any device; None on the other ranks.
        mine: [numels[rank]], contiguous; receives this rank's piece.
        numels: the pieces' lengths, the same list on every rank.
    """
    if whole is None:
        if mine.numel():
            _receive(group, mine, src, lane=_Lane.STATE).wait()
        return
    pieces = whole.to(mine.device).split(list(numels))
    works = [
        _send(group, piece, rank, lane=_Lane.STATE)
        for rank, piece in enumerate(pieces)
        if rank != src and piece.numel()
    ]
    mine.copy_(pieces[src])
    for work in works:
        work.wait()


def all_gather_object(group: Group, mine: Any) -> list[Any]:
    """Everyone's picklable object, by `Group.number`. Collective."""
    if group.world_size == 1 and group.replicas is None:
        return [mine]
    everyones: list[Any] = [None] * group.world_size
    dist.all_gather_object(everyones, mine, group=group.control or group.process_group)
    if group.replicas is not None:
        everyones = list(chain.from_iterable(all_gather_object(group.replicas, everyones)))
    return everyones


def _average(rows: Sequence[Tensor], out: Tensor) -> None:
    """Mean of equal-sized rows, summed in the given order; half precision in fp32."""
    dtype = torch.promote_types(torch.promote_types(rows[0].dtype, out.dtype), torch.float32)
    total = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
    if rows[0].dtype == dtype:
        torch.add(rows[0], rows[1], out=total)  # which may be either of them
    else:
        total.copy_(rows[0]).add_(rows[1])
    for row in rows[2:]:
        total.add_(row)
    total.div_(len(rows))
    if total is not out:
        out.copy_(total)


def _copy(to: Tensor, source: Tensor) -> None:
    to.copy_(source)


def _around(group: Group, distance: int) -> tuple[int, int]:
    """(source, target) of the exchange with the neighbours at `distance`."""
    return (group.rank - distance) % group.world_size, (group.rank + distance) % group.world_size


def _process_group(group: Group) -> dist.ProcessGroup:
    assert group.process_group is not None
    return group.process_group


def _send(group: Group, tensor: Tensor, target: int, lane: _Lane) -> Any:
    target = dist.get_global_rank(_process_group(group), target)
    return dist.isend(tensor, target, group=group.process_group, tag=group.channel + lane)


def _receive(group: Group, tensor: Tensor, source: int, lane: _Lane) -> Any:
    source = dist.get_global_rank(_process_group(group), source)
    return dist.irecv(tensor, source, group=group.process_group, tag=group.channel + lane)

"""Reductions in pieces and at once: their sums, and that neither meets the other's messages."""

import time
from functools import partial

import pytest
import torch
from torch import nn

from adadelta_dist import ShardedAdadelta, communicators, groups, reduction
from adadelta_dist.reduction import Reduction

NUMEL = 37
"""Of a shard: no multiple of a piece."""


def gradients(rank, world_size, dtype):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(world_size * NUMEL, generator=generator).to(dtype)


def reduced(rank, world_size, dtype, wire, add):
    """(this rank's shard, the most pieces that were on their way at once)."""
    group = communicators.open_channel(groups.join(None))
    flat, shard = gradients(rank, world_size, dtype), torch.ones(NUMEL)
    under_way, most = [], []
    monkeypatch = pytest.MonkeyPatch()
    start, finish = reduction._start, reduction._finish

    def counted_start(*args, **kwargs):
        under_way.append(None)
        most.append(len(under_way))
        return start(*args, **kwargs)

    def counted_finish(*args):
        finish(*args)
        under_way.pop()

    monkeypatch.setattr(reduction, "PIECE_NUMEL", 5 * world_size)
    monkeypatch.setattr(reduction, "_start", counted_start)
    monkeypatch.setattr(reduction, "_finish", counted_finish)
    try:
        of_bucket = Reduction(group, wire, flat, shard)
        (of_bucket.start_adding if add else of_bucket.start)(flat, shard)
        of_bucket.wait()
    finally:
        monkeypatch.undo()
    return shard, len(most), max(most)


@pytest.mark.parametrize("add", [False, True], ids=["average", "added"])
@pytest.mark.parametrize(
    ("dtype", "wire"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_pieces_are_averaged_as_the_whole_is(pool, world_size, dtype, wire, add):
    whole = [gradients(rank, world_size, dtype).to(wire).float() for rank in range(world_size)]
    wanted = sum(whole[1:], whole[0]) / world_size + add
    found = pool(world_size).run(reduced, world_size, dtype, wire, add)
    for rank, (shard, pieces, most) in enumerate(found):
        assert torch.equal(shard, wanted[rank * NUMEL : (rank + 1) * NUMEL])
        at_once = world_size == 2 and dtype == wire == torch.float32 and not add
        assert (pieces, most) == ((1, 1) if at_once else (8, reduction.PIECES_ON_THEIR_WAY))


def of_two_kinds(rank):
    """One bucket is received in place; the other goes in the thread, first on one rank only."""
    params = [nn.Parameter(torch.zeros(64, dtype=d)) for d in (torch.float32, torch.bfloat16)]
    optimizer = ShardedAdadelta(params)
    reductions = [bucket.reduction for bucket in optimizer._reducer.buckets]
    assert {r._takes_memory for r in reductions} == {False, True}
    for p in params:
        p.grad = torch.full_like(p, rank + 1.0)
    if rank == 0:
        reductions[0].in_order.submit(partial(time.sleep, 0.4))
    else:
        in_place = next(r for r in reductions if not r._takes_memory)
        start = in_place.start

        def start_late(*args):
            time.sleep(0.2)
            start(*args)

        in_place.start = start_late
    optimizer.step()
    return [optimizer.grad_shard(p).local.tolist() for p in params]


def test_buckets_in_place_and_in_the_thread_do_not_get_each_others_gradients(pool):
    for shards in pool(2).run(of_two_kinds):
        assert shards == [[1.5] * 32, [1.5] * 32]

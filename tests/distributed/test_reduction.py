"""Reductions: those that a thread sends never meet the messages of those that it does not."""

import time
from functools import partial

import torch
from torch import nn

from adadelta_dist import ShardedAdadelta


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

"""Clipping by value, as the integrations do it."""

import pytest
import torch

from adadelta_dist import ShardedAdadelta, ShardPolicy
from adadelta_dist.strategies import clipping

HUGE = 1e34
"""Finite until it is scaled."""


def overflow(rank, policy, factor):
    """(skipped steps, scale, the parameter) after a step of scaled gradients."""
    p = torch.nn.Parameter(torch.ones(64))
    optimizer = ShardedAdadelta([p], policy=policy)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale((p * factor).sum()).backward()
    limit = 0.5 * clipping.scale_of(optimizer, scaler)
    clipping.clip_grad_value_(optimizer, limit, scaled=True)
    scaler.step(optimizer)
    scaler.update()
    return optimizer.skipped_steps, scaler.get_scale(), p.unique().tolist()


@pytest.mark.parametrize(
    ("policy", "factor"),
    [
        (ShardPolicy(), HUGE),
        (ShardPolicy(stage=2), HUGE),
        (ShardPolicy(reduce_dtype=torch.float16), 3.0),
    ],
    ids=["stage 1", "stage 2", "float16 on the wire"],
)
def test_clipping_hides_no_overflow_from_the_scaler(pool, policy, factor):
    assert pool(2).run(overflow, policy, factor) == [(1, 2.0**15, [1.0])] * 2


def skipping(rank, policy):
    p = torch.nn.Parameter(torch.ones(64))
    optimizer = ShardedAdadelta([p], policy=policy)
    (p * float("inf")).sum().backward()
    clipping.clip_grad_value_(optimizer, 0.5)
    optimizer.step()
    return optimizer.skipped_steps, p.unique().numel()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [1, 2])
def test_nor_from_a_policy_that_skips(pool, world_size, stage):
    policy = ShardPolicy(skip_nonfinite=True, stage=stage)
    assert pool(world_size).run(skipping, policy) == [(1, 1)] * world_size


def clamped(rank, stage):
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = ShardedAdadelta([p], policy=ShardPolicy(stage=stage))
    (p * torch.tensor([3.0, float("inf")])).sum().backward()
    clipping.clip_grad_value_(optimizer, 0.5)
    shard = optimizer.grad_shard(p)
    return getattr(shard, "local", shard).tolist()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [1, 2])
def test_where_no_step_is_skipped_all_is_clamped_as_in_torch(pool, world_size, stage):
    found = pool(world_size).run(clamped, stage)
    assert [value for shard in found for value in shard] == [0.5, 0.5]

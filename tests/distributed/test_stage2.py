"""Gradients of which each rank keeps its shard: when they are freed, and how they add up."""

import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from test_gradients import STAGE_2, assert_close, batch, loss_of, model, values
from torch import nn
from torch.optim import Adadelta

from adadelta_dist import FlatSlice, RankError, ShardedAdadelta, ShardPolicy, reduction


def new(**options):
    module = model()
    return module, ShardedAdadelta(module.parameters(), policy=STAGE_2, **options)


def reference(batches, *, divide_by):
    """One step of torch's optimizer on the mean over the ranks of these batches' gradients."""
    module = model()
    optimizer = Adadelta(module.parameters())
    for rank, step in batches:
        (loss_of(module, batch(rank, step)) / divide_by).backward()
    optimizer.step()
    return values(module), [p.grad for p in module.parameters()]


def freed(rank, world_size):
    module, optimizer = new()
    first, last = next(module.parameters()), list(module.parameters())[-1]
    for step in range(2):
        loss_of(module, batch(rank, step)).backward()
        assert all(p.grad is None for p in module.parameters())
        assert all(bucket._held is None for bucket in optimizer._reducer.buckets)
    shard = optimizer.grad_shard(first)
    assert isinstance(shard, FlatSlice) == (world_size > 1)
    own = shard.local if world_size > 1 else shard.flatten()
    start = shard.interval.start if world_size > 1 else 0
    _, grads = reference(
        [(r, step) for r in range(world_size) for step in range(2)], divide_by=world_size
    )
    assert_close([own], [grads[0].flatten()[start : start + own.numel()]])
    optimizer.step()
    assert all(p.grad is None for p in module.parameters())
    assert optimizer.grad_shard(first) is None, "a step takes the gradients"
    last.sum().backward()  # of its bucket alone, and not all of that
    assert all(bucket._held is None for bucket in optimizer._reducer.buckets)
    assert optimizer.grad_shard(first) is None
    assert optimizer.grad_shard(last) is not None
    return values(module)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gradients_are_freed_and_add_up_in_the_shard(pool, world_size):
    batches = [(r, step) for r in range(world_size) for step in range(2)]
    wanted, _ = reference(batches, divide_by=world_size)
    for got in pool(world_size).run(freed, world_size):
        assert_close(got, wanted)


def averaged_elsewhere(rank):
    with pytest.raises(ValueError, match=r"stage=2 with gradients='averaged'.*gradients='local'"):
        ShardedAdadelta(model().parameters(), policy=ShardPolicy(stage=2, gradients="averaged"))


def test_gradients_that_others_average_are_refused_on_every_rank(pool):
    pool(2).run(averaged_elsewhere)


def grad_shard_of_a_stranger(rank):
    _, optimizer = new()
    stranger = nn.Parameter(torch.zeros(2))
    p = stranger if rank == 1 else next(iter(optimizer.param_groups[0]["params"]))
    with pytest.raises((ValueError, RankError), match="not a parameter of this optimizer"):
        optimizer.grad_shard(p)


def test_a_stranger_has_no_grad_shard(pool):
    pool(2).run(grad_shard_of_a_stranger)


def uneven(rank):
    """Rank r has r backward passes; the last micro-batch of rank 2 is not even sent."""
    module, optimizer = new()
    for step in range(2):
        optimizer.zero_grad()
        for micro in range(rank):
            if (rank, micro) == (2, 1):
                with optimizer.no_sync():
                    loss_of(module, batch(rank, 10 * step + micro)).backward()
                assert all(p.grad is not None for p in module.parameters())
            else:
                loss_of(module, batch(rank, 10 * step + micro)).backward()
        optimizer.step()
    return values(module)


def test_ranks_may_have_other_numbers_of_backward_passes(pool):
    module = model()
    optimizer = Adadelta(module.parameters())
    for step in range(2):
        optimizer.zero_grad()
        for rank in range(3):
            for micro in range(rank):
                (loss_of(module, batch(rank, 10 * step + micro)) / 3).backward()
        optimizer.step()
    for got in pool(3).run(uneven):
        assert_close(got, values(module))


def zeroed(rank):
    module, optimizer = new()
    loss_of(module, batch(rank, 7)).backward()  # in flight, and to be forgotten
    optimizer.zero_grad()
    loss_of(module, batch(rank, 0)).backward()
    optimizer.step()
    return values(module)


def test_zero_grad_empties_the_shards(pool):
    wanted, _ = reference([(0, 0), (1, 0)], divide_by=2)
    for got in pool(2).run(zeroed):
        assert_close(got, wanted)


def zeroed_at_other_times(rank):
    module, optimizer = new()
    if rank == 1:
        optimizer.zero_grad()
    loss_of(module, batch(rank, 0)).backward()
    if rank == 0:
        optimizer.zero_grad()
    with pytest.raises(RankError, match=r"zero_grad after 1 backward .* zero_grad after 0"):
        optimizer.step()


def test_zero_grad_at_other_times_is_an_error_on_every_rank(pool):
    pool(2).run(zeroed_at_other_times)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("on purpose")


def after_a_failure(rank):
    """Backward fails on one rank half-way; it drops what it had and goes on."""
    module, optimizer = new()
    if rank == 0:
        with pytest.raises(ArithmeticError):
            loss_of(
                lambda x: module[2](Fails.apply(module[1](module[0](x)))), batch(rank, 5)
            ).backward()
        assert module[2].bias.grad is None
    else:
        loss_of(module, batch(rank, 5)).backward()
    for step in range(2):
        optimizer.zero_grad()
        loss_of(module, batch(rank, step)).backward()
        if step == 0:
            optimizer.step()
    optimizer.step()
    return values(module)


def test_a_backward_that_failed_is_forgotten(pool):
    module = model()
    optimizer = Adadelta(module.parameters())
    for step in range(2):
        optimizer.zero_grad()
        for rank in range(2):
            (loss_of(module, batch(rank, step)) / 2).backward()
        optimizer.step()
    for got in pool(2).run(after_a_failure):
        assert_close(got, values(module))


def unscaled(rank):
    module, optimizer = new()
    before = values(module)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(module, batch(rank, 0))).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="at stage 2 finds no gradients"):
        scaler.step(optimizer)
    assert all(map(torch.equal, before, values(module)))
    # Without it, alone too, where torch would look for gradients by itself.
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(module, batch(0, 0))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_close(values(module), reference([(0, 0)], divide_by=1)[0])


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_scaler_cannot_unscale_what_is_freed_and_need_not(pool, world_size):
    pool(world_size).run(unscaled)


def within(rank):
    """Backward within backward: reentrant checkpointing reaches the same parameter twice."""
    from torch.utils.checkpoint import checkpoint

    module, optimizer = new()
    for step in range(2):
        optimizer.zero_grad()
        inputs = batch(rank, step).requires_grad_()
        hidden = checkpoint(lambda x: module[1](module[0](x)), inputs, use_reentrant=True)
        (module[2](hidden).square().mean() + module[0].weight.square().sum()).backward()
        optimizer.step()
    return values(module)


def test_a_backward_within_backward(pool):
    module = model()
    optimizer = Adadelta(module.parameters())
    for step in range(2):
        optimizer.zero_grad()
        for rank in range(2):
            loss = loss_of(module, batch(rank, step)) + module[0].weight.square().sum()
            (loss / 2).backward()
        optimizer.step()
    for got in pool(2).run(within):
        assert_close(got, values(module))


def threads(rank):
    before = set(threading.enumerate())  # those of other tests may end meanwhile
    for _ in range(3):
        module, optimizer = new()
        loss_of(module, batch(rank, 0)).backward()
        optimizer.step()
        assert len(set(threading.enumerate()) - before) == 1
        del optimizer
        for thread in set(threading.enumerate()) - before:
            thread.join(5)
    return len(set(threading.enumerate()) - before)


def test_the_thread_ends_with_its_optimizer(pool):
    assert pool(2).run(threads) == [0, 0]


def unanswered(rank):
    """What a dropped optimizer has sent to nobody must not close the group when time is up."""
    ranks = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), process_group=ranks, policy=STAGE_2)
    if rank == 0:
        loss_of(module, batch(rank, 0)).backward()
    del optimizer
    time.sleep(2)
    dist.barrier()
    optimizer = ShardedAdadelta(module.parameters(), process_group=ranks, policy=STAGE_2)
    optimizer.zero_grad()
    loss_of(module, batch(rank, 0)).backward()
    optimizer.step()
    return values(module)


def test_what_nobody_answers_does_no_harm(pool):
    wanted, _ = reference([(0, 0), (1, 0)], divide_by=2)
    for got in pool(2).run(unanswered):
        assert_close(got, wanted)


def two_optimizers(rank, stage):
    """How far the parameters move by the second optimizer, while the first is still there."""
    p = torch.nn.Parameter(torch.ones(8))
    policy = ShardPolicy(stage=stage)
    first, second = (ShardedAdadelta([p], policy=policy) for _ in range(2))
    moved = []
    for _ in range(2):
        before = p.detach().clone()
        (p * (rank + 1.0)).sum().backward()
        second.step()
        second.zero_grad()
        moved.append((before - p.detach()).min().item())
    del first
    return min(moved)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_are_the_latest_optimizers(pool, world_size, stage):
    assert all(moved > 0 for moved in pool(world_size).run(two_optimizers, stage))


def failing_once(rank):
    """Two micro-batches, of which the first cannot be averaged."""
    module, optimizer = new()
    averages = reduction._average_in_pieces

    def fail(*args, **kwargs):
        monkeypatch.setattr(reduction, "_average_in_pieces", averages)
        raise MemoryError("no room for a piece")

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(reduction, "_average_in_pieces", fail)
        for step in range(2):
            loss_of(module, batch(rank, step)).backward()
        with pytest.raises(MemoryError, match="no room for a piece"):
            optimizer.step()


def test_what_fails_in_the_thread_is_raised_though_a_later_reduction_succeeds(pool):
    pool(2).run(failing_once)

"""Loops of unequal length under torch's `Join`."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from test_gradients import SMALL_BUCKETS, STAGE_2, batch, loss_of, model, values
from torch.distributed.algorithms.join import Join
from torch.optim import Adadelta
from torch.optim.lr_scheduler import StepLR

from adadelta_dist import ShardedAdadelta, ShardPolicy


@contextmanager
def joined(optimizers, **kwargs):
    """torch's `Join`, which changes the process's filters of warnings when it ends."""
    with warnings.catch_warnings(), Join(optimizers, **kwargs):
        yield


def lengths(rank):
    """Rank 1 has no inputs at all."""
    return (4, 0, 2)[rank]


def uneven(rank, policy, scaled):
    module = model(torch.float32 if scaled else torch.float64)
    optimizer = ShardedAdadelta(module.parameters(), policy=policy)
    scheduler = StepLR(optimizer, 1, gamma=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
    hooks = []
    optimizer.register_step_post_hook(lambda *_: hooks.append(1))
    with joined([optimizer]):
        for step in range(lengths(rank)):
            optimizer.zero_grad()
            inputs = batch(rank, step, torch.float32 if scaled else torch.float64)
            scaler.scale(loss_of(module, inputs)).backward()
            optimizer.clip_grad_norm_(0.05 * (scaler.get_scale() if scaled else 1))
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
    assert len(hooks) == lengths(rank)
    return values(module)


def one_process():
    module = model()
    optimizer = Adadelta(module.parameters())
    scheduler = StepLR(optimizer, 1, gamma=0.5)
    for step in range(4):
        optimizer.zero_grad()
        for rank in range(3):
            if step < lengths(rank):
                (loss_of(module, batch(rank, step)) / 3).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.05)
        optimizer.step()
        scheduler.step()
    return values(module)


@pytest.mark.parametrize("policy", [SMALL_BUCKETS, ShardPolicy(overlap=False), STAGE_2])
@pytest.mark.parametrize("scaled", [False, True])
def test_ranks_that_have_ended_follow_the_others(pool, policy, scaled):
    for got in pool(3).run(uneven, policy, scaled):
        for a, b in zip(got, one_process(), strict=True):
            tolerance = {"rtol": 1e-4, "atol": 1e-5} if scaled else {"rtol": 1e-12, "atol": 1e-14}
            torch.testing.assert_close(a.double(), b, **tolerance)


def averaged(rank):
    optimizer = ShardedAdadelta(model().parameters(), policy=ShardPolicy(gradients="averaged"))
    with pytest.raises(ValueError, match="never receives their averages"):
        Join([optimizer])


def test_averages_do_not_reach_a_rank_that_has_ended(pool):
    pool(2).run(averaged)


def loop(rank, optimizer, module, early):
    with joined([optimizer], throw_on_early_termination=early):
        for step in range(rank if not early else 1 + rank):
            optimizer.zero_grad()
            loss_of(module, batch(rank, step)).backward()
            if not early:
                module[0].weight.grad = torch.zeros(5, 6, dtype=torch.float64).to_sparse()
            optimizer.step()


def failing(rank, early, words):
    module = model()
    optimizer = ShardedAdadelta(module.parameters())
    with pytest.raises(RuntimeError, match=words):
        loop(rank, optimizer, module, early)


def test_an_early_end_is_an_error_where_that_is_asked_for(pool):
    pool(2).run(failing, True, r"exhausted all inputs|Detected at least one rank that exhausted")


def test_an_error_reaches_those_that_have_ended(pool):
    pool(2).run(failing, False, "Adadelta does not support sparse gradients")


def scheduled(rank):
    """Learning rates after each of two epochs, of unequal length."""
    optimizer = ShardedAdadelta(model().parameters())
    scheduler = StepLR(optimizer, 1, gamma=0.5)
    rates = []
    for _ in range(2):
        with joined([optimizer]):
            for _ in range(1 + rank):
                optimizer.zero_grad()
                optimizer.param_groups[0]["params"][0].sum().backward()
                optimizer.step()
                scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_what_a_scheduler_sets_at_the_end_reaches_all(pool):
    assert pool(2).run(scheduled) == [[0.25, 0.0625]] * 2


def left_over(rank, policy):
    """Rank 1 ends with a backward that no step followed."""
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=policy)
    with joined([optimizer]):
        for step in range((4, 3)[rank]):
            loss_of(module, batch(rank, step)).backward()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
    return values(module)


@pytest.mark.parametrize("policy", [SMALL_BUCKETS, STAGE_2])
def test_ranks_agree_where_one_ends_with_gradients_left_over(pool, policy):
    for got in pool(2).run(left_over, policy):
        for a, b in zip(got, one_process_left_over(policy.stage), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def one_process_left_over(stage):
    """At stage 2 what was sent counts with the others' next step; at stage 1 nothing was."""
    module = model()
    optimizer = Adadelta(module.parameters())
    for steps in ((0, 1), (2, 3)):
        optimizer.zero_grad()
        for rank in range(2):
            for step in steps:
                if step < (4, 3)[rank] and not (rank == 1 and step == 2 and stage == 1):
                    (loss_of(module, batch(rank, step)) / 2).backward()
        optimizer.step()
    return values(module)


def with_a_tensor(rank):
    """Whether `lr` is still the user's own tensor, and its value, when all have ended."""
    lr = torch.tensor(1.0)
    optimizer = ShardedAdadelta(model().parameters(), lr=lr)
    with joined([optimizer]):
        for _ in range(1 + rank):
            optimizer.zero_grad()
            optimizer.param_groups[0]["params"][0].sum().backward()
            optimizer.step()
            lr.mul_(0.5)
    return optimizer.param_groups[0]["lr"] is lr, lr.item()


def test_a_tensor_of_the_users_is_written_not_replaced(pool):
    assert pool(2).run(with_a_tensor) == [(True, 0.25)] * 2

"""Edits that no version counter sees, and norms."""

import warnings
from itertools import permutations

import pytest
import torch

from adadelta_dist import ShardedAdadelta, ShardPolicy

# Of float64 they change the sum of 8-byte words by a multiple of 2**64.
EDITS = {"half": lambda grad: grad.mul_(0.5), "negative": lambda grad: grad.neg_()}
NUMEL = 2**13


def edited(rank, edit):
    """Ours after an edit through `.data`, and torch's with the average of such gradients."""
    ours, theirs = (torch.nn.Parameter(torch.ones(NUMEL, dtype=torch.float64)) for _ in range(2))
    optimizer, control = ShardedAdadelta([ours]), torch.optim.Adadelta([theirs])
    slope = torch.linspace(-1e-3, 2e-3, NUMEL, dtype=torch.float64)
    (ours * slope * (rank + 1)).sum().backward()
    EDITS[edit](ours.grad.data)
    theirs.grad = EDITS[edit](slope * 1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    control.step()
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize("edit", EDITS)
def test_they_are_noticed(pool, edit):
    assert max(pool(2).run(edited, edit)) < 1e-12


def edited_after_a_look(rank, policy, by):
    """Ours after an edit through `.data` between `grad_shard` and the step, and torch's."""
    ours, theirs = (torch.nn.Parameter(torch.ones(8)) for _ in range(2))
    optimizer, control = ShardedAdadelta([ours], policy=policy), torch.optim.Adadelta([theirs])
    theirs.grad = torch.full((8,), 1e-3)
    if by == "backward":
        (ours * 64).sum().backward()
    else:
        ours.grad = torch.full((8,), 64.0)
    looked_at = optimizer.grad_shard(ours)
    seen = getattr(looked_at, "local", looked_at).unique().tolist()
    ours.grad.data.fill_(1e-3)  # as `GradScaler.unscale_`: its version stays
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    control.step()
    return seen, torch.equal(ours, theirs)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("gradients", ["local", "averaged"])
@pytest.mark.parametrize("by", ["backward", "hand"])
def test_so_are_those_after_a_look_at_the_average(pool, by, gradients, world_size):
    policy = ShardPolicy(overlap=False, gradients=gradients)
    assert pool(world_size).run(edited_after_a_look, policy, by) == [([64.0], True)] * world_size


def complex_norm(rank, dtypes):
    params = [torch.nn.Parameter(torch.ones(4, dtype=d)) for d in dtypes]
    optimizer = ShardedAdadelta(params)
    for p in params:
        p.grad = torch.ones_like(p)
    norm = optimizer.clip_grad_norm_(1.0)
    return norm.item(), norm.dtype


@pytest.mark.parametrize("dtypes", list(permutations((torch.float32, torch.complex64))))
def test_norms_of_complex_shards(pool, dtypes):
    wanted = pytest.approx(8**0.5), torch.float32
    assert pool(2).run(complex_norm, dtypes) == [wanted] * 2


def infinity_norm(rank):
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = ShardedAdadelta([p])
    p.grad = torch.tensor([1.0, -3.0, 0.0, 2.0])
    return optimizer.clip_grad_norm_(1.0, "inf").item()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_norm_may_be_a_word_as_in_torch(pool, world_size):
    assert pool(world_size).run(infinity_norm) == [3.0] * world_size


def norm_of_nothing(rank):
    optimizer = ShardedAdadelta([{"params": []}])
    return optimizer.clip_grad_norm_(1.0).item()


def test_a_norm_of_nothing_is_zero_as_in_torch(pool):
    assert pool(2).run(norm_of_nothing) == [0.0, 0.0]

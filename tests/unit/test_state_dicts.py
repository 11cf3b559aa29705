"""Gathering, scattering and consolidating with one rank, where nobody answers."""

import copy

import pytest
import torch
from checkpoints import assert_same, build, train

from adadelta_dist import ShardedAdadelta


def sharded(**kwargs):
    return build(cls=ShardedAdadelta, brain=torch.float64, **kwargs)


def test_gathered_is_torchs_own_and_scatters_back():
    module, optimizer = sharded()
    gathered = optimizer.gather_state_dict()
    other, control = build(steps=1, brain=torch.float64)
    control.load_state_dict(gathered)
    other.load_state_dict(module.state_dict())
    assert_same((module, optimizer), (other, control))
    train(module, optimizer, [5])
    got = sharded(seed=1, steps=1)
    got[1].scatter_state_dict(gathered)
    got[0].load_state_dict(sharded()[0].state_dict())
    assert_same(got, sharded())


def test_gathered_is_memory_of_its_own():
    module, optimizer = sharded()
    gathered = optimizer.gather_state_dict(0)
    before = copy.deepcopy(gathered["state"])
    train(module, optimizer, [5])
    for i, entry in before.items():
        for key, value in entry.items():
            assert torch.equal(gathered["state"][i][key], value), key


@pytest.mark.parametrize("nothing", [None, {}])
def test_the_only_rank_must_have_the_state(nothing):
    module, optimizer = sharded()
    with pytest.raises(ValueError, match=r"state_dict on rank 0 is .* wanted the whole state"):
        optimizer.scatter_state_dict(nothing)
    assert_same((module, optimizer), sharded())


@pytest.mark.parametrize("rank", [-1, 1])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("dst", lambda o, rank: o.gather_state_dict(rank)),
        ("src", lambda o, rank: o.scatter_state_dict(o.state_dict(), rank)),
        ("to", lambda o, rank: o.consolidate_state_dict(rank)),
    ],
)
def test_other_ranks_are_refused(name, call, rank):
    with pytest.raises(ValueError, match=f"{name} must be a rank below 1, got {rank}"):
        call(sharded()[1], rank)


def test_hooks_see_what_leaves_and_enters():
    _, optimizer = sharded()
    seen = []
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("leaving"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("entering"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("entered"))
    optimizer.scatter_state_dict(optimizer.gather_state_dict())
    assert seen == ["leaving", "entering", "entered"]

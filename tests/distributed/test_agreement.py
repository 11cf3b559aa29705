"""Ranks agree, or all of them fail, within seconds and with a reason."""

import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailure, Ranks
from torch import nn

from adadelta_dist import RankError, ShardedAdadelta, ShardPolicy


def failure(function):
    """The error that `function` raises, and the seconds it took."""
    start = time.monotonic()
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "none", "", time.monotonic() - start


def build(rank, odd_rank, names, kwargs):
    """Every rank but `odd_rank` builds from names[0] / kwargs[0], that one from the others."""
    which = int(rank == odd_rank)
    params = [(name, nn.Parameter(torch.zeros(*shape, dtype=d))) for name, shape, d in names[which]]
    return failure(lambda: ShardedAdadelta(params, **kwargs[which]))


BASE = [("weight", (3, 2), torch.float32), ("bias", (3,), torch.float32)]
OTHERS = {
    "shape": ([BASE[0], ("bias", (4,), torch.float32)], "(3,)", "(4,)"),
    "name": ([BASE[0], ("beta", (3,), torch.float32)], "bias", "beta"),
    "dtype": ([BASE[0], ("bias", (3,), torch.float64)], "float32", "float64"),
    "order": ([BASE[1], BASE[0]], "weight", "bias"),
    "missing": ([BASE[0]], "bias", "lr"),
    "more": ([*BASE, ("more", (1,), torch.float32)], "lr", "more"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_parameters_are_an_error_on_every_rank(pool, what):
    odd, here, there = OTHERS[what]
    for kind, message, seconds in pool(3).run(build, 2, (BASE, odd), ({}, {})):
        assert kind == "RankError"
        assert "the ranks disagree. Rank 0 has" in message
        assert "rank 2 has" in message
        assert here in message
        assert there in message
        assert seconds < 15  # a busy machine; the process group's timeout is 30


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 0.5), ("rho", 0.95), ("eps", 1e-3), ("weight_decay", 0.1), ("maximize", True)],
)
def test_other_hyperparameters_are_an_error_on_every_rank(pool, name, value):
    for kind, message, _ in pool(2).run(build, 1, (BASE, BASE), ({}, {name: value})):
        assert kind == "RankError"
        assert f"{name}={float(value)}" in message


def test_another_policy_is_an_error_on_every_rank(pool):
    kwargs = ({}, {"policy": ShardPolicy(bucket_mb=1)})
    assert [kind for kind, *_ in pool(2).run(build, 1, (BASE, BASE), kwargs)] == ["RankError"] * 2


def test_a_wrong_value_on_one_rank_raises_torchs_message_there_and_a_quote_elsewhere(pool):
    other, own = pool(2).run(build, 1, (BASE, BASE), ({}, {"lr": -1.0}))
    assert own[:2] == ("ValueError", "Invalid learning rate: -1.0")
    assert other[0] == "RankError"
    assert "rank 1 failed with ValueError: Invalid learning rate: -1.0" in other[1]
    assert "this is rank 0" in other[1]


@pytest.mark.parametrize(
    "kwargs",
    [{"lr": -1.0}, {"rho": 1.5}, {"eps": -1.0}, {"weight_decay": -1.0}],
)
def test_a_wrong_value_everywhere_raises_torchs_message_everywhere(pool, kwargs):
    with pytest.raises(ValueError, match="Invalid") as torchs:
        torch.optim.Adadelta([torch.zeros(1)], **kwargs)
    for kind, message, _ in pool(2).run(build, 0, (BASE, BASE), (kwargs, kwargs)):
        assert (kind, message) == ("ValueError", str(torchs.value))


def plateau(rank):
    """ReduceLROnPlateau fed with each rank's own metric: the classic silent divergence."""
    p = nn.Parameter(torch.ones(4))
    optimizer = ShardedAdadelta([p])
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    p.sum().backward()
    optimizer.step()
    for metric in (1.0, 2.0):
        scheduler.step(metric if rank else 1.0 / metric)
    before = p.detach().clone()
    return *failure(optimizer.step), torch.equal(before, p)


def test_hyperparameters_that_drift_apart_are_noticed_at_the_next_step(pool):
    for kind, message, _, unchanged in pool(2).run(plateau):
        assert kind == "RankError"
        assert "group 0: lr=1.0" in message
        assert "group 0: lr=0.1" in message
        assert unchanged


def moved(rank):
    module = nn.Linear(3, 2)
    optimizer = ShardedAdadelta(module.named_parameters())
    if rank == 1:
        module.to(torch.float64)
    return failure(optimizer.step)


def test_parameters_cast_after_construction_are_an_error_with_the_remedy(pool):
    other, own = pool(2).run(moved)
    assert own[0] == "RuntimeError"
    assert "bias was (2,), torch.float32, on cpu" in own[1]
    assert "Build the optimizer last" in own[1]
    assert other[0] == "RankError"
    assert "rank 1 failed with RuntimeError: bias" in other[1]


def wrong_state(rank):
    p = nn.Parameter(torch.ones(4))
    optimizer = ShardedAdadelta([p])
    if rank == 1:
        optimizer.state[p] = {"exp_avg": torch.zeros(4)}
    return failure(optimizer.step)


def test_a_broken_state_on_one_rank_is_an_error_on_every_rank(pool):
    other, own = pool(2).run(wrong_state)
    assert own[0] == "ValueError"
    assert "another optimizer" in own[1]
    assert other[0] == "RankError"


def add_group(rank, bad_rank):
    p = nn.Parameter(torch.ones(5))
    optimizer = ShardedAdadelta([p])
    added = nn.Parameter(torch.full((3,), float(rank)))
    lr = -1.0 if rank == bad_rank else 0.5
    caught = failure(lambda: optimizer.add_param_group({"params": [added], "lr": lr}))
    (p.sum() + (rank + 1) * added.sum()).backward()
    optimizer.step()
    return caught[:2], len(optimizer.param_groups), added.detach().clone(), p.detach().clone()


def test_add_param_group_in_mid_training(pool):
    results = pool(2).run(add_group, None)
    p, added = nn.Parameter(torch.ones(5)), nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adadelta([{"params": [p]}, {"params": [added], "lr": 0.5}])
    (p.sum() + 1.5 * added.sum()).backward()
    optimizer.step()
    for caught, groups, got, got_p in results:
        assert (caught[0], groups) == ("none", 2)
        assert torch.equal(got, added)
        assert torch.equal(got_p, p)


def test_a_bad_group_on_one_rank_changes_nothing_on_any(pool):
    for rank, (caught, groups, added, _) in enumerate(pool(2).run(add_group, 1)):
        assert caught[0] == ("ValueError" if rank else "RankError")
        assert groups == 1
        assert torch.equal(added, torch.full((3,), float(rank)))


def closure_raises(rank):
    p = nn.Parameter(torch.ones(5))
    optimizer = ShardedAdadelta([p])

    def closure():
        if rank == 1:
            raise KeyError("the data loader broke")
        optimizer.zero_grad()
        loss = p.sum()
        loss.backward()
        return loss

    start = time.monotonic()
    try:
        optimizer.step(closure)
    except KeyError as error:
        return "own", str(error), time.monotonic() - start
    except RuntimeError as error:
        return "comm", type(error).__name__, time.monotonic() - start


def test_a_rank_that_raises_in_its_closure_keeps_its_own_error():
    """The others wait for it no longer than the process group's timeout."""
    ranks = Ranks(2, timeout=3.0)
    try:
        other, own = ranks.run(closure_raises)
    finally:
        ranks.close()
    assert own[:2] == ("own", "'the data loader broke'")
    assert own[2] < 1
    assert other[0] == "comm"
    assert other[2] < 6


def rank_dies(rank):
    p = nn.Parameter(torch.ones(5))
    optimizer = ShardedAdadelta([p])
    if rank == 1:
        raise SystemExit(3)
    p.sum().backward()
    optimizer.step()


def test_the_harness_reports_the_first_traceback(pool):
    with pytest.raises(RankFailure, match="SystemExit: 3"):
        pool(2).run(rank_dies)


def subgroup(rank):
    """Two groups of two in a world of four, each with its own data."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = groups[rank % 2]
    p = nn.Parameter(torch.full((7,), float(rank)))
    optimizer = ShardedAdadelta([p], process_group=mine)
    start = p.detach().clone()
    for step in range(3):
        optimizer.zero_grad()
        (p * (rank + step + 1)).sum().backward()
        optimizer.step()
    outsider = failure(lambda: ShardedAdadelta([p], process_group=groups[1 - rank % 2]))
    return start, p.detach().clone(), outsider[:2]


def test_subgroups_of_ranks_train_on_their_own(pool):
    results = pool(4).run(subgroup)
    for rank, (start, got, outsider) in enumerate(results):
        assert torch.equal(start, torch.full((7,), float(rank % 2)))
        p = nn.Parameter(start.clone())
        optimizer = torch.optim.Adadelta([p])
        for step in range(3):
            p.grad = torch.full((7,), float(rank % 2 + 1 + step + 1))
            optimizer.step()
        assert torch.equal(got, p)
        assert outsider[0] == "ValueError"
        assert "not a member" in outsider[1]


def test_rank_error_is_a_runtime_error():
    assert issubclass(RankError, RuntimeError)

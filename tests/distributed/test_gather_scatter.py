"""The whole state on one rank, and back: `gather_state_dict` and `scatter_state_dict`."""

import copy

import pytest
import torch
from test_gradients import batch, loss_of, model
from torch import nn

from adadelta_dist import FlatSlice, RankError, ShardedAdadelta, ShardPolicy

TINY_BUCKETS = ShardPolicy(bucket_mb=1e-4)


def parameters():
    """Every kind that a state dict may hold, deterministic."""
    torch.manual_seed(0)
    frozen = nn.Parameter(torch.randn(3, 2), requires_grad=False)
    return [
        nn.Parameter(torch.randn(5, 6)),
        nn.Parameter(torch.randn(())),
        nn.Parameter(torch.empty(0, 3)),
        nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(7, dtype=torch.complex64)),
        nn.Parameter(torch.randn(4, 3, dtype=torch.float64)),
        frozen,
    ]


def groups_of(params):
    return [{"params": params[:3], "lr": 0.5}, {"params": params[3:], "rho": 0.8}]


def train(params, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        for i, p in enumerate(params):
            if p.requires_grad:
                p.grad = torch.full_like(p, 0.1 * (i + 1) * (-1) ** step)
        optimizer.step()


def one_process(steps):
    params = parameters()
    optimizer = torch.optim.Adadelta(groups_of(params))
    train(params, optimizer, range(steps))
    return params, optimizer


def assert_state_equal(got, wanted):
    assert got["param_groups"] == wanted["param_groups"]
    for key, entry in wanted["state"].items():
        assert list(got["state"][key]) == list(entry)
        for name, value in entry.items():
            mine = got["state"][key][name]
            assert mine.device.type == "cpu"
            assert (mine.dtype, mine.shape) == (value.dtype, value.shape)
            assert torch.equal(mine, value), (key, name)


def gather(rank, dst):
    params = parameters()
    optimizer = ShardedAdadelta(groups_of(params), policy=TINY_BUCKETS)
    train(params, optimizer, range(3))
    gathered = optimizer.gather_state_dict(dst)
    kept = copy.deepcopy(gathered)
    train(params, optimizer, range(3, 4))
    assert str(kept) == str(gathered)  # in memory of its own
    own = optimizer.state_dict()["state"][0]["square_avg"]
    assert optimizer._group.world_size == 1 or isinstance(own, FlatSlice)
    return gathered


@pytest.mark.parametrize(("world_size", "dst"), [(1, 0), (2, 0), (3, 2), (4, 1)])
def test_gather_is_torchs_state_dict_on_one_rank_and_nothing_elsewhere(pool, world_size, dst):
    results = pool(world_size).run(gather, dst)
    _, optimizer = one_process(3)
    wanted = optimizer.state_dict()
    got = results.pop(dst)
    assert results == [{}] * (world_size - 1)
    frozen = got["state"].pop(6)  # torch has no entry where there never was a gradient
    assert not any(value.any() for value in frozen.values())
    assert_state_equal(got, wanted)


def scatter(rank, state_dict, src):
    params = parameters()
    optimizer = ShardedAdadelta(groups_of(params), policy=TINY_BUCKETS)
    train(params, optimizer, range(1))  # something to overwrite
    calls = []
    optimizer.register_load_state_dict_pre_hook(lambda o, sd: calls.append("pre"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("post"))
    optimizer.scatter_state_dict(state_dict if rank == src else None, src)
    assert calls == (["pre", "post"] if rank == src else ["post"])
    return optimizer.gather_state_dict(src), [g["lr"] for g in optimizer.param_groups]


@pytest.mark.parametrize(("world_size", "src"), [(1, 0), (2, 1), (3, 0), (4, 3)])
def test_scatter_gives_every_rank_its_slices_of_torchs_state(pool, world_size, src):
    _, optimizer = one_process(3)
    optimizer.param_groups[0]["lr"] = 0.25
    wanted = optimizer.state_dict()
    before = copy.deepcopy(wanted)
    results = pool(world_size).run(scatter, wanted, src)
    assert str(before) == str(wanted)
    got = results[src][0]
    frozen = got["state"].pop(6)
    assert not any(value.any() for value in frozen.values())
    assert_state_equal(got, wanted)
    assert [lrs for _, lrs in results] == [[0.25, 1.0]] * world_size


def round_trip(rank):
    """Gather, scatter into another layout, and train on; beside one that never stopped."""
    torch.manual_seed(0)
    module, twin = model(), model()
    twin.load_state_dict(module.state_dict())
    optimizer = ShardedAdadelta(module.parameters())
    for step in range(4):
        if step == 2:
            whole = optimizer.gather_state_dict(1)
            twin.load_state_dict(module.state_dict())
            resumed = ShardedAdadelta(twin.parameters(), policy=TINY_BUCKETS)
            resumed.scatter_state_dict(whole, 1)
        for m, o in [(module, optimizer)] + ([(twin, resumed)] if step >= 2 else []):
            o.zero_grad()
            loss_of(m, batch(rank, step)).backward()
            o.step()
    pairs = zip(module.parameters(), twin.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("world_size", [2, 3])
def test_training_goes_on_bitwise_after_a_round_trip(pool, world_size):
    assert pool(world_size).run(round_trip) == [True] * world_size


def bad_scatter(rank, break_it):
    params = parameters()
    optimizer = ShardedAdadelta(groups_of(params))
    train(params, optimizer, range(2))
    whole = optimizer.gather_state_dict(0)
    before = copy.deepcopy(optimizer.state_dict())
    src, state_dict = break_it(rank, whole)
    try:
        optimizer.scatter_state_dict(state_dict, src)
    except (ValueError, RankError) as error:
        same = str(before) == str(optimizer.state_dict())
        return type(error).__name__, str(error), same
    return None


def drop_key(rank, whole):
    if rank == 0:
        del whole["state"][0]["acc_delta"]
    return 0, whole


def other_shape(rank, whole):
    if rank == 0:
        whole["state"][3]["acc_delta"] = torch.zeros(3)
    return 0, whole


def other_groups(rank, whole):
    if rank == 0:
        whole["param_groups"].pop()
    return 0, whole


def no_source(rank, whole):
    return 0, None


def two_sources(rank, whole):
    return 0, whole or {"state": {}, "param_groups": []}


def no_such_rank(rank, whole):
    return 2, None


def two_minds(rank, whole):
    return rank, {"state": {}, "param_groups": []}


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (drop_key, "saved by another optimizer, or is incomplete"),
        (other_shape, "another model"),
        (other_groups, "different number of parameter groups"),
        (no_source, "wanted the whole state: src=0 alone has it"),
        (two_sources, "state_dict on rank 1 is dict of 2 entries, wanted None"),
        (no_such_rank, "src must be a rank below 2, got 2"),
        (two_minds, "different number of parameter groups"),
    ],
)
def test_a_state_that_does_not_fit_is_an_error_on_all_ranks_and_changes_nothing(
    pool, break_it, words
):
    for name, message, same in pool(2).run(bad_scatter, break_it):
        assert words in message, (name, message)
        assert same


def slices_from_src(rank):
    optimizer = ShardedAdadelta(parameters())
    try:
        optimizer.scatter_state_dict(optimizer.state_dict() if rank == 0 else None)
    except (ValueError, RankError) as error:
        return str(error)
    return None


def test_slices_are_no_whole_state(pool):
    for message in pool(2).run(slices_from_src):
        assert "wanted the whole state" in message


def scatter_code(rank):
    optimizer = ShardedAdadelta([torch.nn.Parameter(torch.ones(3))])
    whole = optimizer.gather_state_dict()
    if rank == 0:
        whole["param_groups"][0]["schedule"] = lambda step: 0.1 * step
    try:
        optimizer.scatter_state_dict(whole or None)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_hyperparameters_that_cannot_be_sent_leave_no_rank_waiting(pool):
    for message in pool(2).run(scatter_code):
        assert "Can't pickle" in message


def scatter_nothing(rank):
    optimizer = ShardedAdadelta([{"params": []}])
    whole = optimizer.gather_state_dict()
    if rank == 0:
        whole["param_groups"][0]["lr"] = 0.25
    optimizer.scatter_state_dict(whole or None)
    return optimizer.param_groups[0]["lr"]


def test_groups_that_are_all_empty_have_hyperparameters(pool):
    assert pool(2).run(scatter_nothing) == [0.25, 0.25]

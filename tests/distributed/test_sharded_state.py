"""State: sharded, consolidated, loaded at any world size, refused where it would be lost."""

import copy
import io
import pickle

import pytest
import torch
from equivalence import Case, Group, assert_same, control, experiment
from test_gradients import batch, loss_of, model, reference, values
from torch import nn

from adadelta_dist import Adadelta, FlatSlice, ShardedAdadelta, ShardPolicy

WORLDS = [1, 2, 3, 4]
SMALL_BUCKETS = ShardPolicy(bucket_mb=1e-4)


def state_bytes(rank):
    module = nn.Sequential(nn.Linear(500, 300), nn.Linear(300, 10))
    optimizer = ShardedAdadelta(module.parameters())
    entries = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, FlatSlice)]
    assert len(entries) == 8
    storages = {v.local.untyped_storage().data_ptr(): v.local for v in entries if v.local.numel()}
    held = sum(v.untyped_storage().nbytes() for v in storages.values())
    return held, sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_state_bytes_per_rank(pool, world_size):
    for held, numel in pool(world_size).run(state_bytes):
        assert 8 * numel / world_size <= held <= 8 * numel / world_size + 2 * 16 * 5


def tiny(rank):
    """Fewer elements than ranks: some shards are empty."""
    params = [
        nn.Parameter(torch.ones(())),
        nn.Parameter(torch.ones(2)),
        nn.Parameter(torch.ones(0)),
    ]
    optimizer = ShardedAdadelta(params)
    sum(p.sum() for p in params).backward()
    optimizer.step()
    return [p.detach().clone() for p in params], [
        optimizer.state[p]["square_avg"].local.numel() for p in params
    ]


def test_empty_shards(pool):
    params = [
        nn.Parameter(torch.ones(())),
        nn.Parameter(torch.ones(2)),
        nn.Parameter(torch.ones(0)),
    ]
    optimizer = torch.optim.Adadelta(params)
    sum(p.sum() for p in params).backward()
    optimizer.step()
    results = pool(4).run(tiny)
    for got, _ in results:
        assert all(torch.equal(a, b) for a, b in zip(got, params, strict=True))
    assert [sum(numels) for numels in zip(*(n for _, n in results), strict=True)] == [1, 2, 0]


def slices(rank):
    module = model()
    optimizer = ShardedAdadelta(module.named_parameters())
    loss_of(module, batch(rank, 0)).backward()
    optimizer.step()
    state_dict = optimizer.state_dict()
    messages = []
    for save in (
        lambda: torch.save(state_dict, io.BytesIO()),
        lambda: pickle.dumps(optimizer),
        lambda: state_dict["state"][0]["square_avg"] + 1,
    ):
        try:
            save()
        except (TypeError, NotImplementedError) as error:
            messages.append(str(error))
    twin = copy.deepcopy(state_dict)  # the slices can be copied: nothing is lost
    optimizer.load_state_dict(twin)
    entry = state_dict["state"][0]["square_avg"]
    return messages, entry.shape, entry.local.clone(), state_dict["param_groups"][0]["param_names"]


def test_a_sharded_state_dict_has_slices_and_cannot_be_pickled(pool):
    results = pool(2).run(slices)
    for messages, shape, _, names in results:
        assert shape == (5, 6)
        assert names == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert len(messages) == 3
        assert all("gather_state_dict" in message for message in messages)
    pieces = torch.cat([local for _, _, local, _ in results])
    assert pieces.numel() == 30


def full_round_trip(rank, state_dict, steps, to):
    """Load torch's whole state, train on, and give it back from rank `to`."""
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=SMALL_BUCKETS)
    module.load_state_dict(state_dict["model"])
    before = copy.deepcopy(state_dict["optimizer"])
    optimizer.load_state_dict(state_dict["optimizer"])
    assert str(before) == str(state_dict["optimizer"])
    for step in steps:
        optimizer.zero_grad()
        loss_of(module, batch(0, 10 * step)).backward()  # the same batch on every rank
        optimizer.step()
    optimizer.consolidate_state_dict(to=to)
    whole = optimizer.state_dict()
    optimizer.zero_grad()
    loss_of(module, batch(0, 0)).backward()
    optimizer.step()
    sharded_again = isinstance(optimizer.state_dict()["state"][0]["square_avg"], FlatSlice)
    if rank != to:
        return None
    # Equal gradients on n ranks average to themselves exactly for n = 2 and 4 alone.
    return {"optimizer": whole}, sharded_again


@pytest.mark.parametrize("world_size", [2, 4])
def test_torch_to_n_ranks_and_back_continues_bitwise(pool, world_size):
    module = model()
    optimizer = torch.optim.Adadelta(module.parameters(), rho=0.8)
    snapshot = None
    for step in range(4):
        if step == 2:
            snapshot = copy.deepcopy(
                {"model": module.state_dict(), "optimizer": optimizer.state_dict()}
            )
        optimizer.zero_grad()
        loss_of(module, batch(0, 10 * step)).backward()
        optimizer.step()
    results = pool(world_size).run(full_round_trip, snapshot, (2, 3), 1)
    got, sharded_again = results[1]
    assert sharded_again
    wanted = optimizer.state_dict()
    assert got["optimizer"]["param_groups"][0]["rho"] == 0.8
    for index, entry in wanted["state"].items():
        for key, value in entry.items():
            assert torch.equal(got["optimizer"]["state"][index][key], value)
    torch.optim.Adadelta(model().parameters()).load_state_dict(got["optimizer"])


@pytest.mark.parametrize("world_size", WORLDS)
def test_consolidated_state_has_torchs_strides_and_keys(pool, world_size):
    group = Group(((4, 3, 2), (5,)), {}, torch.float64, transposed=True)
    case = Case((group,), (((True, True),) * world_size,) * 2)
    results = pool(world_size).run(experiment, case)
    assert_same(case, results)
    for index, entry in control(case)[1]["state"].items():
        for key, value in entry.items():
            assert results[0][1]["state"][index][key].stride() == value.stride()


def bad_loads(rank):
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=SMALL_BUCKETS)
    loss_of(module, batch(rank, 0)).backward()
    optimizer.step()
    optimizer.consolidate_state_dict(to=0)
    optimizer.consolidate_state_dict(to=1)
    good = Adadelta(model().parameters()).state_dict()
    before = [v.local.clone() for s in optimizer.state.values() for v in list(s.values())[1:]]
    adam = torch.optim.Adam(model().parameters())
    loss_of(module, batch(0, 0)).backward()
    for p, q in zip(adam.param_groups[0]["params"], module.parameters(), strict=True):
        p.grad = q.grad.clone()
    adam.step()
    missing_group = good | {"param_groups": []}
    negative = good | {"param_groups": [good["param_groups"][0] | {"lr": -2.0}]}
    zeros = {"step": torch.zeros(()), "square_avg": torch.zeros(9), "acc_delta": torch.zeros(9)}
    shapes = good | {"state": {0: zeros}}
    mine_only = good | {"param_groups": [good["param_groups"][0] | {"lr": 1.0 + rank}]}
    errors = []
    for bad in (adam.state_dict(), missing_group, negative, shapes, mine_only):
        try:
            optimizer.load_state_dict(bad)
        except (ValueError, RuntimeError) as error:
            errors.append(str(error))
    after = [v.local.clone() for s in optimizer.state.values() for v in list(s.values())[1:]]
    return errors, all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_bad_state_dicts_are_refused_with_reasons_and_change_nothing(pool):
    for errors, unchanged in pool(2).run(bad_loads):
        adam, groups, negative, shapes, ranks = errors
        assert "exp_avg" in adam
        assert "another optimizer" in adam
        assert groups == "loaded state dict has a different number of parameter groups"
        assert negative == "Invalid learning rate: -2.0"
        assert "wanted (5, 6)" in shapes
        assert "the ranks disagree" in ranks
        assert unchanged


def copied(rank):
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=SMALL_BUCKETS)
    loss_of(module, batch(rank, 0)).backward()
    optimizer.step()
    twin_module, twin = copy.deepcopy((module, optimizer))
    for m, o in ((module, optimizer), (twin_module, twin)):
        o.zero_grad()
        loss_of(m, batch(rank, 10)).backward()
        o.step()
    return values(module), values(twin_module)


def test_a_deep_copy_trains_on_like_the_original(pool):
    for original, twin in pool(2).run(copied):
        assert all(torch.equal(a, b) for a, b in zip(original, twin, strict=True))


def replaced_entries(rank):
    """What Lightning does after loading: every state entry is replaced by a moved copy."""
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=SMALL_BUCKETS)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(module, batch(rank, 10 * step)).backward()
        optimizer.step()
        for p, entry in optimizer.state.items():
            optimizer.state[p] = {key: value.clone() for key, value in entry.items()}
    return values(module)


def test_replaced_state_entries_are_adopted(pool):
    for got in pool(2).run(replaced_entries):
        for a, b in zip(got, reference(2, 3), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def written_parameters(rank):
    """Users write into parameters, or replace their storage, between steps."""
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=SMALL_BUCKETS)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(module, batch(rank, 10 * step)).backward()
        optimizer.step()
        with torch.no_grad():
            module[0].weight.clamp_(-0.1, 0.1)
            module[2].weight.data = module[2].weight.data * 0.5
    return values(module)


def test_what_users_write_into_parameters_counts(pool):
    module = model()
    optimizer = torch.optim.Adadelta(module.parameters())
    for step in range(3):
        optimizer.zero_grad()
        for rank in range(2):
            (loss_of(module, batch(rank, 10 * step)) / 2).backward()
        optimizer.step()
        with torch.no_grad():
            module[0].weight.clamp_(-0.1, 0.1)
            module[2].weight.data = module[2].weight.data * 0.5
    for got in pool(2).run(written_parameters):
        for a, b in zip(got, values(module), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)

"""State is allocated in one piece, and what is loaded into it is checked first."""

import copy

import pytest
import torch
from torch import nn
from trajectory import assert_equal, message_of, parameters, train

from adadelta_dist import ShardedAdadelta, ShardPolicy, state
from adadelta_dist.buckets import FlatBucket
from adadelta_dist.collectives import Group
from adadelta_dist.functional import ACCUMULATORS
from adadelta_dist.layout import Interval, ParamSpec, plan_layout

NAMES = ["second", "first"]  # slots come in reverse order


def shard_of(*shapes, dtype=torch.float32, world_size=1, rank=0):
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    (plan,) = plan_layout(
        [ParamSpec(p.numel(), dtype.itemsize, (0,)) for p in params], world_size, 99
    )
    policy = ShardPolicy(gradients="averaged")
    bucket = FlatBucket(
        plan, Group(None, rank, world_size), params[::-1], NAMES[-len(params) :], policy
    )
    return state.allocate(bucket, capturable=False)


def values_like(entry, fill=2.0):
    return {key: torch.full_like(value, fill) for key, value in entry.items()}


def test_entries_are_zero_views_of_the_shard_and_the_steps():
    shard = shard_of((2, 3), (4,))
    assert [t.shape for t in shard.accumulators] == [(12,), (12,)]
    assert all(not t.any() for t in (*shard.accumulators, shard.steps))
    for flat in (*shard.accumulators, shard.steps):
        flat.fill_(1)
    for entry, shape in zip(shard.entries, [(4,), (2, 3)], strict=True):
        assert list(entry) == ["step", *ACCUMULATORS]
        assert entry["step"].shape == ()
        assert all(entry[key].shape == shape and entry[key].all() for key in ACCUMULATORS)
        assert entry["step"] == 1


def test_with_more_ranks_entries_are_the_slices_that_this_rank_owns():
    for rank, (start, stop) in enumerate([(0, 4), (4, 6)]):
        (entry,) = shard_of((2, 3), world_size=2, rank=rank).entries
        assert entry["square_avg"].shape == (2, 3)
        assert entry["square_avg"].interval == Interval(start, stop)
        assert entry["square_avg"].local.numel() == stop - start


def test_a_whole_tensor_is_cut_to_the_slice_on_adoption():
    shard = shard_of((2, 3), world_size=2, rank=1)
    whole = torch.arange(6.0).view(2, 3)
    values = {"step": torch.tensor(3.0), "square_avg": whole, "acc_delta": whole + 10}
    state.check(shard, 0, values)
    state.adopt(shard, 0, values, {})
    assert [t[:2].tolist() for t in shard.accumulators] == [[4, 5], [14, 15]]


def test_reclaim_adopts_replaced_entries_and_resets_removed_ones():
    shard = shard_of((2,), (3,))
    second, first = shard.bucket.params
    held = {}
    state.reclaim([shard], held)
    shard.accumulators[0].fill_(5)
    held[first] = values_like(shard.entries[1])
    del held[second]
    state.reclaim([shard], held)
    assert [held[first][key] is shard.entries[1][key] for key in held[first]] == [True] * 3
    assert shard.entries[1]["square_avg"].tolist() == [2, 2]
    assert shard.entries[0]["square_avg"].tolist() == [0, 0, 0]
    assert shard.steps.tolist() == [0, 2]


def test_reclaim_leaves_views_that_are_in_place_alone():
    shard = shard_of((2,))
    held = {}
    state.reclaim([shard], held)
    before = held[shard.bucket.params[0]]
    state.reclaim([shard], held)
    assert held[shard.bucket.params[0]] is before


def test_entries_that_others_put_there_are_kept():
    shard = shard_of((2,))
    held = {}
    state.adopt(shard, 0, values_like(shard.entries[0]) | {"ema": 7}, held)
    assert held[shard.bucket.params[0]]["ema"] == 7


def test_adoption_casts_to_the_dtype_of_the_shard():
    shard = shard_of((2,), dtype=torch.float64)
    state.adopt(shard, 0, {key: torch.ones(2).half() for key in ACCUMULATORS}, {})
    assert shard.entries[0]["square_avg"].dtype == torch.float64
    assert shard.entries[0]["square_avg"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"step": 1, "exp_avg": 0, "exp_avg_sq": 0}, "another optimizer, or is incomplete"),
        ({"step": torch.tensor(1.0)}, r"holds \['step'\], but Adadelta's is"),
        ({"step": 1, "square_avg": torch.zeros(2), "acc_delta": torch.zeros(3)}, "another model"),
        ({"step": 1, "square_avg": 0.0, "acc_delta": 0.0}, r"has shape \(\), wanted \(2,\)"),
    ],
    ids=["adam", "incomplete", "shape", "no tensor"],
)
def test_state_that_does_not_fit_is_refused_by_name(values, words):
    shard = shard_of((2,))
    with pytest.raises(ValueError, match=rf"first.*{words}"):
        state.check(shard, 0, values)


def test_a_slice_of_another_world_size_is_refused_with_the_remedy():
    entries = shard_of((4, 6), world_size=2).entries
    for other in (1, 3):
        shard = shard_of((4, 6), world_size=other)
        with pytest.raises(ValueError, match=r"another world size.*Load a gathered"):
            state.check(shard, 0, entries[0])


def test_no_state_at_all_is_fine():
    shard = shard_of((2,))
    state.check(shard, 0, {})
    shard.entries[0]["square_avg"].fill_(1)
    shard.entries[0]["step"].fill_(1)
    state.adopt(shard, 0, {}, {})
    assert not shard.accumulators[0].any()
    assert not shard.steps.any()


def test_gather_returns_a_whole_entry_of_its_own():
    shard = shard_of((2, 3), (4,))
    shard.accumulators[0].copy_(torch.arange(12.0))
    entry = state.gather(shard, 1, 0)
    assert entry["square_avg"].tolist() == [[4, 5, 6], [7, 8, 9]]
    shard.accumulators[0].zero_()
    assert entry["square_avg"].any()


@pytest.mark.parametrize(
    "groups",
    [[[(2,)], [(3,)]], [[(2,), (3,), (4,)]], [[(2,)]]],
    ids=["more groups", "more parameters", "fewer parameters"],
)
def test_other_groups_are_refused_in_torchs_words(groups):
    params = parameters([(2,), (3,)])
    saved = torch.optim.Adadelta([{"params": parameters(shapes)} for shapes in groups]).state_dict()
    wanted = message_of(
        ValueError, lambda: torch.optim.Adadelta(parameters([(2,), (3,)])).load_state_dict(saved)
    )
    ours = ShardedAdadelta(params)
    assert message_of(ValueError, lambda: ours.load_state_dict(saved)) == wanted


def test_a_hyperparameter_out_of_range_is_refused_on_load():
    optimizer = ShardedAdadelta(parameters())
    saved = optimizer.state_dict()
    saved["param_groups"][0]["rho"] = 2.0
    with pytest.raises(ValueError, match=r"Invalid rho value: 2\.0"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["rho"] == 0.9


def test_loading_casts_and_leaves_the_callers_dict_alone():
    single = parameters()
    source = torch.optim.Adadelta(single, lr=0.5)
    train(source, single)
    saved = source.state_dict()
    before = copy.deepcopy(saved)
    params = parameters(dtype=torch.float64)
    optimizer = ShardedAdadelta(params)
    optimizer.load_state_dict(saved)
    assert all(optimizer.state[p]["square_avg"].dtype == torch.float64 for p in params)
    train(optimizer, params)
    assert saved["param_groups"] == before["param_groups"]
    assert saved.keys() == before.keys()
    for index, entry in before["state"].items():
        assert_equal(list(saved["state"][index].values()), list(entry.values()))


def test_a_failed_load_changes_nothing():
    params = parameters()
    optimizer = ShardedAdadelta(params)
    train(optimizer, params)
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.1
    saved["state"][0]["square_avg"] += 1
    saved["state"][3]["square_avg"] = torch.zeros(7)
    with pytest.raises(ValueError, match="parameter 3 of group 0"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 1.0
    after = optimizer.state_dict()["state"]
    for index, entry in before["state"].items():
        assert_equal(list(after[index].values()), list(entry.values()))


def test_state_under_keys_that_no_group_lists_is_refused():
    """As a round trip through JSON, or through `dcp_to_torch_save`, makes of integers."""
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = ShardedAdadelta([p])
    saved = optimizer.state_dict()
    strings = saved | {"state": {str(key): value for key, value in saved["state"].items()}}
    with pytest.raises(ValueError, match=r"state of '0', which is in none .* strings"):
        optimizer.load_state_dict(strings)


def test_the_state_dict_has_the_keys_of_torchs():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones(2)
    ours, torchs = ShardedAdadelta(params[:1]), torch.optim.Adadelta(params[1:])
    ours.step()
    torchs.step()
    got, want = ours.state_dict(), torchs.state_dict()
    assert got["param_groups"] == want["param_groups"]
    assert got["state"].keys() == want["state"].keys()
    assert got["state"][0].keys() == want["state"][0].keys()


def test_what_a_load_pre_hook_returns_is_loaded_even_if_empty():
    optimizer = ShardedAdadelta([torch.nn.Parameter(torch.ones(2))])
    optimizer.register_load_state_dict_pre_hook(lambda *_: {})
    with pytest.raises(KeyError, match="param_groups"):
        optimizer.load_state_dict(optimizer.state_dict())

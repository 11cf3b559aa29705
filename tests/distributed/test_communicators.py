"""Process groups of our own: they meet, in order, and wait as long as the user's."""

import inspect
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from adadelta_dist import ShardedAdadelta, communicators, groups


@pytest.fixture(autouse=True)
def no_groups_are_left(pool):
    """Ranks are used again by other tests."""
    yield
    for world_size in (2, 3):
        pool(world_size).run(destroy_all_but_the_default_group)


def destroy_all_but_the_default_group(rank):
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    communicators._backgrounds.clear()


SHORT = timedelta(seconds=20)  # what does not meet by then never will


def after_groups_of_some(rank, members):
    """What the sharing ranks add up over a group of ours, where rank 0 is in more groups."""
    dist.new_group([0])
    sharing = dist.new_group(members, timeout=SHORT) if members else None
    if members and rank not in members:
        return None
    group = communicators.open_background(groups.join(sharing))
    assert group.process_group not in (None, sharing, dist.group.WORLD)
    total = torch.tensor(rank + 1)
    dist.all_reduce(total, group=group.process_group)
    return total.item()


@pytest.mark.parametrize(("members", "wanted"), [(None, [6, 6, 6]), ([0, 2], [4, None, 4])])
def test_they_meet_where_ranks_are_in_other_groups_besides(pool, members, wanted):
    assert pool(3).run(after_groups_of_some, members) == wanted


def as_patient(rank):
    sharing = dist.new_group([0, 1], timeout=timedelta(seconds=77))
    group = communicators.open_background(groups.join(sharing))
    backend = group.process_group._get_backend(torch.device("cpu"))
    return backend.options._timeout.total_seconds()


def test_they_wait_as_long_as_the_users(pool):
    assert pool(2).run(as_patient) == [77, 77]


def in_another_order(rank):
    sharing = dist.new_group([1, 0], sort_ranks=False)
    group = communicators.open_background(groups.join(sharing))
    p = torch.nn.Parameter(torch.full((8,), float(rank)))
    ShardedAdadelta([p], process_group=sharing)
    ranks = dist.get_process_group_ranks(group.process_group)
    return ranks, group.rank, dist.get_rank(group.process_group), p[0].item()


@pytest.mark.skipif(
    "sort_ranks" not in inspect.signature(dist.new_group).parameters,
    reason="torch has no groups in another order",
)
def test_they_keep_the_order_of_the_ranks(pool):
    assert pool(2).run(in_another_order) == [([1, 0], 1, 1, 1.0), ([1, 0], 0, 0, 1.0)]


def after_one_is_destroyed(rank):
    """Whether groups of ours meet before and after the user destroys a group of theirs."""
    theirs = [dist.new_group([0, 1]) for _ in range(2)]
    ours = []
    for sharing in theirs:
        ours.append(communicators.open_background(groups.join(sharing)).process_group)
        dist.all_reduce(torch.ones(1), group=ours[-1])
        dist.destroy_process_group(sharing)
    return len({group.group_name for group in ours})


def test_they_have_names_of_their_own_whatever_is_destroyed(pool):
    assert pool(2).run(after_one_is_destroyed) == [2, 2]


def bound_to_a_device(rank):
    """What torch, which may split communicators off a bound default group, finds it bound to."""
    found, new_group = [], dist.new_group
    default, device = dist.group.WORLD, torch.device("cpu", 0)

    def recorded(*args, **kwargs):
        found.append(default.bound_device_id)
        return new_group(*args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        sharing = new_group([0, 1])
        monkeypatch.setattr(default, "bound_device_id", device)
        monkeypatch.setattr(dist, "new_group", recorded)
        communicators.open_background(groups.join(sharing))
        return found, default.bound_device_id == device


def test_they_are_made_by_their_members_alone(pool):
    assert pool(2).run(bound_to_a_device) == [([None], True)] * 2

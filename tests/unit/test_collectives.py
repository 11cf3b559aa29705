"""What communication does where there is nobody to talk to."""

from types import SimpleNamespace

import pytest
import torch

from adadelta_dist import RankError, collectives, communicators, groups
from adadelta_dist.agreement import agreement, digest
from adadelta_dist.collectives import Group, Pending

ALONE = Group()


def test_without_a_process_group_this_process_is_alone():
    group = groups.join(None)
    assert (group.process_group, group.rank, group.world_size) == (None, 0, 1)
    assert group.control_device == torch.device("cpu")
    assert not group.is_pairwise(torch.device("cpu"))


def test_the_default_group_is_joined_where_there_is_one(mesh):
    group = groups.join(None)
    assert (group.rank, group.world_size) == (0, 1)
    assert group.process_group is torch.distributed.group.WORLD
    assert group.backends["cpu"] == "gloo"
    assert group.is_pairwise(torch.device("cpu"))


def test_a_rank_outside_the_group_is_refused_with_the_remedy(mesh):
    outside = torch.distributed.GroupMember.NON_GROUP_MEMBER
    with pytest.raises(ValueError, match=r"global rank 0 is not a member.*own ranks only"):
        groups.join(outside)


def test_every_optimizer_gets_a_channel_of_its_own():
    first, second = (communicators.open_channel(ALONE) for _ in range(2))
    assert second.channel >= first.channel + 3  # tags for gradients, state and parameters
    assert first.channel >= ALONE.channel


@pytest.mark.parametrize("op", ["sum", "max"])
def test_combine_is_the_identity(op):
    values = torch.tensor([1.0, -2.0])
    assert collectives.combine(ALONE, values, op).tolist() == [1.0, -2.0]


def test_nothing_is_sent_and_nothing_changes():
    flat = torch.arange(4.0)
    collectives.broadcast(ALONE, flat)
    collectives.reduce_scatter(ALONE, flat, flat).wait()
    collectives.all_gather(ALONE, flat).wait()
    assert flat.tolist() == [0, 1, 2, 3]
    assert collectives.gather_slices(ALONE, flat[1:3], [2], 0).tolist() == [1, 2]


def work(seen, name, error=None):
    """Stands in for torch's handle of an asynchronous collective."""

    def wait():
        seen.append(name)
        if error is not None:
            raise error

    return SimpleNamespace(wait=wait)


def test_pending_waits_for_all_its_works_and_then_finishes():
    seen = []
    works = (work(seen, "first"), work(seen, "second"))
    Pending(works, lambda: seen.append("finish")).wait()
    assert seen == ["first", "second", "finish"]


def test_an_abandoned_pending_is_kept_and_not_waited_for(monkeypatch):
    kept = []
    monkeypatch.setattr(collectives, "_abandoned", kept)
    seen = []
    pending = Pending((work(seen, "first"),), lambda: seen.append("finish"))
    pending.abandon()
    Pending().abandon()
    assert kept == [pending]
    assert seen == []


def test_agreement_lets_the_own_error_through_as_it_is():
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught, agreement(ALONE, "test"):
        raise error
    assert caught.value is error


def test_agreement_of_one_rank_never_disagrees():
    with agreement(ALONE, "test") as mine:
        mine.facts.append("anything")


def test_agreement_does_not_hold_up_an_interrupt_to_talk_to_others():
    two = Group(world_size=2)  # to talk would fail: there is no process group
    with pytest.raises(KeyboardInterrupt), agreement(two, "test"):
        raise KeyboardInterrupt


def test_equal_facts_have_equal_digests_of_eight_bytes():
    one, same, other = (digest(f) for f in (["a", "b"], ["a", "b"], ["a", "c"]))
    assert one == same != other
    assert len(one) == 8


@pytest.mark.parametrize(
    ("sent", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_average_is_the_sum_in_rank_order(sent, dtype):
    rows = [torch.tensor([value], dtype=sent) for value in (1.0, 1 / 256, 1 / 256)]
    out = torch.empty(1, dtype=dtype)
    collectives._average(rows, out)
    # In bf16 the small terms would vanish one by one: it is summed in fp32.
    total = torch.tensor(1.0) + 1 / 256 + 1 / 256
    assert out.item() == (total / 3).to(dtype).item()


def test_neighbours_at_every_distance_are_everyone_else_once():
    group = Group(rank=1, world_size=4)
    around = [collectives._around(group, distance) for distance in (1, 2, 3)]
    assert around == [(0, 2), (3, 3), (2, 0)]


def test_a_rank_error_is_a_runtime_error():
    assert issubclass(RankError, RuntimeError)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("exchange", ["reduce_scatter", "all_gather"])
def test_a_rank_asks_for_what_it_gets_before_it_sends(monkeypatch, exchange, world_size):
    """Else the word that it is ready queues behind what it sends, and directions take turns."""
    group = Group(None, 0, world_size)
    order = []
    for name in ("_send", "_receive"):
        monkeypatch.setattr(collectives, name, lambda *_, name=name, **__: order.append(name))
    monkeypatch.setattr(Group, "is_pairwise", lambda *_: True)
    flat, shard = torch.zeros(4 * world_size), torch.zeros(4)
    arguments = (flat, shard) if exchange == "reduce_scatter" else (flat,)
    getattr(collectives, exchange)(group, *arguments)
    assert order == ["_receive"] * (world_size - 1) + ["_send"] * (world_size - 1)

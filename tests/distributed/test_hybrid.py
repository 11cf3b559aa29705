"""Sharding within groups and replicas across them: as flat, with all state equal."""

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_gradients import STAGE_2, assert_close, batch, loss_of, model, reference, values
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from adadelta_dist import RankError, ShardedAdadelta, ShardPolicy

TINY = ShardPolicy(bucket_mb=1e-4)


def groups(shards=((0, 1), (2, 3)), replicas=((0, 2), (1, 3))):
    """As keyword arguments, made on every rank."""
    made = [[dist.new_group(list(ranks)) for ranks in kind] for kind in (shards, replicas)]
    rank = dist.get_rank()
    mine = [
        next(group for group, ranks in zip(kind, of, strict=True) if rank in ranks)
        for kind, of in zip(made, (shards, replicas), strict=True)
    ]
    return {"process_group": mine[0], "replicate_group": mine[1]}


def mesh():
    return {"device_mesh": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))}


def slices(optimizer):
    """This rank's state."""
    return [
        getattr(value, "local", value).clone()
        for entry in optimizer.state.values()
        for value in entry.values()
    ]


def train(rank, module, optimizer, steps, max_norm=0.05):
    for step in steps:
        optimizer.zero_grad()
        loss_of(module, batch(rank, 10 * step)).backward()
        if max_norm:
            optimizer.clip_grad_norm_(max_norm)
        optimizer.step()


def hybrid(rank, make, policy):
    module = model()
    if rank:  # the first rank's count
        for p in module.parameters():
            p.data.fill_(float(rank))
    optimizer = ShardedAdadelta(module.parameters(), policy=policy, **make())
    train(rank, module, optimizer, range(4))
    return values(module), slices(optimizer)


@pytest.mark.parametrize("make", [groups, mesh])
@pytest.mark.parametrize("policy", [TINY, ShardPolicy(overlap=False), STAGE_2])
def test_two_by_two_is_flat_four_and_one_process(pool, make, policy):
    def clip(params):
        nn.utils.clip_grad_norm_(params, 0.05)

    wanted = reference(4, 4, edit=clip)
    results = pool(4).run(hybrid, make, policy)
    for got, _ in results:
        assert_close(got, wanted)
        assert all(map(torch.equal, got, results[0][0]))
    for one, other in ((0, 2), (1, 3)):
        assert all(map(torch.equal, results[one][1], results[other][1]))


def bytes_across(rank, make):
    """What one step sends from this rank to ranks of the other half, but for small messages."""
    sent = []
    send, all_reduce = dist.isend, dist.all_reduce

    def count_sent(tensor, target, **kwargs):
        sent.append(tensor.nbytes * (target // 2 != rank // 2))
        return send(tensor, target, **kwargs)

    def count_reduced(tensor, **kwargs):  # a ring of n ranks: 2 (n - 1) / n of the bytes each
        ranks = dist.get_process_group_ranks(kwargs["group"])
        crosses = len({rank // 2 for rank in ranks}) > 1 and tensor.dtype != torch.uint8
        sent.append(crosses * tensor.nbytes * 2 * (len(ranks) - 1) // len(ranks))
        return all_reduce(tensor, **kwargs)

    p = nn.Parameter(torch.zeros(1024))
    optimizer = ShardedAdadelta([p], **make())
    p.grad = torch.ones(1024)
    with mock.patch.multiple(dist, isend=count_sent, all_reduce=count_reduced):
        optimizer.step()
    return sum(sent)


def test_half_of_flats_bytes_go_between_the_halves(pool):
    assert pool(4).run(bytes_across, dict) == [4096] * 4
    for make in (groups, mesh):
        assert pool(4).run(bytes_across, make) == [2048] * 4


def half(rank):
    p = nn.Parameter(torch.linspace(-2, 2, 50).bfloat16())
    policy = ShardPolicy(state_dtype=torch.bfloat16)
    optimizer = ShardedAdadelta([p], policy=policy, **groups())
    for step in range(3):
        p.grad = torch.full_like(p, 0.5 + rank + step)
        optimizer.step()
    return p.detach().clone(), slices(optimizer)


def test_replicas_round_alike(pool):
    results = pool(4).run(half)
    assert all(torch.equal(p, results[0][0]) for p, _ in results)
    for one, other in ((0, 2), (1, 3)):
        assert all(map(torch.equal, results[one][1], results[other][1]))


def uneven(rank, policy):
    """Only some ranks have gradients; micro-batches differ in number."""
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=policy, **groups())
    for step in range(3):
        optimizer.zero_grad()
        for micro in range((rank + step) % 3):
            loss_of(module, batch(rank, 10 * step + micro)).backward()
        optimizer.step()
    return values(module)


@pytest.mark.parametrize("policy", [TINY, STAGE_2])
def test_ranks_with_other_numbers_of_gradients(pool, policy):
    module = model()
    optimizer = torch.optim.Adadelta(module.parameters())
    for step in range(3):
        optimizer.zero_grad()
        for rank in range(4):
            for micro in range((rank + step) % 3):
                (loss_of(module, batch(rank, 10 * step + micro)) / 4).backward()
        optimizer.step()
    for got in pool(4).run(uneven, policy):
        assert_close(got, values(module))


def gather_and_scatter(rank):
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=TINY, **groups())
    train(rank, module, optimizer, range(2))
    before = slices(optimizer)
    whole = optimizer.gather_state_dict(1)
    assert bool(whole) == (rank == 1), "rank 3 has it too, and need not send it"
    optimizer = ShardedAdadelta(module.parameters(), policy=TINY, **groups())
    optimizer.scatter_state_dict(whole or None, src=1)
    assert all(map(torch.equal, before, slices(optimizer)))
    everyones = [None] * 4
    dist.all_gather_object(everyones, whole)
    optimizer = ShardedAdadelta(module.parameters(), policy=TINY, **groups())
    optimizer.load_state_dict(everyones[1])
    assert all(map(torch.equal, before, slices(optimizer)))
    return whole


def test_the_state_is_gathered_from_one_replica_and_scattered_to_all(pool):
    module = model()
    optimizer = torch.optim.Adadelta(module.parameters())
    optimizer.load_state_dict(pool(4).run(gather_and_scatter)[1])
    assert all(entry["step"] == 2 for entry in optimizer.state.values())


class Large(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000, 100))


def save(rank, path):
    module = Large()
    optimizer = ShardedAdadelta(module.parameters(), **mesh())
    module.weight.grad = torch.arange(1e5).view(1000, 100) / 1e5 + rank
    optimizer.step()
    state = {f"{key}": value for key, value in optimizer.state[module.weight].items()}
    dcp.save(state, checkpoint_id=path)


def load(rank, path):
    module = Large()
    optimizer = ShardedAdadelta(module.parameters())
    dcp.load(optimizer.state[module.weight], checkpoint_id=path)
    whole = optimizer.gather_state_dict(0)
    return whole["state"][0]["square_avg"] if rank == 0 else None


def test_a_sharded_checkpoint_holds_each_slice_once(pool, tmp_path):
    pool(4).run(save, tmp_path)
    size = sum(Path(file).stat().st_size for file in tmp_path.glob("*.distcp"))
    assert size < 1.05 * 2 * 4e5
    grad = torch.arange(1e5).view(1000, 100) / 1e5 + 1.5
    (got, _, _) = pool(3).run(load, tmp_path)
    torch.testing.assert_close(got, 0.1 * grad.square(), rtol=1e-5, atol=1e-7)


def error_of_rank_3(rank):
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=TINY, **groups())
    loss_of(module, batch(rank, 0)).backward()
    if rank == 3:
        optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(RankError, match=r"Rank 0 has group 0: lr=1.0; rank 3 has .*lr=0.5"):
        optimizer.step()


def test_an_error_in_one_replica_is_one_in_all(pool):
    pool(4).run(error_of_rank_3)


def bad(rank):
    p = nn.Parameter(torch.zeros(4))
    good = groups()
    inside = good["process_group"]

    def refused(match, **options):
        with pytest.raises((ValueError, RankError), match=match):
            ShardedAdadelta([p], **options)

    refused("share the ranks", process_group=inside, replicate_group=inside)
    refused("share the ranks", replicate_group=good["replicate_group"])
    refused("with this rank alone in both", **groups(((0,), (1,), (2,), (3,)), ((0, 1, 2, 3),)))
    crossed = groups(replicas=((0, 3), (1, 2)))
    refused(r"ranks that own other shards: .* \[\(\d, 2\), \(\d, 2\)\]", **crossed)
    cube = DeviceMesh("cpu", torch.arange(4).view(1, 2, 2), mesh_dim_names=("a", "b", "c"))
    refused("device_mesh with 3 dimensions", device_mesh=cube)
    refused("no groups besides", device_mesh=cube["b", "c"], process_group=inside)
    ShardedAdadelta([p], device_mesh=cube["a", "b", "c"]["b", "c"])
    ShardedAdadelta([p], device_mesh=cube["c"])


def test_groups_and_meshes_that_do_not_fit_are_errors_on_every_rank(pool):
    pool(4).run(bad)

"""Checkpoints of `torch.distributed.checkpoint`: sharded, with no gather, at any world size."""

import copy
import io
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as names
from test_gradients import batch, loss_of
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from adadelta_dist import Adadelta, ShardedAdadelta, ShardPolicy

NESTED = names.StateDictOptions()
FLAT = names.StateDictOptions(flatten_optimizer_state_dict=True)
flattened = pytest.mark.parametrize("options", [FLAT, NESTED], ids=["flat", "nested"])


@contextmanager
def torchs_own_warning():
    """That there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or")
        yield


def load(state, path, *, partial):
    # torch's optimizer has no `fused` in its groups, and no state of frozen parameters.
    planner = dcp.DefaultLoadPlanner(allow_partial_load=partial)
    with torchs_own_warning():
        dcp.load(state, checkpoint_id=path, planner=planner)


class Zoo(nn.Module):
    """One of each kind of parameter."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def param(*shape, dtype=torch.float32):
            return nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator))

        self.matrix = param(5, 7)
        self.transposed = nn.Parameter(param(4, 3, 5).detach().permute(2, 0, 1))
        self.image = nn.Parameter(param(2, 3, 4, 5).detach().to(memory_format=torch.channels_last))
        self.scalar, self.none = param(), param(0, 3)
        self.wide = param(6, 5, dtype=torch.float64)
        self.complex = nn.Parameter(param(4, 5, dtype=torch.complex64).detach().t())
        self.frozen = param(3, 3).requires_grad_(False)

    def groups(self):
        named = list(self.named_parameters())
        return [
            {"params": [p for _, p in named[::2]], "rho": 0.8},
            {"params": [p for _, p in named[1::2]], "lr": 0.5, "weight_decay": 0.1},
        ]


def build(bucket_mb, steps):
    """A zoo and its optimizer (torch's in one process), trained for `steps` steps."""
    module = Zoo()
    if bucket_mb is None:
        optimizer = torch.optim.Adadelta(module.groups())
    else:
        optimizer = ShardedAdadelta(module.groups(), policy=ShardPolicy(bucket_mb=bucket_mb))
    train(module, optimizer, steps)
    return module, optimizer


def train(module, optimizer, steps):
    """Gradients are small integers, equal on all ranks: their average is exact."""
    for step in steps:
        for i, p in enumerate(module.parameters()):
            if p.requires_grad:
                generator = torch.Generator().manual_seed(100 * step + i)
                grad = torch.randint(-8, 9, (*p.shape, 2), generator=generator).float()
                p.grad = torch.view_as_complex(grad) if p.is_complex() else grad[..., 0].to(p.dtype)
        optimizer.step()


def whole(module, optimizer):
    """Parameters and state by name, whole, on every rank."""
    sharded = isinstance(optimizer, ShardedAdadelta)
    for rank in range(dist.get_world_size() if sharded else 1):
        if sharded:
            optimizer.consolidate_state_dict(to=rank)
        if not sharded or rank == dist.get_rank():
            state = names.get_optimizer_state_dict(module, optimizer)["state"]
    values = {f"state.{name}.{key}": v for name, entry in state.items() for key, v in entry.items()}
    values |= names.get_model_state_dict(module)
    values = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in values.items()}
    return copy.deepcopy(values)


def state_of(values):
    return {key: value for key, value in values.items() if key.startswith("state.")}


def assert_equal(got, want, but=()):
    assert set(got) - set(want) == set(but)
    for key, value in want.items():
        assert got[key].dtype == value.dtype, key
        assert torch.equal(got[key], value), key


def save(_, path, bucket_mb, options):
    module, optimizer = build(bucket_mb, [0, 1])
    model, optim = names.get_state_dict(module, optimizer, options=options)
    with torchs_own_warning():
        dcp.save({"model": model, "optim": optim}, checkpoint_id=path)


def resume(_, path, bucket_mb, options, partial):
    module, optimizer = build(bucket_mb, [])
    model, optim = names.get_state_dict(module, optimizer, options=options)
    load({"model": model, "optim": optim}, path, partial=partial)
    states = {"model_state_dict": model, "optim_state_dict": optim}
    names.set_state_dict(module, optimizer, **states, options=options)
    before = whole(module, optimizer)
    train(module, optimizer, [2])
    return before, whole(module, optimizer)


def controls():
    module, optimizer = build(None, [0, 1])
    before = whole(module, optimizer)
    train(module, optimizer, [2])
    return before, whole(module, optimizer)


FROZEN = {f"state.frozen.{key}" for key in ("step", "square_avg", "acc_delta")}


@flattened
@pytest.mark.parametrize("worlds", [(2, 3), (3, 2), (2, 4), (4, 1), (1, 3)], ids=str)
def test_a_job_goes_on_bitwise_at_another_world_size(pool, tmp_path, worlds, options):
    source, target = worlds
    if source == 1:
        save(0, tmp_path, None, options)
    else:
        pool(source).run(save, tmp_path, 1e-4, options)
    if target == 1:
        results = [resume(0, tmp_path, None, options, False)]
    else:
        results = pool(target).run(resume, tmp_path, 25, options, source == 1)
    for result in results:
        for got, want in zip(result, controls(), strict=True):
            assert_equal(got, want, but=FROZEN if target > 1 else ())


def stateful(rank, path):
    """The optimizer itself in the dict to save; loading writes into its own memory."""
    module, optimizer = build(1e-4, [0, 1])
    dcp.save({"model": module, "optim": optimizer}, checkpoint_id=path)
    want = whole(module, optimizer)
    module, optimizer = build(25, [7])
    dcp.load({"optim": optimizer.state_dict()}, checkpoint_id=path)
    loaded_in_place = whole(module, optimizer)
    module, optimizer = build(25, [7])
    dcp.load({"model": module, "optim": optimizer}, checkpoint_id=path)
    return loaded_in_place, whole(module, optimizer), want


def test_the_optimizer_itself_can_be_saved_and_loaded_in_place(pool, tmp_path):
    for in_place, got, want in pool(2).run(stateful, tmp_path):
        assert_equal(state_of(in_place), state_of(want))
        assert_equal(got, want)


def save_in_background(rank, path, older):
    module, optimizer = build(1e-4, [0, 1])
    state = names.get_optimizer_state_dict(module, optimizer)
    if older:  # it makes scalars whole
        del state["state"]["scalar"]
    group = dist.new_group()  # the thread's messages must not meet those of `step`
    writer = dcp.FileSystemWriter(path) if older else None
    where = {"checkpoint_id": path, "storage_writer": writer, "process_group": group}
    saving = dcp.async_save({"optim": state}, **where)
    train(module, optimizer, [2])  # which changes the state in place
    saving.result()
    dist.destroy_process_group(group)


def load_state(rank, path, partial):
    module, optimizer = build(25, [])
    loaded = {"optim": names.get_optimizer_state_dict(module, optimizer)}
    load(loaded, path, partial=partial)
    names.set_optimizer_state_dict(module, optimizer, loaded["optim"])
    return state_of(whole(module, optimizer))


@pytest.mark.parametrize("older", [False, True], ids=["default stager", "FileSystemWriter"])
def test_training_goes_on_during_async_save(pool, tmp_path, older):
    pool(2).run(save_in_background, tmp_path, older)
    want = state_of(controls()[0])
    for got in pool(3).run(load_state, tmp_path, older):
        if older:
            want |= {key: value for key, value in got.items() if key.startswith("state.scalar")}
        assert_equal(got, want, but=FROZEN)


def test_dcp_to_torch_save_gives_one_plain_file(pool, tmp_path):
    pool(2).run(save, tmp_path / "dcp", 1e-4, NESTED)
    with torchs_own_warning():
        dcp_to_torch_save(tmp_path / "dcp", tmp_path / "file.pt")
    file = torch.load(tmp_path / "file.pt", weights_only=True)
    before, after = controls()
    module, optimizer = build(None, [])
    states = {"model_state_dict": file["model"], "optim_state_dict": file["optim"]}
    names.set_state_dict(module, optimizer, **states)
    assert_equal(whole(module, optimizer), before)
    train(module, optimizer, [2])
    assert_equal(whole(module, optimizer), after)


def refusals(rank, path):
    module, optimizer = build(1e-4, [0])
    named = names.get_optimizer_state_dict(module, optimizer)
    with pytest.raises(TypeError, match="gather_state_dict"):
        torch.save(named, io.BytesIO())
    with pytest.raises(NotImplementedError, match="gather_state_dict"):
        dcp.async_save({"optim": named}, storage_writer=dcp.FileSystemWriter(path))
    dcp.save({"w": named["state"]["matrix"]["square_avg"]}, checkpoint_id=path)
    with pytest.raises(dcp.api.CheckpointException, match="Size mismatch"):
        dcp.load({"w": named["state"]["wide"]["square_avg"]}, checkpoint_id=path)
    optimizer.consolidate_state_dict()  # until the next step, rank 0 gives the whole
    with pytest.raises(dcp.api.CheckpointException, match="overlapping chunks"):
        dcp.save({"optim": optimizer}, checkpoint_id=path / "again")


def test_what_would_lose_state_is_refused(pool, tmp_path):
    pool(2).run(refusals, tmp_path)


def from_rank_0(rank, state):
    """torch's whole state on rank 0 alone, as read from a file there."""
    for entry in state["state"].values():  # torch sends it in memory order, whatever that is
        entry.update({key: value.contiguous() for key, value in entry.items()})
    module, optimizer = build(1e-4, [7])
    options = names.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    names.set_optimizer_state_dict(module, optimizer, state if rank == 0 else {}, options=options)
    return state_of(whole(module, optimizer))


def test_a_whole_state_is_broadcast_from_rank_0(pool):
    module, optimizer = build(None, [0, 1])
    want = state_of(whole(module, optimizer))
    for got in pool(2).run(from_rank_0, names.get_optimizer_state_dict(module, optimizer)):
        assert_equal(got, want, but=FROZEN)


def network(cls, *, shard):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    module[0].bias.requires_grad_(False)
    if shard:
        fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    bias, weights = [module[2].bias], [module[0].weight, module[2].weight]
    return module, cls([{"params": weights, "rho": 0.8}, {"params": bias, "lr": 0.5}])


def save_network(rank, path, cls, options):
    module, optimizer = network(cls, shard=cls is not ShardedAdadelta)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(module, batch(rank, 10 * step)).backward()
        optimizer.step()
    state = names.get_optimizer_state_dict(module, optimizer, options=options)
    dcp.save({"optim": state}, checkpoint_id=path)
    return state_of(whole(module, optimizer))


def load_network(rank, path, cls, options, partial):
    module, optimizer = network(cls, shard=cls is not ShardedAdadelta)
    loaded = {"optim": names.get_optimizer_state_dict(module, optimizer, options=options)}
    load(loaded, path, partial=partial)
    names.set_optimizer_state_dict(module, optimizer, loaded["optim"], options=options)
    groups = [(group["rho"], group["lr"]) for group in optimizer.param_groups]
    return state_of(whole(module, optimizer)), groups


@flattened
@pytest.mark.parametrize("fsdp", [torch.optim.Adadelta, Adadelta], ids=["torch's", "ours"])
@pytest.mark.parametrize("to_fsdp", [True, False], ids=["to FSDP2", "from FSDP2"])
def test_a_job_moves_between_fsdp2_and_sharded_adadelta(pool, tmp_path, fsdp, to_fsdp, options):
    source, target = (ShardedAdadelta, fsdp) if to_fsdp else (fsdp, ShardedAdadelta)
    want = pool(2).run(save_network, tmp_path, source, options)[0]
    partial = source is torch.optim.Adadelta
    for got, groups in pool(3).run(load_network, tmp_path, target, options, partial):
        assert_equal(got, want)
        assert groups == [(0.8, 1.0), (0.9, 0.5)]

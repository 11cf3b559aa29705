"""`save_checkpoint` and `load_checkpoint`: at any world size, and whole or not at all."""

import json
import subprocess

import pytest
import torch
from test_dcp import (
    FROZEN,
    assert_equal,
    build,
    controls,
    network,
    train,
    whole,
)
from test_gradients import batch, loss_of
from torch.distributed.device_mesh import init_device_mesh

from adadelta_dist import (
    Adadelta,
    ShardedAdadelta,
    async_save_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from adadelta_dist.checkpoints.reading import SafeReader


def save(rank, path, bucket_mb, asynchronous=False):
    module, optimizer = build(bucket_mb, [0, 1])
    extra = {"epoch": 3, "rank": rank, "rng": torch.get_rng_state()}
    if asynchronous:
        saving = async_save_checkpoint(path, module, optimizer, extra=extra)
        train(module, optimizer, [7])  # which changes what is being written
        assert saving.result() == path
    else:
        assert save_checkpoint(path, module, optimizer, extra=extra) == path


def resume(_, path, bucket_mb):
    module, optimizer = build(bucket_mb, [7])  # something to overwrite
    loaded = load_checkpoint(path, module, optimizer)
    before = whole(module, optimizer)
    train(module, optimizer, [2])
    return before, whole(module, optimizer), loaded


def run(pool, world_size, function, path, *args):
    """`world_size` ranks of ShardedAdadelta, or torch's optimizer in one process for 0."""
    if world_size == 0:
        return [function(0, path, None, *args)]
    return pool(world_size).run(function, path, 1e-4 if world_size % 2 else 25, *args)


@pytest.mark.parametrize(
    "worlds", [(4, 1), (4, 2), (4, 3), (1, 4), (2, 4), (3, 4), (4, 0), (0, 4), (2, 2)], ids=str
)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "async"])
def test_training_goes_on_bitwise_at_another_world_size(pool, tmp_path, worlds, asynchronous):
    source, target = worlds
    run(pool, source, save, tmp_path / "a", asynchronous)
    for rank, (*states, loaded) in enumerate(run(pool, target, resume, tmp_path / "a")):
        for got, want in zip(states, controls(), strict=True):
            assert_equal(got, want, but=FROZEN)  # torch has no state of it
        assert loaded.path == tmp_path / "a"
        assert loaded.skipped == ()
        assert loaded.extra["epoch"] == 3
        assert loaded.extra["rank"] == (rank if rank < max(source, 1) else 0)
        torch.set_rng_state(loaded.extra["rng"])
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


def save_network(rank, path, cls):
    module, optimizer = network(cls, shard=cls is not ShardedAdadelta)
    run_network(rank, module, optimizer, range(2))
    save_checkpoint(path, module, optimizer)
    run_network(rank, module, optimizer, range(2, 4))
    return whole(module, optimizer)


def run_network(rank, module, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(module, batch(rank, 10 * step)).backward()
        optimizer.step()


def resume_network(rank, path, cls):
    module, optimizer = network(cls, shard=cls is not ShardedAdadelta)
    hooks = []
    optimizer.register_step_pre_hook(lambda *_: hooks.append("step"))
    load_checkpoint(path, module, optimizer)
    assert not hooks  # torch's own functions would have made a step
    run_network(rank, module, optimizer, range(2, 4))
    return whole(module, optimizer)


@pytest.mark.parametrize("fsdp", [torch.optim.Adadelta, Adadelta], ids=["torch's", "ours"])
@pytest.mark.parametrize("to_fsdp", [True, False], ids=["to FSDP2", "from FSDP2"])
def test_training_goes_on_bitwise_through_fsdp2(pool, tmp_path, fsdp, to_fsdp):
    source, target = (ShardedAdadelta, fsdp) if to_fsdp else (fsdp, ShardedAdadelta)
    want = pool(2).run(save_network, tmp_path / "a", source)[0]
    for got in pool(2).run(resume_network, tmp_path / "a", target):
        for key in got.keys() & want.keys():
            assert torch.equal(got[key], want[key]), key
        assert not any(got[key].any() for key in got.keys() - want.keys())  # the frozen one's


def wrapped(rank, path):
    """Names are those of the bare model, whatever wraps it."""
    bare, optimizer = network(ShardedAdadelta, shard=False)
    module = torch.nn.parallel.DistributedDataParallel(torch.compile(bare, backend="eager"))
    save_checkpoint(path, module, optimizer)
    return load_checkpoint(path, bare, optimizer).skipped


def test_wrappers_leave_no_trace_in_the_names(pool, tmp_path):
    assert pool(2).run(wrapped, tmp_path / "a") == [(), ()]
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert sorted(manifest["parameters"]) == ["0.weight", "2.bias", "2.weight"]


def after_consolidation(rank, path):
    module, optimizer = build(25, [0, 1])
    optimizer.consolidate_state_dict(to=1)
    save_checkpoint(path, module, optimizer)


def test_a_consolidated_whole_in_memory_is_no_obstacle(pool, tmp_path):
    pool(2).run(after_consolidation, tmp_path / "a")
    for before, _, _ in run(pool, 3, resume, tmp_path / "a"):
        assert_equal(before, controls()[0], but=FROZEN)


def several(rank, path, count, keep):
    module, optimizer = build(25, [0])
    for i in range(count):
        save_checkpoint(path / f"step-{i}", module, optimizer, extra=i, keep=keep)
    return load_checkpoint(path, module, optimizer)


def test_keep_leaves_the_newest_and_the_newest_is_loaded(pool, tmp_path):
    tmp_path.joinpath("notes").mkdir()
    dead = tmp_path / ".step-9.0123456789abcdef.incomplete"
    dead.mkdir()
    loaded = pool(2).run(several, tmp_path, 12, 3)
    assert {f.name for f in tmp_path.iterdir()} == {"notes", "step-9", "step-10", "step-11"}
    assert [item.extra for item in loaded] == [11, 11]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-11"
    assert latest_checkpoint(tmp_path / "notes") is None


def test_the_sums_are_those_of_coreutils(pool, tmp_path):
    pool(2).run(save, tmp_path / "a", 25)
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"],
                   cwd=tmp_path / "a", check=True)  # fmt: skip
    listed = (tmp_path / "a" / "SHA256SUMS").read_text().split()[1::2]
    assert sorted([*listed, "SHA256SUMS"]) == sorted(f.name for f in (tmp_path / "a").iterdir())


def half(hybrid):
    """A bfloat16 module with fp32 masters, over all ranks or 2 replicas of 2."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3)).bfloat16()
    mesh = init_device_mesh("cpu", (2, 2)) if hybrid else None
    return module, ShardedAdadelta(module.parameters(), lr=0.01, device_mesh=mesh)


def run_half(rank, path, hybrid, save_at, steps):
    module, optimizer = half(hybrid)
    if save_at is None:
        load_checkpoint(path, module, optimizer)
    for step in steps:
        train(module, optimizer, [step])
        if step == save_at:
            save_checkpoint(path, module, optimizer)
    return module.state_dict()


@pytest.mark.parametrize(("source", "target"), [(2, 3), (4, 2)])
def test_masters_and_replicas_go_on_too(pool, tmp_path, source, target):
    hybrid = source == 4
    want = pool(source).run(run_half, tmp_path / "a", hybrid, 1, range(4))[0]
    if hybrid:  # each slice is there once, whoever wrote it
        written = sum(f.stat().st_size for f in (tmp_path / "a").glob("*.distcp"))
        pool(2).run(run_half, tmp_path / "flat", False, 1, range(2))
        flat = sum(f.stat().st_size for f in (tmp_path / "flat").glob("*.distcp"))
        assert written == pytest.approx(flat, rel=0.02)
    for got in pool(target).run(run_half, tmp_path / "a", False, None, range(2, 4)):
        assert_equal(got, want)
    (master,) = {k for k in SafeReader(tmp_path / "a").read_metadata().state_dict_metadata
                 if k.endswith("0.weight.master")}  # fmt: skip
    assert master == "optimizer.state.0.weight.master"

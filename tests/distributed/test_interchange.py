"""Every row of the table in docs/checkpoints.md."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as names
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from adadelta_dist import Adadelta, ShardedAdadelta, ShardPolicy, load_checkpoint, save_checkpoint

with warnings.catch_warnings():  # of torch's other optimizers in that package
    warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer

ROOT = Path(__file__).parents[2]
TORCH = torch.optim.Adadelta


def job(cls, steps=(), *, fsdp=False):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).double()
    if fsdp:
        fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    kwargs = {}
    if cls is ShardedAdadelta:
        kwargs = {"policy": ShardPolicy(bucket_mb=1e-4)}
    if cls is ZeroRedundancyOptimizer:
        optimizer = cls(module.parameters(), TORCH, rho=0.8)
    else:
        optimizer = cls(module.named_parameters(), rho=0.8, **kwargs)
    advance(module, optimizer, steps)
    return module, optimizer


def advance(module, optimizer, steps):
    """Gradients are small integers, equal on all ranks: their average is exact."""
    for step in steps:
        for i, p in enumerate(module.parameters()):
            generator = torch.Generator().manual_seed(100 * step + i)
            grad = torch.randint(-8, 9, p.shape, generator=generator).to(p.dtype)
            if isinstance(p, DTensor):
                grad = distribute_tensor(grad, p.device_mesh, p.placements)
            p.grad = grad
        optimizer.step()


def finish(module, optimizer):
    """Two more steps; the parameters after them."""
    advance(module, optimizer, [2, 3])
    whole = (p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters())
    return [p.detach().clone() for p in whole]


def torch_state():
    """Of one process: what is known to be right."""
    module, optimizer = job(TORCH, [0, 1])
    return {"model": module.state_dict(), "optimizer": optimizer.state_dict()}


def save(_, path, cls, fsdp=False):
    save_checkpoint(path / "a", *job(cls, [0, 1], fsdp=fsdp))


def resume(_, path, cls, fsdp=False):
    module, optimizer = job(cls, [7], fsdp=fsdp)
    load_checkpoint(path / "a", module, optimizer)
    return finish(module, optimizer)


def sharded_to_sharded(pool, path):
    pool(4).run(save, path, ShardedAdadelta)
    return pool(3).run(resume, path, ShardedAdadelta)


def sharded_to_torch(pool, path):
    pool(3).run(save, path, ShardedAdadelta)
    return [resume(0, path, TORCH)]


def torch_to_sharded(pool, path):
    save(0, path, TORCH)
    return pool(3).run(resume, path, ShardedAdadelta)


def sharded_to_fsdp(pool, path):
    pool(3).run(save, path, ShardedAdadelta)
    return pool(2).run(resume, path, TORCH, True) + pool(2).run(resume, path, Adadelta, True)


def fsdp_to_sharded(pool, path):
    pool(2).run(save, path / "torch", TORCH, True)
    pool(2).run(save, path / "ours", Adadelta, True)
    results = [pool(3).run(resume, path / kind, ShardedAdadelta) for kind in ("torch", "ours")]
    return [*results[0], *results[1]]


def convert(src, dst, to):
    command = [sys.executable, "-m", "adadelta_dist.cli", "convert", str(src), str(dst), "--to", to]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)


def sharded_to_file(pool, path):
    pool(3).run(save, path / "folder", ShardedAdadelta)
    convert(path / "folder" / "a", path / "file.pt", "torch")
    state = torch.load(path / "file.pt", weights_only=True)
    module, optimizer = job(TORCH)
    module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return [finish(module, optimizer)]


def file_to_sharded(pool, path):
    torch.save(torch_state(), path / "file.pt")
    convert(path / "file.pt", path / "a", "dcp")
    return pool(3).run(resume, path, ShardedAdadelta)


def gather(rank, dst):
    module, optimizer = job(ShardedAdadelta, [0, 1])
    return module.state_dict(), optimizer.gather_state_dict(dst)


def sharded_to_dict(pool, path):
    model, state = pool(3).run(gather, 1)[1]
    module, optimizer = job(TORCH)
    module.load_state_dict(model)
    optimizer.load_state_dict(state)
    return [finish(module, optimizer)]


def scatter(rank, state, src):
    module, optimizer = job(ShardedAdadelta, [7])
    module.load_state_dict(state["model"])
    optimizer.scatter_state_dict(state["optimizer"] if rank == src else None, src)
    return finish(module, optimizer)


def dict_to_sharded(pool, path):
    return pool(3).run(scatter, torch_state(), 2)


def load(rank, state, cls):
    module, optimizer = job(cls, [7])
    module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return finish(module, optimizer)


def dicts_to_sharded(pool, path):
    return pool(3).run(load, torch_state(), ShardedAdadelta)


def consolidate(rank):
    module, zero = job(ZeroRedundancyOptimizer, [0, 1])
    zero.consolidate_state_dict(0)
    return {"model": module.state_dict(), "optimizer": zero.state_dict() if rank == 0 else None}


def zero_to_sharded(pool, path):
    return pool(3).run(scatter, pool(2).run(consolidate)[0], 0)


def sharded_to_zero(pool, path):
    model, state = pool(3).run(gather, 0)[0]
    return pool(2).run(load, {"model": model, "optimizer": state}, ZeroRedundancyOptimizer)


def save_by_name(rank, path):
    module, optimizer = job(TORCH, [0, 1], fsdp=True)
    model, optim = names.get_state_dict(module, optimizer)
    dcp.save({"model": model, "optimizer": optim}, checkpoint_id=path / "a")


def dcp_to_sharded(pool, path):
    pool(2).run(save_by_name, path)
    return pool(3).run(resume, path, ShardedAdadelta)


def load_by_name(rank, path):
    module, optimizer = job(ShardedAdadelta, [7])
    model, optim = names.get_state_dict(module, optimizer)
    dcp.load({"model": model, "optimizer": optim}, checkpoint_id=path / "a")
    names.set_state_dict(module, optimizer, model_state_dict=model, optim_state_dict=optim)
    return finish(module, optimizer)


def checkpoint_to_dcp(pool, path):
    pool(3).run(save, path, ShardedAdadelta)
    return pool(2).run(load_by_name, path)


ROWS = [
    sharded_to_sharded,
    sharded_to_torch,
    torch_to_sharded,
    sharded_to_fsdp,
    fsdp_to_sharded,
    sharded_to_file,
    file_to_sharded,
    sharded_to_dict,
    dict_to_sharded,
    dicts_to_sharded,
    zero_to_sharded,
    sharded_to_zero,
    dcp_to_sharded,
    checkpoint_to_dcp,
]
"""In the order of the document's rows."""

WORDS = {"sharded": "ShardedAdadelta", "torch": "torch.optim.Adadelta", "fsdp": "FSDP2",
         "file": "one file", "dict": "a state dict", "dicts": "a state dict", "zero": "ZeroRed",
         "dcp": "torch.distributed.checkpoint", "checkpoint": "save_checkpoint"}  # fmt: skip


def test_the_rows_are_those_of_the_document():
    document = (ROOT / "docs" / "checkpoints.md").read_text()
    section = document.partition("## From where")[2].partition("\n## ")[0]
    table = re.findall(r"^\| (.+?) \| (.+?) \| .+ \|$", section, re.M)
    rows = [row for row in table if row != ("from", "to")]
    assert len(rows) == len(ROWS)
    for row, function in zip(rows, ROWS, strict=True):
        for cell, word in zip(row, function.__name__.split("_to_"), strict=True):
            assert WORDS[word] in cell


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_training_goes_on_to_the_last_bit(pool, tmp_path, row):
    want = finish(*job(TORCH, [0, 1]))
    path = (
        tmp_path if row in (sharded_to_file, file_to_sharded, fsdp_to_sharded) else tmp_path / "a"
    )
    for got in row(pool, path):
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)

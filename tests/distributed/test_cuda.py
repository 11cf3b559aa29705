"""The same promises on CUDA and NCCL; skipped, with the reason, where there are no devices."""

import multiprocessing as mp

import pytest
import torch
import torch.distributed as dist
from torch import nn

from adadelta_dist import Adadelta, ShardedAdadelta, ShardPolicy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def train(device, rank, make, dtype=torch.float32):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 300), nn.Tanh(), nn.Linear(300, 10)).to(device, dtype)
    optimizer = make(module.parameters())
    for step in range(4):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(100 * step + rank)
        inputs = torch.randn(8, 64, generator=generator).to(device, dtype)
        module(inputs).square().mean().backward()
        optimizer.step()
    return [p.detach().cpu() for p in module.parameters()]


@pytest.mark.parametrize("make", [Adadelta, ShardedAdadelta])
@pytest.mark.parametrize("fused", [False, True])
def test_one_device_follows_torch(make, fused):
    device = torch.device("cuda")
    wanted = train(device, 0, torch.optim.Adadelta)
    got = train(device, 0, lambda params: make(params, fused=fused))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if fused else 0, atol=1e-6 if fused else 0)


def test_parameters_on_two_devices_share_one_optimizer():
    params = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5, device="cuda"))]
    optimizer = ShardedAdadelta(params)
    sum(p.sum().cpu() for p in params).backward()
    optimizer.step()
    assert torch.equal(params[0], params[1].cpu())


def _rank(rank, world_size, address, queue):
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", address, rank=rank, world_size=world_size)
    policy = ShardPolicy(bucket_mb=0.01)
    params = train(
        torch.device("cuda", rank), rank, lambda params: ShardedAdadelta(params, policy=policy)
    )
    queue.put((rank, [p.numpy() for p in params]))
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_ranks_agree_over_nccl(tmp_path):
    context = mp.get_context("spawn")
    queue = context.Queue()
    address = f"file://{tmp_path / 'store'}"
    processes = [context.Process(target=_rank, args=(r, 2, address, queue)) for r in range(2)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    assert all((a == b).all() for a, b in zip(results[0], results[1], strict=True))

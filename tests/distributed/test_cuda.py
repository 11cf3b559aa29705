"""The same promises on CUDA and NCCL; skipped, with the reason, where there are no devices."""

import multiprocessing as mp
import warnings

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


def iterate(*args):
    stream = torch.cuda.Stream()  # of its own, and the same for all, as captures ask for
    with torch.cuda.stream(stream):
        params = _iterate(*args)
    torch.cuda.synchronize()
    return [p.detach().cpu() for p in params]


def _iterate(device, rank, make, captured):
    """Six iterations; the last four replay a graph, or not; `lr` is another from the fifth on.

    Args:
        make: of the parameters and `lr`, a tensor on the device.
        captured: "nothing", "step", or "all", backward too.
    """
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 300), nn.Tanh(), nn.Linear(300, 10)).to(device)
    inputs, lr = torch.empty(8, 64, device=device), torch.ones((), device=device)
    optimizer = make(module.parameters(), lr)
    graph = torch.cuda.CUDAGraph()

    def backward():
        optimizer.zero_grad(set_to_none=captured != "step")  # the graph knows one address
        module(inputs).square().mean().backward()

    def capture():
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):  # runs nothing yet
            if captured == "all":
                backward()
            optimizer.step()

    for step in range(6):
        generator = torch.Generator().manual_seed(100 * step + rank)
        inputs.copy_(torch.randn(8, 64, generator=generator))
        lr.fill_(1.0 if step < 4 else 0.5)
        is_replay = captured != "nothing" and step > 1
        if not is_replay or captured == "step":
            backward()
        if is_replay and step == 2:
            capture()
        if is_replay:
            graph.replay()
        else:
            optimizer.step()
    return list(module.parameters())


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
@pytest.mark.parametrize("captured", ["step", "all"])
@pytest.mark.parametrize("make", [Adadelta, ShardedAdadelta])
@pytest.mark.parametrize("fused", [False, True])
def test_a_graph_repeats_the_step(make, fused, captured):
    def new(params, lr):
        return make(params, lr, capturable=True, fused=fused)

    def torchs(params, lr):
        return torch.optim.Adadelta(params, lr, capturable=True)

    device = torch.device("cuda")
    wanted = iterate(device, 0, torchs, "nothing")
    got = iterate(device, 0, new, captured)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if fused else 0, atol=1e-6 if fused else 0)


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
def test_a_capturable_step_does_not_wait_for_the_device():
    p = nn.Parameter(torch.ones(1000, device="cuda"))
    optimizer = ShardedAdadelta([p], torch.ones((), device="cuda"), capturable=True)
    for mode in ("default", "error"):
        p.grad = torch.ones_like(p)
        torch.cuda.set_sync_debug_mode(mode)
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _rank(rank, world_size, address, queue):
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", address, rank=rank, world_size=world_size)
    policy = ShardPolicy(bucket_mb=0.01)
    params = train(
        torch.device("cuda", rank), rank, lambda params: ShardedAdadelta(params, policy=policy)
    )
    graphs = []
    for captured in ("nothing", "step", "all"):
        policy = ShardPolicy(bucket_mb=0.01, overlap=captured != "step")

        def make(params, lr, policy=policy):
            return ShardedAdadelta(params, lr, capturable=True, policy=policy)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a capturable step is not captured
            graphs.append(iterate(torch.device("cuda", rank), rank, make, captured))
    for captured in graphs[1:]:
        params.extend(a - b for a, b in zip(captured, graphs[0], strict=True))
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
    differences = results[0][4:]  # of what graphs and eager steps lead to
    assert len(differences) == 8
    assert not any(difference.any() for difference in differences)

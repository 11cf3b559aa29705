"""One training iteration over gloo ranks of one thread: what a step costs in its place.

All peers live in the same processes, each with its own copy of the model, and take
turns. An iteration is forward, backward, step and zero_grad, from one barrier to the
next, so that its time is that of the slowest rank.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from tqdm import tqdm

from adadelta_dist import Adadelta, ShardedAdadelta, ShardPolicy

from .report import Table, Timing

MIB = 2**20
SENT = "MiB sent per rank"
ALONE = "forward + backward alone"
BASELINE = "DDP + torch.optim.Adadelta"
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")


@dataclass(frozen=True)
class IterationPlan:
    """What to measure.

    Args:
        widths: of the layers of the perceptron.
        batch: samples per rank.
        world_size: number of ranks.
        warmup, repetitions: iterations of each peer.
    """

    widths: tuple[int, ...] = (1024, 3072, 3072, 3072, 1000)
    batch: int = 64
    world_size: int = 2
    warmup: int = 3
    repetitions: int = 20

    @property
    def numel(self) -> int:
        return sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise(self.widths))


QUICK = IterationPlan(widths=(16, 32, 8), batch=4, warmup=2, repetitions=3)

Peer = tuple[nn.Module, Optimizer | None]


def measure(plan: IterationPlan) -> list[Table]:
    """One table, from processes of its own."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_rank, (plan, folder), nprocs=plan.world_size)
            found = json.loads((Path(folder) / "found.json").read_text())
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
    return [_table(plan, found)]


def _table(plan: IterationPlan, found: dict[str, dict[str, list[float] | str]]) -> Table:
    timings, skipped = [], {}
    for name, result in found.items():
        if "skipped" in result:
            skipped[name] = str(result["skipped"])
            continue
        sent = [float(count) / plan.world_size / MIB for count in result["sent"]]
        extra = {SENT: f"{statistics.median(sent):.3g}"} if sent else {}
        times = [float(s) for s in result["seconds"]]
        ours = "adadelta_dist" in name
        timings.append(Timing(name, times, ours, name == ALONE, extra))
    if not LOOPBACK.exists():
        skipped[SENT] = f"there is no {LOOPBACK} to read"
    ranks = plan.world_size
    least = 2 * (ranks - 1) / ranks * plan.numel * 4 / MIB
    return Table(
        f"iteration: {plan.numel / 1e6:.3g} M parameters, {ranks} ranks",
        f"Perceptron {' -> '.join(map(str, plan.widths))}, fp32, batch {plan.batch} per rank, "
        f"{ranks} gloo ranks of 1 thread on one machine, {plan.repetitions} repetitions. Ratio to "
        f"{BASELINE}. Bytes are the loopback interface's own count, median, headers included; "
        f"2(N-1)/N of the parameters is {least:.3g} MiB.",
        timings,
        BASELINE,
        skipped,
    )


def _builders() -> dict[str, Callable[[nn.Module], Peer]]:
    """What makes each peer out of a model."""

    def ddp(model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)

    def zero(model: nn.Module) -> Peer:
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(),
            optimizer_class=torch.optim.Adadelta,
            parameters_as_bucket_view=True,
        )
        return ddp(model), optimizer

    def fsdp(model: nn.Module) -> Peer:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in [*(m for m in model.children() if list(m.parameters())), model]:
            fully_shard(layer, mesh=mesh)
        return model, torch.optim.Adadelta(model.parameters())

    def sharded(*, overlap: bool) -> Callable[[nn.Module], Peer]:
        policy = ShardPolicy(overlap=overlap)
        return lambda model: (model, ShardedAdadelta(model.parameters(), policy=policy))

    return {
        ALONE: lambda model: (model, None),
        BASELINE: lambda model: (ddp(model), torch.optim.Adadelta(model.parameters())),
        "DDP + adadelta_dist.Adadelta": lambda model: (ddp(model), Adadelta(model.parameters())),
        "DDP + ZeroRedundancyOptimizer": zero,
        "FSDP2 + torch.optim.Adadelta": fsdp,
        "adadelta_dist.ShardedAdadelta, overlap=True": sharded(overlap=True),
        "adadelta_dist.ShardedAdadelta, overlap=False": sharded(overlap=False),
    }


def _rank(rank: int, plan: IterationPlan, folder: str) -> None:
    """One process: all peers, in turns; rank 0 writes what it found."""
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    minutes = timedelta(minutes=3)
    dist.init_process_group("gloo", store, minutes, world_size=plan.world_size, rank=rank)
    try:
        found = _measure_peers(rank, plan)
    finally:
        dist.destroy_process_group()
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))


def _measure_peers(rank: int, plan: IterationPlan) -> dict[str, dict[str, list[float] | str]]:
    generator = torch.Generator().manual_seed(rank)
    batch = torch.randn(plan.batch, plan.widths[0], generator=generator)
    labels = torch.randint(plan.widths[-1], (plan.batch,), generator=generator)
    found: dict[str, dict[str, list[float] | str]] = {}
    peers: dict[str, Peer] = {}
    for name, build in _builders().items():
        try:
            peers[name] = build(_model(plan.widths))
            for _ in range(plan.warmup):
                _iterate(peers[name], batch, labels)
        except Exception as error:  # some peers do not run on every torch or backend
            if name == BASELINE or "FSDP2" not in name:
                raise
            peers.pop(name, None)
            found[name] = {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        else:
            found[name] = {"seconds": [], "sent": []}
    order = list(peers)
    for _ in tqdm(range(plan.repetitions), "iteration", unit="repetition", disable=rank > 0):
        for name in order:
            seconds, sent = _timed(peers[name], batch, labels)
            found[name]["seconds"].append(seconds)  # type: ignore[union-attr]
            if sent is not None:
                found[name]["sent"].append(sent)  # type: ignore[union-attr]
        order.append(order.pop(0))
    return found


def _timed(peer: Peer, batch: Tensor, labels: Tensor) -> tuple[float, int | None]:
    """Seconds of one iteration, and the bytes that all ranks sent in it."""
    dist.barrier()
    before = _bytes_sent()
    dist.barrier()
    start = time.perf_counter()
    _iterate(peer, batch, labels)
    dist.barrier()
    elapsed = time.perf_counter() - start
    after = _bytes_sent()
    dist.barrier()
    return elapsed, None if before is None or after is None else after - before


def _iterate(peer: Peer, batch: Tensor, labels: Tensor) -> None:
    model, optimizer = peer
    nn.functional.cross_entropy(model(batch), labels).backward()
    if optimizer is None:
        model.zero_grad()
    else:
        optimizer.step()
        optimizer.zero_grad()


def _model(widths: tuple[int, ...]) -> nn.Sequential:
    """A perceptron, equal on every rank."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _bytes_sent() -> int | None:
    """By all processes of this machine to each other, since it started."""
    return int(LOOPBACK.read_text()) if LOOPBACK.exists() else None

"""Saving, loading and gathering a large optimizer state, beside ZeroRedundancyOptimizer.

Both optimizers live in the same processes, each with its own copy of the model, and take
turns. Memory is the kernel's own count: the highest resident size during the call (which
writing to `clear_refs` starts anew) minus the size before it.
"""

import ctypes
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from tqdm import tqdm

from adadelta_dist import (
    ShardedAdadelta,
    async_save_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

from .report import Table, Timing

MIB = 2**20
ZERO = "ZeroRedundancyOptimizer.consolidate_state_dict(0)"
ZERO_SAVE = "ZeroRedundancyOptimizer: consolidate, torch.save on rank 0"
ON_DST, ELSEWHERE = "peak MiB, rank 0", "peak MiB, other ranks"
WRITTEN = "MiB written, by rank"


@dataclass(frozen=True)
class CheckpointPlan:
    """What to measure.

    Args:
        widths: of the layers of the perceptron.
        world_size: number of ranks.
        repetitions: of each call.
    """

    widths: tuple[int, ...] = (1024, *[3072] * 6, 1000)
    world_size: int = 4
    repetitions: int = 5

    @property
    def numels(self) -> list[int]:
        return [n for fan_in, fan_out in pairwise(self.widths) for n in (fan_in * fan_out, fan_out)]


QUICK = CheckpointPlan(widths=(16, 32, 8), world_size=2, repetitions=2)

Call = Callable[[Path], Any]


def measure(plan: CheckpointPlan) -> list[Table]:
    """One table, from processes of its own, which write to the folder of temporary files."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (plan, folder), nprocs=plan.world_size)
        found = json.loads((Path(folder) / "found.json").read_text())
    return [_table(plan, found)]


def _table(plan: CheckpointPlan, found: dict[str, dict[str, list[Any]]]) -> Table:
    timings = []
    for name, result in found.items():
        extra = {
            ON_DST: f"{statistics.median(p[0] for p in result['peaks']) / MIB:.1f}",
            ELSEWHERE: f"{statistics.median(max(p[1:]) for p in result['peaks']) / MIB:.1f}",
            WRITTEN: " ".join(f"{count / MIB:.1f}" for count in result["written"][-1]) or "-",
        }
        timings.append(Timing(name, result["seconds"], "Zero" not in name, False, extra))
    state = 8 * sum(plan.numels) / MIB
    return Table(
        f"checkpoint: {state:.3g} MiB of optimizer state, {plan.world_size} ranks",
        f"Perceptron {' -> '.join(map(str, plan.widths))}, fp32, {plan.repetitions} repetitions. "
        f"A rank's share of the state is {state / plan.world_size:.1f} MiB, the model "
        f"{state / 2:.1f}, the largest parameter {4 * max(plan.numels) / MIB:.1f}. Peaks are above "
        f"the resident size before the call. Ratio to {ZERO_SAVE}. Saves end with fsync but for "
        "torch.save. Of the asynchronous save, the time that training is held up.",
        timings,
        ZERO_SAVE,
    )


def _rank(rank: int, plan: CheckpointPlan, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    minutes = timedelta(minutes=3)
    dist.init_process_group("gloo", store, minutes, world_size=plan.world_size, rank=rank)
    try:
        found = _measure_calls(rank, plan, Path(folder))
    finally:
        dist.destroy_process_group()
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))


def _measure_calls(rank: int, plan: CheckpointPlan, folder: Path) -> dict[str, Any]:
    calls = _calls(rank, plan, folder / "kept")
    found: dict[str, Any] = {name: {"seconds": [], "peaks": [], "written": []} for name in calls}
    path = folder / "checkpoint"
    for repetition in tqdm(range(-1, plan.repetitions), "checkpoint", disable=rank > 0):
        for name, call in calls.items():
            seconds, peaks = _timed(call, path)
            if repetition >= 0:  # the first time, files and sockets are new
                found[name]["seconds"].append(seconds)
                found[name]["peaks"].append(peaks)
                found[name]["written"].append(_written(path, plan.world_size))
            dist.barrier()
            if rank == 0:
                shutil.rmtree(path, ignore_errors=True)
    return found


def _calls(rank: int, plan: CheckpointPlan, kept: Path) -> dict[str, Call]:
    """What is measured, by name; each takes the path to write to."""
    model, optimizer = _trained(plan, ShardedAdadelta)
    twin, zero = _trained(
        plan, lambda p: ZeroRedundancyOptimizer(p, optimizer_class=torch.optim.Adadelta)
    )
    save_checkpoint(kept, model, optimizer)

    def zero_gather(_: Path) -> dict[str, Any] | None:
        zero.consolidate_state_dict(0)
        state = zero.state_dict() if rank == 0 else None
        zero._all_state_dicts = []  # or it would hold the state through the next call
        return state

    def zero_save(path: Path) -> None:
        state = zero_gather(path)
        if rank == 0:
            path.mkdir()
            torch.save({"model": twin.state_dict(), "optimizer": state}, path / "__0_0.pt")
        dist.barrier()

    return {
        ZERO_SAVE: zero_save,
        "save_checkpoint": lambda path: save_checkpoint(path, model, optimizer),
        "async_save_checkpoint": lambda path: async_save_checkpoint(path, model, optimizer),
        "torch.distributed.checkpoint.save of the optimizer": lambda path: dcp.save(
            {"optimizer": optimizer}, checkpoint_id=path
        ),
        "load_checkpoint": lambda _: load_checkpoint(kept, model, optimizer),
        ZERO: zero_gather,
        "gather_state_dict(0)": lambda _: optimizer.gather_state_dict(0),
    }


def _trained(
    plan: CheckpointPlan, build: Callable[[Any], torch.optim.Optimizer]
) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(plan.widths)))
    optimizer = build(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def _timed(call: Call, path: Path) -> tuple[float, list[int]]:
    """Seconds until this rank could go on, and by rank the bytes above those before."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    dist.barrier()
    start = time.perf_counter()
    result = call(path)
    elapsed = time.perf_counter() - start
    if isinstance(result, Future):
        result.result()
    slowest = torch.tensor(elapsed, dtype=torch.float64)
    peaks: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, _status("VmHWM") - before)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item(), peaks


def _status(key: str) -> int:
    """A line of the kernel's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _written(path: Path, world_size: int) -> list[int]:
    """Bytes of tensors by rank; none if nothing was written."""
    if not path.exists():
        return []
    return [
        sum(file.stat().st_size for file in path.glob(f"__{rank}_*")) for rank in range(world_size)
    ]

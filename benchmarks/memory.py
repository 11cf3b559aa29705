"""Memory of a training iteration on each rank, a set of processes for each peer.

Resident is the kernel's count: the high-water mark of two iterations, the first among them,
above what was resident before the model was built and after a toy was trained in the same way.
Allocated is glibc's count of blocks of more than 256 KiB, whose memory it is told to give back
at once: at the most, from the building of the model on, and between iterations.
"""

import ctypes
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from adadelta_dist import ShardPolicy
from adadelta_dist.planning.model_plan import from_module
from adadelta_dist.planning.planner import Cluster, sharded

from . import ranks
from .peers import OURS, PEERS, Peer, Setup
from .report import Row, Table, rounded
from .tasks import Perceptron, Task, numel

MIB = 2**20
TOY = Perceptron((16, 32, 8), batch=4)
COMPILED_TOY = Perceptron((1024, 1024, 8), batch=4)
"""Large enough for a fused step, so that the compiler has been there."""

M_MMAP_THRESHOLD, MAPPED = -3, 2**18


@dataclass(frozen=True)
class Plan:
    """What to measure: a model on so many ranks, after a toy."""

    task: Task
    world_size: int
    toy: Task


PLANS = [Plan(Perceptron((1024, *[1536] * 10, 1000), batch=8), n, COMPILED_TOY) for n in (2, 4)]
QUICK = [Plan(TOY, 2, TOY)]


@dataclass(frozen=True)
class Usage:
    """One rank's bytes.

    Args:
        resident: at the high-water mark.
        allocated: at the most.
        between: allocated between two iterations.
        step: resident within `optimizer.step`, at the most, beyond what was before it.
    """

    resident: int
    allocated: int
    between: int
    step: int


def measure(quick: bool) -> list[Table]:
    """A table of resident and one of allocated memory for each plan."""
    return [table for plan in (QUICK if quick else PLANS) for table in _tables(plan)]


def _tables(plan: Plan) -> list[Table]:
    found: dict[str, list[Usage]] = {}
    peers = [peer for peer in PEERS if peer.role != "yardstick"]
    for peer in tqdm(peers, "memory", leave=False):
        found[peer.name] = ranks.run(plan.world_size, usage, peer, plan.task, plan.toy)
    elements = numel(plan.task)
    where = f"{elements / 1e6:.3g} M, {plan.world_size} ranks"
    note = (
        f"{str(plan.task).capitalize()}, fp32: parameters are {4 * elements / MIB:.3g} MiB. "
        f"Two iterations; a value is a rank's. "
    )
    tables = []
    for kind, read in (
        ("resident", lambda used: used.resident),
        ("allocated", lambda used: used.allocated),
    ):
        rows = [_row(peer, found, read, kind) for peer in peers]
        title = f"memory: {kind} at the most, {where}"
        tables.append(Table(title, f"{kind}, {where}", note, rows, unit="MiB"))
    return tables


def _row(peer: Peer, found: dict[str, list[Usage]], read: Callable[[Usage], int], kind: str) -> Row:
    mine, ours = ([read(used) / MIB for used in found[name]] for name in (peer.name, OURS.name))
    extra = {"MiB within step, on top": rounded(max(u.step for u in found[peer.name]) / MIB)}
    if kind == "allocated":
        extra = {
            "MiB between iterations": rounded(max(used.between for used in found[peer.name]) / MIB),
        }
    return Row(peer.name, mine, ours, peer.role, extra)


def usage(peer: Peer, task: Task, toy: Task = TOY) -> list[Usage]:
    """What two iterations of a peer take, by rank. Collective."""
    libc.mallopt(M_MMAP_THRESHOLD, MAPPED)
    _train(peer, toy)  # what libraries allocate once
    ranks.release_memory()
    resident, mapped = resident_bytes("VmRSS"), mapped_bytes()
    setup, peak, step = _train(peer, task)
    mine = Usage(peak - resident, most_mapped_bytes() - mapped, mapped_bytes() - mapped, step)
    del setup
    everyones: list[Usage] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    return everyones


def _train(peer: Peer, task: Task) -> tuple[Setup, int, int]:
    """Two iterations: their peak, and the most that a step took on top of what was there."""
    setup = peer.build(task.model())
    step = setup.optimizer.step
    peaks, on_top = [], []

    def watched(*args: Any, **options: Any) -> Any:
        peaks.append(resident_bytes("VmHWM"))
        before = _forget_peak()
        result = step(*args, **options)
        on_top.append(resident_bytes("VmHWM") - before)
        return result

    setup.optimizer.step = watched
    batch = task.inputs(dist.get_rank())
    _forget_peak()
    for _ in range(2):
        setup.iterate(batch)
        setup.finish()
    peaks.append(resident_bytes("VmHWM"))
    return setup, max(peaks), on_top[-1]


def _forget_peak() -> int:
    """Let the kernel's high-water mark start anew; where it starts."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


def mapped_bytes() -> int:
    """In blocks of more than `MAPPED` bytes now."""
    return libc.mallinfo2().hblkhd  # type: ignore[no-any-return]


def most_mapped_bytes() -> int:
    """The same at the most, since the process began; glibc tells it to stderr alone."""
    with tempfile.TemporaryFile() as file:
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            libc.malloc_stats()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        file.seek(0)
        found = re.search(rb"max mmap bytes *= *(\d+)", file.read())
    assert found is not None
    return int(found[1])


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks")),
        ("keepcost", ctypes.c_size_t),
    ]


libc = ctypes.CDLL(None)
libc.mallinfo2.restype = _MallInfo


def planned(task: Task, stage: int, world_size: int) -> float:
    """Bytes of an iteration, as `adadelta-dist plan` says."""
    with torch.device("meta"):
        model = from_module(task.model())
    cluster = Cluster(world_size, backend="gloo")
    return sharded(model, cluster, ShardPolicy(stage=stage)).peak


def resident_bytes(key: str) -> int:
    """A line of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

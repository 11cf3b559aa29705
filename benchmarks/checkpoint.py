"""Saving, loading and gathering a large optimizer state, and the model with it.

All peers live in the same processes, each with its own copy of the model, and take turns.
Memory is the kernel's own count: the highest resident size during the call (which writing to
`clear_refs` starts anew) minus the size before it.
"""

import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from tqdm import tqdm

from adadelta_dist import async_save_checkpoint, load_checkpoint, save_checkpoint

from . import ranks
from .memory import MIB, resident_bytes
from .peers import DDP, DEEPSPEED, FSDP2, OURS, ZERO_REDUNDANCY, Peer, Setup
from .report import REFERENCE, Row, Table
from .tasks import Perceptron, Task, numel


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        task: its model is saved with the optimizer's state.
        world_size: number of ranks.
        turns: of each call.
    """

    task: Task
    world_size: int
    turns: int


FULL = Plan(Perceptron((1024, *[1536] * 10, 1000), batch=8), world_size=4, turns=3)
QUICK = Plan(Perceptron((16, 32, 8), batch=4), world_size=2, turns=2)
ASYNC = f"{REFERENCE}, async_save_checkpoint"
PEERS = [OURS, DDP, ZERO_REDUNDANCY, FSDP2, *DEEPSPEED]

Call = Callable[[Path], Any]
"""Saves to a path, or loads what was saved there; `gather` ignores it."""


@dataclass
class Taken:
    """What one call took, turn by turn.

    Args:
        seconds: until the slowest rank could go on.
        peaks: by rank, bytes above those before.
        written: by all ranks, in bytes.
    """

    seconds: list[float] = field(default_factory=list)
    peaks: list[list[int]] = field(default_factory=list)
    written: list[int] = field(default_factory=list)


def measure(quick: bool) -> list[Table]:
    """Tables of saving, loading and gathering."""
    plan = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        found = ranks.run(plan.world_size, _take_turns, plan, Path(folder))
    return [_table(plan, kind, taken) for kind, taken in found.items()]


def _table(plan: Plan, kind: str, found: Mapping[str, Taken]) -> Table:
    rows = []
    beside = [1e3 * seconds for seconds in found[REFERENCE].seconds]
    for name, taken in found.items():
        peaks = [statistics.median(by_rank) / MIB for by_rank in zip(*taken.peaks, strict=True)]
        extra = {
            "peak MiB, rank 0": f"{peaks[0]:.0f}",
            "peak MiB, other ranks": f"{max(peaks[1:]):.0f}",
        }
        if kind == "save":
            extra["MiB written"] = f"{taken.written[-1] / MIB:.0f}"
        role = "ours" if name.startswith(REFERENCE) else "theirs"
        rows.append(Row(name, [1e3 * s for s in taken.seconds], beside, role, extra))
    model = 4 * numel(plan.task) / MIB
    note = (
        f"{str(plan.task).capitalize()}: a model of {model:.3g} MiB and {2 * model:.3g} MiB of "
        f"optimizer state, on {plan.world_size} gloo ranks. {NOTES[kind]} Peaks are above the "
        "resident size before the call."
    )
    return Table(f"checkpoint: {kind}, {plan.world_size} ranks", kind, note, rows)


NOTES = {
    "save": "Model and optimizer. DDP and ZeroRedundancyOptimizer: torch.save on rank 0, after "
    "consolidating; FSDP2: torch.distributed.checkpoint; DeepSpeed: save_checkpoint. Only ours "
    "and torch.distributed.checkpoint end with fsync, and only ours with checksums. Of the "
    "asynchronous save, the time that training is held up.",
    "load": "Model and optimizer, on all ranks, by the same calls' counterparts.",
    "gather": "The optimizer's whole state to rank 0's memory: gather_state_dict, "
    "consolidate_state_dict, get_optimizer_state_dict(full_state_dict=True). DDP has it anyway, "
    "and DeepSpeed has no call for it.",
}


def _take_turns(plan: Plan, folder: Path) -> dict[str, dict[str, Taken]]:
    calls = _calls(plan.task)
    found = {kind: {name: Taken() for name in named} for kind, named in calls.items()}
    gc.collect()
    gc.freeze()  # or looking for garbage before each call would take longer than the call
    for turn in tqdm(range(-1, plan.turns), "checkpoint", leave=False, disable=dist.get_rank() > 0):
        for kind, named in calls.items():
            for name, call in named.items():
                path = folder / name
                if kind == "save" and dist.get_rank() == 0:
                    shutil.rmtree(path, ignore_errors=True)
                seconds, peaks = _timed(call, path)
                if turn >= 0:  # the first time, files and sockets are new
                    found[kind][name].seconds.append(seconds)
                    found[kind][name].peaks.append(peaks)
                    found[kind][name].written.append(_written(path))
    return found


def _timed(call: Call, path: Path) -> tuple[float, list[int]]:
    """Seconds until every rank could go on, and by rank the bytes above those before."""
    ranks.release_memory()  # what was freed and kept would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    dist.barrier()
    start = time.perf_counter()
    result = call(path)
    elapsed = time.perf_counter() - start
    if isinstance(result, Future):
        result.result()
    slowest = torch.tensor(elapsed, dtype=torch.float64)
    peaks: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, resident_bytes("VmHWM") - before)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item(), peaks


def _written(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _calls(task: Task) -> dict[str, dict[str, Call]]:
    """What is measured, by kind and name. Collective."""
    calls: dict[str, dict[str, Call]] = {"save": {}, "load": {}, "gather": {}}
    for peer in PEERS:
        setup = peer.build(task.model())
        setup.iterate(task.inputs(dist.get_rank()))
        for kind, call in _calls_of(peer, setup).items():
            calls[kind][peer.name] = call
        if peer == OURS:
            save = partial(async_save_checkpoint, model=setup.model, optimizer=setup.optimizer)
            calls["save"][ASYNC] = save
    return calls


def _calls_of(peer: Peer, setup: Setup) -> dict[str, Call]:
    model, optimizer = setup.model, setup.optimizer
    if peer == OURS:
        return {
            "save": partial(save_checkpoint, model=model, optimizer=optimizer),
            "load": partial(load_checkpoint, model=model, optimizer=optimizer),
            "gather": lambda _: optimizer.gather_state_dict(0),
        }
    if peer == FSDP2:
        return {
            "save": partial(_save_dcp, model, optimizer),
            "load": partial(_load_dcp, model, optimizer),
            "gather": partial(_gather_dcp, model, optimizer),
        }
    if peer in DEEPSPEED:
        return {
            "save": lambda path: model.save_checkpoint(str(path)),
            "load": lambda path: model.load_checkpoint(str(path)),
        }
    save, load = partial(_save_on_rank_0, setup), partial(_load_from_rank_0, setup)
    if peer == DDP:
        return {"save": save, "load": load}
    return {"save": save, "load": load, "gather": lambda _: _consolidated(optimizer)}


def _consolidated(optimizer: Any) -> dict[str, Any] | None:
    """The whole state on rank 0, of whatever may be in the way of having it there."""
    if not hasattr(optimizer, "consolidate_state_dict"):
        return optimizer.state_dict() if dist.get_rank() == 0 else None
    optimizer.consolidate_state_dict(0)
    state = optimizer.state_dict() if dist.get_rank() == 0 else None
    optimizer._all_state_dicts = []  # or it would hold the state through the next call
    return state


def _save_on_rank_0(setup: Setup, path: Path) -> None:
    state = _consolidated(setup.optimizer)
    if dist.get_rank() == 0:
        path.mkdir()
        torch.save({"model": setup.model.state_dict(), "optimizer": state}, path / "whole.pt")
    dist.barrier()


def _load_from_rank_0(setup: Setup, path: Path) -> None:
    whole = torch.load(path / "whole.pt", weights_only=True, mmap=True)
    setup.model.load_state_dict(whole["model"])
    setup.optimizer.load_state_dict(whole["optimizer"])


def _state_dcp(model: torch.nn.Module, optimizer: Any) -> dict[str, Any]:
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def _save_dcp(model: torch.nn.Module, optimizer: Any, path: Path) -> None:
    dcp.save(_state_dcp(model, optimizer), checkpoint_id=path)


def _load_dcp(model: torch.nn.Module, optimizer: Any, path: Path) -> None:
    state = _state_dcp(model, optimizer)
    dcp.load(state, checkpoint_id=path)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


def _gather_dcp(model: torch.nn.Module, optimizer: Any, _: Path) -> dict[str, Any]:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(model, optimizer, options=options)

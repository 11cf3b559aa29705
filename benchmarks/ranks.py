"""Processes with a gloo group on this machine, and calls that take turns in them.

The processes are forked from a server that has imported torch, and DeepSpeed where it is
installed, so that they start at once.
"""

import ctypes
import gc
import os
import pickle
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tqdm import tqdm

TIMEOUT = timedelta(minutes=5)
LOOPBACK = "lo"
T = TypeVar("T")


def run(world_size: int, function: Callable[..., Any], *args: Any, threads: int = 1) -> Any:
    """`function(*args)` on every rank of a process group of its own; what rank 0 returned."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed looks for one, and warns
    mp.get_context("forkserver").set_forkserver_preload(["benchmarks.peers", "deepspeed"])
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _work,
            (world_size, threads, folder, function, args),
            nprocs=world_size,
            start_method="forkserver",
        )
        return pickle.loads((Path(folder) / "answer").read_bytes())


def _work(
    rank: int, world_size: int, threads: int, folder: str, function: Any, args: tuple[Any, ...]
) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}  # which DeepSpeed reads
    os.environ |= {name: str(value) for name, value in names.items()}
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    try:
        answer = prepared(function, args, threads)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    if rank == 0:
        (Path(folder) / "answer").write_bytes(pickle.dumps(answer))


def prepared(function: Callable[..., Any], args: tuple[Any, ...], threads: int = 1) -> Any:
    """Call it with so many threads, and without the warnings of other people's code."""
    torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


@dataclass(frozen=True)
class Turns:
    """What one call did, turn by turn.

    Args:
        seconds: of each turn, from barrier to barrier: the slowest rank's.
        sent: bytes that left this network interface in each turn.
    """

    seconds: list[float]
    sent: list[int]


def alternate(
    calls: Mapping[str, Callable[[], None]],
    turns: int,
    title: str,
    interface: str = LOOPBACK,
) -> dict[str, Turns]:
    """Let the calls take turns, each time in another order. Collective."""
    found = {name: Turns([], []) for name in calls}
    order = list(calls)
    gc.collect()
    gc.freeze()  # what is there stays; collecting it again and again is nobody's work
    for _ in tqdm(range(turns), title, leave=False, disable=dist.get_rank() > 0):
        for name in order:
            barrier()
            before = bytes_sent(interface)
            barrier()
            start = time.perf_counter()
            calls[name]()
            barrier()
            found[name].seconds.append(time.perf_counter() - start)
            found[name].sent.append(bytes_sent(interface) - before)
        order.append(order.pop(0))  # no call always runs behind the same one
    gc.unfreeze()
    return found


def barrier() -> None:
    """Wait for the others, if there are any."""
    if dist.get_world_size() > 1:
        dist.barrier()


def in_sets(everyone: Sequence[T], reference: T, room: int) -> Iterator[list[T]]:
    """Those who take turns together: `room` at a time, the reference always among them."""
    others = [one for one in everyone if one != reference]
    for start in range(0, len(others), room - 1):
        yield [reference, *others[start : start + room - 1]]


def bytes_sent(interface: str) -> int:
    """The interface's own count, of all processes, headers included; 0 where none is kept."""
    path = Path(f"/sys/class/net/{interface}/statistics/tx_bytes")
    return int(path.read_text()) if path.exists() else 0


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def release_memory() -> None:
    """Give back to the system what nobody holds any more."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)

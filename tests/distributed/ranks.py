"""A pool of real processes, of gloo unless told otherwise, that run a function on every rank.

The processes are forked from a server that has imported torch, so a pool starts in
about a second, and is kept for the whole session. A pool in which anything went wrong is
thrown away.
"""

import multiprocessing as mp
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "adadelta_dist", "pytest"])


class RankFailure(AssertionError):
    """A rank raised, died or missed the deadline."""


class Ranks:
    """`world_size` processes with an initialised default process group.

    Args:
        world_size: number of processes.
        timeout: of the process group, in seconds.
        backend: of the process group.
    """

    def __init__(self, world_size: int, timeout: float = 30.0, backend: str = "gloo") -> None:
        self.world_size, self.timeout, self.backend = world_size, timeout, backend
        self._workers: list[tuple[Any, Connection]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any, deadline: float = 60.0) -> list[Any]:
        """Call `function(rank, *args)` on every rank; returns the results by rank."""
        if not self._workers:
            self._start()
        task = pickle.dumps((function, args))
        for _, pipe in self._workers:
            pipe.send_bytes(task)
        end = time.monotonic() + deadline
        outcomes: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._workers)}
        while waiting and (answered := wait(waiting, max(end - time.monotonic(), 0.0))):
            for pipe in answered:
                rank = waiting.pop(pipe)
                try:
                    ok, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self._workers[rank][0].join(5)
                    ok, value = False, f"died with exit code {self._workers[rank][0].exitcode}"
                (outcomes if ok else failures)[rank] = value
            if failures:  # the others may wait for the one that failed: not for long
                end = min(end, time.monotonic() + 2.0)
        failures |= dict.fromkeys(waiting.values(), f"no answer within {deadline} s")
        if failures:
            self.close()
            raise RankFailure("".join(f"\n--- rank {r}\n{text}" for r, text in failures.items()))
        return [outcomes[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []
        if self._folder is not None:
            self._folder.cleanup()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        for rank in range(self.world_size):
            here, there = _context.Pipe()
            group = (rank, self.world_size, store, self.timeout, self.backend)
            process = _context.Process(target=_work, args=(*group, there), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))


def _work(
    rank: int, world_size: int, store: str, timeout: float, backend: str, pipe: Connection
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group(
        backend,
        rank=rank,
        world_size=world_size,
        store=dist.FileStore(store, world_size),
        timeout=timedelta(seconds=timeout),
    )
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = True, function(rank, *args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))

"""Saves that die at any moment, and files that rot: the newest checkpoint is whole, or noticed."""

import multiprocessing as mp
import os
import random
import signal
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from adadelta_dist import (
    Adadelta,
    CheckpointError,
    ShardedAdadelta,
    async_save_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

FORK = mp.get_context("forkserver")
STEPS = 200


def job(cls, width):
    """A model whose gradients are powers of two, so that any average of them is exact."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 3))
    return module, cls(module.parameters())


def advance(module, optimizer, step):
    for p in module.parameters():
        p.grad = torch.full_like(p, 2.0 ** (step % 5 - 2))
    optimizer.step()


def keep_saving(rank, world_size, store, folder, width, asynchronous, pipe):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        rank=rank,
        world_size=world_size,
        store=dist.FileStore(store, world_size),
        timeout=timedelta(seconds=20),
    )
    module, optimizer = job(ShardedAdadelta, width)
    save = async_save_checkpoint if asynchronous else save_checkpoint
    for step in range(STEPS):
        advance(module, optimizer, step)
        save(folder / f"step-{step}", module, optimizer, extra=step, keep=2)
        if rank == 0:
            pipe.send(step)


def kill_in_mid_save(folder, width, asynchronous, victims, moment):
    """SIGKILL to the ranks `victims`, `moment` seconds after the second save."""
    with tempfile.TemporaryDirectory() as place:
        here, there = FORK.Pipe(duplex=False)
        store = str(Path(place) / "store")
        ranks = [
            FORK.Process(
                target=keep_saving,
                args=(rank, 2, store, folder, width, asynchronous, there),
            )
            for rank in range(2)
        ]
        for process in ranks:
            process.start()
        for _ in range(2):
            assert here.poll(60)
            here.recv()
        time.sleep(moment)
        for rank in victims:
            os.kill(ranks[rank].pid, signal.SIGKILL)
        for process in ranks:  # a survivor fails by itself, rather than hang
            process.join(40)
            assert process.exitcode is not None, "a rank hangs"
            assert process.exitcode != 0
            process.close()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "async"])
@pytest.mark.parametrize("width", [10, 700])
@pytest.mark.parametrize("victims", [(0, 1), (0,), (1,)], ids=str)
@pytest.mark.filterwarnings("ignore:.*leaked semaphore")
def test_the_newest_checkpoint_loads_whenever_ranks_are_killed(
    tmp_path, victims, width, asynchronous
):
    folder = tmp_path / "run"
    moment = random.uniform(0, 0.1)
    kill_in_mid_save(folder, width, asynchronous, victims, moment)
    module, optimizer = job(Adadelta, width)
    loaded = load_checkpoint(folder, module, optimizer)
    assert loaded.path == latest_checkpoint(folder)
    step = loaded.extra
    assert loaded.path.name == f"step-{step}"
    control, control_optimizer = job(Adadelta, width)
    for i in range(step + 1):
        advance(control, control_optimizer, i)
    for i in (step + 1, step + 2):
        for a, b in zip(module.parameters(), control.parameters(), strict=True):
            assert torch.equal(a, b), (moment, step)
        advance(module, optimizer, i)
        advance(control, control_optimizer, i)
    visible = [f for f in folder.iterdir() if not f.name.startswith(".")]
    for path in visible:  # each of them is whole
        load_checkpoint(path, module, optimizer)
    save_checkpoint(folder / "next", module, optimizer, keep=1)
    assert [f.name for f in folder.iterdir()] == ["next"]  # what died is cleared away


def test_every_flipped_byte_is_noticed(tmp_path):
    module, optimizer = job(Adadelta, 10)
    advance(module, optimizer, 0)
    folder = save_checkpoint(tmp_path / "a", module, optimizer, extra={"epoch": 1})
    files = sorted(folder.iterdir())
    assert len(files) == 5
    sizes = [file.stat().st_size for file in files]
    for _ in range(200):
        (file,) = random.choices(files, sizes) if random.random() < 0.8 else random.sample(files, 1)
        content = bytearray(file.read_bytes())
        place, bit = random.randrange(len(content)), 1 << random.randrange(8)
        content[place] ^= bit
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="is damaged"):
            load_checkpoint(folder, module, optimizer)
        content[place] ^= bit
        file.write_bytes(content)
    load_checkpoint(folder, module, optimizer)

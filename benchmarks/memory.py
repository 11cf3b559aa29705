"""Peak resident memory of one training step at each stage, beside the formula.

    torchrun --nproc-per-node 4 -m benchmarks.memory

Every rank measures itself: the high-water mark of a step, less what was resident before the
model was built and what a step on a tiny model takes.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from adadelta_dist import ShardedAdadelta, ShardPolicy

LAYER = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=100, help="of a million parameters each")
    layers = parser.parse_args().layers
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        # Freed memory goes back to the system; glibc would keep some of it, at its discretion.
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:]])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for stage in (1, 2):
        measured = peak(layers, stage) / 1e6
        wanted = formula(layers, stage, dist.get_world_size()) / 1e6
        everyones: list[float] = [0.0] * dist.get_world_size()
        dist.all_gather_object(everyones, measured)
        if dist.get_rank() == 0:
            ranks = ", ".join(f"{mb:.0f}" for mb in everyones)
            print(f"stage {stage}: {ranks} MB measured by rank, {wanted:.0f} MB by the formula")
    dist.destroy_process_group()


def peak(layers: int, stage: int) -> int:
    """Bytes at the high-water mark of two steps above what was resident before."""
    policy = ShardPolicy(stage=2) if stage == 2 else ShardPolicy()
    train(nn.Sequential(nn.Linear(LAYER, 8)), policy)  # what torch allocates once
    before = resident("VmRSS")
    model = nn.Sequential(*[_layer() for _ in range(layers)])
    train(model, policy)
    return resident("VmHWM") - before


def _layer() -> nn.Module:
    layer = nn.utils.skip_init(nn.Linear, LAYER, LAYER, bias=False)
    nn.init.constant_(layer.weight, 1 / LAYER)
    return layer


def train(model: nn.Module, policy: ShardPolicy) -> None:
    optimizer = ShardedAdadelta(model.parameters(), fused=False, policy=policy)
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, LAYER)).sum().backward()
        optimizer.step()


def formula(layers: int, stage: int, ranks: int) -> float:
    """Bytes by docs/design.md, for fp32 parameters on gloo."""
    params, bucket = 4 * layers * LAYER**2, ShardPolicy().bucket_mb * 2**20
    gradient = 4 * LAYER**2  # the one that autograd has just made
    bucket = -(-bucket // gradient) * gradient
    shards = 3 * params / ranks  # two accumulators and averaged gradients
    received = bucket * (ranks - 2) / ranks  # the first of the others' rows needs no room
    if stage == 1:
        return params + shards + params + received + gradient
    # One bucket fills, and one travels, with its average.
    return params + shards + 2 * bucket + received + bucket / ranks + gradient


def resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    main()

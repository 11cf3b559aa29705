"""An iteration with flat and with hybrid sharding, taking turns, and what crosses between hosts.

    torchrun --nnodes 2 --nproc-per-node 2 ... -m benchmarks.hybrid

Bytes are those that left by the network interface of GLOO_SOCKET_IFNAME.
"""

import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from adadelta_dist import ShardedAdadelta

ROUNDS = 9


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    hosts = dist.get_world_size() // int(os.environ["LOCAL_WORLD_SIZE"])
    mesh = init_device_mesh("cpu", (hosts, dist.get_world_size() // hosts))
    variants = {"flat": {}, "hybrid": {"device_mesh": mesh}}
    models = {name: nn.Sequential(*[nn.Linear(1000, 1000) for _ in range(10)]) for name in variants}
    optimizers = {
        name: ShardedAdadelta(models[name].parameters(), fused=False, **options)
        for name, options in variants.items()
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    sent: dict[str, int] = {}
    for _ in range(ROUNDS):
        for name, optimizer in optimizers.items():
            dist.barrier()
            before, start = bytes_sent(), time.perf_counter()
            optimizer.zero_grad()
            models[name](torch.randn(4, 1000)).sum().backward()
            optimizer.step()
            times[name].append(time.perf_counter() - start)
            dist.barrier()
            sent[name] = bytes_sent() - before
    if dist.get_rank() == 0:
        for name, seconds in times.items():
            print(
                f"{name}: {1000 * statistics.median(seconds):.0f} ms, "
                f"{sent[name] / 1e6:.1f} MB sent by this host"
            )
    dist.destroy_process_group()


def bytes_sent() -> int:
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


if __name__ == "__main__":
    main()

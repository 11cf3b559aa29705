"""Hybrid sharding: state over the ranks of one host, replicated across hosts.

    torchrun --nproc-per-node 4 examples/train_hybrid.py --hosts 2

Here all "hosts" are one machine. On real ones start torchrun on each, and --hosts is --nnodes.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from data import CLASSES, batches, load
from model import CONFIG, perceptron, read_config
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy

from adadelta_dist import ShardedAdadelta


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of MNIST's IDX files; default: digits")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(
        "cpu", (args.hosts, world_size // args.hosts), mesh_dim_names=("replicate", "shard")
    )
    data, config = load(args.data), read_config(CONFIG)
    inputs, labels = data.train
    model = perceptron([data.inputs, *config.hidden, CLASSES], args.seed)
    optimizer = ShardedAdadelta(
        model.parameters(), lr=config.lr, rho=config.rho, eps=config.eps, device_mesh=mesh
    )
    for epoch in range(args.epochs):
        for mine, size in batches(
            len(inputs), config.batch_size, args.seed, epoch, rank, world_size
        ):
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs[mine]), labels[mine], reduction="sum")
            (loss * world_size / size).backward()  # the optimizer averages over all ranks
            optimizer.step()
        with torch.no_grad():
            wrong = model(data.test[0]).argmax(1) != data.test[1]
        if rank == 0:
            print(f"epoch {epoch + 1}: test error {100 * wrong.float().mean():.2f} %", flush=True)
    whole = optimizer.gather_state_dict(0)  # from the first replica alone
    if rank == 0:
        numel = sum(value.numel() for entry in whole["state"].values() for value in entry.values())
        print(f"state gathered: {numel} elements")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

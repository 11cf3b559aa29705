"""Mixed precision: autocast, a gradient scaler for float16, accumulation and clipping.

torchrun --nproc-per-node 2 examples/train_amp.py --dtype float16
torchrun --nproc-per-node 2 examples/train_amp.py --dtype bfloat16 --stage 2
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from data import CLASSES, Data, batches, load
from model import CONFIG, perceptron, read_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adadelta_dist import ShardedAdadelta, ShardPolicy

MICRO_BATCHES = 2
MAX_NORM = 5.0


def main() -> None:
    args = parse_args()
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    data, config = load(args.data), read_config(CONFIG)
    model = perceptron([data.inputs, *config.hidden, CLASSES], args.seed)
    optimizer = ShardedAdadelta(
        model.parameters(),
        lr=config.lr,
        rho=config.rho,
        eps=config.eps,
        policy=ShardPolicy(stage=args.stage),
    )
    dtype = getattr(torch, args.dtype)
    # bfloat16 has the range of float32, and needs no scaler.
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    for epoch in range(args.epochs):
        train_epoch(model, optimizer, scaler, data, dtype, config.batch_size, args.seed, epoch)
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
            wrong = model(data.test[0]).argmax(1) != data.test[1]
        if rank == 0:
            print(
                f"epoch {epoch + 1}: test error {100 * wrong.float().mean():.2f} %, "
                f"scale {scaler.get_scale():g}, {optimizer.skipped_steps} steps skipped",
                flush=True,
            )
    if dist.is_initialized():
        dist.destroy_process_group()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of MNIST's IDX files; default: digits")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--stage", type=int, choices=[1, 2], default=1)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train_epoch(
    model: nn.Module,
    optimizer: ShardedAdadelta,
    scaler: torch.amp.GradScaler,
    data: Data,
    dtype: torch.dtype,
    batch_size: int,
    seed: int,
    epoch: int,
) -> None:
    inputs, labels = data.train
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def backward(mine: Tensor, size: int) -> None:
        with torch.autocast("cpu", dtype=dtype):
            loss = cross_entropy(model(inputs[mine]).float(), labels[mine], reduction="sum")
        scaler.scale(loss * world_size / size).backward()  # the optimizer averages over the ranks

    for mine, size in batches(len(inputs), batch_size, seed, epoch, rank, world_size):
        optimizer.zero_grad()
        *before, last = mine.chunk(MICRO_BATCHES)
        with optimizer.no_sync():
            for micro in before:
                backward(micro, size)
        backward(last, size)
        # What is scaled is clipped at the scaled norm; `unscale_` would have it sent again.
        optimizer.clip_grad_norm_(MAX_NORM * scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()


if __name__ == "__main__":
    main()

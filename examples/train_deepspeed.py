"""Zeiler's ADADELTA experiment (arXiv:1212.5701, section 4.1) with DeepSpeed's engine.

    deepspeed --num_gpus 2 examples/train_deepspeed.py
    torchrun --nproc-per-node 2 examples/train_deepspeed.py
    python examples/train_deepspeed.py --resume runs/deepspeed --out runs/more --epochs 14

The optimizer is named in `--deepspeed_config`; there is one for each ZeRO stage in
configs/. (On CPUs, too, `--num_gpus` of the launcher is the number of processes.) Every
number of ranks takes the same steps, and goes on from a checkpoint made with any other.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from data import CLASSES, Data, batches, load, share
from model import CONFIG, perceptron, read_config
from torch.nn.functional import cross_entropy

from adadelta_dist.strategies.deepspeed import initialize
from adadelta_dist.strategies.deepspeed_reading import read_deepspeed
from adadelta_dist.strategies.deepspeed_universal import write_universal

ROOT = Path(__file__).resolve().parent.parent


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of MNIST's IDX files; default: digits")
    parser.add_argument("--out", type=Path, default=Path("runs/deepspeed"), help="folder to write")
    parser.add_argument("--resume", type=Path, help="folder of an earlier run to go on from")
    parser.add_argument("--epochs", type=int, help="in total; default: as in zeiler_mnist.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    deepspeed.add_config_arguments(parser)
    parser.set_defaults(deepspeed_config=str(ROOT / "configs" / "deepspeed_zero2.json"))
    return parser.parse_args()


def start_job() -> None:
    """Join the ranks that a launcher started; alone, a group of one."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    if "RANK" not in os.environ:
        os.environ |= alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    deepspeed.init_distributed(verbose=False)


def build(args: argparse.Namespace, sizes: list[int]) -> tuple[Any, list[dict[str, float]]]:
    """DeepSpeed's engine, new or as it was saved, and the history so far. Collective."""
    config = json.loads(Path(args.deepspeed_config).read_text())
    stage = config["zero_optimization"]["stage"]
    universal = args.resume is not None and stage > 0
    config["checkpoint"] = {"load_universal": universal}
    engine = initialize(model=perceptron(sizes, args.seed), config=config)[0]
    if args.resume is None:
        return engine, []
    folder, tag = args.resume / "checkpoint", None
    if universal:  # so that the number of ranks may be another
        folder, tag = args.out, "universal"
        if dist.get_rank() == 0:
            shutil.rmtree(folder / tag, ignore_errors=True)  # of an earlier resume
            write_universal(read_deepspeed(args.resume / "checkpoint"), folder / tag)
        dist.barrier()
    _, client = engine.load_checkpoint(str(folder), tag)
    return engine, client["history"]


def train_epoch(engine: Any, data: Data, seed: int, epoch: int) -> float:
    """One pass over the data. Returns the mean loss. Collective."""
    inputs, labels = data.train
    rank, world_size = dist.get_rank(), dist.get_world_size()
    pieces = engine.gradient_accumulation_steps()
    losses = torch.zeros((), device=engine.device)  # where the ranks can add it up
    order = batches(len(inputs), engine.train_batch_size(), seed, epoch, rank, world_size)
    for indices, batch_size in order:
        for piece in range(pieces):
            mine = share(indices, piece, pieces)
            total = loss_sum(engine, inputs[mine], labels[mine])
            # DeepSpeed divides by `pieces` and averages over the ranks: the mean of the batch,
            # though the shares may differ in length.
            engine.backward(total * (world_size * pieces / batch_size))
            engine.step()
            losses += total.detach()
    dist.all_reduce(losses)
    return losses.item() / len(inputs)


def loss_sum(engine: Any, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    dtype = next(engine.module.parameters()).dtype
    outputs = engine(inputs.to(engine.device, dtype)).float()
    return cross_entropy(outputs, labels.to(engine.device), reduction="sum")


@torch.no_grad()
def test_error(engine: Any, data: Data) -> float:
    """Wrong answers on the test set in percent. Collective."""
    inputs, labels = data.test
    mine = share(torch.arange(len(inputs)), dist.get_rank(), dist.get_world_size())
    dtype = next(engine.module.parameters()).dtype
    answers = engine(inputs[mine].to(engine.device, dtype)).argmax(1)
    wrong = (answers != labels[mine].to(engine.device)).sum().float()
    dist.all_reduce(wrong)
    return 100 * wrong.item() / len(inputs)


def main() -> None:
    args = parse_args()
    start_job()
    data, config = load(args.data), read_config(CONFIG)
    args.out.mkdir(parents=True, exist_ok=True)
    engine, history = build(args, [data.inputs, *config.hidden, CLASSES])
    leads = dist.get_rank() == 0
    if leads:
        print(f"{data.title} on {dist.get_world_size()} ranks, {len(history)} epochs done")
        print("epoch  train loss  test error %")
    for epoch in range(len(history) + 1, (args.epochs or config.epochs[data.name]) + 1):
        loss = train_epoch(engine, data, args.seed, epoch)
        error = test_error(engine, data)
        history.append({"epoch": epoch, "train_loss": loss, "test_error": error})
        if leads:
            print(f"{epoch:5}  {loss:10.4f}  {error:12.2f}", flush=True)
            (args.out / "history.json").write_text(json.dumps(history, indent=1) + "\n")
        engine.save_checkpoint(str(args.out / "checkpoint"), client_state={"history": history})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

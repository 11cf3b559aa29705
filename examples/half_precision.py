"""Zeiler's perceptron with bfloat16 parameters: what masters and rounding are worth.

    torchrun --nproc-per-node 2 examples/half_precision.py --data folder/of/mnist

Every variant starts from the same weights and sees the same batches. Leaves a picture and
a JSON file of test errors.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from data import CLASSES, Data, batches, load
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from model import CONFIG, perceptron, read_config
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from adadelta_dist import ShardedAdadelta, ShardPolicy


@dataclass(frozen=True)
class Variant:
    """One line of the picture; without a policy torch.optim.Adadelta, on one rank.

    Args:
        style: of the line; `size` of its hollow markers, one within the other where lines meet.
    """

    dtype: torch.dtype
    policy: ShardPolicy | None
    style: str
    size: float


BF16 = torch.bfloat16
VARIANTS = {
    "float32, torch.optim.Adadelta": Variant(torch.float32, None, "ko-", 15),
    "bfloat16, masters": Variant(BF16, ShardPolicy(), "C0o-", 11),
    "bfloat16, masters, bfloat16 accumulators": Variant(
        BF16, ShardPolicy(state_dtype=BF16), "C4o-", 7
    ),
    "bfloat16, no masters, stochastic rounding": Variant(
        BF16, ShardPolicy(stochastic_rounding=True), "C2D-", 4
    ),
    "bfloat16, no masters, rounded to nearest": Variant(
        BF16, ShardPolicy(master_weights=False), "C3x-", 7
    ),
    "float32, bfloat16 accumulators": Variant(
        torch.float32, ShardPolicy(state_dtype=BF16), "C1+-", 5
    ),
}


def main() -> None:
    args = parse_args()
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    data, config = load(args.data), read_config(CONFIG)
    epochs = args.epochs or config.epochs[data.name]
    errors: dict[str, list[float]] = {}
    for name, variant in VARIANTS.items():
        sizes = [data.inputs, *config.hidden, CLASSES]
        model = perceptron(sizes, args.seed).to(variant.dtype)
        options = {"lr": args.lr or config.lr, "rho": config.rho, "eps": config.eps}
        optimizer: Optimizer = torch.optim.Adadelta(model.parameters(), **options)
        if variant.policy is not None:
            optimizer = ShardedAdadelta(model.parameters(), **options, policy=variant.policy)
        # The single process of torch's optimizer is every rank by itself.
        share = (rank, dist.get_world_size()) if dist.is_initialized() else (0, 1)
        share = share if variant.policy is not None else (0, 1)
        errors[name] = [
            train_epoch(model, optimizer, data, config.batch_size, args.seed, epoch, share)
            for epoch in range(epochs)
        ]
        if rank == 0:
            print(f"{name:44s}", *(f"{error:5.2f}" for error in errors[name]), flush=True)
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "half_precision.json").write_text(json.dumps(errors, indent=1))
        title = f"{data.title}, lr {args.lr or config.lr:g}"
        draw(errors, title, args.out / "half_precision.png")
    if dist.is_initialized():
        dist.destroy_process_group()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of MNIST's IDX files; default: digits")
    parser.add_argument("--out", type=Path, default=Path("runs/half_precision"))
    parser.add_argument("--epochs", type=int, help="default: as configured")
    parser.add_argument("--lr", type=float, help="default: as configured")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    data: Data,
    batch_size: int,
    seed: int,
    epoch: int,
    share: tuple[int, int],
) -> float:
    """One epoch; returns the test error in percent."""
    inputs, labels = data.train
    dtype, (rank, world_size) = next(model.parameters()).dtype, share
    for mine, size in batches(len(inputs), batch_size, seed, epoch, rank, world_size):
        optimizer.zero_grad()
        logits = model(inputs[mine].to(dtype)).float()
        total = cross_entropy(logits, labels[mine], reduction="sum")
        (total * world_size / size).backward()  # the optimizer averages over the ranks
        optimizer.step()
    with torch.no_grad():
        wrong = model(data.test[0].to(dtype)).argmax(1) != data.test[1]
    return 100 * wrong.float().mean().item()


def draw(errors: dict[str, list[float]], title: str, path: Path) -> None:
    figure = Figure(figsize=(7, 4.2), dpi=90, layout="constrained")
    axes = figure.subplots()
    for name, values in errors.items():
        at = range(1, len(values) + 1)
        style, label = VARIANTS[name].style, f"{name}: {values[-1]:.2f}"
        axes.plot(at, values, style, ms=VARIANTS[name].size, mfc="none", lw=1, label=label)
    axes.set(title=f"{title}: test error", xlabel="epoch", ylabel="wrong answers (%)")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(which="both", alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()

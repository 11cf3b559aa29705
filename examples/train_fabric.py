r"""Zeiler's ADADELTA experiment (arXiv:1212.5701, section 4.1) in a loop of one's own, with Fabric.

    python examples/train_fabric.py --devices 2
    python examples/train_fabric.py --devices 2 --data folder/of/mnist
    python examples/train_fabric.py --resume runs/fabric/checkpoint.ckpt --epochs 14

Fabric starts the second rank, or uses those that torchrun has started. The optimizer is torch's
own: `fabric.setup` shards it. A checkpoint goes on at any number of ranks, and with plain torch.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from data import CLASSES, Data, batches, load, share
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger
from model import CONFIG, Config, perceptron, read_config
from pictures import curves
from recorder import StepRecorder
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Adadelta, Optimizer
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

import adadelta_dist.strategies.fabric  # noqa: F401 (so that Fabric knows its strategy)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of MNIST's IDX files; default: digits")
    parser.add_argument("--config", type=Path, default=CONFIG, help="JSON of hyperparameters")
    parser.add_argument("--out", type=Path, default=Path("runs/fabric"), help="folder to write")
    parser.add_argument("--resume", type=Path, help="checkpoint to go on from")
    parser.add_argument("--epochs", type=int, help="in total; default: as configured")
    parser.add_argument("--devices", type=int, default=1, help="ranks")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train_epoch(
    fabric: Fabric,
    model: nn.Module,
    optimizer: Optimizer,
    data: Data,
    order: Any,
    recorder: StepRecorder,
) -> tuple[float, list[dict[str, Any]]]:
    """One pass over the data. Collective.

    Args:
        order: this rank's share of each batch, and the size of the whole batch.

    Returns:
        The mean loss, and what the recorder saw, with the loss until then.
    """
    inputs, labels = data.train
    of_epoch, of_sample = MeanMetric().to(fabric.device), MeanMetric().to(fabric.device)
    rows = []
    for indices, batch_size in order:
        total = cross_entropy(model(inputs[indices]), labels[indices], reduction="sum")
        optimizer.zero_grad()
        # The average of this over the ranks is the mean over the whole batch, though the
        # shares may differ in length.
        fabric.backward(total * (fabric.world_size / batch_size))
        before = recorder.latest
        optimizer.step()
        mean = total.detach() / max(len(indices), 1)
        of_epoch.update(mean, len(indices))
        of_sample.update(mean, len(indices))
        if recorder.latest is not before:
            rows.append({"loss": of_sample.compute().item(), **recorder.latest})
            of_sample.reset()
    return of_epoch.compute().item(), rows


@torch.no_grad()
def test_error(fabric: Fabric, model: nn.Module, data: Data) -> float:
    """Wrong answers on the test set in percent. Collective."""
    inputs, labels = data.test
    accuracy = MulticlassAccuracy(CLASSES, average="micro").to(fabric.device)
    mine = share(torch.arange(len(inputs)), fabric.global_rank, fabric.world_size)
    accuracy.update(model(inputs[mine]), labels[mine])
    return 100 * (1 - accuracy.compute().item())


def train(fabric: Fabric, args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """All epochs that are left, with a checkpoint after each. Returns the history. Collective."""
    data = load(args.data).to(fabric.device)
    network = perceptron([data.inputs, *config.hidden, CLASSES], args.seed)
    torchs = Adadelta(network.parameters(), lr=config.lr, rho=config.rho, eps=config.eps)
    model, optimizer = fabric.setup(network, torchs)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "epochs": [], "steps": []}
    if args.resume is not None:
        fabric.load(args.resume, state)
        fabric.print(f"resumed at epoch {len(state['epochs'])}")
        for row in state["epochs"]:  # the log has them all
            fabric.log_dict({k: v for k, v in row.items() if k != "epoch"}, step=row["epoch"])
    per_epoch = math.ceil(len(data.train[0]) / config.batch_size)
    done = len(state["epochs"])
    recorder = StepRecorder(network, torchs, config.sample_every, done * per_epoch)
    for epoch in range(done + 1, (args.epochs or config.epochs[data.name]) + 1):
        ranks = fabric.global_rank, fabric.world_size
        order = batches(len(data.train[0]), config.batch_size, args.seed, epoch, *ranks)
        loss, rows = train_epoch(fabric, model, optimizer, data, order, recorder)
        for row in rows:
            step = config.sample_every * (len(state["steps"]) + 1)
            state["steps"].append({"epoch": step / per_epoch, **row})
        values = {"train_loss": loss, "test_error": test_error(fabric, model, data)}
        fabric.log_dict(values, step=epoch)
        fabric.print(
            f"epoch {epoch}: train loss {loss:.4f}, test error {values['test_error']:.2f} %"
        )
        state["epochs"].append({"epoch": epoch, **values})
        fabric.save(args.out / "checkpoint.ckpt", state)
    return {"epochs": state["epochs"], "steps": state["steps"], "title": data.title}


def main() -> None:
    args = parse_args()
    fabric = Fabric(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy="sharded_adadelta",
        loggers=CSVLogger(args.out, name="", version="csv"),
    )
    fabric.launch()
    history = train(fabric, args, read_config(args.config))
    fabric.logger.finalize("success")
    if fabric.is_global_zero:
        curves(history, f"Adadelta with Fabric on {history['title']}", args.out / "curves.png")
        print(f"wrote checkpoint.ckpt, csv and curves.png to {args.out}")


if __name__ == "__main__":
    main()

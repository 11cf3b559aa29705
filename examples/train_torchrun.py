"""Zeiler's ADADELTA experiment (arXiv:1212.5701, section 4.1) with a sharded optimizer.

    torchrun --nproc-per-node 2 examples/train_torchrun.py
    torchrun --nproc-per-node 2 examples/train_torchrun.py --data folder/of/mnist
    python examples/train_torchrun.py --resume runs/torchrun/checkpoints --epochs 14

Every number of ranks trains on the same batches, so it takes the same steps, and a
checkpoint made with one number of ranks goes on with any other.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from data import CLASSES, Data, batches, load, share
from model import CONFIG, Config, perceptron, read_config
from pictures import curves
from recorder import StepRecorder, replicated_bytes, state_bytes
from torch import nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm

from adadelta_dist import ShardedAdadelta, load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class Job:
    """One process among the ranks."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def hides_progress(self) -> bool | None:
        return None if self.leads else True  # None: only where there is no terminal


@dataclass(frozen=True)
class Plan:
    """All that is read before the ranks begin to work together."""

    config: Config
    data: Data
    sizes: list[int]
    epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.data.train[0]) / self.config.batch_size)


@dataclass
class Training:
    """What training changes, and what it needs."""

    job: Job
    plan: Plan
    model: nn.Module
    optimizer: torch.optim.Adadelta
    history: dict[str, Any] = field(default_factory=lambda: {"epochs": [], "steps": []})

    @property
    def epochs_done(self) -> int:
        return len(self.history["epochs"])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of MNIST's IDX files; default: digits")
    parser.add_argument("--config", type=Path, default=CONFIG, help="JSON of hyperparameters")
    parser.add_argument("--out", type=Path, default=Path("runs/torchrun"), help="folder to write")
    parser.add_argument("--resume", type=Path, help="checkpoint, or a folder of them: the newest")
    parser.add_argument("--epochs", type=int, help="in total; default: as configured")
    parser.add_argument("--optimizer", choices=["sharded", "torch"], default="sharded")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def start_job() -> Job:
    """Join the ranks that torchrun (or Ray) started; alone, without a process group."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.device_count() >= local_size:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Job(0, 1, device)
    if dist.is_initialized():  # by Ray Train
        pass
    elif device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    return Job(dist.get_rank(), dist.get_world_size(), device)


def prepare(args: argparse.Namespace, job: Job) -> Plan:
    """Read and check everything that may be wrong, without a word to other ranks.

    Raises:
        OSError, ValueError: in words for the user.
    """
    if args.optimizer == "torch" and job.world_size > 1:
        raise ValueError(
            f"--optimizer torch is for one process, and there are {job.world_size}: it keeps its "
            "gradients to itself. Start it with python, or use --optimizer sharded."
        )
    config = read_config(args.config)
    if job.world_size > config.batch_size:
        raise ValueError(f"{job.world_size} ranks cannot share batches of {config.batch_size}")
    data = load(args.data).to(job.device)
    sizes = [data.inputs, *config.hidden, CLASSES]
    epochs = config.epochs[data.name] if args.epochs is None else args.epochs
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume is None and (args.out / "checkpoints").exists():
        raise ValueError(f"--out {args.out} has checkpoints already: --resume them, or remove them")
    return Plan(config, data, sizes, epochs, args.seed)


def attempt(job: Job, action: Callable[[], Any]) -> Any:
    """What `action` returns; if it raises on any rank, all leave, and rank 0 says why. Collective.

    Raises:
        SystemExit: on every rank.
    """
    result, problem = None, None
    try:
        result = action()
    except (OSError, ValueError, RuntimeError) as error:
        problem = str(error)
    problems = [problem] * job.world_size
    if dist.is_initialized():
        dist.all_gather_object(problems, problem)
    if any(problems):
        if job.leads:
            print(f"error: {next(filter(None, problems))}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            dist.barrier()
        raise SystemExit(2)
    return result


def build(job: Job, plan: Plan, kind: str) -> Training:
    """Model and optimizer, as new. Collective."""
    model = perceptron(plan.sizes, plan.seed).to(job.device)
    values = {name: getattr(plan.config, name) for name in ("lr", "rho", "eps")}
    make = ShardedAdadelta if kind == "sharded" else torch.optim.Adadelta
    return Training(job, plan, model, make(model.named_parameters(), **values))


def resume(training: Training, path: Path) -> None:
    """Go on from a checkpoint, of whatever world size. Collective.

    Raises:
        OSError, ValueError, RuntimeError: on every rank, in words for the user.
    """
    loaded = load_checkpoint(path, training.model, training.optimizer)
    training.history = loaded.extra["history"]
    done, wanted = training.epochs_done, training.plan.epochs
    if wanted <= done:
        raise ValueError(f"{wanted} epochs wanted and {done} done already: give a higher --epochs")
    if training.job.leads:
        then, now = loaded.extra["world_size"], training.job.world_size
        print(f"resumed at epoch {done}, saved at world size {then}, now {now}")


def train(training: Training, out: Path) -> None:
    """All epochs that are left, with a checkpoint after each. Collective."""
    job, plan = training.job, training.plan
    done = training.epochs_done
    recorder = None
    if job.leads:
        every, steps_done = plan.config.sample_every, done * plan.steps_per_epoch
        recorder = StepRecorder(training.model, training.optimizer, every, steps_done)
        print(f"{'epoch':>5}  {'train loss':>10}  {'test error %':>12}  {'seconds':>7}")
    for epoch in tqdm(
        range(done + 1, plan.epochs + 1),
        desc="epochs",
        initial=done,
        total=plan.epochs,
        disable=job.hides_progress,
    ):
        start = time.perf_counter()
        loss = train_epoch(training, epoch, recorder)
        error = test_error(training)
        row = {"epoch": epoch, "train_loss": loss, "test_error": error}
        row |= {"seconds": time.perf_counter() - start, "world_size": job.world_size}
        training.history["epochs"].append(row)
        if job.leads:
            tqdm.write(f"{epoch:5}  {loss:10.4f}  {error:12.2f}  {row['seconds']:7.2f}")
        extra = {"history": training.history, "world_size": job.world_size}
        folder = out / "checkpoints" / f"epoch-{epoch}"
        save_checkpoint(folder, training.model, training.optimizer, extra=extra, keep=1)


def train_epoch(training: Training, epoch: int, recorder: StepRecorder | None) -> float:
    """One pass over the data. Returns the mean loss. Collective."""
    job, plan, model, optimizer = training.job, training.plan, training.model, training.optimizer
    inputs, labels = plan.data.train
    per_epoch, every = plan.steps_per_epoch, plan.config.sample_every
    of_epoch, of_sample = MeanMetric().to(job.device), MeanMetric().to(job.device)
    order = batches(len(inputs), plan.config.batch_size, plan.seed, epoch, job.rank, job.world_size)
    bar = tqdm(order, desc="steps", total=per_epoch, leave=False, disable=job.hides_progress)
    for step, (indices, batch_size) in enumerate(bar, (epoch - 1) * per_epoch + 1):
        total = cross_entropy(model(inputs[indices]), labels[indices], reduction="sum")
        optimizer.zero_grad()
        # The average of this over the ranks is the mean over the whole batch, though the
        # shares may differ in length.
        (total * (job.world_size / batch_size)).backward()
        optimizer.step()
        mean = total.detach() / max(len(indices), 1)
        of_epoch.update(mean, len(indices))
        of_sample.update(mean, len(indices))
        if step % every == 0:
            loss = of_sample.compute().item()
            of_sample.reset()
            if recorder is not None:
                sample = {"step": step, "epoch": step / per_epoch, "loss": loss}
                training.history["steps"].append(sample | recorder.latest)
    return of_epoch.compute().item()


@torch.no_grad()
def test_error(training: Training) -> float:
    """Wrong answers on the test set in percent. Collective."""
    job, (inputs, labels) = training.job, training.plan.data.test
    accuracy = MulticlassAccuracy(CLASSES, average="micro").to(job.device)
    mine = share(torch.arange(len(inputs)), job.rank, job.world_size)
    accuracy.update(training.model(inputs[mine]), labels[mine])
    return 100 * (1 - accuracy.compute().item())


def report(training: Training, out: Path) -> None:
    """A table of the optimizer's memory; the history and its picture, as files. Collective."""
    job, plan, history = training.job, training.plan, training.history
    by_rank = [state_bytes(training.optimizer)] * job.world_size
    if dist.is_initialized():
        dist.all_gather_object(by_rank, by_rank[job.rank])
    if not job.leads:
        return
    whole = replicated_bytes(training.model)
    print(f"\n{'optimizer state':<22}{'bytes':>10}  {'of replicated':>13}")
    rows = [(f"rank {rank} of {job.world_size}", held) for rank, held in enumerate(by_rank)]
    for name, held in [*rows, ("replicated, each rank", whole)]:
        print(f"{name:<22}{held:>10}  {held / whole:>13.1%}")
    history["state_bytes"] = {"by_rank": by_rank, "replicated": whole}
    history |= {"data": plan.data.name, "sizes": plan.sizes, "seed": plan.seed}
    (out / "history.json").write_text(json.dumps(history, indent=1) + "\n")
    network = "-".join(map(str, plan.sizes))
    curves(history, f"Adadelta on {plan.data.title}: a {network} perceptron", out / "curves.png")
    print(f"\nwrote checkpoints, history.json and curves.png to {out}")


def main() -> None:
    args, job = parse_args(), start_job()
    try:
        plan = attempt(job, lambda: prepare(args, job))
        training = build(job, plan, args.optimizer)
        if args.resume is not None:
            attempt(job, lambda: resume(training, args.resume))
        train(training, args.out)
        report(training, args.out)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""LightningModules, and one Trainer job that ranks of a pool run for real.

A job is described by plain values, so that the same one runs on ranks with our strategy
and in one process with stock Lightning and `torch.optim.Adadelta`.
"""

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from adadelta_dist import Adadelta, ShardedAdadelta, ShardPolicy, collectives

ROOT = Path(__file__).parents[2]
GLOBAL_BATCH, BATCHES, INPUTS, CLASSES = 12, 8, 20, 5

# Lightning's own remarks on jobs as small as these, by message.
REMARKS = [
    r".*`LightningModule\.configure_optimizers` returned `None`.*",  # on purpose
    r".*Checkpoint directory .* exists and is not empty.*",  # what is there is to be replaced
    r".*was called without a model.*|.*there is no last checkpoint available.*",  # nor is one meant
    r".*does not have many workers.*",  # a few dozen rows need no worker processes
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",  # torch's, of Lightning's calls
    r".*callbacks used to create the checkpoint need to be provided.*",  # no further saving
    r"The \.grad attribute of a Tensor that is not a leaf.*",  # torch's compiler looks, in a logger
    r".*recommended to use `self\.log\('apart', .*sync_dist=True.*",  # without it, on purpose
    r".*Using ModelCheckpoint with manual optimization.*",  # state after the step is meant
]


@dataclass(frozen=True)
class Job:
    """What one run does; the default is a plain one of 2 epochs.

    Args:
        optimizer: one of `kinds` below.
        module: "automatic", "manual" (two optimizers), "without bias", "normalised",
            or "clips by itself".
        strategy: a name, or keyword arguments of ShardedAdadeltaStrategy.
        trainer: further arguments of Trainer.
        resume: checkpoint to go on from.
        save: {"every_n_train_steps": ...} and so on, of ModelCheckpoint, with "dirpath".
        missing_on: the rank whose loss does not reach the layer `extra`; -1: none.
        compiled: by `torch.compile`: "part" or "whole" of the module.
        then: what to run after fit: "validate", "test", "predict".
    """

    optimizer: str = "torch"
    module: str = "automatic"
    strategy: Any = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    resume: str | None = None
    save: dict[str, Any] | None = None
    scheduler: str | None = None
    missing_on: int = -1
    compiled: str = ""
    then: tuple[str, ...] = ()


def rows() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(GLOBAL_BATCH * BATCHES, INPUTS, generator=generator)
    teacher = torch.randn(INPUTS, CLASSES, generator=generator)
    return TensorDataset(inputs, (inputs @ teacher).argmax(1))


class ResumableLoader(DataLoader):
    """Goes on, in mid-epoch, with the batch after the last one before the checkpoint."""

    skip = done = 0

    def __iter__(self) -> Iterator[Any]:
        self.done, self.skip = self.skip, 0
        for batch in islice(super().__iter__(), self.done, None):
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["done"]


def loader(world_size: int) -> DataLoader:
    """Batches whose union over the ranks is the same at any world size."""
    rank = int(os.environ["RANK"]) if world_size > 1 else 0
    sampler = DistributedSampler(rows(), world_size, rank, shuffle=False)
    return ResumableLoader(rows(), batch_size=GLOBAL_BATCH // world_size, sampler=sampler)


def _on_one_rank(module: Any) -> Any:
    kind = torch.optim.SGD if module.rank == 1 else torch.optim.Adadelta
    return kind(module.parameters(), lr=1.0)


def _over_one_rank(module: Any) -> Any:
    alone = dist.new_group([module.rank], use_local_synchronization=True)
    return ShardedAdadelta(module.parameters(), process_group=alone)


WRONG = {
    "SGD": lambda module: torch.optim.SGD(module.parameters(), lr=1.0),
    "none": lambda module: None,
    "empty list": lambda module: [],
    "SGD on rank 1": _on_one_rank,
    "raises on rank 1": lambda module: torch.optim.Adadelta(
        module.parameters(), lr=1 / (1 - module.rank)
    ),
    "over one rank": _over_one_rank,
}


def make_module(job: Job, world_size: int) -> Any:
    import lightning.pytorch as pl

    averaged = partial(ShardedAdadelta, policy=ShardPolicy(gradients="averaged"))
    kinds = {
        "torch": torch.optim.Adadelta,
        "Adadelta": Adadelta,
        "Sharded": ShardedAdadelta,
        "Sharded averaged": averaged,
    }

    class Net(pl.LightningModule):
        """Two layers, one that some ranks may not use, and what no optimizer averages."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3 + self.rank)  # the ranks must not start alike by chance
            self.body = nn.Sequential(nn.Linear(INPUTS, 16), nn.Tanh())
            if job.module == "normalised":
                self.body.append(nn.BatchNorm1d(16))
            self.head = nn.Linear(16, CLASSES, bias=job.module != "without bias")
            self.extra = nn.Linear(INPUTS, CLASSES, bias=False)
            self.scale = nn.Parameter(torch.rand(1), requires_grad=False)
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
            self.losses: list[float] = []
            self.scores: dict[str, list[float]] = {}
            self.automatic_optimization = job.module != "manual"

        @property
        def rank(self) -> int:
            return int(os.environ.get("RANK", 0))

        def on_train_start(self) -> None:
            self.wrapped = type(self.trainer.strategy.model).__name__

        def loss(self, batch: list[Tensor]) -> Tensor:
            inputs, labels = batch
            logits = self.head(self.body(inputs)) + self.scale
            if world_size == 1 and job.missing_on >= 0:
                share = torch.arange(len(inputs)) % 2 == job.missing_on  # of that rank of two
                logits = logits + self.extra(inputs) * ~share[:, None]
            elif job.missing_on != self.rank:
                logits = logits + self.extra(inputs)
            return nn.functional.cross_entropy(logits, labels)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor | None:
            self.seen += 1 + self.rank
            loss = self.loss(batch)
            self.losses.append(loss.item())
            if job.compiled != "whole":  # torch cannot compile Lightning 2.6.6's `log`
                self.log("train_loss", loss, sync_dist=True, on_epoch=True)
            if self.automatic_optimization:
                return loss
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                with optimizer.toggle_model():
                    self.manual_backward(self.loss(batch))
                optimizer.step()
            return None

        def _score(self, stage: str, batch: list[Tensor]) -> Tensor:
            loss = self.loss(batch)
            self.scores.setdefault(stage, []).append(loss.item())
            self.log(f"{stage}_loss", loss, sync_dist=True)
            return loss

        def validation_step(self, batch: list[Tensor], index: int) -> Tensor:
            return self._score("validation", batch)

        def test_step(self, batch: list[Tensor], index: int) -> Tensor:
            return self._score("test", batch)

        def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
            return self.head(self.body(batch[0])).argmax(1)

        def configure_optimizers(self) -> Any:
            if job.optimizer in WRONG:
                return WRONG[job.optimizer](self)
            kind, values = kinds[job.optimizer], {"rho": 0.95, "weight_decay": 1e-3}
            if job.module == "manual":
                parts = self.body, nn.ModuleList([self.head, self.extra])
                return [kind(part.parameters(), **values) for part in parts]
            groups = [
                {"params": list(self.body.named_parameters()), "lr": 0.7},
                {"params": [*self.head.named_parameters(), *self.extra.named_parameters()]},
            ]
            optimizer = kind(groups, **values)
            if job.scheduler is None:
                return optimizer
            schedules = torch.optim.lr_scheduler
            parts = [
                schedules.LinearLR(optimizer, 0.3, 1.0, 3),
                schedules.StepLR(optimizer, 2, 0.5),
            ]
            scheduler = schedules.SequentialLR(optimizer, parts, [4])
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": job.scheduler},
            }

    class Clipping(Net):
        def configure_gradient_clipping(
            self,
            optimizer: Any,
            gradient_clip_val: float | None = None,
            gradient_clip_algorithm: str | None = None,
        ) -> None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    return Clipping() if job.module == "clips by itself" else Net()


def run_script(
    code: str, folder: Path, *arguments: str, timeout: float = 180.0
) -> "subprocess.CompletedProcess[str]":
    """Run a script as users start theirs; Lightning starts the other ranks."""
    (folder / "script.py").write_text(code)
    return subprocess.run(
        [sys.executable, "script.py", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def import_lightning(rank: int) -> None:
    """Takes seconds, and is done once a process."""
    import lightning.pytorch  # noqa: F401


def become_rank(rank: int, world_size: int) -> None:
    """The environment in which torchrun starts a rank."""
    values = {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    os.environ.update({name: str(value) for name, value in values.items()})


def make_trainer(job: Job, world_size: int, folder: str, **arguments: Any) -> Any:
    import lightning.pytorch as pl

    from adadelta_dist.strategies.lightning import ShardedAdadeltaStrategy

    strategy = job.strategy
    if isinstance(strategy, dict):
        strategy = ShardedAdadeltaStrategy(**strategy)
    defaults = {
        "max_epochs": 2,
        "use_distributed_sampler": False,
        "logger": False,
        "enable_checkpointing": job.save is not None,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "callbacks": [pl.callbacks.ModelCheckpoint(**job.save)] if job.save else [],
    }
    given = defaults | job.trainer | arguments
    if given.get("precision") == "16-mixed":  # of CPUs the Trainer makes bfloat16, if it chooses
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=4)
        del given["precision"]
        given["plugins"] = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    return pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        default_root_dir=folder,
        **given,
    )


def run_alone(job: Job) -> dict[str, Any]:
    """Run the job in this process with stock Lightning and torch's own optimizer."""
    return _run(1, replace(job, strategy="auto", optimizer="torch"))


def run(rank: int, world_size: int, job: Job) -> dict[str, Any]:
    """Run the job on this rank of a pool."""
    become_rank(rank, world_size)
    return _run(world_size, job)


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of each message of gradients or parameters that leaves this rank."""
    sent, send = [], collectives._send

    def spy(group: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return send(group, tensor, *args, **kwargs)

    with mock.patch.object(collectives, "_send", spy):
        yield sent


def fail(rank: int, world_size: int, job: Job) -> tuple[str, str]:
    """Run a job that must not work; returns what it raised here."""
    try:
        run(rank, world_size, job)
    except Exception as error:
        return type(error).__name__, str(error)
    raise AssertionError(f"{job} went well on rank {rank}")


def _run(world_size: int, job: Job) -> dict[str, Any]:
    """What tests compare, as plain values."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        for remark in REMARKS:
            warnings.filterwarnings("ignore", message=remark)
        module = make_module(job, world_size)
        trainer = make_trainer(job, world_size, folder)
        trained = module
        if job.compiled == "part":
            module.body.compile(backend="eager")
        elif job.compiled:
            trained = torch.compile(module, backend="eager")
        trainer.fit(trained, loader(world_size), loader(world_size), ckpt_path=job.resume)
        results = {stage: getattr(trainer, stage)(module, loader(world_size)) for stage in job.then}
        optimizers = [getattr(o, "_optimizer", o) for o in trainer.strategy._lightning_optimizers]
        return {
            "losses": module.losses,
            "scores": module.scores,
            "state": {name: np.array(t.tolist()) for name, t in module.state_dict().items()},
            "lr": [[group["lr"] for group in o.param_groups] for o in optimizers],
            "optimizers": [type(o).__name__ for o in optimizers],
            "wrapped": module.wrapped,
            "callbacks": [type(callback).__name__ for callback in trainer.callbacks],
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "results": {
                stage: [t.tolist() for t in value] if stage == "predict" else value
                for stage, value in results.items()
            },
            "saved": sorted(
                str(path.relative_to(job.save["dirpath"]))
                for path in Path(job.save["dirpath"]).rglob("*")
            )
            if job.save
            else [],
        }

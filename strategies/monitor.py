"""`AdadeltaMonitor`: what Adadelta does, in numbers for a logger."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adadelta_dist import ShardedAdadelta

from .frameworks import pl
from .pieces import innermost, pieces

_SUMS = 3  # of squared gradients, of squared updates, of elements


class AdadeltaMonitor(pl.callbacks.Callback):
    """Log root mean squares of gradients and updates, and their ratio, every few steps.

    For each parameter group (`adadelta/group_0/...`), and for each layer if asked
    (`adadelta/<layer>/...`): `gradient_rms` of the averaged, clipped gradient; `update_rms` of
    what the step added; `effective_lr`, the second over the first; all of them at an optimizer's
    last step in a batch. For all together `adadelta/gradient_norm` and `adadelta/skipped_steps`,
    the number of steps so far that a gradient scaler kept from happening. Values are the same on
    all ranks: one all-reduce carries all of them.

    With `ShardedAdadelta`, `Adadelta`, `torch.optim.Adadelta`; under DeepSpeed without layers,
    for there an optimizer has flat pieces of parameters, whose padding counts in the means.

    Not with ZeRO stage 2, where gradients are gone after a step.

    Args:
        every_n_steps: how often; the first step is one of them.
        layers: log layers too.
        progress_bar: show the gradient norm and the effective learning rates there.

    Attributes:
        latest: the values logged last, by name.
    """

    def __init__(
        self, every_n_steps: int = 50, layers: bool = False, progress_bar: bool = False
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps, self.layers, self.progress_bar = every_n_steps, layers, progress_bar
        self.latest: dict[str, float] = {}
        self._skipped = self._step = 0
        self._attempted = False
        self._handles: list[Any] = []
        self._skips: dict[Optimizer, int] = {}
        self._rows: dict[str, int] | None = None
        self._row_of: dict[Any, int] = {}
        self._sums: dict[Optimizer, Tensor] = {}
        self._before: dict[Optimizer, list[Tensor]] = {}
        self._partitioned = False
        self._groups = 0

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Hook the optimizers."""
        self._reset()  # an exception keeps `teardown` from being called
        for wrapped in trainer.optimizers:
            optimizer, partitioned = innermost(wrapped)
            if isinstance(optimizer, ShardedAdadelta) and optimizer._policy.stage == 2:
                raise ValueError(
                    "AdadeltaMonitor with ShardPolicy(stage=2), where gradients are gone after a "
                    "step: use stage=1, or leave the monitor out."
                )
            self._partitioned |= partitioned
            self._skips[optimizer] = getattr(optimizer, "skipped_steps", 0)
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: Any
    ) -> None:
        """Decide whether to look at the step of this batch."""
        stepped = trainer.fit_loop.epoch_loop._batches_that_stepped
        if self._rows is None and stepped % self.every_n_steps == 0:
            self._step = stepped
            self._rows, self._row_of = self._layout(trainer, pl_module)
            self._before, self._sums = {}, {}

    def on_before_optimizer_step(self, trainer: "pl.Trainer", *_: Any) -> None:
        """Notice a step that is about to happen."""
        # DeepSpeed's engine accumulates gradients itself, and is called for every micro-batch.
        is_last = getattr(trainer.model, "is_gradient_accumulation_boundary", None)
        if trainer.strategy.handles_gradient_accumulation and is_last and not is_last():
            return
        self._skipped += self._attempted  # the one before has not happened
        self._attempted = True

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: Any
    ) -> None:
        """Log, if a step was looked at. Collective."""
        if self._rows is None or not self._sums:
            return
        sums = torch.stack(list(self._sums.values())).sum(0).to(trainer.strategy.root_device)
        self._before, self._sums = {}, {}
        if self._partitioned:
            sums = trainer.strategy.reduce(sums, reduce_op="sum")
        self.latest = self._values(sums.cpu())
        self._rows = None
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, step=self._step)
        if self.progress_bar:
            shown = {k: v for k, v in self.latest.items() if k.endswith(("norm", "effective_lr"))}
            pl_module.log_dict(shown, prog_bar=True, logger=False, on_step=True, on_epoch=False)

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Remove the hooks."""
        self._reset()

    def _reset(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._rows, self._attempted, self._partitioned = None, False, False
        self._before, self._sums, self._skips = {}, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """The number of skipped steps."""
        return {"skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._skipped = state_dict["skipped"]

    def _layout(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule"
    ) -> tuple[dict[str, int], dict[Any, int]]:
        """Row numbers by name, and by group or parameter; the same on all ranks, groups first."""
        rows: dict[str, int] = {}
        row_of: dict[Any, int] = {}
        optimizers = [innermost(wrapped)[0] for wrapped in trainer.optimizers]
        self._groups = sum(len(optimizer.param_groups) for optimizer in optimizers)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            row_of[id(group)] = rows.setdefault(f"group_{len(rows)}", len(rows))
        if self.layers:
            for name, p in pl_module.named_parameters():
                row_of[p] = rows.setdefault(name.rpartition(".")[0] or name, len(rows))
        return rows, row_of

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        # A closure may run after this, and change gradients; parameters stay.
        if self._rows is not None:
            self._before[optimizer] = [piece.values.clone() for piece in pieces(optimizer)]

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._attempted = False
        skips = getattr(optimizer, "skipped_steps", 0)
        if skips > self._skips.get(optimizer, 0):  # hooks run, and nothing has happened
            self._skips[optimizer], self._skipped = skips, self._skipped + 1
            self._before.pop(optimizer, None)
            return
        if self._rows is None:
            return
        shape = len(self._rows), _SUMS
        sums = torch.zeros(shape, dtype=torch.float64, device="cpu")
        for piece, before in zip(pieces(optimizer), self._before[optimizer], strict=True):
            if piece.grad is None:
                continue
            # DeepSpeed's padding is memory as it was found, and may be NaN.
            change = (piece.values - before).masked_fill(~before.isfinite(), 0.0)
            squares = [_square_sum(piece.grad), _square_sum(change), float(piece.values.numel())]
            for row in (self._row_of.get(id(piece.group)), self._row_of.get(piece.param)):
                if row is not None:
                    sums[row] += torch.tensor(squares, dtype=torch.float64, device="cpu")

        self._sums[optimizer] = sums

    def _values(self, sums: Tensor) -> dict[str, float]:
        assert self._rows is not None
        values = {
            "adadelta/gradient_norm": sums[: self._groups, 0].sum().sqrt().item(),
            "adadelta/skipped_steps": float(self._skipped),
        }
        for name, row in self._rows.items():
            values |= _of_row(f"adadelta/{name}", sums[row].tolist())
        return values


def _of_row(name: str, sums: "list[float]") -> Mapping[str, float]:
    """Three values of a group or layer; none where nothing had a gradient."""
    gradients, updates, numel = sums
    if not numel:
        return {}
    gradient, update = (gradients / numel) ** 0.5, (updates / numel) ** 0.5
    values = {f"{name}/gradient_rms": gradient, f"{name}/update_rms": update}
    return values | {f"{name}/effective_lr": update / gradient if gradient else 0.0}


def _square_sum(tensor: Tensor) -> float:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return float(torch.linalg.vector_norm(real, dtype=torch.float64)) ** 2

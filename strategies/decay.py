"""`EpsDecay` and `RhoDecay`: lower a hyperparameter when validation stops improving.

Speech recognition recipes train with Adadelta this way: eps bounds the first updates from
below, and a hundredth of it lets a model settle that no longer improves.
"""

import math
from typing import Any, ClassVar, Literal

import torch

from .frameworks import pl
from .pieces import innermost


class _Decay(pl.callbacks.Callback):
    """Multiply a hyperparameter of all groups by `factor` after `patience` bad validations."""

    _hyperparameter: ClassVar[str]

    def __init__(
        self,
        monitor: str,
        factor: float,
        patience: int,
        minimum: float,
        mode: Literal["min", "max"],
        min_delta: float,
    ) -> None:
        if not 0 < factor < 1:
            raise ValueError(f"factor must be between 0 and 1, got {factor}")
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
        if patience < 0:
            raise ValueError(f"patience must not be negative, got {patience}")
        self.monitor, self.factor, self.patience = monitor, factor, patience
        self.minimum, self.mode, self.min_delta = minimum, mode, min_delta
        self.best = math.inf if mode == "min" else -math.inf
        self.bad_validations = 0

    @property
    def state_key(self) -> str:
        """Tells apart several of these in one checkpoint."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Compare with the best so far. Collective."""
        if trainer.state.fn != pl.trainer.states.TrainerFn.FITTING or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"monitor: no metric {self.monitor!r} was logged in validation, only "
                f"{sorted(trainer.callback_metrics)}. Log it with self.log."
            )
        value = trainer.callback_metrics[self.monitor]
        # All ranks must decide alike, whether or not the user had the metric reduced.
        own = torch.as_tensor(value, dtype=torch.float64, device=trainer.strategy.root_device)
        current = float(trainer.strategy.reduce(own, reduce_op="mean"))
        margin = self.min_delta if self.mode == "max" else -self.min_delta
        better = (
            current > self.best + margin if self.mode == "max" else current < self.best + margin
        )
        if better:
            self.best, self.bad_validations = current, 0
            return
        self.bad_validations += 1
        if self.bad_validations > self.patience:
            self.bad_validations = 0
            self._decay(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The best value, and how often none was better; the groups keep the hyperparameter."""
        return {"best": self.best, "bad_validations": self.bad_validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.best, self.bad_validations = state_dict["best"], state_dict["bad_validations"]

    def _decay(self, trainer: "pl.Trainer") -> None:
        name = self._hyperparameter
        for wrapped in trainer.optimizers:
            optimizer, _ = innermost(wrapped)
            for group in optimizer.param_groups:
                if name in group:
                    lower = max(group[name] * self.factor, self.minimum)
                    group[name] = min(group[name], lower)  # it may be below the minimum already


class EpsDecay(_Decay):
    """Multiply `eps` by `factor` when `monitor` has not improved in `patience` validations.

    With `ShardedAdadelta`, `Adadelta` and `torch.optim.Adadelta`, also under DeepSpeed. The
    metric is averaged over the ranks, so all of them decide alike.

    Args:
        monitor: a metric logged in validation.
        factor: between 0 and 1.
        patience: how many validations without improvement to let pass.
        min_eps: where to stop.
        mode: whether "min" or "max" is better.
        min_delta: what counts as an improvement.

    Attributes:
        best: the best value so far.
        bad_validations: how many have passed since, or since the last decay.

    Raises:
        ValueError: an argument out of range; after validation: no such metric.
    """

    _hyperparameter = "eps"

    def __init__(
        self,
        monitor: str,
        factor: float = 0.01,
        patience: int = 0,
        min_eps: float = 1e-12,
        mode: Literal["min", "max"] = "min",
        min_delta: float = 0.0,
    ) -> None:
        super().__init__(monitor, factor, patience, min_eps, mode, min_delta)


class RhoDecay(_Decay):
    """As `EpsDecay`, for `rho`: a shorter memory of past gradients.

    Args:
        min_rho: where to stop.
    """

    _hyperparameter = "rho"

    def __init__(
        self,
        monitor: str,
        factor: float = 0.9,
        patience: int = 0,
        min_rho: float = 0.5,
        mode: Literal["min", "max"] = "min",
        min_delta: float = 0.0,
    ) -> None:
        super().__init__(monitor, factor, patience, min_rho, mode, min_delta)

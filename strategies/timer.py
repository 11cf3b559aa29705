"""`StepTimer`: where the time of a step goes."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torchmetrics import MeanMetric

from adadelta_dist import ShardedAdadelta

from .frameworks import pl
from .pieces import innermost

_KINDS = ("reduce_wait_ms", "update_ms", "gather_wait_ms", "bytes_sent")


class StepTimer(pl.callbacks.Callback):
    """Log this rank's milliseconds and bytes of optimizer steps, averaged over `every_n_steps`.

    `step/reduce_wait_ms`: from the end of backward until averaged gradients are there (what
    overlapped with backward is not in it); `step/gather_wait_ms`: waiting for the parameters that
    others own; `step/update_ms`: the rest of the step; `step/bytes_sent` by this rank, during
    backward too. The first three are zero, zero and the whole step for an optimizer that is not
    `ShardedAdadelta`. It is host time: on CUDA devices, work is only queued in it.

    Attributes:
        latest: the values logged last, by name.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.latest: dict[str, float] = {}
        self._means = {kind: MeanMetric(sync_on_compute=False) for kind in _KINDS}
        self._clocks: list[_Clock] = []
        self._handles: list[Any] = []
        self._start = 0.0
        self._steps = 0

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Hook the optimizers."""
        for wrapped in trainer.optimizers:
            optimizer, _ = innermost(wrapped)
            self._clocks.append(clock := _Clock(optimizer))
            hook = self._hook(trainer, clock)
            self._handles.append(optimizer.register_step_post_hook(hook))

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Start the clock: backward is done, clipping and the step follow."""
        for clock in self._clocks:
            clock.reduce_wait = clock.gather_wait = 0.0
        self._start = time.perf_counter()

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()
        while self._clocks:
            self._clocks.pop().remove()

    def _hook(self, trainer: "pl.Trainer", clock: "_Clock") -> Callable[..., None]:
        def after_step(*_: Any) -> None:
            total = time.perf_counter() - self._start
            update = total - clock.reduce_wait - clock.gather_wait
            seconds = clock.reduce_wait, update, clock.gather_wait
            values = [1000 * s for s in seconds] + [float(clock.bytes_sent)]
            clock.bytes_sent = 0
            for kind, value in zip(_KINDS, values, strict=True):
                self._means[kind].update(value)
            self._steps += 1
            if self._steps % self.every_n_steps == 0:
                self._log(trainer)

        return after_step

    def _log(self, trainer: "pl.Trainer") -> None:
        self.latest = {f"step/{kind}": mean.compute().item() for kind, mean in self._means.items()}
        for mean in self._means.values():
            mean.reset()
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


class _Clock:
    """Times the waits of one optimizer, by wrapping what it calls on its buckets."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.reduce_wait = self.gather_wait = 0.0
        self.bytes_sent = 0
        self._waits = 0  # nested: a launch waits for the reduction before it
        self._wrapped: list[tuple[Any, str]] = []
        if isinstance(optimizer, ShardedAdadelta) and optimizer._shards:
            self._wrap(optimizer._reducer, "reduce", self._timed)
            for bucket in optimizer._reducer.buckets:
                numel = bucket.own_param.numel() * (bucket.group.world_size - 1)
                reduced = partial(self._counted, sent=numel * bucket.precision.reduce.itemsize)
                gathered = numel * bucket.precision.gather.itemsize
                self._wrap(bucket, "wait", self._timed)
                self._wrap(bucket.reduction, "start", reduced)
                self._wrap(bucket.reduction, "start_adding", reduced)
                self._wrap(bucket, "gather", partial(self._gathering, sent=gathered))

    def remove(self) -> None:
        """Undo the wrapping."""
        for owner, name in self._wrapped:
            delattr(owner, name)

    def _wrap(self, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        setattr(owner, name, wrap(getattr(owner, name)))
        self._wrapped.append((owner, name))

    def _timed(self, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start, self._waits = time.perf_counter(), self._waits + 1
            try:
                return function(*args, **kwargs)
            finally:
                self._waits -= 1
                if not self._waits:
                    self.reduce_wait += time.perf_counter() - start

        return timed

    def _counted(self, function: Any, sent: int) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.bytes_sent += sent
            return function(*args, **kwargs)

        return counted

    def _gathering(self, function: Any, sent: int) -> Any:
        def gather() -> Any:
            self.bytes_sent += sent
            return _TimedWait(self, function())

        return gather


class _TimedWait:
    def __init__(self, clock: _Clock, pending: Any) -> None:
        self._clock, self._pending = clock, pending

    def wait(self) -> None:
        start = time.perf_counter()
        self._pending.wait()
        self._clock.gather_wait += time.perf_counter() - start

"""`ShardedAdadeltaStrategy`: train a LightningModule with `ShardedAdadelta`, without DDP.

Import this module, and `Trainer(strategy="sharded_adadelta")` knows it.
"""

import warnings
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from adadelta_dist import ShardedAdadelta, ShardPolicy, groups
from adadelta_dist.agreement import agreement

from . import clipping, conversion, sharded_checkpoint
from .backend import check_backend
from .broadcast import BufferBroadcast, broadcast_module_
from .frameworks import fabric, pl
from .meeting import MeetingOnException

_meetings = count()
_WHAT = "configure_optimizers"
_SEES_GRADIENTS = ("on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping")
_FREED = (
    "ZeRO stage 2 frees gradients during backward, so p.grad is None and has no norm to clip. "
    "Clip with gradient_clip_val or self.clip_gradients; optimizer.grad_shard(p), on every rank, "
    "is a slice of the average; strategy='sharded_adadelta' keeps p.grad."
)


class ShardedAdadeltaStrategy(pl.strategies.DDPStrategy):
    """Data parallel training whose optimizer averages gradients and shards its own state.

    `configure_optimizers` returns `torch.optim.Adadelta` (which becomes a `ShardedAdadelta`
    in place: hyperparameters, schedulers and hooks stay), `adadelta_dist.Adadelta` or
    `ShardedAdadelta`. The module is not wrapped: parameters and buffers are broadcast as
    DistributedDataParallel does, and reductions run during backward.

    Clip through the Trainer (`gradient_clip_val`) or `self.clip_gradients`: what a hook sees
    in `p.grad` is this rank's own gradient.

    Args:
        policy: how the optimizers that are converted communicate.
        checkpoint: "full": one file, which strategy "auto" or "ddp" with
            `torch.optim.Adadelta` loads too; "sharded": a folder into which every rank
            writes what it owns. Both are loaded, whatever this is, at any world size.
        broadcast_buffers: give all ranks rank 0's buffers, as DistributedDataParallel does.
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin,
            process_group_backend, timeout, start_method: as Lightning's `DDPStrategy`.

    Raises:
        ValueError: `checkpoint` is neither of the two; NCCL without CUDA devices.
        TypeError: on every rank, if `configure_optimizers` returns another optimizer or none.
    """

    def __init__(
        self,
        policy: ShardPolicy = ShardPolicy(),
        checkpoint: Literal["full", "sharded"] = "full",
        broadcast_buffers: bool = True,
        accelerator: "pl.accelerators.Accelerator | None" = None,
        parallel_devices: list[Any] | None = None,
        cluster_environment: "fabric.plugins.ClusterEnvironment | None" = None,
        checkpoint_io: "fabric.plugins.CheckpointIO | None" = None,
        precision_plugin: "pl.plugins.precision.Precision | None" = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        if checkpoint not in ("full", "sharded"):
            raise ValueError(f"checkpoint must be 'full' or 'sharded', got {checkpoint!r}")
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self._policy, self._checkpoint = policy, checkpoint
        self._buffers = BufferBroadcast(broadcast_buffers)
        self._blocked = False
        self._meeting = MeetingOnException(-1)
        self._validation = _BuffersBeforeValidation()

    def setup_distributed(self) -> None:
        """Initialise the process group."""
        check_backend(self.root_device, self._get_process_group_backend())
        super().setup_distributed()

    def setup(self, trainer: "pl.Trainer") -> None:
        """Prepare the module, its optimizers, and for exceptions. Collective."""
        super().setup(trainer)
        self._meeting.leave(trainer)  # if an exception has kept `teardown` from being called
        self._meeting = MeetingOnException(self.broadcast(next(_meetings)))
        self._meeting.join(trainer)
        self._validation.join(trainer)

    def configure_ddp(self) -> None:
        """Nothing: the optimizers average the gradients."""

    def setup_optimizers(self, trainer: "pl.Trainer") -> None:
        """Build the user's optimizers and shard them; broadcast what they leave. Collective."""
        error = None
        group = groups.join(None)
        try:
            super().setup_optimizers(trainer)
            self._refuse_none()
            self._warn_of_freed_gradients()
        except Exception as raised:
            error = raised
        bare = [_bare(optimizer) for optimizer in self.optimizers]
        sharded = conversion.shard_all_(bare, group, self._policy, _WHAT, error)
        self.optimizers = list(sharded)
        assert self.model is not None
        done = [p for optimizer in sharded for p in clipping.parameters(optimizer)]
        broadcast_module_(group, self.model, done)

    def setup_precision_plugin(self) -> None:
        """Attach the precision plugin, and have it clip what the optimizers average."""
        super().setup_precision_plugin()
        clip = partial(_clip_gradients, self.precision_plugin)
        self.precision_plugin.clip_gradients = clip  # type: ignore[method-assign]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The training step, with rank 0's buffers if the last one was a synced one."""
        assert self.model is not None
        self._buffers.before_forward_(self.model, synced=not self._blocked)
        return super().training_step(*args, **kwargs)

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Within it, backward accumulates local gradients and sends nothing."""
        before, self._blocked = self._blocked, True
        with ExitStack() as stack:
            for optimizer in self.optimizers:
                stack.enter_context(_bare(optimizer).no_sync())
            stack.callback(setattr, self, "_blocked", before)
            yield

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state to save: whole on rank 0, or this rank's slices. Collective."""
        bare = _bare(optimizer)
        if self._checkpoint == "full":
            whole: dict[str, Any] = super().optimizer_state(bare)
            return whole
        assert self.lightning_module is not None
        return sharded_checkpoint.by_name(bare, self.lightning_module)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write a file or a folder that is there as a whole or not at all. Collective."""
        group, filepath = groups.join(None), self.broadcast(filepath)
        if self._checkpoint == "sharded":
            if storage_options is not None:
                raise TypeError("storage_options: a sharded checkpoint does not use CheckpointIO")
            assert self.lightning_module is not None
            sharded_checkpoint.save(group, checkpoint, Path(filepath), self.lightning_module)
            return
        with agreement(group, f"saving {filepath}"):
            if self.is_global_zero:
                sharded_checkpoint.remove(Path(filepath))
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file or a folder. Collective."""
        group, checkpoint_path = groups.join(None), self.broadcast(checkpoint_path)
        path, checkpoint = Path(checkpoint_path), {}
        with agreement(group, f"loading {path}") as mine:
            folder = sharded_checkpoint.is_folder(path)
            mine.facts.append("a folder" if folder else "a file")
            if not folder:
                checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        if folder:
            assert self.lightning_module is not None
            strict = self.lightning_module.strict_loading
            checkpoint = sharded_checkpoint.load(
                path,
                self.lightning_module,
                strict=strict,
                weights_only=weights_only is None or weights_only,
            )
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give every optimizer its state. Collective.

        Raises:
            ValueError: the checkpoint has another number of optimizers.
        """
        saved = checkpoint["optimizer_states"]
        if len(saved) != len(self.optimizers):
            raise ValueError(
                f"the checkpoint has the state of {len(saved)} optimizers, and "
                f"configure_optimizers returned {len(self.optimizers)}"
            )
        assert self.lightning_module is not None
        for state, optimizer in zip(saved, map(_bare, self.optimizers), strict=True):
            conversion.shard_added_groups_(optimizer)
            if isinstance(state, sharded_checkpoint.OnDisk):
                sharded_checkpoint.load_optimizer(state, optimizer, self.lightning_module)
            else:
                optimizer.load_state_dict(state)

    def on_exception(self, exception: BaseException) -> None:
        """Explain a gradient that is not there."""
        super().on_exception(exception)
        if "NoneType" in str(exception) and 2 in self._stages():
            exception.args = (f"{exception}. If that was a gradient: {_FREED}",)

    def teardown(self) -> None:
        """Leave the precision plugin, the Trainer's callbacks and later backwards alone."""
        for optimizer in map(_bare, self.optimizers):
            if isinstance(optimizer, ShardedAdadelta):  # else `setup_optimizers` has failed
                optimizer._reducer.unhook()
        vars(self.precision_plugin).pop("clip_gradients", None)
        if self.lightning_module is not None and self.lightning_module._trainer is not None:
            self._meeting.leave(self.lightning_module.trainer)
            self._validation.leave(self.lightning_module.trainer)
        super().teardown()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Add "sharded_adadelta" and "sharded_adadelta_zero2"."""
        strategy_registry.register(
            "sharded_adadelta", cls, description="Adadelta, sharded as in ZeRO stage 1"
        )
        strategy_registry.register(
            "sharded_adadelta_zero2",
            cls,
            description="Adadelta, sharded as in ZeRO stage 2",
            policy=ShardPolicy(stage=2),
        )

    def _refuse_none(self) -> None:
        mock = pl.core.optimizer._MockOptimizer
        if not self.optimizers or any(isinstance(o, mock) for o in self.optimizers):
            raise TypeError(
                "configure_optimizers returned no optimizer, and sharded_adadelta needs an "
                "Adadelta: return torch.optim.Adadelta(self.parameters()), or train with "
                "strategy='ddp'."
            )

    def _warn_of_freed_gradients(self) -> None:
        is_overridden = pl.utilities.model_helpers.is_overridden
        hooks = [name for name in _SEES_GRADIENTS if is_overridden(name, self.lightning_module)]
        if hooks and 2 in self._stages():
            warnings.warn(f"{', '.join(hooks)}: {_FREED}", stacklevel=2)

    def _stages(self) -> set[int]:
        return {getattr(_bare(o), "_policy", self._policy).stage for o in self.optimizers}


class _BuffersBeforeValidation(pl.callbacks.Callback):
    """Has every rank validate with rank 0's buffers, as DistributedDataParallel would.

    The last of the callbacks: others swap buffers in when validation begins.
    """

    def on_validation_epoch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule"
    ) -> None:
        """Collective: ranks need not have equally many batches, or any."""
        strategy: Any = trainer.strategy
        strategy._buffers.before_validation_(strategy.model)

    def join(self, trainer: "pl.Trainer") -> None:
        self.leave(trainer)  # if an exception has kept `teardown` from being called
        trainer.callbacks.append(self)  # type: ignore[attr-defined]

    def leave(self, trainer: "pl.Trainer") -> None:
        if self in trainer.callbacks:  # type: ignore[attr-defined]
            trainer.callbacks.remove(self)  # type: ignore[attr-defined]


def _bare(optimizer: Optimizer) -> Any:
    """The optimizer that Lightning wraps; a `ShardedAdadelta` from `setup_optimizers` on."""
    return getattr(optimizer, "_optimizer", optimizer)


def _clip_gradients(
    plugin: Any,
    optimizer: Optimizer,
    clip_val: float | None = 0.0,
    gradient_clip_algorithm: Any = pl.utilities.GradClipAlgorithmType.NORM,
) -> None:
    """What precision plugins do, on the gradients that the optimizer averages. Collective."""
    if not clip_val or clip_val <= 0:
        return
    bare = _bare(optimizer)
    scaler = getattr(plugin, "scaler", None)
    clip_val *= clipping.scale_of(bare, scaler)
    if gradient_clip_algorithm == pl.utilities.GradClipAlgorithmType.VALUE:
        clipping.clip_grad_value_(bare, clip_val, scaled=scaler is not None)
    else:
        bare.clip_grad_norm_(clip_val)


ShardedAdadeltaStrategy.register_strategies(pl.strategies.StrategyRegistry)

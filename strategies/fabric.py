"""`ShardedAdadeltaFabricStrategy`: the same for a training loop of your own, with Fabric.

Import this module, and `Fabric(strategy="sharded_adadelta")` knows it.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from adadelta_dist import ShardedAdadelta, ShardPolicy, groups

from . import clipping, conversion
from .backend import check_backend
from .broadcast import BufferBroadcast, broadcast_module_
from .frameworks import fabric

_WHAT = "fabric.setup"


class _NoSync(fabric.strategies.strategy._BackwardSyncControl):
    """What `fabric.no_backward_sync` asks."""

    def __init__(self, strategy: "ShardedAdadeltaFabricStrategy") -> None:
        self._strategy = strategy

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """Send nothing for the parameters of this module, if enabled."""
        return self._strategy.no_sync(module) if enabled else nullcontext()


class ShardedAdadeltaFabricStrategy(fabric.strategies.ddp.DDPStrategy):
    """Data parallel training whose optimizers average gradients and shard their own state.

    `model, optimizer = fabric.setup(model, optimizer)` makes a `torch.optim.Adadelta` a
    `ShardedAdadelta` in place, so that schedulers built on it go on. The module is not
    wrapped. Clip with `fabric.clip_gradients`, accumulate within `fabric.no_backward_sync`.
    `fabric.save` writes torch's own state dict, `fabric.load` takes it at any world size.

    Args:
        policy: how the optimizers that are converted communicate.
        broadcast_buffers: give all ranks rank 0's buffers, as DistributedDataParallel does.
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision,
            process_group_backend, timeout, start_method: as Fabric's `DDPStrategy`.

    Raises:
        ValueError: NCCL without CUDA devices.
        TypeError: on every rank, if `setup` is given another optimizer.
    """

    def __init__(
        self,
        policy: ShardPolicy = ShardPolicy(),
        broadcast_buffers: bool = True,
        accelerator: "fabric.accelerators.accelerator.Accelerator | None" = None,
        parallel_devices: list[Any] | None = None,
        cluster_environment: "fabric.plugins.ClusterEnvironment | None" = None,
        checkpoint_io: "fabric.plugins.CheckpointIO | None" = None,
        precision: "fabric.plugins.Precision | None" = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision=precision,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self._policy, self._broadcasts_buffers = policy, broadcast_buffers
        self._backward_sync_control = _NoSync(self)
        self._sharded: list[ShardedAdadelta] = []
        self._blocked = False

    def setup_environment(self) -> None:
        """Initialise the process group."""
        check_backend(self.root_device, self._get_process_group_backend())
        super().setup_environment()

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: Sequence[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Shard the optimizers; broadcast what they leave of the module. Collective."""
        group = groups.join(None)
        sharded = conversion.shard_all_(optimizers, group, self._policy, _WHAT)
        self._sharded.extend(sharded)
        self._broadcast(module, sharded)
        return module, list(sharded), scheduler

    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        """Broadcast the module. Collective."""
        self._broadcast(module, [])
        return module

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Shard one optimizer. Collective."""
        group = groups.join(None)
        (sharded,) = conversion.shard_all_([optimizer], group, self._policy, _WHAT)
        self._sharded.append(sharded)
        return sharded

    @contextmanager
    def no_sync(self, module: nn.Module) -> Iterator[None]:
        """Within it, backward sends nothing for the parameters of this module."""
        own, before = set(module.parameters()), self._blocked
        self._blocked = True
        with ExitStack() as stack:
            for optimizer in self._sharded:
                if not own.isdisjoint(clipping.parameters(optimizer)):
                    stack.enter_context(optimizer.no_sync())
            stack.callback(setattr, self, "_blocked", before)
            yield

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Clip the averaged gradients; returns their global norm. Collective."""
        assert isinstance(optimizer, ShardedAdadelta)
        scale = self._scale(optimizer)
        norm = optimizer.clip_grad_norm_(max_norm * scale, float(norm_type), error_if_nonfinite)
        return norm / scale

    def clip_gradients_value(
        self, module: nn.Module, optimizer: Optimizer, clip_val: float
    ) -> None:
        """Clamp the averaged gradients. Collective."""
        limit = clip_val * self._scale(optimizer)
        scaled = getattr(self.precision, "scaler", None) is not None
        clipping.clip_grad_value_(optimizer, limit, scaled=scaled)

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

    def _scale(self, optimizer: Optimizer) -> float:
        """What the gradients are multiplied by, when what can be unscaled has been."""
        scaler = getattr(self.precision, "scaler", None)
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            self.precision.unscale_gradients(optimizer)
        return clipping.scale_of(optimizer, scaler)

    def _broadcast(self, module: nn.Module, done: Sequence[Optimizer]) -> None:
        group = groups.join(None)
        broadcast_module_(group, module, [p for o in done for p in clipping.parameters(o)])
        if next(module.buffers(), None) is None:
            return
        buffers = BufferBroadcast(self._broadcasts_buffers)

        def before_forward(module: nn.Module, _: Any) -> None:
            buffers.before_forward_(module, synced=torch.is_grad_enabled() and not self._blocked)

        module.register_forward_pre_hook(before_forward)


ShardedAdadeltaFabricStrategy.register_strategies(fabric.strategies.STRATEGY_REGISTRY)

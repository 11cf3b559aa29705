"""Loops of unequal length: `torch.distributed.algorithms.join.Join`.

A rank whose inputs have ended still owns a shard. Within `Join` each rank says what it is
about to do before it does it; a rank that has ended listens, and does the same without
gradients of its own.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from . import collectives
from .functional import HYPERPARAMETERS
from .policy import ShardPolicy
from .state_dicts import StateDicts


class Joining(StateDicts, Joinable):
    """An optimizer that takes part in `Join`."""

    _announced: bool
    _policy: ShardPolicy

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """What a rank does when its own loop has ended; for `Join`.

        Raises:
            ValueError: gradients that others average do not reach a rank that has ended.
            NotImplementedError: `Join` knows one process group, which replicas are not; with
                `differentiable` a rank that has ended has no graph for the others' gradients.
        """
        if not self._installed and self._group.world_size > 1:
            raise NotImplementedError(
                "Join with differentiable=True on several ranks: gradients flow back through every "
                "rank's graph, and one that has ended has none. Give all ranks as many batches."
            )
        if self._policy.gradients == "averaged":
            raise ValueError(
                "Join with gradients='averaged': a rank that has ended never receives their "
                "averages. Use gradients='local', without DistributedDataParallel."
            )
        if self._group.replicas is not None:
            raise NotImplementedError(
                "Join with replicate_group: it knows one process group. Use flat sharding."
            )
        return _Shadow(self)

    @property
    def join_device(self) -> torch.device:
        """Where `Join` counts the ranks."""
        return self._group.control_device

    @property
    def join_process_group(self) -> dist.ProcessGroup | None:
        """The ranks that `Join` counts."""
        return self._group.process_group

    def _announce(self, method: str, *args: Any) -> None:
        """Tell ranks that have ended what is done next. Collective within `Join`."""
        if not self._join_config.enable or self._group.world_size == 1:
            return
        if not self._announced:
            work = Join.notify_join_context(self)
            if work is not None:
                work.wait()
        self._announced = True
        collectives.all_gather_object(self._group, (method, args, self._hyperparameters()))

    def _hyperparameters(self) -> list[dict[str, Any]]:
        return [{name: g[name] for name in HYPERPARAMETERS} for g in self.param_groups]

    @torch.no_grad()
    def _adopt(self, hyperparameters: list[dict[str, Any]]) -> None:
        for mine, theirs in zip(self.param_groups, hyperparameters, strict=True):
            for name, value in theirs.items():
                if isinstance(mine[name], Tensor) and isinstance(value, Tensor):
                    mine[name].copy_(value)  # which a captured step, or the user, may hold
                else:
                    mine[name] = value

    def _follow(self) -> None:
        """One iteration of the ranks that go on. Collective."""
        if self._policy.stage == 1:
            self.zero_grad()
        # At stage 2 what a last backward has sent is answered by the others' next one, and counts.
        method = ""
        while method != "_step_all":
            said = collectives.all_gather_object(self._group, None)
            method, args, groups = next(call for call in said if call is not None)
            self._adopt(groups)
            with torch.no_grad():
                getattr(self, method)(*args)


class _Shadow(JoinHook):
    def __init__(self, optimizer: Joining) -> None:
        self._optimizer = optimizer

    def main_hook(self) -> None:
        self._optimizer._follow()

    def post_hook(self, is_last_joiner: bool) -> None:
        """What a scheduler has set after the last step, on the ranks that took it. Collective."""
        optimizer = self._optimizer
        own = optimizer._hyperparameters() if is_last_joiner else None
        said = collectives.all_gather_object(optimizer._group, own)
        optimizer._adopt(next(groups for groups in said if groups is not None))

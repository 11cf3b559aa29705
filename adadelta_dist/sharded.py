"""`ShardedAdadelta`: the optimizer that each rank builds, and that shards its state."""

from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Joinable
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import ParamsT

from . import collectives, communicators, fingerprint, functional, groups, scaling, state
from .agreement import agreement
from .buckets import FlatBucket, make_buckets
from .capture import check_capture, is_capturing
from .differentiable import averaged_grads
from .gathering import Gathers
from .grad_sharding import FreedBucket, ShardingReducer
from .gradients import ShardedGradients
from .groups import Group
from .memory import check_memory
from .policy import ShardPolicy
from .precision import check_precision
from .reducer import GradientReducer, release
from .shard_step import rounds_in_one_kernel, step_


class ShardedAdadelta(ShardedGradients):
    """`torch.optim.Adadelta` with its accumulators sharded over the ranks (ZeRO stage 1 or 2).

    Build it on every rank, last, with the same arguments; then train as with any
    optimizer: no DistributedDataParallel is needed, for it averages the gradients itself.
    Parameters are broadcast from rank 0. Each rank owns 1/world_size of the accumulators;
    `step()` updates what it owns and gathers the rest. After `step()`, `p.grad` still
    holds this rank's own gradient, not the average.

    With one rank, or without a process group, it is `torch.optim.Adadelta` over flat memory.

    Args:
        params, lr, rho, eps, weight_decay, foreach, capturable, maximize, differentiable:
            as `torch.optim.Adadelta`. With `differentiable` nothing is sharded or broadcast:
            each rank takes the whole step on averaged gradients, through which gradients flow,
            to `lr` and `weight_decay` too where they are Tensors that require one: on each
            rank what its own copy contributes to the sum of all ranks' losses. With
            `capturable` a step on CUDA may be captured on every rank, after one that is not;
            replays repeat which gradients there were, and every hyperparameter but a Tensor `lr`.
        fused: as `Adadelta`.
        process_group: the ranks to shard over; None: the default group, or this process
            alone if there is none.
        replicate_group: to shard within hosts and replicate across them: this rank and
            those with the same shard in other process groups. Averaged shards are
            all-reduced over it, and all else stays within `process_group`.
        device_mesh: instead of both, a mesh of (replicas, shards), or of shards alone.
        policy: how to communicate.

    Collective: construction, `step`, `clip_grad_norm_`, `add_param_group`,
    `load_state_dict`, `gather_state_dict`, `scatter_state_dict`, `consolidate_state_dict` and
    `copy.deepcopy` are called on every rank. So is `step` of a `torch.amp.GradScaler`: what
    overflows on one rank is skipped on all, and their scales stay equal.

    Attributes:
        skipped_steps: how many steps were skipped because a gradient was not finite.

    Raises:
        ValueError, TypeError: as torch; parameters that share memory.
        RankError: another rank failed, or has other parameters or hyperparameters.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        process_group: dist.ProcessGroup | None = None,
        replicate_group: dist.ProcessGroup | None = None,
        device_mesh: DeviceMesh | None = None,
        policy: ShardPolicy = ShardPolicy(),
    ) -> None:
        group = groups.join(process_group, replicate_group, device_mesh)
        with agreement(group, "ShardedAdadelta") as mine:
            groups.check_replicas(group)
            if differentiable and (policy.skip_nonfinite or policy.stage == 2):
                raise ValueError(
                    f"differentiable=True with skip_nonfinite={policy.skip_nonfinite}, "
                    f"stage={policy.stage}: it needs whole gradients, and to take every step"
                )
            self._prepare(group, policy)
            super().__init__(
                params,
                lr,
                rho,
                eps,
                weight_decay,
                foreach,
                capturable=capturable,
                maximize=maximize,
                differentiable=differentiable,
                fused=fused,
            )
            self._check_params()
            mine.facts.extend([str(policy), *fingerprint.facts(self.param_groups)])
        if differentiable:
            release(p for group in self.param_groups for p in group["params"])
        else:
            self._install(0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, in mid-training too. Collective; changes nothing if any rank fails."""
        if not self._installed:  # the constructor, which looks at all groups together
            super().add_param_group(param_group)
            return
        count = len(self.param_groups)
        try:
            with agreement(self._group, "add_param_group") as mine:
                super().add_param_group(param_group)
                self._check_params()
                mine.facts.extend(fingerprint.facts(self.param_groups[count:], count))
        except Exception:
            del self.param_groups[count:]
            raise
        self._consolidated = None
        self._reducer.catch_up()
        self._install(count)

    def attach(self, model: nn.Module) -> None:
        """Say which model waits for its parameters, with `policy.overlap_gather`. Collective.

        Each module waits before its forward, `state_dict` and `load_state_dict` for the
        parameters that it owns. `step` waits for buckets that hold others: another model's, or
        parameters added later (attach again). Whoever reads or writes them in another way (a
        module that uses another's weight, an average of the weights) calls `wait()` first.

        Raises:
            ValueError: the model has trainable parameters that the optimizer does not have.
        """
        with agreement(self._group, "attach") as mine:
            bucket_of = {p: shard.bucket for shard in self._shards for p in shard.bucket.params}
            waited_for = self._gathers.attach(model, bucket_of)
            numbers = [i for i, shard in enumerate(self._shards) if shard.bucket in waited_for]
            mine.facts.append(f"waits for buckets {numbers}")
        if self._policy.overlap_gather:
            self._left_open |= waited_for

    def wait(self) -> None:
        """Return when all parameters are here, which `step` with `overlap_gather` leaves open."""
        self._gathers.wait()

    def state_dict(self) -> dict[str, Any]:
        """As `StateDicts.state_dict`, when all parameters are here."""
        self.wait()
        return super().state_dict()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShardedAdadelta":
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__setstate__(deepcopy(self.__getstate__(), memo) | {"_group": self._group})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        self.wait()
        return super().__getstate__() | {"_policy": self._policy}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        super().__setstate__(attributes)
        if "_installed" not in self.__dict__:  # unpickled or copied, not loaded
            self._prepare(attributes.get("_group") or groups.join(None), self._policy)
            if not self.defaults["differentiable"]:
                self._install(0)  # which adopts the state that came along

    def _prepare(self, group: Group, policy: ShardPolicy) -> None:
        self._group, self._policy = group, policy
        self._installed = False  # stays so with `differentiable`, where all is as in torch
        self._shards = []
        self._params: list[list[Tensor]] = []
        self._reducer = (
            GradientReducer(group, overlap=policy.overlap and group.world_size > 1)
            if policy.stage == 1
            else ShardingReducer(group)
        )
        self.skipped_steps = 0
        # So that GradScaler comes to `step`, rather than deciding by this rank's `p.grad`.
        self._step_supports_amp_scaling = group.world_size > 1 or policy.stage == 2
        self._consolidated = None
        self._gathers = Gathers()
        self._left_open: set[FlatBucket] = set()
        self._announced = False
        Joinable.__init__(self)

    def _check_params(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        check_memory(params)
        check_precision(self._policy, params)
        groups.check_devices(self._group, params)

    def _install(self, first_group: int) -> None:
        """Move the parameters of the groups from `first_group` on into buckets. Collective."""
        if not self._installed:
            self._group = communicators.open_channel(self._group)
        new_params = [list(g["params"]) for g in self.param_groups[first_group:]]
        self._params.extend(new_params)
        # torch's own unscaling refuses float16 gradients.
        self._step_supports_amp_scaling |= any(
            p.dtype == torch.float16 for params in new_params for p in params
        )
        kind = FlatBucket if self._policy.stage == 1 else FreedBucket
        new = make_buckets(self.param_groups, first_group, self._group, self._policy, kind)
        for bucket in new:
            collectives.broadcast(self._group, bucket.flat_param)
            capturable = self.param_groups[bucket.group_index]["capturable"]
            self._shards.append(state.allocate(bucket, capturable=capturable))
        state.reclaim(self._shards[-len(new) :] if new else [], self.state)
        self._reducer.extend(new)
        self._installed = True

    def _update(self) -> None:
        if not self._installed and self._group.world_size == 1:
            super()._update()
            return
        if not self._installed:
            self._consolidated = None
            if is_capturing():
                check_capture(self._policy, {"differentiable=True on several ranks": True})
            with scaling.forgotten_on_error(self), averaged_grads(self, self._group):
                super()._update()
            return
        inverse_scale, is_scaled = scaling.inverse_scale(self), scaling.is_scaled(self)
        self._announce("_step_all", inverse_scale, is_scaled)
        with scaling.forgotten_on_error(self):
            self._step_all(inverse_scale, is_scaled)

    def _step_all(self, inverse_scale: float, is_scaled: bool) -> None:
        """Reduce, and update or skip. Collective.

        Args:
            inverse_scale: what the gradients are to be multiplied by.
            is_scaled: whether a `GradScaler` has called.
        """
        self.wait()
        self._consolidated = None
        fused: list[bool] = []
        error: Exception | None = None
        try:
            scaling.check_unscaled(self, stage=self._policy.stage)
            for group, flat in zip(self.param_groups, self._flat_params(), strict=False):
                functional.check_capturable(group, flat)
                fused.append(functional.use_fused(group, flat))
            for shard in self._shards:
                if fused[shard.bucket.group_index]:
                    rounds_in_one_kernel(shard)  # compiled before anything is changed
            state.reclaim(self._shards, self.state)
        except Exception as raised:
            error = raised
        scaled = " under a GradScaler" if is_scaled else ""
        self._reduce(f"step of gradients times {inverse_scale}{scaled}", error, final=True)
        if (self._policy.skip_nonfinite or is_scaled) and self._is_nonfinite(is_scaled):
            self.skipped_steps += 1
        else:
            self._step_shards(fused, inverse_scale)
        self._announced = False
        self._reducer.reset()

    def _is_nonfinite(self, is_scaled: bool) -> bool:
        """Whether a gradient is not finite on any rank. Collective."""
        for shard in self._shards:
            shard.bucket.wait()
        grads = [shard.bucket.grad_shard for shard in self._shards]
        found = scaling.any_nonfinite(self._group, grads, self)
        if is_scaled:
            scaling.tell_scaler(self, found)
        return found

    def _step_shards(self, fused: list[bool], inverse_scale: float) -> None:
        """Update what this rank owns, bucket by bucket, and gather the rest. Collective."""
        left_open = set() if is_capturing() else self._left_open
        # What stays open goes in the order of the next forward, whose first layers wait first.
        for shard in reversed(self._shards) if left_open else self._shards:
            shard.bucket.wait()
            if any(shard.bucket.present):
                g = shard.bucket.group_index
                group = self.param_groups[g]
                step_(shard, group, fused=fused[g], inverse_scale=inverse_scale)
                self._gathers.start(shard.bucket)
                if self._policy.gather_dtype is not None and not left_open:
                    self._gathers.leave(2)  # each takes memory of its own
        self._gathers.wait([s.bucket for s in self._shards if s.bucket not in left_open])

    def _flat_params(self) -> list[list[Tensor]]:
        """By group, what is stepped of each bucket on all ranks together."""
        flats: list[list[Tensor]] = [[] for _ in self.param_groups]
        for shard in self._shards:
            bucket, stepped = shard.bucket, shard.bucket.typed(shard.bucket.flat_param)
            if not shard.is_exact:  # pieces of another dtype
                stepped = stepped.new_empty((), dtype=bucket.precision.compute).expand_as(stepped)
            flats[bucket.group_index].append(stepped)
        return flats

"""`ShardedAdadelta`: the optimizer that each rank builds, and that shards its state."""

import sys
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import collectives, fingerprint, functional, state
from .adadelta import Adadelta
from .buckets import FlatBucket, check_memory
from .clipping import clip_shards_
from .collectives import Group
from .layout import ParamSpec, plan_layout
from .policy import ShardPolicy
from .reducer import GradientReducer
from .state import ShardState


class ShardedAdadelta(Adadelta):
    """`torch.optim.Adadelta` with its accumulators sharded over the ranks (ZeRO stage 1).

    Build it on every rank, last, with the same arguments; then train as with any
    optimizer: no DistributedDataParallel is needed, for it averages the gradients itself.
    Parameters are broadcast from rank 0. Each rank owns 1/world_size of the accumulators;
    `step()` updates what it owns and gathers the rest. After `step()`, `p.grad` still
    holds this rank's own gradient, not the average.

    With one rank, or without a process group, it is `torch.optim.Adadelta` over flat memory.

    Args:
        params, lr, rho, eps, weight_decay, foreach, capturable, maximize, differentiable:
            as `torch.optim.Adadelta`; `differentiable` with one rank only.
        fused: as `Adadelta`.
        process_group: the ranks to shard over; None: the default group, or this process
            alone if there is none.
        policy: how to communicate.

    Collective: construction, `step`, `clip_grad_norm_`, `add_param_group`,
    `load_state_dict` and `consolidate_state_dict` are called on every rank.

    Raises:
        ValueError, TypeError: as torch; parameters that share memory.
        RankError: another rank failed, or has other parameters or hyperparameters.
    """

    _consolidated: defaultdict[Tensor, Any] | None

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
        policy: ShardPolicy = ShardPolicy(),
    ) -> None:
        group = collectives.join(process_group)
        with collectives.agreement(group, "ShardedAdadelta") as mine:
            if differentiable and group.world_size > 1:
                raise NotImplementedError(
                    f"differentiable=True at world size {group.world_size}: gradients through the "
                    "collectives are not supported. Use one process, or differentiable=False."
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
        if not differentiable:
            self._install(0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, in mid-training too. Collective; changes nothing if any rank fails."""
        if not self._installed:  # the constructor, which looks at all groups together
            super().add_param_group(param_group)
            return
        count = len(self.param_groups)
        try:
            with collectives.agreement(self._group, "add_param_group") as mine:
                super().add_param_group(param_group)
                self._check_params()
                mine.facts.extend(fingerprint.facts(self.param_groups[count:], count))
        except Exception:
            del self.param_groups[count:]
            raise
        self._consolidated = None
        self._install(count)

    def no_sync(self) -> AbstractContextManager[None]:
        """Within it, backward accumulates local gradients and sends nothing."""
        return self._reducer.no_sync() if self._installed else nullcontext()

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """Scale the averaged gradients so that their norm is at most `max_norm`. Collective.

        As `torch.nn.utils.clip_grad_norm_` in one process. With more than one rank only
        the averaged shards are scaled; `p.grad` stays the local gradient.

        Args:
            max_norm: the largest norm to allow.
            norm_type: p > 0, or infinity.
            error_if_nonfinite: raise if the norm is NaN or infinite.

        Returns:
            The global norm before clipping, a 0-dim tensor, equal on every rank.

        Raises:
            ValueError: `norm_type` is not positive.
            RuntimeError: the norm is not finite and `error_if_nonfinite`.
        """
        if not norm_type > 0:
            raise ValueError(f"norm_type must be positive or infinity, got {norm_type}")
        if self._group.world_size == 1:
            params = [p for g in self.param_groups for p in g["params"]]
            return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite)
        self._reducer.reduce(fingerprint.hyperparameters(self.param_groups))
        for shard in self._shards:
            shard.bucket.wait()
        grads = [shard.bucket.grad_shard for shard in self._shards]
        return clip_shards_(
            self._group, grads, max_norm, norm_type, error_if_nonfinite=error_if_nonfinite
        )

    def state_dict(self) -> dict[str, Any]:
        """The state, as torch's. With more ranks, `FlatSlice` of what this rank owns.

        On the rank where `consolidate_state_dict` gathered it, and until the next step,
        the whole state, in torch's own form.
        """
        if self._consolidated is None:
            return super().state_dict()
        own, self.state = self.state, self._consolidated
        try:
            return super().state_dict()
        finally:
            self.state = own

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gather the whole state on the CPU of one rank, for its next `state_dict()`.

        Collective. One parameter travels at a time, so that no rank but `to` needs
        memory for more than a piece of one parameter.

        Args:
            to: rank within the process group.
        """
        if not 0 <= to < self._group.world_size:
            raise ValueError(f"to must be a rank below {self._group.world_size}, got {to}")
        if self._group.world_size == 1:
            return
        whole: defaultdict[Tensor, Any] = defaultdict(dict)
        state.reclaim(self._shards, self.state)
        for shard in self._shards:
            for i, p in enumerate(shard.bucket.params):
                entry = state.gather(shard, i, to)
                if entry is not None:
                    whole[p] = entry
        self._consolidated = whole if self._group.rank == to else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of `torch.optim.Adadelta`, or of this class. Collective.

        Every rank passes either the whole state (torch's form, any world size) or its own
        slices. Parameters without an entry start from zero. Nothing changes on any rank
        if any rank fails.

        Raises:
            ValueError: other groups, other shapes, or state of another optimizer.
            RankError: another rank failed, or the ranks load different checkpoints.
        """
        if not self._installed:
            super().load_state_dict(state_dict)
            return
        with collectives.agreement(self._group, "load_state_dict") as mine:
            state_dict = state_dict.copy()
            for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
                state_dict = pre_hook(self, state_dict) or state_dict
            groups, values = state.match(self.param_groups, state_dict)
            for shard in self._shards:
                for i, p in enumerate(shard.bucket.params):
                    state.check(shard, i, values.get(p, {}))
                    step = fingerprint.plain(values.get(p, {}).get("step", 0))
                    mine.facts.append(f"{shard.bucket.names[i]}: step {step}")
            both = zip(self.param_groups, groups, strict=True)
            mine.facts.extend(fingerprint.hyperparameters([old | new for old, new in both]))
        for shard in self._shards:
            for i, p in enumerate(shard.bucket.params):
                state.adopt(shard, i, values.get(p, {}), self.state)
        self._consolidated = None
        super().__setstate__({"param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._group.world_size > 1:
            raise TypeError(
                f"ShardedAdadelta at world size {self._group.world_size} cannot be pickled: it "
                "holds this rank's slices only. Call consolidate_state_dict(to=0) on every rank, "
                "then save state_dict() on rank 0."
            )
        return super().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShardedAdadelta":
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__setstate__(deepcopy(self.__getstate__(), memo) | {"_group": self._group})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_policy": self._policy}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        super().__setstate__(attributes)
        if "_installed" not in self.__dict__:  # unpickled or copied, not loaded
            self._prepare(attributes.get("_group", Group()), self._policy)
            if not self.defaults["differentiable"]:
                self._install(0)  # which adopts the state that came along

    def _prepare(self, group: Group, policy: ShardPolicy) -> None:
        self._group, self._policy = group, policy
        self._installed = False  # stays so with `differentiable`, where all is as in torch
        self._shards: list[ShardState] = []
        self._reducer = GradientReducer(group, overlap=policy.overlap)
        self._consolidated = None

    def _check_params(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        check_memory(params)
        collectives.check_devices(self._group, params)

    def _install(self, first_group: int) -> None:
        """Move the parameters of the groups from `first_group` on into buckets. Collective."""
        if not self._installed:
            self._group = collectives.open_channel(self._group)
        params, names, specs = [], [], []
        for g, group in enumerate(self.param_groups[first_group:], first_group):
            for name, p in fingerprint.named(g, group):
                real = p.dtype.to_real()
                numel = p.numel() * (2 if p.is_complex() else 1)
                specs.append(ParamSpec(numel, real.itemsize, (g, p.dtype, p.device)))
                params.append(p)
                names.append(name)
        averaged = self._policy.gradients == "averaged"
        # With one rank there is nothing to send, and one bucket is one kernel call.
        alone = self._group.world_size == 1
        bucket_bytes = sys.maxsize if alone else int(self._policy.bucket_mb * 2**20)
        buckets = []
        for plan in plan_layout(specs, self._group.world_size, bucket_bytes):
            indices = [slot.param for slot in plan.slots]
            mine = [params[i] for i in indices], [names[i] for i in indices]
            bucket = FlatBucket(plan, self._group, *mine, averaged=averaged)
            collectives.broadcast(self._group, bucket.flat_param)
            capturable = self.param_groups[plan.kind[0]]["capturable"]
            shard = state.allocate(bucket, capturable=capturable)
            state.reclaim([shard], self.state)
            self._shards.append(shard)
            buckets.append(bucket)
        self._reducer.extend(buckets)
        self._installed = True

    def _update(self) -> None:
        if not self._installed:
            super()._update()
            return
        self._consolidated = None
        facts: list[str] = []
        fused: list[bool] = []
        error: Exception | None = None
        try:
            flats = self._flat_params()
            for group, flat in zip(self.param_groups, flats, strict=True):
                functional.check_capturable(group, flat)
                fused.append(functional.use_fused(group, flat))
            state.reclaim(self._shards, self.state)
            facts = fingerprint.hyperparameters(self.param_groups)
        except Exception as raised:  # for `reduce` to raise on every rank
            error = raised
        self._reducer.reduce(facts, error)
        gathers = []
        for shard in self._shards:
            shard.bucket.wait()
            if any(shard.bucket.present):
                g = shard.bucket.plan.kind[0]
                _step_shard(shard, self.param_groups[g], fused=fused[g])
                gathers.append((shard.bucket, shard.bucket.gather()))
        for bucket, gather in gathers:
            gather.wait()
            torch.autograd.graph.increment_version(bucket.params)
        self._reducer.reset()

    def _flat_params(self) -> list[list[Tensor]]:
        """The buckets of each group."""
        flats: list[list[Tensor]] = [[] for _ in self.param_groups]
        for bucket in (shard.bucket for shard in self._shards):
            flats[bucket.plan.kind[0]].append(bucket.typed(bucket.flat_param))
        return flats


def _step_shard(shard: ShardState, group: dict[str, Any], *, fused: bool) -> None:
    """Update what this rank owns of one bucket, where a gradient is present."""
    bucket = shard.bucket
    shard.steps.add_(torch.tensor(bucket.present, dtype=shard.steps.dtype).to(shard.steps.device))
    flats = (bucket.own_param, bucket.grad_shard, *shard.accumulators)
    for run in bucket.own_runs():
        pieces = (bucket.typed(flat[run.start : run.stop]) for flat in flats)
        param, grad, square_avg, acc_delta = pieces
        entry = (param, grad, square_avg, acc_delta)
        if fused:
            functional.fused_([entry], group)
        else:
            functional.eager_flat_(entry, group)

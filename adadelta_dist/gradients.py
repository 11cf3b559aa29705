"""The gradients of a `ShardedAdadelta`: averaged, clipped, looked at."""

from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from operator import is_

import torch
from torch import Tensor

from . import fingerprint, groups, scaling, state
from .capture import check_capture, is_capturing
from .clipping import clip_shards_
from .joining import Joining
from .policy import ShardPolicy


class ShardedGradients(Joining):
    """An optimizer whose gradients are averaged over the ranks, each of which gets a shard."""

    _policy: ShardPolicy
    _params: list[list[Tensor]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. At stage 2, where it empties the shards, call it on every rank."""
        super().zero_grad(set_to_none)
        self._reducer.discard()

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
        self._announce("_clip", max_norm, norm_type, error_if_nonfinite)
        return self._clip(max_norm, norm_type, error_if_nonfinite)

    def _clip(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
        error: Exception | None = None
        try:
            norm_type = float(norm_type)  # "inf", too
            if not norm_type > 0:
                raise ValueError(f"norm_type must be positive or infinity, got {norm_type}")
        except (TypeError, ValueError) as raised:
            error = raised  # which the others must hear of
        if self._group.world_size == 1 and self._policy.stage == 1:
            if error is not None:
                raise error
            params = [p for g in self.param_groups for p in g["params"]]
            return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite)
        self._check_sharded("clip_grad_norm_", "an average and a norm that gradients flow through")
        self._reducer.begin_clip()
        self._reduce(f"clip_grad_norm_({max_norm}, {norm_type}, {error_if_nonfinite})", error)
        if max_norm < float("inf"):
            self._reducer.end_clip()
        buckets = [shard.bucket for shard in self._shards]
        for bucket in buckets:
            bucket.wait()
        grads = [bucket.typed(bucket.grad_shard) for bucket in buckets]
        return clip_shards_(
            self._group, grads, max_norm, norm_type, error_if_nonfinite=error_if_nonfinite
        )

    def grad_shard(self, p: Tensor) -> Tensor | None:
        """The averaged gradient of a parameter, as far as this rank has it. Collective.

        Args:
            p: a parameter of the optimizer, the same on every rank.

        Returns:
            With more ranks a `FlatSlice`, with one a tensor in the parameter's shape: a view
            of what `step` will use, until then. None if no rank has a gradient.

        Raises:
            ValueError: `p` is not a parameter of the optimizer.
            RuntimeError: `differentiable=True`, which shards nothing.
        """
        places = [
            (shard, i)
            for shard in self._shards
            for i, q in enumerate(shard.bucket.params)
            if q is p
        ]
        error: Exception | None = None
        self._check_sharded("grad_shard", "p.grad")
        if not places:
            error = ValueError("grad_shard: the tensor is not a parameter of this optimizer")
        named = places[0][0].bucket.names[places[0][1]] if places else "nothing"
        self._announce("_reduce", f"grad_shard({named})", None)
        self._reduce(f"grad_shard({named})", error)
        shard, i = places[0]
        shard.bucket.wait()
        if not shard.bucket.present[i]:
            return None
        return state.view(shard.bucket, i, shard.bucket.grad_shard)

    def _reduce(self, what: str, error: Exception | None, *, final: bool = False) -> None:
        """Have all gradients averaged, or raise on every rank. Collective.

        Args:
            what: the call, which must be the same on every rank.
            error: what went wrong on this rank already.
            final: the step follows at once.
        """
        groups.check_alone(self._group)
        facts = [what]
        try:
            if is_capturing():
                facts.append("captured")
                self._check_capture(what, final=final)
            self._check_groups()
            facts += fingerprint.hyperparameters(self.param_groups)
        except Exception as raised:
            error = raised  # it explains whatever went wrong before
        self._reducer.reduce(facts, error, final=final)

    def _check_capture(self, what: str, *, final: bool) -> None:
        buckets = [shard.bucket for shard in self._shards]
        on_host = any(s.steps.device != s.bucket.flat_param.device for s in self._shards)
        hindrances = {
            f"{what}, which the host reads": not final,
            "GradScaler, whose found_inf the host reads": scaling.is_scaled(self),
            "Join": self._join_config.enable,
            "reductions that began before the capture (use ShardPolicy(overlap=False), or capture "
            "backward too)": self._group.world_size > 1 and any(b.launched for b in buckets),
            "`step` on the CPU (pass capturable=True to the constructor)": on_host,
        }
        check_capture(self._policy, hindrances)

    def _check_groups(self) -> None:
        now = [group["params"] for group in self.param_groups]
        if list(map(len, now)) != list(map(len, self._params)) or not all(
            map(is_, chain.from_iterable(now), chain.from_iterable(self._params))
        ):
            raise RuntimeError(
                "param_groups have other parameters than ShardedAdadelta was built with. Use "
                "add_param_group, or build a new optimizer and load the state."
            )

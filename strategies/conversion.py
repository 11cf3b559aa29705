"""From the optimizer that a user's code builds to the one that is sharded.

The optimizer stays the same object and becomes a `ShardedAdadelta` in place, so that what
refers to it already (schedulers, also nested ones, hooks, a user's attribute) goes on with
the sharded one.
"""

import weakref
from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch
from torch.optim import Optimizer

from adadelta_dist import Adadelta, RankError, ShardedAdadelta, ShardPolicy
from adadelta_dist.agreement import agreement
from adadelta_dist.groups import Group

_TO_CONVERT = (torch.optim.Adadelta, Adadelta)  # exactly: a subclass has code of its own


def shard_all_(
    optimizers: Sequence[Optimizer],
    group: Group,
    policy: ShardPolicy,
    what: str,
    error: Exception | None = None,
) -> list[ShardedAdadelta]:
    """Make every optimizer a `ShardedAdadelta`, in place. Collective.

    Args:
        optimizers: of `torch.optim.Adadelta`, `Adadelta` or `ShardedAdadelta`.
        group: all ranks of the job.
        policy: for those that are converted.
        what: where they come from, for messages.
        error: what went wrong on this rank already, to be raised on all.

    Raises:
        TypeError: another optimizer.
        RuntimeError: a `ShardedAdadelta` over other ranks than the job's.
        RankError: another rank failed, or has other optimizers.
    """
    if isinstance(error, RankError):
        raise error  # every rank has one
    with agreement(group, what) as mine:
        if error is not None:
            raise error
        for optimizer in optimizers:
            check(optimizer, group, what)
            state = "state" if optimizer.state else "no state"
            mine.facts.append(f"{type(optimizer).__qualname__} with {state}")
    return [_shard_(optimizer, policy) for optimizer in optimizers]


def check(optimizer: Optimizer, group: Group, what: str) -> None:
    """Whether `_shard_` can take it."""
    if isinstance(optimizer, ShardedAdadelta):
        ranks = optimizer._group.world_size
        if ranks != group.world_size:
            raise RuntimeError(
                f"{what}: a ShardedAdadelta over {ranks} of {group.world_size} ranks. Build it in "
                "configure_optimizers (Fabric: after fabric.launch()), without a process_group; or "
                "build torch.optim.Adadelta, which is converted."
            )
    elif type(optimizer) not in _TO_CONVERT:
        kind = type(optimizer)
        raise TypeError(
            f"{what}: {kind.__module__}.{kind.__qualname__}, and sharded_adadelta shards Adadelta "
            "alone. Return torch.optim.Adadelta, adadelta_dist.Adadelta or "
            "adadelta_dist.ShardedAdadelta, or train this optimizer with strategy='ddp'."
        )


def _shard_(optimizer: Optimizer, policy: ShardPolicy) -> ShardedAdadelta:
    """Make it a `ShardedAdadelta` with the same groups, state and hooks. Collective."""
    if isinstance(optimizer, ShardedAdadelta):
        return optimizer
    groups = [_with_names(group) for group in optimizer.param_groups]
    sharded = ShardedAdadelta(groups, **optimizer.defaults, policy=policy)
    if optimizer.state:
        sharded.load_state_dict(optimizer.state_dict())
    hooks = {name: value for name, value in vars(optimizer).items() if name.endswith("_hooks")}
    watched = hasattr(optimizer.step, "_wrapped_by_lr_sched")
    optimizer.__dict__ = {**vars(sharded), **hooks}
    optimizer.__class__ = ShardedAdadelta
    assert isinstance(optimizer, ShardedAdadelta)
    if watched:
        _watch_step(optimizer)
    return optimizer


def _with_names(group: dict[str, Any]) -> dict[str, Any]:
    """A group as a constructor takes it: names, if any, beside their parameters."""
    copy = dict(group)
    names = copy.pop("param_names", None)
    if names is not None:
        copy["params"] = list(zip(names, group["params"], strict=True))
    return copy


def _watch_step(optimizer: ShardedAdadelta) -> None:
    """Wrap `step` as LR schedulers do, to see that it was called before theirs."""
    own, me = type(optimizer).step, weakref.ref(optimizer)

    @wraps(own)
    def step(*args: Any, **kwargs: Any) -> Any:
        alive = me()
        assert alive is not None
        alive._opt_called = True  # type: ignore[attr-defined]
        return own(alive, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = step  # type: ignore[method-assign]


def shard_added_groups_(optimizer: ShardedAdadelta) -> None:
    """Shard parameter groups that were put behind those that are. Collective.

    Lightning's finetuning callbacks assign `param_groups` when a run goes on in which they had
    added some.
    """
    if not optimizer._installed:  # differentiable: nothing is sharded
        return
    sharded = len(optimizer._params)
    added = optimizer.param_groups[sharded:]
    del optimizer.param_groups[sharded:]
    for group in added:
        optimizer.add_param_group(group)

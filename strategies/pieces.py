"""What this rank updates of the parameters, whichever optimizer does it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from adadelta_dist import ShardedAdadelta, scaling


@dataclass(frozen=True)
class Piece:
    """The part of one parameter that this rank updates: all of it where nothing is sharded.

    Args:
        group: the parameter group it belongs to.
        param: the parameter it is a part of.
        values: its elements, live.
        grad: the gradient that the last step used, or None if there was none.
    """

    group: dict[str, Any]
    param: Tensor
    values: Tensor
    grad: Tensor | None


def pieces(optimizer: Optimizer) -> Iterator[Piece]:
    """The pieces of all parameters, in an order that stays the same."""
    if not isinstance(optimizer, ShardedAdadelta) or not optimizer._shards:
        for group in optimizer.param_groups:
            for p in group["params"]:
                yield Piece(group, p, p.detach(), p.grad)
        return
    unscaled = scaling.inverse_scale(optimizer)  # the shards stay as a scaler has made them
    for bucket in optimizer._reducer.buckets:
        group, rank = optimizer.param_groups[bucket.group_index], bucket.group.rank
        for slot, param, present in zip(
            bucket.plan.slots, bucket.params, bucket.present, strict=True
        ):
            at = bucket.plan.place(slot, rank)
            grad = bucket.grad_shard[at.start : at.stop] * unscaled if present else None
            yield Piece(group, param, bucket.own_param[at.start : at.stop], grad)


def innermost(optimizer: Any) -> tuple[Optimizer, bool]:
    """The `torch.optim.Optimizer` within wrappers, and whether ranks update pieces of parameters.

    DeepSpeed wraps the optimizer, and gives it pieces from ZeRO stage 1 on.
    """
    partitioned = False
    while not isinstance(optimizer, Optimizer):
        partitioned |= any(kind.__name__ == "ZeROOptimizer" for kind in type(optimizer).__mro__)
        optimizer = optimizer.optimizer
    optimizer = getattr(optimizer, "_optimizer", optimizer)  # Lightning's wrapper
    return optimizer, partitioned or isinstance(optimizer, ShardedAdadelta)

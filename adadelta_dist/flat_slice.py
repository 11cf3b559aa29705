"""`FlatSlice`: a parameter-shaped tensor of which this rank holds one flat piece."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .layout import Interval

_aten = torch.ops.aten
_ON_LOCAL = {
    _aten.detach.default,
    _aten.alias.default,
    _aten.clone.default,
    _aten._to_copy.default,
    _aten.copy_.default,
    _aten.zero_.default,
    _aten.fill_.Scalar,
    _aten.fill_.Tensor,
    _aten.zeros_like.default,
    _aten.empty_like.default,
}


class FlatSlice(Tensor):
    """The elements `interval` of a tensor of shape `shape`, flattened in memory order.

    It is what `ShardedAdadelta.state_dict()` holds at more than one rank. Copying, filling,
    cloning and moving work on the local piece; arithmetic over the whole is refused, for
    this rank does not have the rest; pickling (`torch.save`) is refused too, for it would
    lose the rest in silence.

    Attributes:
        local: [interval.numel], this rank's elements: a view into the optimizer's state.
        interval: where they lie in the flattened tensor.
        order: the dimensions from slowest to fastest, the order of flattening.
    """

    local: Tensor
    interval: Interval
    order: tuple[int, ...]

    @staticmethod
    def __new__(
        cls, local: Tensor, shape: Sequence[int], interval: Interval, order: Sequence[int]
    ) -> "FlatSlice":
        self = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=local.dtype, device=local.device
        )
        self.local, self.interval, self.order = local, interval, tuple(order)
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        slices = [a for a in args if isinstance(a, FlatSlice)]
        first = args[0]
        if func not in _ON_LOCAL or not isinstance(first, FlatSlice) or not _alike(slices):
            raise NotImplementedError(
                f"{func} on a FlatSlice, of which this rank holds one piece alone. Use its .local, "
                "or optimizer.consolidate_state_dict() for the whole."
            )
        local = func(*(getattr(a, "local", a) for a in args), **(kwargs or {}))
        if local is first.local:
            return first
        return FlatSlice(local, first.shape, first.interval, first.order)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> "FlatSlice":
        copied = FlatSlice(self.local.clone(), self.shape, self.interval, self.order)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "torch.save of a sharded state_dict would keep this rank's slices only. Call "
            "optimizer.consolidate_state_dict(to=0) on every rank, then save "
            "optimizer.state_dict() on rank 0."
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return (
            f"FlatSlice(shape={tuple(self.shape)}, elements [{self.interval.start}, "
            f"{self.interval.stop}), local={self.local})"
        )


def _alike(slices: Sequence[FlatSlice]) -> bool:
    """Whether the slices hold the same elements of tensors of the same shape and order."""
    first = slices[0]
    return all(
        (s.shape, s.interval, s.order) == (first.shape, first.interval, first.order) for s in slices
    )

"""`FlatSlice`: a parameter-shaped tensor of which this rank holds one flat piece."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from .layout import Box, Interval, boxes

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

    `torch.distributed.checkpoint` saves and loads it with no gather: the slice is a few boxes
    of the whole tensor (`boxes`), each a chunk in the checkpoint. Loading writes into `local`.

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
        if func is _aten.new_empty.default and tuple(args[1]) == first.shape:
            func, args = _aten.empty_like.default, args[:1]  # DCP's `async_save` asks so
        if func not in _ON_LOCAL or not isinstance(first, FlatSlice) or not _alike(slices):
            raise NotImplementedError(
                f"{func} on a FlatSlice, of which this rank holds one piece alone. Use its .local, "
                "or optimizer.gather_state_dict() for the whole."
            )
        local = func(*(getattr(a, "local", a) for a in args), **(kwargs or {}))
        if local is first.local:
            return first
        return FlatSlice(local, first.shape, first.interval, first.order)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
            for box in self._boxes()
        ]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for box in self._boxes():
            if box.offsets == index.offset:
                flat = self.local[box.start : box.start + prod(box.sizes)]
                inverse = [self.order.index(dim) for dim in range(self.dim())]
                return flat.view([box.sizes[dim] for dim in self.order]).permute(inverse)
        raise ValueError(f"{index.fqn} has no chunk at {index.offset} on this rank: {self}")

    def _boxes(self) -> list[Box]:
        if not self.numel():  # one chunk all the same: DCP would miss the key
            return [Box((0,) * self.dim(), tuple(self.shape), 0)]
        return boxes(self.shape, self.order, self.interval)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FlatSlice":
        copied = FlatSlice(self.local.clone(), self.shape, self.interval, self.order)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "torch.save of a sharded state_dict would keep this rank's slices only. Call "
            "optimizer.gather_state_dict(dst=0) on every rank and save what rank 0 gets, or save "
            "the slices with torch.distributed.checkpoint.save."
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

"""Copies in host memory, from which an asynchronous save writes while training goes on.

Fresh memory costs more than the copy: each page of it is found and zeroed first. So what one
save has copied into waits for the next one.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..flat_slice import FlatSlice

_Kind = tuple[torch.Size, tuple[int, ...], torch.dtype, bool]

_spare: defaultdict[_Kind, list[Tensor]] = defaultdict(list)


def copied(state: Any) -> Any:
    """The same nested state with all tensors in host memory, which the next step leaves alone.

    What `give_back` has returned is used where it fits, and dropped where it does not.
    """
    copies = tree_map_only(Tensor, _copied, state)
    _spare.clear()
    if torch.accelerator.is_available():  # copies into pinned memory return at once
        torch.accelerator.synchronize()
    return copies


def give_back(copies: Any) -> None:
    """Keep the memory of copies that nobody reads any more for the next `copied`."""
    for tensor in tree_leaves(copies):
        if isinstance(tensor, FlatSlice):
            tensor = tensor.local
        if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):
            _spare[_kind(tensor, pinned=tensor.is_pinned())].append(tensor)


def _copied(tensor: Tensor) -> Tensor:
    if isinstance(tensor, FlatSlice):
        local = _copied(tensor.local)
        return FlatSlice(local, tensor.shape, tensor.interval, tensor.order)
    if isinstance(tensor, DTensor):
        return tensor.detach().to("cpu", copy=True)
    pinned = tensor.is_cuda
    waiting = _spare[_kind(tensor, pinned=pinned)]
    if waiting:
        copy = waiting.pop()
    else:
        copy = torch.empty_like(tensor, device="cpu", pin_memory=pinned, requires_grad=False)
    return copy.copy_(tensor.detach(), non_blocking=True)


def _kind(tensor: Tensor, *, pinned: bool) -> _Kind:
    return tensor.shape, tensor.stride(), tensor.dtype, pinned

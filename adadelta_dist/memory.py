"""Tensors and the flat memory that holds them."""

import ctypes
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_HUGE_PAGE_BYTES = 2**21
_MADV_HUGEPAGE = 14  # of Linux
_CHECKSUM_ROWS = 32


def zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[numel] zeros; on the CPU in huge pages, where Linux has them.

    A step goes through seven long arrays at once, and would spend a tenth of its time on
    looking up their pages (docs/performance.md).
    """
    tensor = torch.empty(numel, dtype=dtype, device=device)
    if device.type == "cpu" and sys.platform == "linux":  # before the first touch
        page = _HUGE_PAGE_BYTES
        start = -(-tensor.data_ptr() // page) * page
        length = (tensor.data_ptr() + tensor.nbytes - start) // page * page
        if length > 0:  # a wish: where it fails, pages are as they always were
            _madvise()(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return tensor.zero_()


@functools.cache
def _madvise() -> Callable[..., int]:
    return ctypes.CDLL(None).madvise


def unflatten(flat: Tensor, like: Tensor, order: Sequence[int]) -> Tensor:
    """A view of `flat` (real, one-dimensional) with the shape of `like`.

    Args:
        flat: as many elements as `like`, twice as many if `like` is complex.
        order: the dimensions of `like` from slowest to fastest (`storage_order`).
    """
    if like.is_complex():
        flat = torch.view_as_complex(flat.view(-1, 2))
    inverse = sorted(range(len(order)), key=lambda position: order[position])
    return flat.view([like.shape[dim] for dim in order]).permute(inverse)


def flatten(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """The inverse of `unflatten`: real and one-dimensional; a view where memory allows."""
    flat = tensor.permute(tuple(order)).reshape(-1)
    return torch.view_as_real(flat).view(-1) if tensor.is_complex() else flat


class Places:
    """Where tensors ought to lie, to be asked of thousands of them at each step.

    Args:
        views: a dense view of flat memory for each.
    """

    def __init__(self, views: Sequence[Tensor]) -> None:
        self._starts, self._numels = _starts(views), _numels(views)
        self._shaped = [(i, view) for i, view in enumerate(views) if view.dim() > 1]

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether each of as many dense tensors lies in its place, in its shape.

        A vector that begins at the same address and is as long is in its place. What has more
        dimensions may begin there and be transposed, which takes longer to find out.
        """
        return (
            _starts(tensors) == self._starts
            and _numels(tensors) == self._numels
            and all(tensors[i].is_set_to(view) for i, view in self._shaped)
        )


def _starts(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _numels(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.numel, tensors))


def check_memory(params: Iterable[Tensor]) -> None:
    """Refuse parameters that cannot move into a bucket.

    Raises:
        TypeError: a DTensor, or not a dense tensor.
        ValueError: two parameters share memory.
    """
    extents = []
    for p in dict.fromkeys(params):
        if isinstance(p, DTensor):
            raise TypeError("ShardedAdadelta got a DTensor, which is sharded already: use Adadelta")
        if p.layout != torch.strided:
            raise TypeError(f"ShardedAdadelta needs dense parameters, got one of layout {p.layout}")
        if p.numel() and p.device.type != "meta":
            span = 1 + sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))
            extents.append((p.data_ptr(), p.data_ptr() + span * p.element_size()))
    for (_, stop), (start, _) in pairwise(sorted(extents)):
        if start < stop:
            raise ValueError(
                "two parameters share memory. Tie weights by using one Parameter object in both "
                "places, not two that view the same data."
            )


def checksum(flat: Tensor) -> Tensor:
    """What an edit changes: sums of the memory's 8-byte words, modulo 2**64, a row of them each.

    In one sum of all words a change of every sign goes unseen where as many values are positive
    as negative, which in a row of an odd number of words they cannot be. In float64 halves and
    negatives change words by 2**52 or 2**63, of which zeros may make a multiple of 2**64: there
    the sum of the values counts as well.

    Args:
        flat: [numel], a multiple of 8 bytes.
    """
    words = flat.view(torch.int64)
    length = max(1, len(words) // _CHECKSUM_ROWS) | 1
    whole = len(words) // length * length
    sums = [words[:whole].view(-1, length).sum(dim=1), words[whole:].sum().view(1)]
    if flat.dtype == torch.float64:
        sums.append(flat.sum().view(torch.int64).view(1))
    return torch.cat(sums)

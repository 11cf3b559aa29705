"""Views of flat memory that are lent to parameters as their gradients.

Making a tensor costs more than copying a small gradient, so a view is made once and lent at
every step. Whoever keeps a gradient from one step to the next finds its values unchanged: what
is held is never written, and another view is lent instead.
"""

import sys
from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor

from .memory import Places


class Lending:
    """The gradients of one bucket, as views of its flat memory.

    Args:
        places: the slots of flat memory, each in its parameter's shape and strides.

    Attributes:
        lent: by slot, what a parameter gets as its gradient.
    """

    def __init__(self, places: Sequence[Tensor]) -> None:
        self.places = list(places)
        # Made at once, they lie side by side in memory too, which makes them quick to go through.
        self.lent = [place.detach() for place in places]
        self._memory = Places(self.places)

    def are_lent(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether all gradients are what was lent: dense as we made them."""
        return bool(self.lent) and all(map(is_, grads, self.lent))

    def hold(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether there is a gradient for every slot, and all are in flat memory."""
        if not self.places:
            return False
        if self.are_lent(grads):
            return self._memory.hold(grads)  # type: ignore[arg-type]
        return all(map(self.holds, range(len(grads)), grads))

    def holds(self, i: int, grad: Tensor | None) -> bool:
        """Whether there is a gradient for slot `i`, and it is in flat memory."""
        return grad is not None and grad.layout == torch.strided and grad.is_set_to(self.places[i])

    def take_back(self, i: int) -> None:
        """Before flat memory is written: an old gradient that someone holds keeps its values.

        What nobody holds is lent again.
        """
        place, lent = self.places[i], self.lent[i]
        if _references(lent) > _OURS_ALONE:
            lent.data = lent.clone()
        if lent.requires_grad or not lent.is_set_to(place):
            self.lent[i] = place.detach()


def _references(tensor: Tensor) -> int:
    return sys.getrefcount(tensor)


def _count_ours() -> int:
    ours = [torch.empty(0)]
    lent = ours[0]
    return _references(lent)


_OURS_ALONE = _count_ours()  # differs between versions of Python

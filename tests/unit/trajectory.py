"""What the tests of the optimizers share: reproducible parameters and gradients, exact comparison.

Nothing here knows adadelta_dist: the wanted values come from torch's own optimizer.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SHAPES = ((3, 4), (5,), (), (2, 3, 2))


def parameters(
    shapes: Sequence[Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    """The same values at every call."""
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]


def gradient(p: Tensor, step: int, index: int) -> Tensor:
    """In `p`'s memory order, as autograd makes it."""
    generator = torch.Generator().manual_seed(100 * step + index)
    values = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return torch.empty_like(p.detach()).copy_(values)


def train(
    optimizer: torch.optim.Optimizer,
    params: Sequence[Tensor],
    steps: Iterable[int] = range(4),
    without_grad: Collection[int] = (),
) -> list[Tensor]:
    """Hand-assigned gradients, one update for each of `steps`; returns the values then."""
    for step in steps:
        for index, p in enumerate(params):
            p.grad = None if index in without_grad else gradient(p, step, index)
        optimizer.step()
    return [p.detach().clone() for p in params]


def assert_equal(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Bit by bit, in the same memory order."""
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert torch.equal(a, b), f"tensor {index}: {a} != {b}"


def assert_same_state(got: dict[str, Any], want: dict[str, Any]) -> None:
    """State dicts, bit by bit; `fused` is ours alone."""
    groups = [{k: v for k, v in g.items() if k != "fused"} for g in got["param_groups"]]
    assert groups == want["param_groups"]
    assert got["state"].keys() == want["state"].keys()
    for index, entry in want["state"].items():
        assert got["state"][index].keys() == entry.keys()
        assert_equal(list(got["state"][index].values()), list(entry.values()))


def message_of(kind: type[Exception], call: Callable[[], object]) -> str:
    """What `call` says when it raises `kind`, which it must."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"{kind.__name__} was not raised")

"""Stochastic rounding: to one of the two neighbours, and right on average."""

import torch
from torch import Tensor


def round_stochastically_(out: Tensor, values: Tensor, generator: torch.Generator) -> None:
    """Round up with the probability that makes the expected value exact.

    bfloat16 is the upper half of a float32, so what is to be decided is whether its lower
    half, 16 bits, carries.

    Args:
        out: bfloat16, of the shape of `values`, overwritten.
        values: float32. What is not finite is kept.
        generator: on the device of `values`.
    """
    noise = torch.empty_like(values, dtype=torch.int32).random_(0, 2**16, generator=generator)
    rounded = noise.add_(values.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32)
    out.copy_(torch.where(values.isfinite(), rounded, values))

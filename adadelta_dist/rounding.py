"""Stochastic rounding: to one of the two neighbours, and right on average."""

import torch
from torch import Tensor


def round_stochastically_(out: Tensor, values: Tensor, generator: torch.Generator) -> None:
    """Round up with the probability that makes the expected value exact.

    bfloat16 is the upper half of a float32, so what is to be decided is whether its lower
    half, 16 bits, carries.

    Args:
        out: bfloat16, of the shape of `values`, overwritten.
        values: float32, [numel]. What is not finite is kept.
        generator: on the device of `values`.
    """
    numel = values.numel()
    draws = torch.empty(-(-numel // 4), dtype=torch.int64, device=values.device)
    draws.random_(
        -(2**63), None, generator=generator
    )  # 64 bits at once: most of the time goes here
    noise = draws.view(torch.uint16)[:numel].to(torch.int32)
    rounded = noise.add_(values.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32)
    # An infinity has nothing in its lower half. A NaN may have all of it there.
    out.copy_(torch.where(values == values, rounded, values))

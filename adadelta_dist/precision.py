"""In which dtype everything of a bucket is kept, travels and is computed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import compute_dtype
from .policy import ShardPolicy

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Precision:
    """The dtypes of one bucket.

    Args:
        compute: of the arithmetic, of averaged gradients and of masters.
        state: of the accumulators; bfloat16 is rounded stochastically.
        reduce: in which gradients travel.
        gather: in which parameters travel, whose values are then all of this dtype.
        has_master: a shard of exact parameters is kept beside those of the model.
        stochastic: parameters without masters are rounded stochastically.
    """

    compute: torch.dtype
    state: torch.dtype
    reduce: torch.dtype
    gather: torch.dtype
    has_master: bool
    stochastic: bool


def precision_of(policy: ShardPolicy, dtype: torch.dtype) -> Precision:
    """What the policy means for parameters of this dtype.

    Raises:
        ValueError: it means nothing for them.
    """
    real = dtype.to_real()
    gather = policy.gather_dtype or real
    if gather != real and gather.itemsize >= real.itemsize:
        raise ValueError(
            f"gather_dtype={gather} for parameters of {dtype}: wanted a narrower one. What they "
            "cannot hold need not be sent; leave gather_dtype at None."
        )
    if dtype.is_complex and (policy.gather_dtype or policy.state_dtype):
        raise ValueError(
            f"gather_dtype and state_dtype are for real parameters, got {dtype} among them: use "
            "two optimizers, or leave both at None."
        )
    if policy.stochastic_rounding and dtype == torch.float16:
        raise ValueError(
            "stochastic_rounding rounds to bfloat16, got float16 parameters: keep their masters."
        )
    rounds = real in HALF or gather != real
    compute = compute_dtype(real)
    return Precision(
        compute=compute,
        state=policy.state_dtype or compute,
        reduce=policy.reduce_dtype or real,
        gather=gather,
        has_master=rounds and policy.keeps_masters,
        stochastic=policy.stochastic_rounding and real in HALF,
    )


def check_precision(policy: ShardPolicy, params: Sequence[Tensor]) -> None:
    """Refuse parameters for which the policy means nothing, as `precision_of`.

    Raises:
        TypeError: gradients of another dtype than their parameters (torch's `grad_dtype`).
    """
    for p in params:
        # torch 2.8 has none.
        grad_dtype = getattr(p, "grad_dtype", None) if p.requires_grad and p.is_leaf else None
        if grad_dtype not in (None, p.dtype):
            raise TypeError(
                f"a parameter of {p.dtype} has grad_dtype={grad_dtype}, and ShardedAdadelta keeps "
                "gradients in its parameters' dtype, averaged in float32. Leave grad_dtype out."
            )
    for dtype in dict.fromkeys(p.dtype for p in params):
        precision_of(policy, dtype)

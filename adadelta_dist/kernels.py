"""The fused step: one kernel, made by `torch.compile` of the formula.

Per element, with g the gradient (negated if `maximize`) and x the parameter:

    g  <- g + weight_decay x
    v  <- rho v + (1 - rho) g^2                     square_avg, E[g^2]
    d  <- sqrt(u + eps) / sqrt(v + eps) g           the update, before lr
    u  <- rho u + (1 - rho) d^2                     acc_delta, E[dx^2]
    x  <- x - lr d

On CPUs the kernel is C++, on CUDA Triton. It is made at the first step that asks for it,
which takes seconds.
"""

import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from .capture import check_warm

logger = logging.getLogger("adadelta_dist")

FUSED_MIN_NUMEL = 2**20
"""`fused=None` compiles a kernel from this many elements on: below, it takes thousands of
steps to earn back the seconds of compilation."""

Kernel = Callable[..., None]
_OPTIONS: dict[str, Any] = {"emulate_precision_casts": True}
"""Else the compiler leaves out what rounds to half precision and back."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a fused step of this dtype computes."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scalars_of(
    group: Mapping[str, Any], dtype: torch.dtype, inverse_scale: float = 1.0
) -> tuple[Tensor, ...]:
    """The hyperparameters as 0-dim tensors: as Python numbers each new one would recompile."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.detach().squeeze().to(dtype)
    else:
        lr = torch.tensor(lr, dtype=dtype, device="cpu")
    rho = group["rho"]
    sign = -inverse_scale if group["maximize"] else inverse_scale
    rest = (rho, 1 - rho, group["eps"], group["weight_decay"], sign)
    return lr, *(torch.tensor(float(value), dtype=dtype, device="cpu") for value in rest)


@functools.cache
def step_kernel(device_type: str, dtype: torch.dtype) -> Kernel:
    """`kernel(param, grad, square_avg, acc_delta, *scalars_of(...))`, of one dtype."""
    compiled = _compiled(_formula, device_type, dtype)
    _run_on_scratch(compiled, _scratch(device_type, [dtype] * 4), compute_dtype(dtype))
    return compiled


@functools.cache
def master_kernel(
    device_type: str, dtype: torch.dtype, rounded_to: torch.dtype, grad_dtype: torch.dtype
) -> Kernel:
    """`kernel(param, master, grad, square_avg, acc_delta, *scalars_of(...))`.

    Args:
        dtype: of the parameters.
        rounded_to: of the values that they take.
        grad_dtype: of the gradients; all else is of the dtype of the arithmetic.

    Raises:
        RuntimeError: the compiler leaves out the rounding.
    """
    compute = compute_dtype(dtype)
    compiled = _compiled(_rounded(rounded_to), device_type, dtype, rounded_to, grad_dtype)
    scratch = _scratch(device_type, [dtype, compute, grad_dtype, compute, compute])
    param, master = scratch[:2]
    master.uniform_(-1, 1)
    param.copy_(master.to(rounded_to))
    param[::2] = 2  # which somebody has written
    wanted = [param.clone(), master.clone()]
    wanted[1][::2] = 2
    _run_on_scratch(compiled, scratch, compute)  # without gradients it moves nothing
    if not all(map(torch.equal, (param, master), wanted)):
        raise RuntimeError(f"the compiler leaves out the rounding to {rounded_to}")
    return compiled


@functools.cache
def missing(make: Callable[..., Kernel], device_type: str, *dtypes: torch.dtype) -> str | None:
    """Why `make` has no kernel for this device and these dtypes, or None if it has."""
    check_warm("the fused step is compiled")
    try:
        make(device_type, *dtypes)
    except Exception as error:  # whatever the compiler's toolchain raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        kind = make.__name__.replace("_", " ")
        logger.warning("no %s for %s on %s: %s", kind, dtypes[0], device_type, reason)
        return reason
    return None


def _updated(
    x: Tensor,
    g: Tensor,
    v: Tensor,
    u: Tensor,
    lr: Tensor,
    rho: Tensor,
    one_minus_rho: Tensor,
    eps: Tensor,
    weight_decay: Tensor,
    sign: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    g = sign * g
    # Where, not a plain sum: without weight decay an infinite parameter leaves g alone.
    g = torch.where(weight_decay != 0, g + weight_decay * x, g)
    v = rho * v + (one_minus_rho * g) * g
    d = (u + eps).sqrt() / (v + eps).sqrt() * g
    u = rho * u + (one_minus_rho * d) * d
    return x - lr * d, v, u


def _formula(
    param: Tensor, grad: Tensor, square_avg: Tensor, acc_delta: Tensor, *scalars: Tensor
) -> None:
    compute = compute_dtype(param.dtype)
    x, g, v, u = (t.to(compute) for t in (param, grad, square_avg, acc_delta))
    x, v, u = _updated(x, g, v, u, *scalars)
    square_avg.copy_(v)
    acc_delta.copy_(u)
    param.copy_(x)


def _rounded(rounded_to: torch.dtype) -> Callable[..., None]:
    def formula(
        param: Tensor,
        master: Tensor,
        grad: Tensor,
        square_avg: Tensor,
        acc_delta: Tensor,
        *scalars: Tensor,
    ) -> None:
        kept = param == master.to(rounded_to).to(param.dtype)
        x = torch.where(kept, master, param.to(master.dtype))
        x, v, u = _updated(x, grad.to(x.dtype), square_avg, acc_delta, *scalars)
        square_avg.copy_(v)
        acc_delta.copy_(u)
        master.copy_(x)
        param.copy_(x.to(rounded_to))

    return formula


def _compiled(function: Callable[..., None], device_type: str, *dtypes: torch.dtype) -> Kernel:
    """With a code object of its own: of each the compiler makes at most 8 variants."""
    assert isinstance(function, FunctionType)
    name = "_".join(["adadelta", device_type, *map(str, dtypes)]).replace(".", "_")
    code = function.__code__.replace(co_name=name)
    own = FunctionType(code, globals(), closure=function.__closure__)
    return torch.compile(own, dynamic=True, fullgraph=True, options=_OPTIONS)


def _scratch(device_type: str, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Its size matters, for the compiler decides by it whether a loop is worth threads."""
    return [torch.zeros(FUSED_MIN_NUMEL, dtype=dtype, device=device_type) for dtype in dtypes]


def _run_on_scratch(kernel: Kernel, scratch: Sequence[Tensor], compute: torch.dtype) -> None:
    """The first run compiles: if that fails, nobody's state is half updated."""
    group = {"lr": 1.0, "rho": 0.9, "eps": 1e-6, "weight_decay": 0.0, "maximize": False}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        kernel(*scratch, *scalars_of(group, compute))

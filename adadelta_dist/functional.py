"""The ADADELTA step on lists of tensors (Zeiler 2012, algorithm 1).

Per element, with g the gradient (negated if `maximize`) and x the parameter:

    g  <- g + weight_decay x
    v  <- rho v + (1 - rho) g^2                     square_avg, E[g^2]
    d  <- sqrt(u + eps) / sqrt(v + eps) g           the update, before lr
    u  <- rho u + (1 - rho) d^2                     acc_delta, E[dx^2]
    x  <- x - lr d

`eager_` is torch's own functional `adadelta`. `fused_` is the same formula as one
kernel, made by `torch.compile` from `_formula` for the CPU (C++) and for CUDA
(Triton): it touches each of the 28 bytes of an fp32 element once, and differs
from eager by rounding alone (docs/design.md has the measured bounds).
"""

import functools
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.optim.adadelta import adadelta as torch_adadelta
from torch.optim.optimizer import _get_scalar_dtype

from .capture import check_warm

logger = logging.getLogger("adadelta_dist")

ACCUMULATORS = ("square_avg", "acc_delta")
"""Names of the per-element state, as in `torch.optim.Adadelta`."""

HYPERPARAMETERS = ("lr", "rho", "eps", "weight_decay", "maximize")
"""Names of what a step depends on beside its tensors."""

FUSED_MIN_NUMEL = 2**20
"""`fused=None` compiles a kernel from this many elements on: below, the seconds of
compilation are never earned back."""

FUSED_DEVICES = ["cpu", "cuda"]

EAGER_PIECE_NUMEL = 2**17
"""Elements whose temporaries fit a CPU's cache."""

Entry = tuple[Tensor, Tensor, Tensor, Tensor]
"""A parameter, its gradient, `square_avg` and `acc_delta`."""


def eager_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    square_avgs: Sequence[Tensor],
    acc_deltas: Sequence[Tensor],
    steps: Sequence[Tensor],
    group: Mapping[str, Any],
) -> None:
    """One step by `torch.optim.adadelta.adadelta`: for-loop or foreach, as torch chooses.

    Args:
        params, grads, square_avgs, acc_deltas: tensors of equal shapes, entry by entry;
            all but `grads` are updated in place.
        steps: one-element tensors, each incremented by one.
        group: a parameter group of the optimizer.

    Raises:
        AssertionError: `capturable` on a device that torch does not support for it.
    """
    torch_adadelta(
        list(params),
        list(grads),
        list(square_avgs),
        list(acc_deltas),
        list(steps),
        foreach=group["foreach"],
        capturable=group["capturable"],
        differentiable=group["differentiable"],
        has_complex=any(torch.is_complex(p) for p in params),
        **{name: group[name] for name in HYPERPARAMETERS},
    )


def eager_flat_(entry: Entry, group: Mapping[str, Any], inverse_scale: float = 1.0) -> None:
    """`eager_` on flat tensors [numel], in pieces whose temporaries fit the cache.

    Args:
        inverse_scale: what the gradients are multiplied by first; they stay as they are.
    """
    step_device = entry[0].device if group["capturable"] else "cpu"
    step = torch.zeros((), dtype=_get_scalar_dtype(), device=step_device)
    params, grads, square_avgs, acc_deltas = (t.split(EAGER_PIECE_NUMEL) for t in entry)
    if inverse_scale == 1.0:
        eager_(params, grads, square_avgs, acc_deltas, [step] * len(params), group)
        return
    for piece in zip(params, grads, square_avgs, acc_deltas, strict=True):
        param, grad, square_avg, acc_delta = piece
        eager_([param], [grad * inverse_scale], [square_avg], [acc_delta], [step], group)


def fused_(entries: Iterable[Entry], group: Mapping[str, Any], inverse_scale: float = 1.0) -> None:
    """One fused step of each entry.

    Args:
        entries: contiguous one-dimensional tensors, of one floating dtype an entry.
        group: a parameter group of the optimizer. A Tensor `lr` stays on its device.
        inverse_scale: what the gradients are to be multiplied by.

    Raises:
        RuntimeError: no compiler is found.
    """
    scalars: dict[torch.dtype, tuple[Tensor, ...]] = {}
    for entry in entries:
        param = entry[0]
        if param.numel() < 2:  # a size of one would compile a kernel of its own
            eager_flat_(entry, group, inverse_scale)
            continue
        compute = compute_dtype(param.dtype)
        if compute not in scalars:
            scalars[compute] = _scalars(group, compute, inverse_scale)
        kernel = _kernel(param.device.type, param.dtype)
        with torch.no_grad():
            kernel(*(tensor.detach() for tensor in entry), *scalars[compute])


def use_fused(group: Mapping[str, Any], params: Sequence[Tensor]) -> bool:
    """Whether this group's step takes the fused kernel.

    `fused=True` insists. `fused=None` takes it when `foreach` is not given either,
    all `params` are floating point and have `FUSED_MIN_NUMEL` elements together, and
    a compiler is found.

    Raises:
        RuntimeError: `fused=True` and no compiler is found, or parameters on a device that
            has no kernel, or a first call while a CUDA graph is captured.
    """
    if group.get("fused") is False or not params or torch.compiler.is_compiling():
        return False
    if group.get("fused") is None and (
        group["foreach"] is not None
        or group["differentiable"]
        or sum(p.numel() for p in params) < FUSED_MIN_NUMEL
        or not all(p.is_floating_point() and p.device.type in FUSED_DEVICES for p in params)
    ):
        return False
    for p in params:
        _check_fusable(p, on_device=p.device.type in FUSED_DEVICES)
    reasons = {_no_kernel(p.device.type, p.dtype) for p in params} - {None}
    if reasons and group.get("fused"):
        raise RuntimeError(
            f"fused=True: torch.compile found no working compiler ({reasons.pop()}). Install a "
            "C++ compiler such as g++ (CPU) or Triton (CUDA), or leave `fused` at None."
        )
    return not reasons


def check_capturable(group: Mapping[str, Any], params: Sequence[Tensor]) -> None:
    """Apply torch's rule where capturable steps may run, before anything is changed.

    Raises:
        AssertionError: `capturable` on a device that torch does not support for it.
    """
    if group["capturable"]:
        for device in {p.device for p in params}:
            empty = torch.empty(0, device=device)
            eager_flat_((empty, empty, empty, empty), group)


def check_fused(group: Mapping[str, Any], params: Sequence[Tensor]) -> None:
    """Refuse what a fused step cannot do, in the words of `torch.optim.Adam`.

    Raises:
        RuntimeError: `fused=True` with `differentiable`, `foreach`, or parameters that
            are not floating point or on a device that has no kernel.
    """
    if not group.get("fused"):
        return
    if group["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    for p in params:  # devices are looked at by the step: a meta model may yet be made real
        _check_fusable(p, on_device=p.device.type == "meta" or p.device.type in FUSED_DEVICES)


def _check_fusable(p: Tensor, *, on_device: bool) -> None:
    if not (p.is_floating_point() and on_device):
        raise RuntimeError(
            "`fused=True` requires all the params to be floating point Tensors of supported "
            f"devices: {FUSED_DEVICES} but {p.dtype} and {p.device.type}"
        )


def _formula(
    param: Tensor,
    grad: Tensor,
    square_avg: Tensor,
    acc_delta: Tensor,
    lr: Tensor,
    rho: Tensor,
    one_minus_rho: Tensor,
    eps: Tensor,
    weight_decay: Tensor,
    sign: Tensor,
) -> None:
    compute = compute_dtype(param.dtype)
    x, g, v, u = (t.to(compute) for t in (param, grad, square_avg, acc_delta))
    g = sign * g
    # Where, not a plain sum: without weight decay an infinite parameter leaves g alone.
    g = torch.where(weight_decay != 0, g + weight_decay * x, g)
    v = rho * v + (one_minus_rho * g) * g
    d = (u + eps).sqrt() / (v + eps).sqrt() * g
    u = rho * u + (one_minus_rho * d) * d
    square_avg.copy_(v)
    acc_delta.copy_(u)
    param.copy_(x - lr * d)


def _scalars(
    group: Mapping[str, Any], dtype: torch.dtype, inverse_scale: float
) -> tuple[Tensor, ...]:
    """The hyperparameters as 0-dim tensors: as Python numbers each new one would recompile."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.detach().squeeze().to(dtype)
    else:
        lr = torch.tensor(lr, dtype=dtype)
    rho = group["rho"]
    sign = -inverse_scale if group["maximize"] else inverse_scale
    rest = (rho, 1 - rho, group["eps"], group["weight_decay"], sign)
    return lr, *(torch.tensor(float(value), dtype=dtype) for value in rest)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a fused step of this dtype computes."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def _kernel(device_type: str, dtype: torch.dtype) -> Callable[..., None]:
    """The compiled formula, after a first run on scratch memory of `FUSED_MIN_NUMEL`.

    The first run compiles: if that fails, nobody's state is half updated. Its size
    matters too, for the compiler decides by it whether a loop is worth threads.
    """
    # A code object of its own: the compiler counts the variants of each, and gives up at 8.
    code = _formula.__code__.replace(co_name=f"adadelta_{device_type}_{dtype}".replace(".", "_"))
    formula = FunctionType(code, globals())
    compiled = torch.compile(formula, dynamic=True, fullgraph=True)
    scratch = [torch.zeros(FUSED_MIN_NUMEL, dtype=dtype, device=device_type) for _ in range(4)]
    group = {"lr": 1.0, "rho": 0.9, "eps": 1e-6, "weight_decay": 0.0, "maximize": False}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        compiled(*scratch, *_scalars(group, compute_dtype(dtype), 1.0))
    return compiled


@functools.cache
def _no_kernel(device_type: str, dtype: torch.dtype) -> str | None:
    """Why there is no kernel for this device and dtype, or None if there is one."""
    check_warm("the fused step is compiled")
    try:
        _kernel(device_type, dtype)
    except Exception as error:  # whatever the compiler's toolchain raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        logger.warning("the fused step is off for %s on %s: %s", dtype, device_type, reason)
        return reason
    return None

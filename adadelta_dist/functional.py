"""The ADADELTA step on lists of tensors (Zeiler 2012, algorithm 1).

`eager_` is torch's own functional `adadelta`. `fused_` is the same formula as one kernel
(`kernels.py`): it touches each of the 28 bytes of an fp32 element once, and differs
from eager by rounding alone (docs/design.md has the measured bounds).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adadelta import adadelta as torch_adadelta
from torch.optim.optimizer import _get_scalar_dtype

from . import kernels
from .kernels import FUSED_MIN_NUMEL, compute_dtype, scalars_of

ACCUMULATORS = ("square_avg", "acc_delta")
"""Names of the per-element state, as in `torch.optim.Adadelta`."""

HYPERPARAMETERS = ("lr", "rho", "eps", "weight_decay", "maximize")
"""Names of what a step depends on beside its tensors."""

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
            scalars[compute] = scalars_of(group, compute, inverse_scale)
        kernel = kernels.step_kernel(param.device.type, param.dtype)
        with torch.no_grad():
            kernel(*(tensor.detach() for tensor in entry), *scalars[compute])


def fused_rounded_(
    param: Tensor,
    rounded_to: torch.dtype,
    entry: Entry,
    group: Mapping[str, Any],
    inverse_scale: float = 1.0,
) -> None:
    """One fused step of masters, and of the parameters that are rounded from them.

    Args:
        param: [numel], at least 2, of any floating dtype. An element that is not its master
            rounded was written by somebody: the master takes it first.
        rounded_to: the dtype of the values that `param` takes.
        entry: the masters, their gradients (of any floating dtype), and the accumulators.
        group, inverse_scale: as `fused_`.

    Raises:
        RuntimeError: `kernels.missing` has a reason.
    """
    master, grad, *_ = entry
    kernel = kernels.master_kernel(param.device.type, param.dtype, rounded_to, grad.dtype)
    with torch.no_grad():
        tensors = (tensor.detach() for tensor in (param, *entry))
        kernel(*tensors, *scalars_of(group, master.dtype, inverse_scale))


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
    dtypes = {(p.device.type, p.dtype) for p in params}
    reasons = {kernels.missing(kernels.step_kernel, *of) for of in dtypes} - {None}
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

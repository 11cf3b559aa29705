"""The step on what one rank owns of a bucket, and the rounding where less is stored."""

from collections.abc import Iterator
from itertools import compress
from typing import Any

import torch

from . import kernels
from .agreement import digest
from .functional import EAGER_PIECE_NUMEL, Entry, eager_flat_, fused_, fused_rounded_
from .layout import Interval
from .rounding import round_stochastically_
from .state import ShardState

_DEVICE_PIECE_NUMEL = 2**24
"""An accelerator has no cache to fit, but memory for temporaries to save."""


def step_(
    shard: ShardState, group: dict[str, Any], *, fused: bool, inverse_scale: float = 1.0
) -> None:
    """Update what this rank owns of one bucket, where a gradient is present.

    Args:
        inverse_scale: what the gradients are to be multiplied by.
    """
    bucket = shard.bucket
    if shard.generator is not None:  # so that a run that is resumed rounds as it would have
        facts = [bucket.names[0], str(bucket.group.rank), str(shard.steps.max().item())]
        shard.generator.manual_seed(int.from_bytes(digest(facts)[1:], "big"))
    one_kernel_rounds = fused and rounds_in_one_kernel(shard)
    for interval in bucket.own_runs():
        run = slice(interval.start, interval.stop)
        if shard.is_exact:
            flats = (bucket.own_param, bucket.grad_shard, *shard.accumulators)
            param, grad, square_avg, acc_delta = (bucket.typed(flat[run]) for flat in flats)
            _step_entry_((param, grad, square_avg, acc_delta), group, fused, inverse_scale)
        elif one_kernel_rounds and interval.numel > 1:
            assert shard.master is not None
            flats = (shard.master, bucket.grad_shard, *shard.accumulators)
            master, grad, square_avg, acc_delta = (flat[run] for flat in flats)
            entry = master, grad, square_avg, acc_delta
            fused_rounded_(
                bucket.own_param[run], bucket.precision.gather, entry, group, inverse_scale
            )
        else:
            for piece in _pieces(interval, bucket.own_param.device):
                _step_rounded_(shard, piece, group, fused, inverse_scale)
    if all(bucket.present):
        shard.steps.add_(1)
    else:
        counted = compress(shard.entries, bucket.present)
        torch._foreach_add_([entry["step"] for entry in counted], 1)


def rounds_in_one_kernel(shard: ShardState) -> bool:
    """Whether a fused step of masters rounds the parameters as well; compiles it at first."""
    bucket = shard.bucket
    precision, param = bucket.precision, bucket.flat_param
    if shard.master is None or precision.state != precision.compute:
        return False
    dtypes = (param.dtype, precision.gather, bucket.grad_shard.dtype)
    return kernels.missing(kernels.master_kernel, param.device.type, *dtypes) is None


def _step_rounded_(
    shard: ShardState, piece: slice, group: dict[str, Any], fused: bool, inverse_scale: float
) -> None:
    """One piece in the dtype of the arithmetic; then what is stored in less is rounded."""
    precision, param = shard.bucket.precision, shard.bucket.own_param[piece]
    stored = [param, *(flat[piece] for flat in shard.accumulators)]
    if shard.master is not None:
        stored[0] = master = shard.master[piece]
        # What somebody has written into the parameter since the last step counts.
        kept = param == master.to(precision.gather).to(param.dtype)
        master.copy_(torch.where(kept, master, param.to(master.dtype)))
    exact = [tensor.to(precision.compute) for tensor in stored]  # itself where it is exact
    grad = shard.bucket.grad_shard[piece].to(precision.compute)
    _step_entry_((exact[0], grad, exact[1], exact[2]), group, fused, inverse_scale)
    for tensor, value in zip(stored, exact, strict=True):
        is_param = tensor is param
        if tensor.dtype == torch.bfloat16 and (precision.stochastic or not is_param):
            assert shard.generator is not None
            round_stochastically_(tensor, value, shard.generator)
        elif tensor is not value:
            tensor.copy_(value)
    if shard.master is not None:
        param.copy_(exact[0].to(precision.gather))


def _step_entry_(entry: Entry, group: dict[str, Any], fused: bool, inverse_scale: float) -> None:
    if fused:
        fused_([entry], group, inverse_scale)
    else:
        eager_flat_(entry, group, inverse_scale)


def _pieces(run: Interval, device: torch.device) -> Iterator[slice]:
    numel = EAGER_PIECE_NUMEL if device.type == "cpu" else _DEVICE_PIECE_NUMEL
    for start in range(run.start, run.stop, numel):
        yield slice(start, min(start + numel, run.stop))

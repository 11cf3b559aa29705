"""Clipping by the global norm of gradients that are sharded."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import collectives
from .groups import Group


def clip_shards_(
    group: Group,
    shards: Sequence[Tensor],
    max_norm: float,
    norm_type: float,
    *,
    error_if_nonfinite: bool,
) -> Tensor:
    """Scale all ranks' shards so that their norm, as one vector, is at most `max_norm`.

    As `torch.nn.utils.clip_grad_norm_`. Collective.

    Args:
        shards: this rank's averaged gradients, [shard_numel] each, scaled in place.

    Returns:
        The norm before clipping, a 0-dim tensor, equal on every rank.

    Raises:
        RuntimeError: the norm is not finite and `error_if_nonfinite`.
    """
    norm = global_norm(group, shards, norm_type)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients is non-finite, so it cannot "
            "be clipped. To disable this error, set error_if_nonfinite=False"
        )
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for shard in shards:
        shard.mul_(scale.to(shard))
    return norm.to(shards[0].device, shards[0].dtype.to_real()) if shards else norm.float()


def global_norm(group: Group, shards: Sequence[Tensor], norm_type: float) -> Tensor:
    """The p-norm of all ranks' shards as one vector, in fp64 on the CPU. Collective."""
    zero = torch.zeros((), dtype=torch.float64, device="cpu")  # whatever the default is
    by_shard = [
        torch.linalg.vector_norm(shard, norm_type, dtype=_dtype_of_norm(shard))
        for shard in shards
        if shard.numel()
    ]
    norms = torch.stack([zero, *(norm.to("cpu", torch.float64) for norm in by_shard)])
    if norm_type == float("inf"):
        largest, is_nan = norms.nan_to_num(nan=0.0, posinf=norm_type).max(), norms.isnan().any()
        both = torch.stack([largest, is_nan.to(largest)])  # gloo's maximum may lose a NaN
        largest, is_nan = collectives.combine(group.sharding, both, "max")
        return largest if is_nan == 0 else norms.new_tensor(float("nan"))
    return collectives.combine(group.sharding, (norms**norm_type).sum(), "sum") ** (1 / norm_type)


def _dtype_of_norm(shard: Tensor) -> torch.dtype:
    """At least single precision; complex, as torch wants it, where the shard is."""
    single = torch.complex64 if shard.is_complex() else torch.float32
    return torch.promote_types(shard.dtype, single)

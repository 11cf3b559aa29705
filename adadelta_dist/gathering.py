"""All-gathers that go on while the next forward begins."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .buckets import FlatBucket
from .collectives import Pending

_READ_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules of torch that use their children's weights without calling them."""


class Gathers:
    """What is under way: by bucket, the parameters that other ranks send."""

    def __init__(self) -> None:
        self._pending: dict[FlatBucket, Pending] = {}
        weakref.finalize(self, _abandon, self._pending).atexit = False

    def start(self, bucket: FlatBucket) -> None:
        """Collective."""
        self._pending[bucket] = bucket.gather()

    def leave(self, count: int) -> None:
        """Return when no more than the `count` latest are under way."""
        self.wait(list(self._pending)[:-count])

    def wait(self, buckets: Sequence[FlatBucket] | None = None) -> None:
        """Return when these buckets, by default all, hold every parameter."""
        for bucket in list(self._pending) if buckets is None else buckets:
            pending = self._pending.pop(bucket, None)
            if pending is not None:
                pending.wait()
                torch.autograd.graph.increment_version(bucket.params)


def attach(
    model: nn.Module,
    bucket_of: Mapping[Tensor, FlatBucket],
    wait: Callable[[Sequence[FlatBucket]], None],
) -> set[FlatBucket]:
    """Have each module wait for its own parameters before its forward, and before its state
    is read or loaded; torch's attention for its children's as well.

    Returns:
        The buckets all of whose parameters some module waits for.

    Raises:
        ValueError: the model has trainable parameters that are in no bucket.
    """
    strangers = [
        name for name, p in model.named_parameters() if p.requires_grad and p not in bucket_of
    ]
    if strangers:
        raise ValueError(
            f"attach: the model's parameters {strangers[:3]} (of {len(strangers)}) are not the "
            "optimizer's. Attach the model whose parameters it was built with."
        )
    owned: set[Tensor] = set()
    for module in model.modules():
        read = module.parameters(recurse=isinstance(module, _READ_CHILDREN))
        own = [p for p in read if p in bucket_of]
        owned.update(own)
        buckets = list(dict.fromkeys(bucket_of[p] for p in own))
        if buckets:

            def hook(*_: Any, buckets: Sequence[FlatBucket] = buckets) -> None:
                wait(buckets)

            module.register_forward_pre_hook(hook, prepend=True)
            module.register_state_dict_pre_hook(hook)
            # What is loaded must not be overwritten by what arrives late.
            module.register_load_state_dict_pre_hook(hook)
    return {b for b in set(bucket_of.values()) if owned.issuperset(b.params)}


def _abandon(pending: Mapping[FlatBucket, Pending]) -> None:
    for gather in pending.values():
        gather.abandon()

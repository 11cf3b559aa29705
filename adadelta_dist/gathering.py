"""All-gathers that go on while the next forward begins."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .buckets import FlatBucket
from .collectives import Pending

_READ_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules of torch that use their children's weights without calling them."""


class Gathers:
    """What is under way: by bucket, the parameters that other ranks send."""

    def __init__(self) -> None:
        self._pending: dict[FlatBucket, Pending] = {}
        self._hooks: weakref.WeakKeyDictionary[nn.Module, list[RemovableHandle]] = (
            weakref.WeakKeyDictionary()
        )
        weakref.finalize(self, _abandon, self._pending).atexit = False
        weakref.finalize(self, _remove, self._hooks).atexit = False

    def start(self, bucket: FlatBucket) -> None:
        """Collective. A graph from before it may no longer be gone back through, as in torch."""
        self._pending[bucket] = bucket.gather()
        torch.autograd.graph.increment_version(bucket.params)

    def leave(self, count: int) -> None:
        """Return when no more than the `count` latest are under way."""
        self.wait(list(self._pending)[:-count])

    def wait(self, buckets: Sequence[FlatBucket] | None = None) -> None:
        """Return when these buckets, by default all, hold every parameter."""
        for bucket in list(self._pending) if buckets is None else buckets:
            pending = self._pending.pop(bucket, None)
            if pending is not None:
                pending.wait()

    def attach(self, model: nn.Module, bucket_of: Mapping[Tensor, FlatBucket]) -> set[FlatBucket]:
        """Have each module wait for its own parameters before its forward, and before its state
        is read or loaded; for those in a `ParameterList` or another child without a forward, and
        torch's attention for its children's, as well.

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
            own = [p for p in _read_by(module) if p in bucket_of]
            if _has_forward(module):
                owned.update(own)
            if own:
                self._hook(module, _Wait(self, dict.fromkeys(bucket_of[p] for p in own)))
        return {b for b in set(bucket_of.values()) if owned.issuperset(b.params)}

    def _hook(self, module: nn.Module, wait: "_Wait") -> None:
        for old in self._hooks.pop(module, ()):
            old.remove()
        self._hooks[module] = [
            module.register_forward_pre_hook(wait, prepend=True),
            module.register_state_dict_pre_hook(wait),
            # What is loaded must not be overwritten by what arrives late.
            module.register_load_state_dict_pre_hook(wait),
        ]


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _read_by(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that a module uses itself: its own, and those of mere containers in it."""
    yield from module.parameters(recurse=isinstance(module, _READ_CHILDREN))
    for child in module.children():
        if not _has_forward(child):
            yield from _read_by(child)


class _Wait:
    """A hook that waits for buckets, and keeps neither them nor the optimizer alive.

    A copy of the module, in memory or in a file, has other parameters, and waits for nothing.
    """

    def __init__(self, gathers: Gathers, buckets: Iterable[FlatBucket]) -> None:
        self._gathers = weakref.ref(gathers)
        self._buckets = [weakref.ref(bucket) for bucket in buckets]

    def __call__(self, *_: Any) -> None:
        gathers = self._gathers()
        if gathers is not None:
            # No `:=` in a comprehension: torch.compile, which traces this, takes it amiss.
            alive = [bucket() for bucket in self._buckets]
            gathers.wait([bucket for bucket in alive if bucket is not None])

    def __reduce__(self) -> tuple[Any, ...]:
        return _wait_for_nothing, ()


def _wait_for_nothing() -> Callable[..., None]:
    return _nothing


def _nothing(*_: Any) -> None:
    pass


def _abandon(pending: Mapping[FlatBucket, Pending]) -> None:
    for gather in pending.values():
        gather.abandon()


def _remove(hooks: Mapping[nn.Module, Sequence[RemovableHandle]]) -> None:
    for handles in hooks.values():
        for handle in handles:
            handle.remove()

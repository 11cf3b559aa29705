"""When buckets are reduced: during backward where possible, in one order on all ranks.

The hook that runs when a gradient is complete marks its slot as ready. A bucket whose
gradients are all there is *launched*: its reduce-scatter starts while backward goes on.
The order of collectives never depends on which gradients this rank happens to have:
buckets are launched in one fixed order, each once, and those that changed afterwards on
any rank are reduced again on all.
"""

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from itertools import compress

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import agreement, collectives
from .agreement import RankError
from .buckets import FlatBucket
from .capture import is_capturing
from .groups import Group

_hooks: MutableMapping[Tensor, torch.utils.hooks.RemovableHandle] = WeakTensorKeyDictionary()
"""Of all parameters: the latest optimizer's."""


class GradientReducer:
    """Reduces the buckets in one fixed order, during backward where it can.

    Args:
        group: the ranks.
        overlap: start reductions from gradient hooks; else all at `reduce()`.
    """

    def __init__(self, group: Group, *, overlap: bool) -> None:
        self.group, self.overlap = group, overlap
        self.buckets: list[FlatBucket] = []
        self._sync = True
        self._next = 0
        self._counted = False
        self._lock = threading.Lock()
        self._unhooked: list[tuple[int, int, Tensor]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.clipped = self._adds_to_clipped = False
        self._edited = self._warned = False
        weakref.finalize(self, _remove, self._handles).atexit = False

    def extend(self, buckets: Sequence[FlatBucket]) -> None:
        for bucket in buckets:
            release(bucket.params)
        self._unhooked += _slots_to_hook(buckets, len(self.buckets))
        self.buckets.extend(buckets)
        in_order = {b.reduction.in_thread: b.reduction.in_order for b in reversed(self.buckets)}
        for bucket in buckets:  # one thread: what arrives first is freed first
            bucket.reduction.in_order = in_order[bucket.reduction.in_thread]
        self._counted = False
        self._hook_params()

    def unhook(self) -> None:
        """Leave backwards alone until the next step, which reduces what they put into `p.grad`."""
        ours = set(map(id, self._handles))
        release(p for p, handle in list(_hooks.items()) if id(handle) in ours)
        self._handles.clear()
        self._unhooked = _slots_to_hook(self.buckets)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def reduce(
        self, facts: Sequence[str], error: Exception | None = None, *, final: bool = False
    ) -> None:
        """Have every bucket reduced (perhaps still under way: `wait()` it). Collective.

        Calling it again without new gradients sends nothing but one small message.

        Args:
            facts: what must be equal on every rank, such as hyperparameters.
            error: what went wrong on this rank already, to be raised on all.
            final: the step follows at once.

        Raises:
            RuntimeError: a parameter was moved, or a gradient is sparse. The ranks that
                are well raise `RankError`.
        """
        error = self._check(error)
        edited = [
            error is None and bucket.launched and not bucket.is_current() for bucket in self.buckets
        ]
        by_hand = any(
            changed and not bucket.accumulating  # by the user, that is, not by a backward
            for changed, bucket in zip(edited, self.buckets, strict=True)
        )
        flags = [by_hand or self._adds_to_clipped, self._is_clipped(), *edited]
        changed_anywhere, clipped_anywhere, *again = self._agree(flags, facts, error)
        if clipped_anywhere and changed_anywhere:
            raise self._clipped_too_early()
        self._edited |= by_hand and self.buckets[0].is_hooked  # else nothing was sent
        # First what some ranks have launched already, so that all launch in the same order.
        for bucket in self.buckets:
            if not bucket.launched:
                bucket.launch(final=final)
        for bucket in compress(self.buckets, again):
            bucket.launch(final=final)

    def catch_up(self) -> None:
        """Launch what any rank has launched, before a collective of another kind. Collective.

        Native collectives pair by their order alone, and ranks with other gradients may have
        launched more or fewer buckets during backward.
        """
        launched = sum(bucket.launched for bucket in self.buckets)
        for bucket in self.buckets[: collectives.most(self.group, launched)]:
            if not bucket.launched:
                bucket.launch(in_backward=True)

    def begin_clip(self) -> None:
        """A clip replaces one whose step was skipped, unless gradients were added to that."""
        self.clipped = self._adds_to_clipped

    def end_clip(self) -> None:
        self.clipped, self._adds_to_clipped = True, False

    def discard(self) -> None:
        """Gradients are zeroed: forget what was done with them."""
        self.clipped = self._adds_to_clipped = False

    def reset(self) -> None:
        """Begin a new iteration, after a step."""
        self._next, self._counted = 0, False
        self.clipped = self._adds_to_clipped = False
        for bucket in self.buckets:
            bucket.reset()
        self._hook_params()
        self._warn_of_edits()  # last: where warnings are errors, it must not stop half-way

    def _is_clipped(self) -> bool:
        """Whether anything is left of what was clipped; the step may have been skipped since."""
        return self.clipped and any(bucket.has_launched() for bucket in self.buckets)

    def _clipped_too_early(self) -> RankError:
        return RankError(
            "gradients changed after optimizer.clip_grad_norm_, which clips the average of all: "
            "clip once, after all that adds to them or edits them; or forget them before, by "
            f"optimizer.zero_grad(). (raised on every rank; this is rank {self.group.number})"
        )

    def _check(self, error: Exception | None) -> Exception | None:
        """What is wrong here, if anything: parameters that were moved, or a sparse gradient, first.

        They explain what else went wrong.
        """
        found: Exception | None = None
        for bucket in self.buckets:
            try:
                bucket.reclaim_params()
                bucket.check_grads()
            except RuntimeError as raised:
                found = found or raised
        return found or error

    def _agree(
        self, edits: list[bool], facts: Sequence[str], error: Exception | None
    ) -> list[bool]:
        """Learn which edits and which gradients any rank has, in one message."""
        here = [has for bucket in self.buckets for has in bucket.has_gradients()]
        # Equal on all ranks if and only if the maximum of the digest and the maximum of
        # its complement still add up to 255, byte by byte.
        digest = agreement.digest(facts)
        flags = [*edits, *here, error is not None, *digest, *(255 - byte for byte in digest)]
        message = torch.frombuffer(bytearray(flags), dtype=torch.uint8)
        anyone = collectives.combine(self.group, message, "max")
        low, high = anyone[-2 * len(digest) :].view(2, -1).tolist()
        known = anyone[: -2 * len(digest)].bool().tolist()
        if known.pop() or any(a + b != 255 for a, b in zip(low, high, strict=True)):
            with agreement.agreement(self.group, "ShardedAdadelta.step") as mine:
                mine.facts.extend(facts)
                if error is not None:
                    raise error
        start = len(edits)
        for bucket in self.buckets:
            stop = start + len(bucket.params)
            bucket.present, start = known[start:stop], stop
        return known[: len(edits)]

    def _warn_of_edits(self) -> None:
        if self._edited and not self._warned and self.group.world_size > 1:
            self._warned = True
            warnings.warn(
                "Gradients changed after their reduction had started, so they were reduced again. "
                "To clip by the global norm call optimizer.clip_grad_norm_(max_norm); if "
                "DistributedDataParallel averages them, pass ShardPolicy(gradients='averaged'); if "
                "you edit gradients, ShardPolicy(overlap=False) reduces them once, at the step.",
                stacklevel=2,
            )

    def _on_gradient(self, b: int, i: int) -> None:
        """A gradient is complete: launch what can be launched, in order.

        Under capture a reduction belongs to the step, which may not be captured with it.
        """
        bucket = self.buckets[b]
        adds_to_clipped = self.clipped and bucket.is_launched(i)
        taken = bucket.take(i)
        with self._lock:  # backward has a thread for each device
            self._adds_to_clipped |= adds_to_clipped
            if bucket.launched:
                bucket.accumulating = True  # a second backward: `reduce()` sends it again
            elif taken and self._sync and self.overlap and not is_capturing():
                bucket.ready.add(i)
                if not self._counted:
                    for every in self.buckets:
                        every.expect()
                    self._counted = True
                while self._next < len(self.buckets):
                    following = self.buckets[self._next]
                    if not following.launched:  # by `reduce`, before there were new buckets
                        if not following.is_full():
                            break
                        following.launch(in_backward=True)
                    self._next += 1

    def _hook_params(self) -> None:
        """Hook parameters that require gradients by now (some may have been frozen)."""
        me, unhooked, self._unhooked = weakref.ref(self), self._unhooked, []
        for b, i, p in unhooked:
            if p in _hooks:  # of an optimizer after this one
                continue
            if p.requires_grad and p.is_leaf:
                _hooks[p] = p.register_post_accumulate_grad_hook(_gradient_hook(me, b, i))
                self._handles.append(_hooks[p])
            else:
                self._unhooked.append((b, i, p))


def _slots_to_hook(buckets: Sequence[FlatBucket], first: int = 0) -> list[tuple[int, int, Tensor]]:
    return [
        (b, i, p)
        for b, bucket in enumerate(buckets, first)
        if bucket.is_hooked
        for i, p in enumerate(bucket.params)
    ]


def release(params: Iterable[Tensor]) -> None:
    """Take off the hooks of an optimizer before this one, which would take its gradients."""
    for p in params:
        hook = _hooks.pop(p, None)
        if hook is not None:
            hook.remove()


def _gradient_hook(
    reducer: "weakref.ref[GradientReducer]", b: int, i: int
) -> Callable[[Tensor], None]:
    """A hook that keeps neither the reducer nor its buckets alive."""

    def hook(_: Tensor) -> None:
        alive = reducer()
        if alive is not None:
            alive._on_gradient(b, i)

    return hook


def _remove(handles: Sequence[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()

"""Checkpoints upon an exception: saving needs every rank, and an exception may come to one alone.

That rank would wait for the others in the save, and they for it in their next reduction, until
the process group gives up. So ranks with an exception meet first. They do at the store of the
process group, where no message of training can be taken for one of theirs.
"""

import warnings
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from .frameworks import pl

PATIENCE = timedelta(seconds=20)  # ranks that meet the same error are a step apart at most


class MeetingOnException(pl.callbacks.Callback):
    """Keeps callbacks from saving upon an exception that other ranks do not have.

    Args:
        number: the same on all ranks, and another each time.
    """

    def __init__(self, number: int) -> None:
        self._number, self._exceptions = number, 0
        self._left_out: list[pl.callbacks.Callback] = []

    def on_exception(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException
    ) -> None:
        """Wait a while for the other ranks; without them leave out the callbacks that save."""
        saving = [callback for callback in trainer.callbacks if _saves(callback)]  # type: ignore[attr-defined]
        if not saving or trainer.world_size == 1 or not dist.is_initialized():
            return
        self._exceptions += 1
        # The state of ranks that are at different steps does not belong together.
        name = f"{self._number}/{self._exceptions}/step {trainer.global_step}"
        if all_meet(name, trainer.world_size, PATIENCE):
            return
        for callback in saving:
            trainer.callbacks.remove(callback)  # type: ignore[attr-defined]
        self._left_out += saving
        warnings.warn(
            f"rank {trainer.global_rank}: {type(exception).__name__} at step {trainer.global_step}"
            f", not on all of the {trainer.world_size} ranks within {PATIENCE.seconds} s. So no "
            "checkpoint is saved upon it, for every rank has a part of the optimizer's state.",
            RuntimeWarning,
            stacklevel=2,
        )

    def join(self, trainer: "pl.Trainer") -> None:
        """Become the first of the Trainer's callbacks."""
        trainer.callbacks.insert(0, self)  # type: ignore[attr-defined]

    def leave(self, trainer: "pl.Trainer") -> None:
        """Leave the Trainer's callbacks as they were."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if self in callbacks:
            callbacks.remove(self)
            callbacks += self._left_out  # those that save are always the last
        self._left_out = []


def all_meet(name: str, world_size: int, patience: timedelta) -> bool:
    """Whether every rank calls this, with the same name, before one of them loses patience.

    All ranks get the same answer. One that comes too late does not wait.

    Args:
        name: used once.
    """
    try:
        store = dist.PrefixStore(f"adadelta_dist/exception/{name}", _get_default_store())  # type: ignore[attr-defined]
        if store.add("arrived", 1) == world_size:
            store.compare_set("verdict", "", "all")
        try:
            store.wait(["verdict"], patience)
        except RuntimeError:  # as stores report that time is up, each in its own way
            store.compare_set("verdict", "", "some")
        return bool(store.get("verdict") == b"all")
    except RuntimeError:  # the rank that keeps the store is gone
        return False


def _saves(callback: "pl.callbacks.Callback") -> bool:
    """Whether it saves a checkpoint upon an exception."""
    reacts = type(callback).on_exception is not pl.callbacks.Callback.on_exception
    is_saver = isinstance(callback, pl.callbacks.Checkpoint)
    return is_saver and reacts and bool(getattr(callback, "save_on_exception", True))

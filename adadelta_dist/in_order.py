"""Finishing what was sent, one after the other, without holding up who sent it."""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as futures_wait
from queue import SimpleQueue

Action = Callable[[], None]
_Queue = SimpleQueue["tuple[Action, Future[None]] | None"]


class InOrder:
    """Carries out actions in the order in which they came.

    Args:
        in_thread: actions may block the host (gloo), so a thread of their own runs them:
            backward must not wait for a rank that has not come that far. Else an action
            waits on the device alone, and runs when the next one comes.
    """

    def __init__(self, *, in_thread: bool) -> None:
        self._in_thread = in_thread
        self._queue: _Queue | None = None
        self._due: tuple[Action, Future[None]] | None = None

    def submit(self, action: Action) -> "Future[None]":
        done: Future[None] = Future()
        if self._in_thread:
            self._running().put((action, done))
        else:
            self._run_due()
            self._due = action, done
        return done

    def wait(self, done: "Future[None]") -> None:
        """Return when the action is done, or raise what it raised."""
        if not done.done() and not self._in_thread:
            self._run_due()
        done.result()

    def is_done(self, done: "Future[None]", within_s: float) -> bool:
        """Whether the action is done, or will be within these seconds."""
        return not self._in_thread or not futures_wait([done], within_s).not_done

    def _run_due(self) -> None:
        due, self._due = self._due, None
        if due is not None:
            _run(*due)

    def _running(self) -> _Queue:
        if self._queue is None:
            self._queue = SimpleQueue()
            # A daemon: what a dropped optimizer has in flight must not hold up the exit.
            threading.Thread(target=_work, args=(self._queue,), daemon=True).start()
            weakref.finalize(self, self._queue.put, None).atexit = False
        return self._queue


def _work(queue: _Queue) -> None:
    while (item := queue.get()) is not None:
        _run(*item)
        del item  # what the action holds is free now, not at the next one


def _run(action: Action, done: "Future[None]") -> None:
    try:
        action()
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(None)

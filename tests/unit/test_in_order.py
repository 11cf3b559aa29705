"""Actions run in the order in which they came, and what they raise comes back."""

import gc
import threading
import weakref

import pytest

from adadelta_dist.in_order import InOrder

both = pytest.mark.parametrize("in_thread", [False, True])


@both
def test_actions_run_once_each_in_order(in_thread):
    done, order = InOrder(in_thread=in_thread), []
    futures = [done.submit(lambda i=i: order.append(i)) for i in range(5)]
    done.wait(futures[-1])
    done.wait(futures[0])
    assert order == [0, 1, 2, 3, 4]


@both
def test_an_error_comes_back_and_the_next_action_runs(in_thread):
    done, order = InOrder(in_thread=in_thread), []
    failed = done.submit(lambda: 1 / 0)
    fine = done.submit(lambda: order.append("fine"))
    done.wait(fine)
    assert order == ["fine"]
    with pytest.raises(ZeroDivisionError):
        done.wait(failed)


def test_in_a_thread_nobody_waits_for_a_blocked_action():
    done, gate = InOrder(in_thread=True), threading.Event()
    future = done.submit(gate.wait)
    assert not done.is_done(future, within_s=0.01)
    gate.set()
    assert done.is_done(future, within_s=10)


def test_without_a_thread_an_action_waits_for_the_next_or_for_someone_who_asks():
    done, order = InOrder(in_thread=False), []
    done.submit(lambda: order.append(1))
    assert order == []
    second = done.submit(lambda: order.append(2))
    assert order == [1]
    assert done.is_done(second, within_s=0), "it waits on the device, not on the host"
    done.wait(second)
    assert order == [1, 2]


@both
def test_what_an_action_holds_is_free_when_it_is_done(in_thread):
    class Memory:
        pass

    done, memory = InOrder(in_thread=in_thread), Memory()
    held = weakref.ref(memory)
    future = done.submit(lambda memory=memory: None)
    del memory
    done.wait(future)
    done.wait(done.submit(lambda: None))
    gc.collect()
    assert held() is None


def test_no_thread_before_the_first_action():
    before = threading.active_count()
    InOrder(in_thread=True)
    assert threading.active_count() == before

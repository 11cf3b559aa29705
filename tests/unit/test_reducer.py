"""Which buckets share a place where reductions are finished."""

from types import SimpleNamespace

from adadelta_dist.groups import Group
from adadelta_dist.in_order import InOrder
from adadelta_dist.reducer import GradientReducer


def bucket(in_thread):
    reduction = SimpleNamespace(in_thread=in_thread, in_order=InOrder(in_thread=in_thread))
    return SimpleNamespace(is_hooked=False, params=[], reduction=reduction)


def test_a_thread_waits_for_the_host_and_never_for_a_device():
    reducer = GradientReducer(Group(), overlap=True)
    on_cpu, on_cuda = [bucket(True) for _ in range(3)], [bucket(False) for _ in range(3)]
    reducer.extend([on_cuda[0], on_cpu[0], on_cuda[1]])
    reducer.extend([on_cpu[1], on_cuda[2], on_cpu[2]])
    places = [{id(b.reduction.in_order) for b in buckets} for buckets in (on_cpu, on_cuda)]
    assert [len(place) for place in places] == [1, 1]
    assert places[0] != places[1]

"""Ways of our own between the ranks, besides what the user sends in their process groups."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from .collectives import LANES, most
from .groups import FIRST_CHANNEL, Group

_channels = [FIRST_CHANNEL]
_numbers = [0]
_backgrounds: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = (
    weakref.WeakKeyDictionary()
)


def open_channel(group: Group) -> Group:
    """The same ranks with a channel of their own. Collective.

    Pairwise messages are kept apart by their tag (`collectives._Lane`). Native
    collectives have no tags: they get a process group of their own, so that the user's
    collectives between backward and step never pair with ours, whichever of ours a rank has
    started by then. For the same reason what ranks agree on goes another way than the
    reductions that some of them have started: over the CPU, by a gloo group of our own where
    theirs has none.
    """
    agreed = most(group, _channels[0])
    _channels[0] = agreed + LANES
    replicas = None if group.replicas is None else _own_communicator(group.replicas)
    return replace(_own_communicator(group), channel=agreed, replicas=replicas)


def open_background(group: Group) -> Group:
    """The same ranks over a gloo group, apart from what goes on in training. Collective.

    It is made once for a process group: making one costs a round over the store.
    """
    if group.process_group is None:
        return group
    if group.process_group not in _backgrounds:
        _backgrounds[group.process_group] = _new_group(group, "gloo")
    return replace(group, process_group=_backgrounds[group.process_group], control=None)


def _own_communicator(group: Group) -> Group:
    """The same ranks for native collectives of our own."""
    if group.process_group is None or set(group.backends.values()) == {"gloo"}:
        return group
    own = _new_group(group, dist.get_backend_config(group.process_group))
    control = None if "cpu" in group.backends else _new_group(group, "gloo")
    return replace(group, process_group=own, control=control)


def _new_group(group: Group, backend: str) -> dist.ProcessGroup:
    """A process group of the same ranks in the same order, as patient as theirs. Collective."""
    assert group.process_group is not None
    ranks = dist.get_process_group_ranks(group.process_group)
    # torch 2.8, which has no such argument, has no groups in another order either.
    order: dict[str, Any] = {} if ranks == sorted(ranks) else {"sort_ranks": False}
    _numbers[0] = most(group, _numbers[0]) + 1  # of each rank's groups no two have the same
    with _named(f"adadelta_dist/{_numbers[0]}/{ranks[0]}"), _by_its_members_alone():
        own: dist.ProcessGroup = dist.new_group(
            ranks,
            timeout=_timeout(group),
            backend=backend,
            use_local_synchronization=True,
            **order,
        )
    return own


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Have torch give the next group this name.

    It would name one that its members alone make by its ranks and by how many groups the process
    is in. Ranks in other groups besides would never meet; and once a group is destroyed, the
    name of an older one would come again.
    """
    module: Any = distributed_c10d
    before = module._process_group_name
    module._process_group_name = lambda *_, **__: name
    try:
        yield
    finally:
        module._process_group_name = before


@contextmanager
def _by_its_members_alone() -> Iterator[None]:
    """Have no communicator split off the default group's, which all of its ranks would have to do.

    torch does so where `init_process_group` got a `device_id`.
    """
    default = dist.group.WORLD
    assert default is not None
    bound, default.bound_device_id = default.bound_device_id, None
    try:
        yield
    finally:
        default.bound_device_id = bound


def _timeout(group: Group) -> timedelta | None:
    """How long the process group waits for a rank; None: its backend does not say."""
    assert group.process_group is not None
    timeouts = []
    for device in group.backends:
        options = getattr(group.process_group._get_backend(torch.device(device)), "options", None)
        if options is not None:
            timeouts.append(options._timeout)
    return max(timeouts, default=None)

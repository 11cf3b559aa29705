"""Ways of our own between the ranks, besides what the user sends in their process groups."""

import weakref
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from .collectives import LANES, most
from .groups import FIRST_CHANNEL, Group

_channels = [FIRST_CHANNEL]
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
    timeout = _timeout(group)
    # torch names a group that only its members make by its ranks and by how many groups this
    # process is in already. Ranks that are not in equally many would never meet.
    count = len(distributed_c10d._world.pg_names)
    for _ in range(most(group, count) - count):
        _new_local_group([dist.get_rank()], "gloo", timeout)
    return _new_local_group(ranks, backend, timeout)


def _new_local_group(
    ranks: list[int], backend: str, timeout: timedelta | None
) -> dist.ProcessGroup:
    # torch 2.8, which has no such argument, has no groups in another order either.
    order: dict[str, Any] = {} if ranks == sorted(ranks) else {"sort_ranks": False}
    own: dist.ProcessGroup = dist.new_group(
        ranks, timeout=timeout, backend=backend, use_local_synchronization=True, **order
    )
    return own


def _timeout(group: Group) -> timedelta | None:
    """How long the process group waits for a rank; None: its backend does not say."""
    assert group.process_group is not None
    timeouts = []
    for device in group.backends:
        options = getattr(group.process_group._get_backend(torch.device(device)), "options", None)
        if options is not None:
            timeouts.append(options._timeout)
    return max(timeouts, default=None)

"""What DistributedDataParallel does for a module beside its gradients: rank 0's values on all."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from adadelta_dist import collectives, groups
from adadelta_dist.agreement import agreement
from adadelta_dist.groups import Group


def broadcast_module_(group: Group, module: nn.Module, done: Iterable[Tensor] = ()) -> None:
    """Give parameters and buffers rank 0's values. Collective.

    Args:
        done: parameters that have them already.

    Raises:
        RankError: another rank has another module.
    """
    names = _ignored(module)
    skip = set(done)
    left = {name: p for name, p in module.named_parameters() if name not in names and p not in skip}
    buffers = {name: b for name, b in module.named_buffers() if name not in names}
    with agreement(group, "broadcast of the module") as mine:
        mine.facts.extend(
            f"{name}: {tuple(t.shape)}, {t.dtype}"
            for name, t in chain(left.items(), buffers.items())
        )
    for p in left.values():  # one by one: these may be large
        broadcast_([p], group)
    broadcast_(buffers.values(), group)


@dataclass
class BufferBroadcast:
    """When buffers get rank 0's values: before the forward that follows a synced one.

    Args:
        enabled: whether they do at all.
    """

    enabled: bool
    _differ: bool = False

    def before_forward_(self, module: nn.Module, *, synced: bool) -> None:
        """Broadcast buffers where they may differ, in one message a device. Collective.

        Args:
            synced: gradients of this forward will be averaged.
        """
        self.before_validation_(module)
        self._differ = synced

    def before_validation_(self, module: nn.Module) -> None:
        """The same, whose forward changes no buffers: but a callback may swap others in and out.

        Collective.
        """
        if self.enabled and self._differ:
            names = _ignored(module)
            buffers = [b for name, b in module.named_buffers() if name not in names]
            broadcast_(buffers, groups.join(None))


def _ignored(module: nn.Module) -> set[str]:
    """The names that DistributedDataParallel would leave alone, too."""
    return set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))


@torch.no_grad()
def broadcast_(tensors: Iterable[Tensor], group: Group) -> None:
    """Overwrite tensors (dense, of any strides) with rank 0's. Collective."""
    if group.world_size == 1:
        return
    by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    # The largest elements first, so that each tensor's bytes start where its dtype may.
    for t in sorted(tensors, key=Tensor.element_size, reverse=True):
        by_device[t.device].append(t)
    for same in by_device.values():
        rows = [t.reshape(-1).view(torch.uint8) for t in same]
        flat = torch.cat(rows)
        collectives.broadcast(group, flat)
        for t, piece in zip(same, flat.split([len(row) for row in rows]), strict=True):
            t.copy_(piece.view(t.dtype).view(t.shape))

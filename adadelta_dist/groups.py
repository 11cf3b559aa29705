"""Who shards with whom.

A `Group` is this process's view of a process group, and perhaps of its replicas: shards lie
over the ranks of one group, and every replica has them all.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

FIRST_CHANNEL = 0xADA0000  # above the tags of a user's own point-to-point messages


@dataclass(frozen=True)
class Group:
    """A process group as seen from this rank.

    Args:
        process_group: None for a single process.
        rank: this process's rank within the group.
        world_size: number of ranks in the group.
        channel: first tag of pairwise messages, the same on all ranks and new for each
            optimizer, so that what one of them left unfinished never reaches another. The
            next tags are for what may travel besides (`collectives._Lane`).
        replicas: the ranks that own the same shard in other groups like this one.
        control: the same ranks over gloo, for messages that the host reads; None:
            `process_group` sends from the CPU itself.
    """

    process_group: dist.ProcessGroup | None = None
    rank: int = 0
    world_size: int = 1
    channel: int = FIRST_CHANNEL
    replicas: "Group | None" = None
    control: dist.ProcessGroup | None = None

    @property
    def replica(self) -> int:
        """Which of the replicas this is."""
        return 0 if self.replicas is None else self.replicas.rank

    @property
    def number(self) -> int:
        """Position of this process among the ranks of all replicas."""
        return self.replica * self.world_size + self.rank

    @property
    def sharding(self) -> "Group":
        """The ranks of this replica alone."""
        return replace(self, replicas=None)

    @property
    def control_device(self) -> torch.device:
        """Where small tensors that the host must read travel: the CPU if the group can."""
        if "cpu" in self.backends or self.control is not None:
            return torch.device("cpu")
        return torch.device(next(iter(self.backends)), torch.accelerator.current_device_index())

    @property
    def backends(self) -> dict[str, str]:
        """Backend by device type, for example {"cpu": "gloo", "cuda": "nccl"}."""
        if self.process_group is None:
            return {"cpu": "none"}
        config = dist.get_backend_config(self.process_group)
        return dict(pair.split(":") for pair in config.split(","))

    def is_pairwise(self, device: torch.device) -> bool:
        return self.backends.get(device.type) == "gloo"


def join(
    process_group: dist.ProcessGroup | None,
    replicate_group: dist.ProcessGroup | None = None,
    device_mesh: DeviceMesh | None = None,
) -> Group:
    """The group to use: the one given, else the default one, else this process alone.

    Args:
        process_group: the ranks that shard.
        replicate_group: this rank and those with its shard in other process groups.
        device_mesh: instead of both, replicas by shards; one dimension: shards alone.

    Raises:
        ValueError: this rank is not a member of a group; the groups share more than this
            rank; a mesh of another rank, or besides groups.
    """
    if device_mesh is not None:
        if process_group is not None or replicate_group is not None or device_mesh.ndim > 2:
            raise ValueError(
                f"device_mesh with {device_mesh.ndim} dimensions {device_mesh.mesh_dim_names}, "
                f"process_group={process_group}, replicate_group={replicate_group}: wanted one "
                "of 1 dimension (shards) or 2 (replicas, shards), and no groups besides. Take a "
                "slice of a larger mesh."
            )
        process_group = device_mesh.get_group(device_mesh.ndim - 1)
        replicate_group = device_mesh.get_group(0) if device_mesh.ndim == 2 else None
    if process_group is None and not (dist.is_available() and dist.is_initialized()):
        return Group()
    world = dist.group.WORLD
    assert world is not None
    group = _joined(process_group or world, "process_group")
    if replicate_group is None or replicate_group.size() == 1:
        return group
    replicas = _joined(replicate_group, "replicate_group")
    shared = sorted(_members(group) & _members(replicas))
    if len(shared) > 1 or group.world_size == 1:
        raise ValueError(
            f"process_group {sorted(_members(group))} and replicate_group "
            f"{sorted(_members(replicas))} share the ranks {shared}: wanted several ranks that "
            "shard and the ones with the same shard elsewhere, with this rank alone in both"
        )
    return replace(group, replicas=replicas)


def check_replicas(group: Group) -> None:
    """Whether all replicas of this rank own the same shard. Collective.

    Raises:
        ValueError: they are other ranks of their groups.
    """
    if group.replicas is not None:
        theirs: list[Any] = [None] * group.replicas.world_size
        mine = group.rank, group.world_size
        dist.all_gather_object(theirs, mine, group=group.replicas.process_group)
        if any(other != mine for other in theirs):
            raise ValueError(
                "replicate_group joins ranks that own other shards: (rank, world_size) within "
                f"their process groups are {theirs}, wanted the same everywhere"
            )


def _joined(group: dist.ProcessGroup, argument: str) -> Group:
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(
            f"{argument}: global rank {dist.get_rank()} is not a member of it. Build the "
            "optimizer on the group's own ranks only."
        )
    return Group(group, rank, dist.get_world_size(group))


def _members(group: Group) -> set[int]:
    assert group.process_group is not None
    return set(dist.get_process_group_ranks(group.process_group))


def check_devices(group: Group, tensors: Iterable[Tensor]) -> None:
    """Refuse what the group cannot send.

    Raises:
        ValueError: a device without a backend, or one other than the CPU on gloo.
    """
    for device in {tensor.device.type for tensor in tensors}:
        backend = group.backends.get(device)
        if group.world_size > 1 and device != "meta" and backend in (None, "gloo"):
            if device == "cpu" and backend == "gloo":
                continue
            raise ValueError(
                f"parameters on {device}, and the process group has {backend or 'no backend'} for "
                "it. Use init_process_group('cpu:gloo,cuda:nccl'), or move the model."
            )


def check_alone(group: Group) -> None:
    """Refuse to go on alone in a job of several ranks.

    Raises:
        RuntimeError: the process group was initialised after the optimizer was built.
    """
    alone = group.process_group is None and dist.is_available() and dist.is_initialized()
    if alone and dist.get_world_size() > 1:
        raise RuntimeError(
            "ShardedAdadelta was built before init_process_group, so it would train on rank "
            f"{dist.get_rank()} alone. Build it afterwards (or, to be alone on purpose, with a "
            "process_group of this one rank)."
        )

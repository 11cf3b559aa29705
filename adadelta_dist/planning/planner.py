"""What training will cost, before anything is allocated or sent.

A *cost* is what one rank holds at its peak, by kind, and what it sends in one step. That of
`ShardedAdadelta` comes from the layout that it would have, padding included; the formulas are
those of docs/design.md ("Memory per rank"). Activations, the framework's own memory, and the
small messages by which ranks agree (some bytes a parameter) come on top.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ..layout import Bucket, ParamSpec, bucket_limit, plan_layout
from ..policy import ShardPolicy
from ..precision import Precision, precision_of
from ..reduction import PIECE_NUMEL, PIECES_ON_THEIR_WAY
from .model_plan import ModelPlan

KINDS = (
    "parameters",
    "gradients",
    "averaged gradients",
    "accumulators",
    "masters",
    "in flight",
)
"""Of memory. In flight: what is being sent or received, and the gradient just made."""


@dataclass(frozen=True)
class Cluster:
    """The ranks of a job, and what joins them.

    Args:
        world_size: ranks in all.
        replicas: how many groups of ranks hold the same shards (hybrid sharding); each is of
            `world_size / replicas` neighbours.
        ranks_per_host: neighbours that share a host.
        backend: "nccl": collectives of the backend, in rings that cross each border between
            hosts once. "gloo": `ShardedAdadelta` exchanges shards pairwise.
        within_gbit: what one rank sends within its host, Gbit/s.
        between_gbit: what one host sends to the others, Gbit/s.

    Raises:
        ValueError: numbers that do not go together.
    """

    world_size: int
    replicas: int = 1
    ranks_per_host: int = 8
    backend: Literal["nccl", "gloo"] = "nccl"
    within_gbit: float = 2400.0
    between_gbit: float = 400.0

    def __post_init__(self) -> None:
        for name in ("world_size", "replicas", "ranks_per_host", "within_gbit", "between_gbit"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.backend not in ("nccl", "gloo"):
            raise ValueError(f"backend must be 'nccl' or 'gloo', got {self.backend!r}")
        if self.replicas > 1 and (self.world_size % self.replicas or self.shards < 2):
            raise ValueError(
                f"replicas={self.replicas} of world_size={self.world_size}: wanted a divisor that "
                "leaves at least 2 ranks to shard over"
            )

    @property
    def shards(self) -> int:
        """Ranks of one replica."""
        return self.world_size // self.replicas


@dataclass(frozen=True)
class Traffic:
    """What is sent in a step.

    Args:
        sent: bytes that leave one rank.
        crossing: bytes that leave one host for others.
        seconds: as long as the slower of the links takes; no latency, and no overlap with
            computation.
    """

    sent: float = 0.0
    crossing: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.sent + other.sent, self.crossing + other.crossing, self.seconds + other.seconds
        )


@dataclass(frozen=True)
class Cost:
    """What one rank pays.

    Args:
        peer: who asks for it.
        memory: bytes by kind (`KINDS`) at the peak of a step; 0 where a kind is missing.
        traffic: of one step.
        balance: the largest share of the sharded state over the mean; None: nothing is sharded.
        source: where the formula comes from.
    """

    peer: str
    memory: Mapping[str, float]
    traffic: Traffic
    balance: float | None
    source: str

    @property
    def peak(self) -> float:
        """Bytes of all kinds together."""
        return sum(self.memory.values())


def exchange(cluster: Cluster, nbytes: float, *, pairwise: bool = False) -> Traffic:
    """One reduce-scatter, all-gather or ring of broadcasts among the ranks of a replica.

    Args:
        nbytes: of the whole; each rank sends all but one share of it.
        pairwise: every rank sends to every other, rather than to its neighbour.
    """
    ranks, local = cluster.shards, min(cluster.shards, cluster.ranks_per_host)
    sent = nbytes * (ranks - 1) / ranks
    crossing = sent if ranks > local else 0.0
    if pairwise:
        crossing = local * nbytes * (ranks - local) / ranks
    return _traffic(cluster, sent, crossing)


def replicate(cluster: Cluster, nbytes: float) -> Traffic:
    """One all-reduce of a shard of `nbytes` over its replicas."""
    sent = 2 * nbytes * (cluster.replicas - 1) / cluster.replicas
    borders = cluster.world_size > cluster.ranks_per_host
    return _traffic(cluster, sent, borders * sent * min(cluster.shards, cluster.ranks_per_host))


def _traffic(cluster: Cluster, sent: float, crossing: float) -> Traffic:
    within, between = sent / cluster.within_gbit, crossing / cluster.between_gbit
    return Traffic(sent, crossing, 8e-9 * max(within, between))


def layout_of(model: ModelPlan, world_size: int, policy: ShardPolicy) -> tuple[Bucket, ...]:
    """The buckets of `ShardedAdadelta` with all parameters in one group; kinds are (dtype,)."""
    specs = [
        ParamSpec(p.numel * (1 + p.dtype.is_complex), p.dtype.to_real().itemsize, (p.dtype,))
        for p in model.parameters
    ]
    return plan_layout(specs, world_size, bucket_limit(policy.bucket_mb, world_size))


def sharded(model: ModelPlan, cluster: Cluster, policy: ShardPolicy = ShardPolicy()) -> Cost:
    """The cost of `ShardedAdadelta`.

    Raises:
        ValueError: the policy means nothing for these parameters.
    """
    buckets = [
        _BucketCost(bucket, precision_of(policy, bucket.kind[0]))
        for bucket in layout_of(model, cluster.shards, policy)
    ]
    whole = sum(bucket.whole for bucket in buckets)
    averages = sum(bucket.average for bucket in buckets)
    alone = cluster.shards == 1 and policy.stage == 1 and policy.gradients == "local"
    gradients, in_flight = _passing(buckets, cluster, policy)
    memory = {
        "parameters": whole + model.frozen_bytes,
        "gradients": gradients,
        "averaged gradients": 0 if alone else averages,
        "accumulators": sum(bucket.accumulators for bucket in buckets),
        "masters": sum(bucket.average for bucket in buckets if bucket.precision.has_master),
        "in flight": in_flight,
    }
    pairwise = cluster.backend == "gloo"
    reduced = sum(bucket.at(bucket.precision.reduce.itemsize) for bucket in buckets)
    gathered = sum(bucket.at(bucket.precision.gather.itemsize) for bucket in buckets)
    traffic = exchange(cluster, gathered, pairwise=pairwise)
    if policy.gradients == "averaged":  # by DistributedDataParallel
        traffic += exchange(cluster, 2 * model.nbytes)
    else:
        traffic += exchange(cluster, reduced, pairwise=pairwise)
    traffic += replicate(cluster, averages)
    balance = whole / model.nbytes if cluster.shards > 1 and model.nbytes else None
    name = f"ShardedAdadelta stage {policy.stage}"
    return Cost(name, memory, traffic, balance, "this package: docs/design.md, Memory per rank")


@dataclass(frozen=True)
class _BucketCost:
    """Bytes of one bucket."""

    plan: Bucket
    precision: Precision

    @property
    def itemsize(self) -> int:
        return int(self.plan.kind[0].to_real().itemsize)

    def at(self, itemsize: int) -> int:
        return self.plan.numel * itemsize

    @property
    def whole(self) -> int:
        return self.at(self.itemsize)

    @property
    def largest(self) -> int:
        """The largest gradient."""
        return max(slot.numel for slot in self.plan.slots) * self.itemsize

    @property
    def average(self) -> int:
        return self.plan.shard_numel * self.precision.compute.itemsize

    @property
    def accumulators(self) -> int:
        return 2 * self.plan.shard_numel * self.precision.state.itemsize

    def reducing(self, stage: int, *, pairwise: bool) -> int:
        """What a reduction takes beside the gradients and this rank's shard of averages.

        Copies where they are not sent as they are; where they arrive, if not in the shard itself;
        at stage 2 their average, before it is added. Pairwise it goes piece by piece.
        """
        reduce, world_size = self.precision.reduce, self.plan.numel // self.plan.shard_numel
        numel = self.plan.numel
        if pairwise and world_size > 1:
            numel = min(numel, PIECES_ON_THEIR_WAY * PIECE_NUMEL)
        shard = numel // world_size
        average = shard * self.precision.compute.itemsize if stage == 2 else 0
        if world_size == 1:
            return average
        copied = 0 if reduce == self.plan.kind[0].to_real() else numel
        is_exact = reduce == self.precision.compute  # then a row arrives where its average goes
        received = (numel - shard if pairwise else shard) - shard * is_exact
        return (copied + received) * reduce.itemsize + average

    def gathering(self) -> int:
        """Where parameters travel in another dtype than their own."""
        gather = self.precision.gather
        return self.at(gather.itemsize) if gather != self.plan.kind[0].to_real() else 0


def _passing(buckets: list[_BucketCost], cluster: Cluster, policy: ShardPolicy) -> tuple[int, int]:
    """Bytes of gradients, and of what is in flight, at the peak.

    Buckets fill one after the other, in each the gradient that autograd has just made beside
    them. At stage 2 one that is full travels, and is freed. At stage 1 those that are full
    travel one after the other if pairwise, all at once by native collectives.
    """
    pairwise = cluster.backend == "gloo"
    at_once = len(buckets) if policy.overlap_gather else 3
    gathers = [b.gathering() for b in buckets]
    gathering = max((sum(gathers[i : i + at_once]) for i in range(len(gathers))), default=0)
    whole, travelling, peaks = sum(b.whole for b in buckets), 0, [(0, 0)]
    for bucket in buckets:
        reducing = bucket.reducing(policy.stage, pairwise=pairwise)
        if policy.stage == 2:
            peaks.append((bucket.whole, bucket.largest + travelling))
            travelling = bucket.whole + reducing
        else:
            if policy.gradients == "local":
                travelling = max(travelling, reducing) if pairwise else travelling + reducing
            peaks.append((whole, bucket.largest + travelling))
    gradients, in_flight = max(peaks, key=sum)
    return gradients, max(in_flight, gathering)


def smallest_world_size(
    cost: Callable[[Cluster], Cost], cluster: Cluster, limit_bytes: float, most: int = 2**16
) -> int | None:
    """The smallest world size whose peak fits; None: not even `most` ranks are enough.

    Peaks fall with the world size, but for padding, so that a smaller one may fit by chance
    within a fraction of a percent of the limit.

    Args:
        cost: of a peer, on a cluster.
        cluster: its replicas and hosts; its world size does not count.
        limit_bytes: what one rank has, activations not included.
    """

    def fits(shards: int) -> bool:
        size = shards * cluster.replicas
        return cost(replace(cluster, world_size=size)).peak <= limit_bytes

    first = 1 if cluster.replicas == 1 else 2
    high = first
    while not fits(high):
        high *= 2
        if high * cluster.replicas > most:
            return None
    low = max(first - 1, high // 2)  # the last that does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high * cluster.replicas

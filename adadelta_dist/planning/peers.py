"""What the peers of `ShardedAdadelta` cost, by their documented formulas.

All keep Adadelta's two accumulators. torch's own keep everything in the parameters' dtype,
without masters; DeepSpeed keeps accumulators and masters in fp32. Each is taken at its most
frugal documented setting: `gradient_as_bucket_view=True`, `foreach=False`,
`reshard_after_forward=True`, blocks wrapped one by one.
"""

import heapq
from collections.abc import Callable
from dataclasses import replace
from math import prod

from .model_plan import ModelPlan
from .planner import Cluster, Cost, Traffic, exchange, replicate

_DEEPSPEED_BUCKET_NUMEL = 5 * 10**8
_FP32_BYTES = 4


def ddp(model: ModelPlan, cluster: Cluster) -> Cost:
    """`DistributedDataParallel` and `torch.optim.Adadelta`: everything on every rank."""
    memory = {
        "parameters": model.nbytes + model.frozen_bytes,
        "gradients": model.nbytes,
        "accumulators": 2 * model.nbytes,
        "in flight": model.largest_bytes,
    }
    source = (
        "torch docs, DistributedDataParallel: an all-reduce sends 2 (N-1)/N, and gradients are "
        "views of its buckets"
    )
    return Cost("DDP", memory, _all_reduce(model, cluster), None, source)


def zero_redundancy(model: ModelPlan, cluster: Cluster) -> Cost:
    """DDP and `ZeroRedundancyOptimizer`: whole parameters, the next largest to who has least."""
    # (elements, bytes) by rank; more ranks than parameters get nothing
    held = [(0, 0)] * min(cluster.world_size, max(1, len(model.parameters)))
    for p in sorted(model.parameters, key=lambda p: -p.numel):
        numel, nbytes = held[0]
        heapq.heapreplace(held, (numel + p.numel, nbytes + p.nbytes))
    largest = max(nbytes for _, nbytes in held)
    memory = {
        "parameters": model.nbytes + model.frozen_bytes,
        "gradients": model.nbytes,
        "accumulators": 2 * largest,
        "in flight": model.largest_bytes,
    }
    traffic = _all_reduce(model, cluster) + _exchange(cluster, model.nbytes)
    source = (
        "torch docs, ZeroRedundancyOptimizer: sorted-greedy over whole parameters, each broadcast "
        "by its owner after DDP's all-reduce"
    )
    balance = _balance(largest, model, cluster.world_size)
    return Cost("ZeroRedundancyOptimizer", memory, traffic, balance, source)


def fsdp2(model: ModelPlan, cluster: Cluster) -> Cost:
    """`fully_shard` by block and `torch.optim.Adadelta`: rows of each parameter on each rank."""
    share = sum(
        -(-p.shape[0] // cluster.shards) * prod(p.shape[1:]) * p.dtype.itemsize
        if p.shape
        else p.nbytes
        for p in model.parameters
    )
    memory = {
        "parameters": share + model.frozen_bytes / cluster.shards,
        "gradients": share,
        "accumulators": 2 * share,
        # One block computes while the next is gathered; its gradients, and those in reduction.
        "in flight": 4 * model.block_bytes if cluster.shards > 1 else model.largest_bytes,
    }
    traffic = exchange(cluster, 3 * model.nbytes) + replicate(cluster, share)
    source = (
        "torch docs, fully_shard and FSDP notes: dim-0 shards, all-gathers in forward and backward "
        "that are one block ahead, a reduce-scatter"
    )
    balance = _balance(share, model, cluster.shards)
    return Cost("FSDP2", memory, traffic, balance, source)


def deepspeed(stage: int) -> Callable[[ModelPlan, Cluster], Cost]:
    """The cost of DeepSpeed at ZeRO stage 1, 2 or 3."""

    def cost(model: ModelPlan, cluster: Cluster) -> Cost:
        ranks = cluster.world_size
        share = model.numel * _FP32_BYTES / ranks
        itemsize = model.nbytes / max(1, model.numel)
        bucket = min(model.numel, _DEEPSPEED_BUCKET_NUMEL) * itemsize
        block = 2 * model.block_bytes if stage == 3 else 0
        whole = model.nbytes + model.frozen_bytes
        memory = {
            "parameters": whole / ranks if stage == 3 else whole,
            "gradients": model.nbytes if stage == 1 else model.nbytes / ranks,
            "averaged gradients": share,
            "accumulators": 2 * share,
            "masters": share,
            # Freed before the step makes fp32 gradients.
            "in flight": max(0, bucket + block + model.largest_bytes - share),
        }
        source = (
            "Rajbhandari et al. 2020, ZeRO, sections 5 and 7 (K = 12 for Adadelta as for Adam); "
            "DeepSpeed's memory estimators (fp32 gradients of the share, 2 x the largest layer at "
            "stage 3) and reduce_bucket_size 5e8"
        )
        traffic = _exchange(cluster, (3 if stage == 3 else 2) * model.nbytes)
        return Cost(f"DeepSpeed ZeRO-{stage}", memory, traffic, 1.0 if ranks > 1 else None, source)

    return cost


PEERS: tuple[Callable[[ModelPlan, Cluster], Cost], ...] = (
    ddp,
    zero_redundancy,
    *map(deepspeed, (1, 2, 3)),
    fsdp2,
)


def _exchange(cluster: Cluster, nbytes: float) -> Traffic:
    """Over all ranks: these peers know no replicas."""
    return exchange(replace(cluster, replicas=1), nbytes)


def _all_reduce(model: ModelPlan, cluster: Cluster) -> Traffic:
    return _exchange(cluster, 2 * model.nbytes)


def _balance(largest: float, model: ModelPlan, ranks: int) -> float | None:
    return largest * ranks / model.nbytes if model.nbytes and ranks > 1 else None

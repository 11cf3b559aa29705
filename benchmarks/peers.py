"""Who is measured: each way of training with Adadelta on several ranks, at its best settings.

A peer turns a model, equal on all ranks, into a `Setup` that can make iterations: forward,
backward, step, gradients dropped.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from adadelta_dist import Adadelta, ShardedAdadelta, ShardPolicy, collectives, communicators, groups

from .tasks import Batch, blocks, loss_of


@dataclass(frozen=True)
class Setup:
    """A peer that is ready to train.

    Args:
        model: what it trains; the engine, if the peer is DeepSpeed.
        iterate: one iteration.
        optimizer: None for what only serves to compare with.
        finish: waits for what an iteration has left under way.
    """

    model: nn.Module
    iterate: Callable[[Batch], None]
    optimizer: Any = None
    finish: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Peer:
    """A way of training.

    Args:
        name: as in the tables.
        build: makes it of a model. Collective.
        settings: what it was given beyond its defaults, and why.
        role: "ours", "theirs", or a "yardstick" that trains nothing.
    """

    name: str
    build: Callable[[nn.Module], Setup] = field(compare=False)  # which pickling makes anew
    settings: str = ""
    role: Literal["ours", "theirs", "yardstick"] = "theirs"


DEEPSPEED_BUCKET = 5_000_000
"""Elements."""


class UnsupportedError(Exception):
    """A peer cannot train this model."""


def _training(model: nn.Module, optimizer: torch.optim.Optimizer) -> Setup:
    def iterate(batch: Batch) -> None:
        loss_of(model(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Setup(model, iterate, optimizer)


def _alone(model: nn.Module) -> Setup:
    def iterate(batch: Batch) -> None:
        loss_of(model(batch[0]), batch[1]).backward()
        model.zero_grad()

    return Setup(model, iterate)


def _bare_collectives(model: nn.Module) -> Setup:
    """Reduce-scatter and all-gather of as many bytes, in whatever number of pieces is fastest."""
    group = communicators.open_channel(groups.join(None))
    numel = sum(p.numel() for p in model.parameters())
    flats = torch.zeros(-(-numel // (64 * group.world_size)) * 64 * group.world_size)
    shards = torch.empty(flats.numel() // group.world_size)

    def exchange(pieces: int) -> None:
        parts = flats.view(pieces, -1)
        reductions = [
            collectives.reduce_scatter(group, flat, shard)
            for flat, shard in zip(parts, shards.view(pieces, -1), strict=True)
        ]
        gathers = []
        for flat, reduction in zip(parts, reductions, strict=True):
            reduction.wait()
            gathers.append(collectives.all_gather(group, flat))
        for gather in gathers:
            gather.wait()

    def seconds(pieces: int) -> float:
        dist.barrier()
        start = time.perf_counter()
        exchange(pieces)
        dist.barrier()
        return time.perf_counter() - start

    choices = (1, 2, 4, 8, 16)
    times = torch.tensor([[seconds(pieces) for pieces in choices] for _ in range(3)])
    best = times.min(0).values
    dist.all_reduce(best, dist.ReduceOp.MAX)
    pieces = choices[int(best.argmin())]
    return Setup(model, lambda _: exchange(pieces))


def _ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)


def _ddp_with(optimizer: type[torch.optim.Optimizer], model: nn.Module) -> Setup:
    return _training(_ddp(model), optimizer(model.parameters()))


def _zero_redundancy(model: nn.Module) -> Setup:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns where it is imported

    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=torch.optim.Adadelta, parameters_as_bucket_view=True
    )
    return _training(_ddp(model), optimizer)


def _fsdp2(reshard: bool, model: nn.Module) -> Setup:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in [*blocks(model), model]:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    return _training(model, torch.optim.Adadelta(model.parameters()))


def sharded(policy: ShardPolicy, model: nn.Module, **options: Any) -> Setup:
    """Ours, with options of `ShardedAdadelta`. Collective."""
    attention = any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    if policy.overlap_gather and attention:
        raise UnsupportedError(
            "nn.MultiheadAttention reads the weight of its output projection without calling that "
            "module, so nothing would wait for it"
        )
    optimizer = ShardedAdadelta(model.parameters(), policy=policy, **options)
    setup = _training(model, optimizer)
    if not policy.overlap_gather:
        return setup
    optimizer.attach(model)
    return replace(setup, finish=optimizer.wait)


def _hybrid(model: nn.Module) -> Setup:
    per_host = int(os.environ["LOCAL_WORLD_SIZE"])
    mesh = init_device_mesh("cpu", (dist.get_world_size() // per_host, per_host))
    return sharded(ShardPolicy(), model, device_mesh=mesh)


def deepspeed_engine(model: nn.Module, stage: int, kind: str = "Adadelta", **zero: Any) -> Any:
    """DeepSpeed's engine around a model, with an optimizer by name. Collective."""
    import deepspeed

    from adadelta_dist.strategies.deepspeed import initialize

    deepspeed.utils.logger.setLevel("ERROR")
    config = {
        "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own counts alone
        "gradient_clipping": 0.0,
        "optimizer": {"type": kind, "params": {"lr": 1.0, "rho": 0.9}},
        "zero_optimization": {"stage": stage, **zero},
        "zero_allow_untested_optimizer": True,
    }
    return initialize(model=model, config=config)[0]


def _deepspeed(stage: int, model: nn.Module) -> Setup:
    buckets = {"reduce_bucket_size": DEEPSPEED_BUCKET, "allgather_bucket_size": DEEPSPEED_BUCKET}
    engine = deepspeed_engine(model, stage, **buckets)

    def iterate(batch: Batch) -> None:
        engine.backward(loss_of(engine(batch[0]), batch[1]))
        engine.step()

    return Setup(engine, iterate, engine.optimizer)


def _ours(name: str, settings: str = "", **policy: Any) -> Peer:
    title = "ShardedAdadelta" + (f", {name}" if name else "")
    return Peer(title, partial(sharded, ShardPolicy(**policy)), settings, "ours")


ALONE = Peer("forward + backward alone", _alone, role="yardstick")
COLLECTIVES = Peer(
    "bare collectives alone",
    _bare_collectives,
    "as many bytes as ShardedAdadelta, by its own exchange, in 1 to 16 pieces, the fastest number",
    "yardstick",
)
OURS = _ours("", "its defaults: stage 1, overlap")
DDP = Peer(
    "DDP + torch.optim.Adadelta",
    partial(_ddp_with, torch.optim.Adadelta),
    "gradient_as_bucket_view=True, static_graph=True, buckets of 25 MiB (its default)",
)
ZERO_REDUNDANCY = Peer(
    "ZeroRedundancyOptimizer",
    _zero_redundancy,
    "under DDP as above; parameters_as_bucket_view=True. overlap_with_ddp refuses gloo",
)
FSDP2 = Peer(
    "FSDP2 + torch.optim.Adadelta",
    partial(_fsdp2, False),
    "torch.optim.Adadelta; fully_shard of each layer and of the model, "
    "reshard_after_forward=False, which gathers parameters once an iteration",
)
DEEPSPEED = [
    Peer(
        f"DeepSpeed ZeRO-{stage}",
        partial(_deepspeed, stage),
        'torch\'s "Adadelta", gradient_clipping 0, buckets of 5e6 elements, which are faster here '
        "than its default of 5e8; overlap_comm gained nothing on CPUs",
    )
    for stage in (1, 2, 3)
]

PEERS = [
    OURS,
    ALONE,
    COLLECTIVES,
    _ours("overlap=False", overlap=False),
    _ours("overlap_gather", overlap_gather=True),
    _ours("stage 2", stage=2),
    _ours("stage 2, overlap_gather", stage=2, overlap_gather=True),
    DDP,
    Peer("DDP + adadelta_dist.Adadelta", partial(_ddp_with, Adadelta), "DDP as above", "ours"),
    ZERO_REDUNDANCY,
    FSDP2,
    Peer(
        "FSDP2, resharding",
        partial(_fsdp2, True),
        "reshard_after_forward=True (its default): less memory, parameters gathered twice",
    ),
    *DEEPSPEED,
]
"""All peers of an iteration on one machine."""

_HALF = {"reduce_dtype": torch.bfloat16, "gather_dtype": torch.bfloat16}
BF16_WIRE = [
    _ours("bf16 on the wire", "reduce_dtype and gather_dtype bfloat16, exact masters", **_HALF),
    _ours("bf16 on the wire, overlap_gather", overlap_gather=True, **_HALF),
]
HYBRID = Peer(
    "ShardedAdadelta, hybrid", _hybrid, "sharded within a host, replicated across", "ours"
)

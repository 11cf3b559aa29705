"""`ShardedAdadelta` at world sizes that no test machine has, without memory or wires.

    python -m benchmarks.scale
    python -m benchmarks.scale --quick --json

Parameters are on the meta device, and torch's fake process group answers every collective.
What is allocated and what is sent is counted as it happens, and compared with the plan
(`adadelta_dist.planning.planner`). The backend is like NCCL: it has collectives of its own.
"""

import argparse
import json
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adadelta_dist import ShardedAdadelta, ShardPolicy
from adadelta_dist.planning.model_plan import from_module
from adadelta_dist.planning.planner import Cluster, Cost, layout_of, sharded


@dataclass(frozen=True)
class Shape:
    """A decoder as Llama's are.

    Args:
        blocks, width, hidden, heads, kv_heads, words: their number; the vector of a word and
            that within a block; heads of queries, and of keys and values; the vocabulary.
    """

    name: str
    blocks: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    words: int


SMALL = Shape("50 M", 4, 1024, 2752, 16, 8, 1000)
LLAMA_8B = Shape("8 B", 32, 4096, 14336, 32, 8, 128256)
LLAMA_70B = Shape("70 B", 80, 8192, 28672, 64, 8, 128256)


class Block(nn.Module):
    """The parameters of a block, in the order of their use.

    Attention itself has none, and is left out.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, narrow = shape.width, shape.width * shape.kv_heads // shape.heads
        self.before = nn.RMSNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, narrow, bias=False) for _ in range(2))
        self.o = nn.Linear(width, width, bias=False)
        self.between = nn.RMSNorm(width)
        self.gate, self.up = (nn.Linear(width, shape.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        x = x + self.o(self.q(y) * (self.k(y) * self.v(y)).sum(-1, keepdim=True))
        y = self.between(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def decoder(shape: Shape, dtype: torch.dtype) -> nn.Module:
    """On the meta device."""
    with torch.device("meta"):
        blocks = [Block(shape) for _ in range(shape.blocks)]
        ends = nn.RMSNorm(shape.width), nn.Linear(shape.width, shape.words, bias=False)
        return nn.Sequential(nn.Embedding(shape.words, shape.width), *blocks, *ends).to(dtype)


@dataclass(frozen=True)
class Case:
    """One job to simulate."""

    shape: Shape
    world_size: int
    stage: Literal[1, 2] = 1
    replicas: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def policy(self) -> ShardPolicy:
        return ShardPolicy(stage=self.stage)


@dataclass(frozen=True)
class Found:
    """What a case took; bytes are of rank 0.

    Args:
        layout_s: of the layout alone.
        build_s, step_s: of the constructor, and of the second iteration.
        held_bytes, peak_bytes, sent_bytes: after the constructor; at the peak of the second
            iteration; in it.
        planned_held_bytes, planned_peak_bytes, planned_sent_bytes: by the plan.
        balance: the largest shard over the mean.
    """

    model: str
    numel: int
    world_size: int
    replicas: int
    stage: int
    dtype: str
    layout_s: float
    build_s: float
    step_s: float
    held_bytes: int
    planned_held_bytes: int
    peak_bytes: int
    planned_peak_bytes: int
    sent_bytes: float
    planned_sent_bytes: float
    balance: float


QUICK = (
    Case(SMALL, 64, 1),
    Case(SMALL, 64, 2),
    Case(SMALL, 64, 1, 4),
    Case(SMALL, 64, 2, 4, torch.float32),
    Case(LLAMA_8B, 4096, 2),
)
CASES = (
    *(Case(LLAMA_8B, 512, stage) for stage in (1, 2)),
    *(Case(LLAMA_70B, world_size, 2) for world_size in (64, 1024)),
    *(Case(LLAMA_70B, 4096, stage) for stage in (1, 2)),
    Case(LLAMA_70B, 4096, 2, 64),
)


class Counter(TorchDispatchMode):
    """Counts bytes of the meta device: those held now, at the peak, and sent.

    Args:
        replicas: ranks of every all-reduce.
    """

    def __init__(self, replicas: int) -> None:
        super().__init__()
        self.replicas = replicas
        self.held = self.peak = 0
        self.sent = 0.0
        self._known: set[int] = set()
        self._travelling: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count_sent(func.__name__.partition(".")[0], args)
        out = func(*args, **(kwargs or {}))
        self.hold(tree_leaves(out))
        return out

    def hold(self, tensors: Iterable[Any]) -> None:
        """Count the memory of tensors for as long as it lives."""
        for tensor in tensors:
            # A FlatSlice has the size of the whole parameter, and no memory of its own.
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "meta":
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.held += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.held)

    def _free(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.held -= nbytes

    def _count_sent(self, name: str, args: Sequence[Any]) -> None:
        tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.is_meta]
        if not tensors:  # what ranks agree on, on the CPU
            return
        # A backend keeps what it sends until it has arrived. Here that is at once: keep it until
        # the next is sent.
        self._travelling = tensors
        sizes = [t.nbytes for t in tensors]
        if name == "allreduce_":
            self.sent += 2 * sizes[0] * (self.replicas - 1) / self.replicas
        elif name in ("_reduce_scatter_base_", "_allgather_base_"):
            self.sent += max(sizes) - min(sizes)  # all but this rank's own shard
        elif name != "broadcast_":  # that of the constructor
            raise NotImplementedError(f"the bytes of {name}")


@contextmanager
def simulated(world_size: int) -> Iterator[None]:
    """Be rank 0 of so many, none of which exist."""
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    meta = torch.library.Library("aten", "IMPL", "Meta")
    # Two functions that torch lacks there. What a value is has one answer: gradients are as
    # they were when they were sent.
    meta.impl("is_set_to", _is_set_to)
    meta.impl("_local_scalar_dense", lambda _: True)
    try:
        yield
    finally:
        meta._destroy()
        dist.destroy_process_group()


def _is_set_to(a: Tensor, b: Tensor) -> bool:
    one, other = ((t.untyped_storage()._cdata, t.storage_offset()) for t in (a, b))
    return one == other and a.shape == b.shape and a.stride() == b.stride()


def simulate(case: Case) -> Found:
    """Build the optimizer of a case on rank 0, and train two iterations."""
    model, counter = decoder(case.shape, case.dtype), Counter(case.replicas)
    plan = from_module(model)
    counter.hold(model.parameters())
    cluster = Cluster(case.world_size, case.replicas)
    cost, started = sharded(plan, cluster, case.policy), time.perf_counter()
    layout_of(plan, cluster.shards, case.policy)
    layout_s = time.perf_counter() - started
    with simulated(case.world_size), counter:
        groups = {}
        if case.replicas > 1:
            groups["process_group"] = dist.new_group(range(cluster.shards))
            peers = range(0, case.world_size, cluster.shards)
            groups["replicate_group"] = dist.new_group(peers)
        started = time.perf_counter()
        optimizer = ShardedAdadelta(
            model.named_parameters(), fused=False, policy=case.policy, **groups
        )
        build_s, held = time.perf_counter() - started, counter.held
        for _ in range(2):
            counter.peak, counter.sent, started = counter.held, 0.0, time.perf_counter()
            optimizer.zero_grad()
            model(torch.zeros(1, dtype=torch.long, device="meta")).sum().backward()
            optimizer.step()
    return Found(
        model=case.shape.name,
        numel=plan.numel,
        world_size=case.world_size,
        replicas=case.replicas,
        stage=case.stage,
        dtype=str(case.dtype)[6:],
        layout_s=layout_s,
        build_s=build_s,
        step_s=time.perf_counter() - started,
        held_bytes=held,
        planned_held_bytes=_held(cost, case.stage),
        peak_bytes=counter.peak,
        planned_peak_bytes=round(cost.peak),
        sent_bytes=counter.sent,
        planned_sent_bytes=cost.traffic.sent,
        balance=cost.balance or 1.0,
    )


def _held(cost: Cost, stage: int) -> int:
    """What of a plan is there between two steps."""
    passing = ("in flight",) if stage == 1 else ("in flight", "gradients")
    return round(sum(nbytes for kind, nbytes in cost.memory.items() if kind not in passing))


HEAD = ["model", "dtype", "ranks", "stage", "layout", "build", "iteration", "held, GB"]
HEAD += ["peak, GB", "sent, GB", "largest shard / mean"]
HEADER = (HEAD, ["---"] * 4 + ["---:"] * 7)


def row(found: Found) -> list[str]:
    """A line of the table: measured, and planned behind a slash."""
    f, shards = found, found.world_size // found.replicas
    ranks = f"{f.replicas} x {shards}" if f.replicas > 1 else f"{f.world_size}"
    cells = [f.model, f.dtype, ranks, f"{f.stage}", f"{1000 * f.layout_s:.1f} ms"]
    cells += [f"{f.build_s:.1f} s", f"{f.step_s:.1f} s"]
    cells += [_pair(f.held_bytes, f.planned_held_bytes), _pair(f.peak_bytes, f.planned_peak_bytes)]
    return [*cells, _pair(f.sent_bytes, f.planned_sent_bytes), f"{f.balance:.6f}"]


def _pair(measured: float, planned: float) -> str:
    return f"{measured / 1e9:.3f} / {planned / 1e9:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few and small cases")
    parser.add_argument("--json", action="store_true", help="for scripts")
    chosen = parser.parse_args()
    cases = QUICK if chosen.quick else CASES
    if chosen.json:
        print(json.dumps([asdict(simulate(case)) for case in cases]))
        return
    for line in chain(HEADER, (row(simulate(case)) for case in cases)):
        print(f"| {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    main()

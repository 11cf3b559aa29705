"""One optimizer step in one process and one thread: what the step itself costs.

Gradients come from a real backward before the first step, so that they lie where each
optimizer wants them, and stay the same from then on. Making them is not timed.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from adadelta_dist import Adadelta, ShardedAdadelta

from .report import Table, Timing

STEP_BYTES = 28
"""Of an fp32 element: parameter, gradient and two accumulators read, all but one written."""

TORCH = ("torch.optim.Adadelta, foreach=False", "torch.optim.Adadelta, foreach=True")
COPY = f"copy, {STEP_BYTES} bytes per element"
IN_PLACE = f"multiply in place, {STEP_BYTES} bytes per element"


@dataclass(frozen=True)
class StepPlan:
    """What to measure.

    Args:
        numel: elements of all parameters together.
        counts: into how many parameters they are split.
        warmup, repetitions: steps of each peer.
    """

    numel: int = 32_000_000
    counts: tuple[int, ...] = (10, 100, 1_000, 10_000)
    warmup: int = 2
    repetitions: int = 15


QUICK = StepPlan(numel=2**16, counts=(4, 64), warmup=1, repetitions=3)


def measure(plan: StepPlan) -> list[Table]:
    """A table for each count of parameters."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps = len(plan.counts) * (plan.warmup + plan.repetitions)
        with tqdm(total=steps, desc="step", unit="repetition") as bar:
            return [_table(plan, count, bar) for count in plan.counts]
    finally:
        torch.set_num_threads(threads)


def _table(plan: StepPlan, count: int, bar: "tqdm[None]") -> Table:
    peers = _peers(plan.numel, count)
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    order = list(peers)
    for repetition in range(plan.warmup + plan.repetitions):
        for name in order:
            start = time.perf_counter()
            peers[name]()
            elapsed = time.perf_counter() - start
            if repetition >= plan.warmup:
                seconds[name].append(elapsed)
        order.append(order.pop(0))  # no peer always runs behind the same one
        bar.update()
    del peers
    gc.collect()
    timings = [
        Timing(name, times, ours="adadelta_dist" in name, yardstick=name in (COPY, IN_PLACE))
        for name, times in seconds.items()
    ]
    baseline = min((t for t in timings if t.peer in TORCH), key=lambda timing: timing.median)
    size = f"{plan.numel / 1e6:.3g} M elements"
    return Table(
        f"step: {count:,} parameters, {size}",
        f"One step, fp32, 1 process, 1 thread, {plan.repetitions} repetitions. Ratio to the "
        f"faster of the two torch paths, here {baseline.peer}.",
        timings,
        baseline.peer,
    )


def _peers(numel: int, count: int) -> dict[str, Callable[[], object]]:
    """What to run once a repetition, by name; each peer has parameters of its own."""
    coefficients = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    parts = coefficients.split(numel // count)
    loop, foreach = TORCH
    optimizers: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        loop: lambda params: torch.optim.Adadelta(params, foreach=False),
        foreach: lambda params: torch.optim.Adadelta(params, foreach=True),
        "adadelta_dist.Adadelta": Adadelta,
        "adadelta_dist.ShardedAdadelta": ShardedAdadelta,
    }
    steps = {name: _step_of(make, parts) for name, make in optimizers.items()}
    # Both read and write: 8 bytes an element of theirs. A processor may fetch what a copy
    # overwrites, which it never reads; in place, as in a step, there is nothing more to fetch.
    source = torch.ones(numel * STEP_BYTES // 8)
    target = torch.ones_like(source)
    return {**steps, COPY: lambda: target.copy_(source), IN_PLACE: lambda: target.mul_(1.0)}


def _step_of(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], parts: tuple[Tensor, ...]
) -> Callable[[], object]:
    """The step of a new optimizer over new parameters that have their gradients."""
    params = [nn.Parameter(part.clone()) for part in parts]
    optimizer = make(params)
    losses = [(p * part).sum() for p, part in zip(params, parts, strict=True)]
    torch.autograd.backward(losses)
    return optimizer.step

"""How a step's cost grows with the number of elements, of tensors, and of ranks.

In one process it is the step alone; on several ranks what an iteration takes beyond forward and
backward, which is the step with its communication.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch.distributed as dist

from . import iteration, ranks, step
from .peers import ALONE, PEERS
from .report import REFERENCE, Growth
from .step import DROP_IN, FOREACH, LOOP, role
from .tasks import Pieces

TENSORS, TENSOR_NUMEL = 10, 100
TOO_SLOW = 2.0
"""Seconds of an iteration, beyond which a peer is not tried with larger sizes."""

ALIKE = ("overlap", "bare", "resharding")
"""Of the peers that differ from another only where there is much to compute or to keep."""

STEPS = (REFERENCE, DROP_IN, LOOP, FOREACH)

Measured = Mapping[int, Mapping[str, float]]
"""Milliseconds, by size and peer."""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        numels: of `TENSORS` tensors together.
        counts: of tensors of `TENSOR_NUMEL` elements.
        world_sizes: of ranks that share `shared_numel` elements in `TENSORS` tensors.
        turns: of each peer; a third of them for the largest sizes.
    """

    numels: Sequence[int] = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
    counts: Sequence[int] = (10, 100, 1_000, 10_000, 20_000)
    world_sizes: Sequence[int] = (1, 2, 4, 8)
    shared_numel: int = 4_000_000
    turns: int = 9


QUICK = Plan((1_000, 10_000), (10, 100), (1, 2), 10_000, turns=3)


def measure(quick: bool) -> list[Growth]:
    """Charts by elements and by tensors, in one process and on two ranks; and by ranks."""
    plan = QUICK if quick else Plan()
    by_numel = {numel: Pieces(TENSORS, numel // TENSORS) for numel in plan.numels}
    by_count = {count: Pieces(count, TENSOR_NUMEL) for count in plan.counts}
    shared = Pieces(TENSORS, plan.shared_numel // TENSORS)
    grow = {"elements": by_numel, f"tensors of {TENSOR_NUMEL} elements": by_count}
    note = (
        f"fp32, ranks of 1 thread, medians. By elements, {TENSORS} tensors hold them. Peers that "
        f"take more than {TOO_SLOW:.0f} s are not tried with larger sizes; what is lost in the "
        "noise of forward + backward is blank."
    )
    charts = [
        _chart(f"{title}, by {label}", note, label, ranks.run(world_size, function, sizes, turns))
        for title, world_size, function, turns in (
            ("step alone, 1 process", 1, _steps, plan.turns),
            ("iteration beyond forward + backward, 2 ranks", 2, _overheads, plan.turns),
        )
        for label, sizes in grow.items()
    ]
    by_ranks = {n: ranks.run(n, _overheads, {n: shared}, plan.turns)[n] for n in plan.world_sizes}
    title = f"iteration beyond forward + backward, {plan.shared_numel / 1e6:.3g} M elements"
    label = f"ranks (beyond {os.cpu_count()} oversubscribed: they share that many cores)"
    return [*charts, _chart(f"{title}, by ranks", note, label, by_ranks)]


def _chart(title: str, note: str, label: str, found: Measured) -> Growth:
    names = list(dict.fromkeys(name for times in found.values() for name in times))
    lines = {n: {size: times[n] for size, times in found.items() if n in times} for n in names}
    roles = {peer.name: peer.role for peer in PEERS} | {n: role(n) for n in STEPS}
    return Growth(title, note, label, lines, roles)


def _steps(sizes: Mapping[int, Pieces], turns: int) -> Measured:
    """The step alone, of torch's optimizer and ours."""
    found: dict[int, dict[str, float]] = {}
    for size, pieces in sizes.items():
        numel = pieces.count * pieces.numel
        steps = 20 if numel < 100_000 else 1  # a turn of microseconds would be noise
        plan = step.Plan(numel, pieces.count, 1, _turns(turns, size, sizes), steps)
        taken = step.take_turns(plan, STEPS, f"growth, {size:,}")
        found[size] = {name: median(mine) for name, (mine, _) in taken.items()}
    return found


def _overheads(sizes: Mapping[int, Pieces], turns: int) -> Measured:
    """Of every peer that is still fast enough, what it takes beyond forward + backward."""
    peers = [peer for peer in PEERS if not any(word in peer.name for word in ALIKE)]
    found: dict[int, dict[str, float]] = {}
    for size, pieces in sizes.items():
        title = f"growth, {size:,}"
        taken = iteration.take_turns(pieces, peers, _turns(turns, size, sizes), 1, title).turns
        ms = {name: 1e3 * median(mine.seconds) for name, (mine, _) in taken.items()}
        alone = ms[ALONE.name]
        found[size] = {name: value - alone for name, value in ms.items() if value > alone}
        slow = [[name for name, value in ms.items() if value > 1e3 * TOO_SLOW]]
        dist.broadcast_object_list(slow, src=0)
        kept = {REFERENCE, ALONE.name}
        peers = [peer for peer in peers if peer.name not in slow[0] or peer.name in kept]
    return found


def _turns(turns: int, size: int, sizes: Mapping[int, Pieces]) -> int:
    """Fewer where a turn takes long."""
    return turns if size < max(sizes) / 10 else max(3, turns // 3)

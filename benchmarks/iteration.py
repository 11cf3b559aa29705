"""One training iteration over gloo ranks of one thread: what a step costs in its place.

Peers live in the same processes, each with its own copy of the model, and take turns. Where
memory does not take all of them at once, they come in sets, each with the reference among
them, so that every ratio is one of neighbours.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from . import ranks
from .peers import ALONE, COLLECTIVES, OURS, PEERS, Peer, Setup, UnsupportedError
from .ranks import Turns
from .report import Row, Table
from .tasks import Perceptron, Task, Transformer, numel

MIB = 2**20
PEER_BYTES = 18
"""An element's, on average: parameters, gradients, accumulators, and what is on its way."""
BOTH = "the two above, one after the other"


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        task: what is trained.
        world_size: number of ranks.
        turns: of each peer.
        iterations: of a turn; one that leaves something under way is charged for it at the end.
    """

    task: Task
    world_size: int = 2
    turns: int = 7
    iterations: int = 2


PLANS = [
    Plan(Perceptron((1024, 1152, 1152, 1152, 1000)), turns=9),
    Plan(Perceptron((1024, 3072, 3072, 3072, 1000)), turns=7),
    Plan(Perceptron((1024, 6560, 6560, 6560, 1000)), turns=3, iterations=1),
    Plan(Perceptron((1024, 3072, 3072, 3072, 1000)), world_size=4, turns=5, iterations=1),
    Plan(Transformer(256, 6), turns=7),
    Plan(Transformer(512, 8), turns=5),
    Plan(Transformer(256, 6), world_size=4, turns=5),
]
QUICK = [
    Plan(Perceptron((16, 32, 8), batch=4), turns=2, iterations=1),
    Plan(Transformer(16, 2, length=4), turns=2, iterations=1),
]


def measure(quick: bool) -> list[Table]:
    """A table for each plan, from processes of its own."""
    return [_table(plan) for plan in (QUICK if quick else PLANS)]


def _table(plan: Plan) -> Table:
    size = numel(plan.task) / 1e6
    short = f"{plan.task.name} {size:.3g} M, {plan.world_size} ranks"
    found = ranks.run(
        plan.world_size, take_turns, plan.task, PEERS, plan.turns, plan.iterations, short
    )
    least = 2 * (plan.world_size - 1) / plan.world_size * size * 4e6 / MIB
    note = (
        f"{str(plan.task).capitalize()}, fp32, {plan.world_size} gloo ranks of 1 thread on one "
        f"machine; {plan.turns} turns of {plan.iterations} iterations. Bytes are the loopback "
        f"interface's own count; 2 (N-1)/N of the parameters is {least:.3g} MiB."
    )
    return table(f"iteration: {short}", short, note, PEERS, found, plan.iterations)


def table(
    title: str,
    short: str,
    note: str,
    peers: Sequence[Peer],
    found: "Found",
    iterations: int,
    sender: str = "rank",
) -> Table:
    """What `take_turns` found, in milliseconds an iteration."""

    def milliseconds(turns: Turns) -> list[float]:
        return [1e3 * seconds / iterations for seconds in turns.seconds]

    rows = []
    for peer in peers:
        if peer.name in found.turns:
            turns, beside = found.turns[peer.name]
            sent = statistics.median(turns.sent) / found.senders / iterations / MIB
            extra = {f"MiB sent per {sender}": f"{sent:.3g}"}
            rows.append(Row(peer.name, milliseconds(turns), milliseconds(beside), peer.role, extra))
        if peer == COLLECTIVES and ALONE.name in found.turns:
            pairs = zip(*(row.values for row in rows[-2:]), strict=True)
            rows.append(Row(BOTH, [a + b for a, b in pairs], rows[-1].beside, "yardstick"))
    return Table(title, short, note, rows, skipped=found.skipped)


@dataclass(frozen=True)
class Found:
    """What the peers took.

    Args:
        turns: by peer, and those of the reference beside it.
        skipped: why, by peer.
        senders: how many ranks' bytes were counted together.
    """

    turns: dict[str, tuple[Turns, Turns]]
    skipped: dict[str, str]
    senders: int


def take_turns(
    task: Task,
    peers: Sequence[Peer],
    turns: int,
    iterations: int,
    title: str,
    interface: str = ranks.LOOPBACK,
    warmup: int = 2,
) -> Found:
    """Build the peers, as many at a time as memory takes, and let them iterate. Collective."""
    senders = dist.get_world_size() if interface == ranks.LOOPBACK else 1
    found = Found({}, {}, senders)
    batch = task.inputs(dist.get_rank())
    for together in ranks.in_sets(peers, OURS, _room(task)):
        setups: dict[str, Setup] = {}
        for peer in together:
            try:
                setups[peer.name] = peer.build(task.model())
            except UnsupportedError as reason:
                found.skipped[peer.name] = str(reason)
        calls = {name: _Turn(setup, batch, iterations) for name, setup in setups.items()}
        for call in calls.values():
            for _ in range(warmup):
                call.setup.iterate(batch)
            call.setup.finish()
        timed = ranks.alternate(calls, turns, title, interface)
        for name, taken in timed.items():
            found.turns.setdefault(name, (taken, timed[OURS.name]))
        del setups, calls, call
        ranks.release_memory()
    return found


@dataclass(frozen=True)
class _Turn:
    setup: Setup
    batch: Any
    iterations: int

    def __call__(self) -> None:
        for _ in range(self.iterations):
            self.setup.iterate(self.batch)
        self.setup.finish()


def _room(task: Task) -> int:
    """How many peers this machine's memory takes at once. Collective."""
    needed = PEER_BYTES * numel(task) * dist.get_world_size()
    room = [max(3, int(0.8 * ranks.available_bytes() / needed))]
    dist.broadcast_object_list(room, src=0)
    return room[0]

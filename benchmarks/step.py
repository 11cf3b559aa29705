"""One optimizer step in one process: what the step itself costs.

Gradients come from a real backward before the first step, so that they lie where each
optimizer wants them, and stay the same from then on. Making them is not timed. Each setting
has a process of its own, for compiled kernels keep the number of threads that they were made
with.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from tqdm import tqdm

from adadelta_dist import Adadelta, ShardedAdadelta

from . import ranks
from .report import REFERENCE, Row, Table

STEP_BYTES = 28
"""Of an fp32 element: parameter, gradient and two accumulators read, all but one written."""

PEER_BYTES = 28
"""Of an element: those four, and as much as three temporaries that torch's foreach makes."""

LOOP, FOREACH = (f"torch.optim.Adadelta, foreach={foreach}" for foreach in (False, True))
DROP_IN = "adadelta_dist.Adadelta"
COMPILED = "torch.optim.Adadelta, torch.compile"
COPY = f"copy, {STEP_BYTES} bytes per element"
IN_PLACE = f"multiply in place, {STEP_BYTES} bytes per element"
MOST_COMPILED = 100
"""Parameters; torch.compile writes code for each, and for 1,000 was not done in minutes."""

Step = Callable[[], object]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        numel: elements of all parameters together.
        count: into how many parameters they are split.
        threads: of the process.
        turns: of each peer.
        steps: of a turn.
    """

    numel: int = 32_000_000
    count: int = 10
    threads: int = 1
    turns: int = 11
    steps: int = 1


PLANS = [
    Plan(1_000_000, turns=51),
    *(Plan(count=count) for count in (10, 100, 1_000, 10_000)),
    *(Plan(count=count, threads=2) for count in (10, 1_000)),
    Plan(256_000_000, turns=3),
]
QUICK = [Plan(2**16, 4, turns=3), Plan(2**16, 200, turns=3)]


def compiled(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """As torch's documentation compiles an optimizer: the step as a whole."""
    optimizer = torch.optim.Adadelta(params, foreach=False)
    optimizer.step = torch.compile(optimizer.step, fullgraph=False)  # type: ignore[method-assign]
    return optimizer


OPTIMIZERS: Mapping[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    REFERENCE: ShardedAdadelta,
    f"{REFERENCE}, fused=False": partial(ShardedAdadelta, fused=False),
    DROP_IN: Adadelta,
    f"{DROP_IN}, fused=False": partial(Adadelta, fused=False),
    LOOP: partial(torch.optim.Adadelta, foreach=False),
    FOREACH: partial(torch.optim.Adadelta, foreach=True),
    COMPILED: compiled,
}


def role(name: str) -> str:
    if name in (COPY, IN_PLACE):
        return "yardstick"
    return "theirs" if name.startswith("torch") else "ours"


def measure(quick: bool) -> list[Table]:
    """A table for each plan."""
    plans = QUICK if quick else PLANS
    return [_table(plan) for plan in tqdm(plans, "step", unit="table", leave=False)]


def _table(plan: Plan) -> Table:
    threads = f"{plan.threads} thread{'s' * (plan.threads > 1)}"
    size = f"{plan.numel / 1e6:.3g} M"
    short = f"{size}, {plan.count:,} tensors, {threads}"
    title = f"step: {size} elements, {plan.count:,} parameters, {threads}"
    names, skipped = [*OPTIMIZERS, COPY, IN_PLACE], {}
    if plan.count > MOST_COMPILED:
        names.remove(COMPILED)
        skipped[COMPILED] = "it writes code for each parameter, which takes minutes"
    room = _room(plan)
    if room < 2:
        needed = 2 * PEER_BYTES * plan.numel / 2**30
        return Table(title, short, "", [], skipped={"all": f"it takes {needed:.0f} GiB of memory"})
    found = ranks.run(1, take_turns, plan, names, short, threads=plan.threads)
    rows = [Row(name, mine, beside, role(name)) for name, (mine, beside) in found.items()]
    copy = next(row for row in rows if row.peer == COPY)
    rows = [
        replace(row, extra={"share of copy's bandwidth": f"{copy.ratio / row.ratio:.0%}"})
        for row in rows
    ]
    sets = "all peers at once" if room >= len(rows) else f"{room} peers in memory at a time"
    note = f"One step, fp32, 1 process of {threads}, {plan.turns} turns, {sets}."
    return Table(title, short, note, rows, skipped=skipped)


def _room(plan: Plan) -> int:
    """How many peers this machine's memory takes at once."""
    return int(0.8 * ranks.available_bytes() / (PEER_BYTES * plan.numel))


def take_turns(
    plan: Plan, names: Sequence[str], title: str
) -> dict[str, tuple[list[float], list[float]]]:
    """Milliseconds a step by peer, and the reference's beside it."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for together in ranks.in_sets(names, REFERENCE, _room(plan)):
        calls = {name: _Turn(_make(name, plan), plan.steps) for name in together}
        for call in calls.values():
            call()
            call()
        taken = ranks.alternate(calls, plan.turns, title)
        ms = {n: [1e3 * s / plan.steps for s in turns.seconds] for n, turns in taken.items()}
        for name in together:
            found.setdefault(name, (ms[name], ms[REFERENCE]))
        del calls, call
        ranks.release_memory()
    return found


@dataclass(frozen=True)
class _Turn:
    step: Step
    steps: int

    def __call__(self) -> None:
        for _ in range(self.steps):
            self.step()


def _make(name: str, plan: Plan) -> Step:
    if name in (COPY, IN_PLACE):
        return (_copy if name == COPY else _in_place)(plan.numel)
    return step_of(OPTIMIZERS[name], plan.numel, plan.count)


def step_of(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], numel: int, count: int
) -> Step:
    """The step of a new optimizer over new parameters that have their gradients."""
    coefficients = torch.randn(numel // count, generator=torch.Generator().manual_seed(0))
    params = [nn.Parameter(coefficients.clone()) for _ in range(count)]
    optimizer = make(params)
    for param in params:
        (param * coefficients).sum().backward()
    return optimizer.step


# Both read and write: 8 bytes an element of theirs. A processor may fetch what a copy
# overwrites, which it never reads; in place, as in a step, there is nothing more to fetch.
def _copy(numel: int) -> Step:
    source = torch.ones(numel * STEP_BYTES // 8)
    return partial(torch.ones_like(source).copy_, source)


def _in_place(numel: int) -> Step:
    return partial(torch.ones(numel * STEP_BYTES // 8).mul_, 1.0)

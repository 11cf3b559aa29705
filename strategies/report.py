"""`ShardReport`: who owns how much of the optimizers' state."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adadelta_dist import FlatSlice, ShardedAdadelta

from .frameworks import pl
from .pieces import innermost

_ACCUMULATORS = 2


class ShardReport(pl.callbacks.Callback):
    """At the start of fit, print on rank 0 what each rank keeps, against a replicated state.

    Attributes:
        bytes_by_rank: of optimizer state, after `on_fit_start`.
        replicated_bytes: what every rank would keep with `torch.optim.Adadelta`.
    """

    def __init__(self) -> None:
        self.bytes_by_rank: list[int] = []
        self.replicated_bytes = 0

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Collect the sizes and print the table. Collective."""
        own, replicated = 0, 0
        for wrapped in trainer.optimizers:
            optimizer, partitioned = innermost(wrapped)
            all_of_it = _bytes_for(_params(wrapped, optimizer))
            own += _bytes_kept(optimizer) or all_of_it  # from the first step on
            if not partitioned or isinstance(optimizer, ShardedAdadelta):
                replicated += all_of_it
        sizes = torch.zeros(
            trainer.world_size, dtype=torch.int64, device=trainer.strategy.root_device
        )
        sizes[trainer.global_rank] = own
        self.bytes_by_rank = trainer.strategy.reduce(sizes, reduce_op="sum").tolist()
        # Where DeepSpeed holds pieces alone, the whole is what they add up to.
        self.replicated_bytes = replicated or sum(self.bytes_by_rank)
        if trainer.is_global_zero:
            print(table(self.bytes_by_rank, self.replicated_bytes), flush=True)


def table(bytes_by_rank: Sequence[int], replicated: int) -> str:
    """Lines of text: rank, bytes, share of what a replicated state takes."""
    lines = [f"{'optimizer state':<16}{'bytes':>14}  {'of replicated':>13}"]
    rows = [(f"rank {rank}", held) for rank, held in enumerate(bytes_by_rank)]
    for name, held in [*rows, ("replicated", replicated)]:
        lines.append(f"{name:<16}{held:>14,}  {held / max(replicated, 1):>13.1%}")
    return "\n".join(lines)


def _params(wrapped: Any, optimizer: Optimizer) -> list[Tensor]:
    """What this rank updates, as far as the optimizer is told before the first step."""
    # DeepSpeed's stage 3 puts its pieces into the groups during a step only.
    flat: list[Tensor] | None = getattr(wrapped, "fp32_partitioned_groups_flat", None)
    return flat or [p for group in optimizer.param_groups for p in group["params"]]


def _bytes_kept(optimizer: Optimizer) -> int:
    entries = [value for entry in optimizer.state.values() for value in entry.values()]
    kept = [value.local if isinstance(value, FlatSlice) else value for value in entries]
    return sum(value.nbytes for value in kept if isinstance(value, Tensor))


def _bytes_for(params: list[Tensor]) -> int:
    """The accumulators of these parameters, with one step each."""
    step = torch.zeros(()).nbytes
    return sum(_ACCUMULATORS * p.nbytes + step for p in params)

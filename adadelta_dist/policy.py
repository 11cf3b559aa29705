"""`ShardPolicy`: how a `ShardedAdadelta` communicates, and what it guards against."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ShardPolicy:
    """How `ShardedAdadelta` communicates; equal on every rank.

    Args:
        bucket_mb: a bucket takes parameters until it holds this much, in MiB; it is what
            one reduction and one gather carry.
        overlap: start reductions during backward, from gradient hooks.
        gradients: "local": each rank has its own, and the optimizer averages them;
            "averaged": they are equal on all ranks already (DistributedDataParallel).
        skip_nonfinite: skip a step, on all ranks, whose averaged gradients have an inf or
            NaN (`optimizer.skipped_steps` counts them). All reductions are waited for first.
    """

    bucket_mb: float = 25.0
    overlap: bool = True
    gradients: Literal["local", "averaged"] = "local"
    skip_nonfinite: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.bucket_mb < float("inf"):
            raise ValueError(f"bucket_mb must be positive and finite, got {self.bucket_mb}")
        if self.gradients not in ("local", "averaged"):
            raise ValueError(f"gradients must be 'local' or 'averaged', got {self.gradients!r}")

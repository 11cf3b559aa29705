"""`ShardPolicy`: how a `ShardedAdadelta` communicates, rounds, and what it guards against."""

from dataclasses import dataclass
from typing import Literal

import torch

_WIRE_DTYPES = (None, torch.float64, torch.float32, torch.bfloat16, torch.float16)
_STATE_DTYPES = (None, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class ShardPolicy:
    """How `ShardedAdadelta` communicates and rounds; equal on every rank.

    Args:
        bucket_mb: a bucket takes parameters until it holds this much, in MiB; it is what
            one reduction and one gather carry. With several ranks the first one takes them
            until it holds 1 MiB, so that sending begins early in backward.
        overlap: start reductions during backward, from gradient hooks.
        gradients: "local": each rank has its own, and the optimizer averages them;
            "averaged": they are equal on all ranks already (DistributedDataParallel).
        stage: of ZeRO. 1: whole gradients stay in `p.grad`; 2: each is freed once its
            bucket is reduced, during backward. `p.grad` is None then, micro-batches add up
            in the shard (`optimizer.grad_shard`), and `step` and `zero_grad` empty it.
        overlap_gather: `step` returns while updated parameters are still on their way, once
            `optimizer.attach(model)` has told which model waits for them.
        skip_nonfinite: skip a step, on all ranks, whose averaged gradients have an inf or
            NaN (`optimizer.skipped_steps` counts them). All reductions are waited for first.
        master_weights: keep fp32 masters of half-precision parameters, and exact masters of
            those that `gather_dtype` rounds: each rank its shard. None: unless
            `stochastic_rounding`.
        stochastic_rounding: round bfloat16 parameters without masters to either neighbour,
            right on average; else to the nearest, where small updates are lost.
        state_dtype: of the accumulators. None: float32 (float64 for float64 parameters).
            bfloat16 is half of that, rounded stochastically.
        reduce_dtype: in which gradients travel; they are summed in fp32 on gloo. None: the
            parameters' own.
        gather_dtype: in which updated parameters travel, narrower than their own: their
            values are rounded to it on every rank. None: the parameters' own.
    """

    bucket_mb: float = 25.0
    overlap: bool = True
    gradients: Literal["local", "averaged"] = "local"
    stage: Literal[1, 2] = 1
    overlap_gather: bool = False
    skip_nonfinite: bool = False
    master_weights: bool | None = None
    stochastic_rounding: bool = False
    state_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    gather_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not 0 < self.bucket_mb < float("inf"):
            raise ValueError(f"bucket_mb must be positive and finite, got {self.bucket_mb}")
        if self.gradients not in ("local", "averaged"):
            raise ValueError(f"gradients must be 'local' or 'averaged', got {self.gradients!r}")
        if self.stage not in (1, 2):
            raise ValueError(f"stage must be 1 or 2, got {self.stage!r}")
        if self.stage == 2 and (self.gradients == "averaged" or not self.overlap):
            raise ValueError(
                f"stage=2 with gradients={self.gradients!r}, overlap={self.overlap}: it averages "
                "gradients itself, during backward, and frees them. Use gradients='local' (without "
                "DistributedDataParallel) and overlap=True, or stage=1."
            )
        if self.master_weights and self.stochastic_rounding:
            raise ValueError(
                "master_weights=True with stochastic_rounding=True: masters make it needless. "
                "Choose one."
            )
        for name, wanted in {
            "state_dtype": _STATE_DTYPES,
            "reduce_dtype": _WIRE_DTYPES,
            "gather_dtype": _WIRE_DTYPES,
        }.items():
            if getattr(self, name) not in wanted:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(str, wanted))}, "
                    f"got {getattr(self, name)!r}"
                )

    @property
    def keeps_masters(self) -> bool:
        """Whether parameters that are rounded have masters."""
        chosen = self.master_weights
        return not self.stochastic_rounding if chosen is None else chosen

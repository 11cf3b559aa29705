"""Steps within a CUDA graph: `capturable=True`.

A replay repeats what the device did while the step was captured, and nothing that the host
did. So which gradients there are, what the ranks agreed on and hyperparameters that are
numbers stay as they were; state, `step` and a Tensor `lr` on the device go on. A step that
needs the host is refused.
"""

from collections.abc import Mapping

import torch

from .policy import ShardPolicy


def is_capturing() -> bool:
    """Whether what this thread launches goes into a CUDA graph."""
    if torch.compiler.is_compiling():  # whose own graphs are the compiler's business
        return False
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def check_capture(policy: ShardPolicy, hindrances: Mapping[str, bool]) -> None:
    """Refuse to capture what a replay would not repeat.

    Args:
        policy: of the optimizer.
        hindrances: what else may be in the way, and whether it is.

    Raises:
        RuntimeError: something is in the way.
    """
    every = {
        **hindrances,
        "stage=2, where the host takes gradients during backward": policy.stage == 2,
        "skip_nonfinite, which the host decides": policy.skip_nonfinite,
        "stochastic rounding, whose noise the host seeds": policy.stochastic_rounding
        or policy.state_dtype == torch.bfloat16,
    }
    found = [hindrance for hindrance, there in every.items() if there]
    if found:
        raise RuntimeError(
            f"ShardedAdadelta cannot be captured with {'; with '.join(found)}: a graph repeats "
            "what the device did, and the host is not asked again. Leave it out, or step outside "
            "the graph."
        )


def check_warm(what: str) -> None:
    """Refuse to do under capture what is done once, before the first replay.

    Raises:
        RuntimeError: a capture is going on.
    """
    if is_capturing():
        raise RuntimeError(
            f"{what} while a CUDA graph is captured: every replay would do it again. Take one "
            "step before the capture."
        )

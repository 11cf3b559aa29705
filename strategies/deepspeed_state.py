"""Adadelta's state under the names that DeepSpeed's universal checkpoints know."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

UNIVERSAL = {"square_avg": "exp_avg_sq", "acc_delta": "exp_avg"}
"""Adadelta's accumulators under Adam's names: at stage 3 the loader reads no others."""

GROUPS_KEY = "adadelta_groups"
"""In the first group of a universal checkpoint: the hyperparameters of all groups. The loader
of stage 3 gives the first group's to every group."""


def adopt_universal(
    groups: Sequence[dict[str, Any]], state: MutableMapping[Tensor, dict[str, Any]]
) -> None:
    """Give what DeepSpeed loaded from a universal checkpoint Adadelta's names again.

    Args:
        groups: those about to step; changed in place where they were loaded.
        state: changed in place; no tensor is copied.

    Raises:
        ValueError: the state is Adam's.
    """
    for group in groups:
        for p in group["params"]:
            entry = state.get(p)
            if entry and "exp_avg_sq" in entry:
                if "betas" in group:
                    raise ValueError(
                        "the universal checkpoint that was loaded holds Adam's state, which is not "
                        "Adadelta's. Load it with load_optimizer_states=False."
                    )
                _rename(entry)
    restore_groups(groups)


def _rename(entry: dict[str, Any]) -> None:
    for ours, theirs in UNIVERSAL.items():
        entry[ours] = entry.pop(theirs)
    # A tensor of its own: at stage 3 the loader gives the same object to every sub-group.
    entry["step"] = torch.tensor(float(entry["step"]), dtype=torch.get_default_dtype())


def restore_groups(groups: Sequence[dict[str, Any]]) -> None:
    """Give every group what it had when it was saved, where stage 3 gave it the first one's."""
    saved: Sequence[Mapping[str, Any]] | None = None
    for group in groups:
        saved = group.pop(GROUPS_KEY, saved)
    if saved is None or len(saved) != len(groups):
        return  # not loaded, or stages 1 and 2, which step one group at a time and load it right
    for group, own in zip(groups, saved, strict=True):
        for key, value in own.items():
            if group.get(key) == saved[0].get(key):  # as loaded, not set by anybody since
                group[key] = value

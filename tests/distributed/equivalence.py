"""The harness of all equivalence tests: ShardedAdadelta against torch.optim.Adadelta.

A `Case` says which parameters there are, which of them have a gradient at which step and
rank, and the hyperparameters. `experiment` trains it on the ranks; `control` trains it in
one process on gradients averaged in rank order. Tolerance: zero.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from adadelta_dist import ShardedAdadelta, ShardPolicy


@dataclass(frozen=True)
class Group:
    """A parameter group: shapes (with a memory order each) and its own hyperparameters."""

    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    transposed: bool = False


@dataclass(frozen=True)
class Case:
    """`present[step][rank][parameter]`: whether there is a gradient."""

    groups: tuple[Group, ...]
    present: tuple[tuple[tuple[bool, ...], ...], ...]
    options: dict[str, Any] = field(default_factory=dict)
    policy: ShardPolicy = field(default_factory=ShardPolicy)
    by_hand: bool = False

    @property
    def world_size(self) -> int:
        return len(self.present[0])


def parameters(case: Case) -> list[list[torch.nn.Parameter]]:
    """The same initial parameters on every rank, by group."""
    generator = torch.Generator().manual_seed(7)
    return [
        [_parameter(shape, group, generator) for shape in group.shapes] for group in case.groups
    ]


def gradient(p: Tensor, step: int, rank: int, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 100 * rank + index)
    return torch.randn(p.shape, dtype=p.dtype, generator=generator)


def experiment(rank: int, case: Case) -> tuple[list[Tensor], dict[str, Any]]:
    """Train on this rank; returns the parameters and the whole state (on rank 0)."""
    groups = parameters(case)
    optimizer = ShardedAdadelta(_grouped(case, groups), policy=case.policy, **case.options)
    for step, by_rank in enumerate(case.present):
        optimizer.zero_grad()
        losses = []
        for index, p in enumerate(p for group in groups for p in group):
            if not by_rank[rank][index]:
                continue
            grad = gradient(p, step, rank, index)
            if case.by_hand:
                p.grad = grad
            else:
                losses.append((p * grad.conj()).real.sum() if p.is_complex() else (p * grad).sum())
        if losses:
            sum(losses).backward()
        optimizer.step()
    if dist.is_initialized():
        optimizer.consolidate_state_dict(to=0)
    whole = optimizer.state_dict() if rank == 0 else {}
    return [p.detach().clone() for group in groups for p in group], whole


def control(case: Case) -> tuple[list[Tensor], dict[str, Any]]:
    """The same in one process with torch's optimizer."""
    groups = parameters(case)
    options = {key: value for key, value in case.options.items() if key != "fused"}
    optimizer = torch.optim.Adadelta(_grouped(case, groups), **options)
    for step, by_rank in enumerate(case.present):
        for index, p in enumerate(p for group in groups for p in group):
            here = [ranks[index] for ranks in by_rank]
            p.grad = averaged(p, step, index, here) if any(here) else None
        optimizer.step()
    return [p.detach().clone() for group in groups for p in group], optimizer.state_dict()


def averaged(p: Tensor, step: int, index: int, here: list[bool]) -> Tensor:
    """The mean over ranks, summed in rank order; a rank without a gradient counts as zero."""
    rows = [
        gradient(p, step, rank, index) if present else torch.zeros_like(p)
        for rank, present in enumerate(here)
    ]
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    if p.is_complex():  # a complex division would round otherwise
        return torch.view_as_complex(torch.view_as_real(total) / len(rows))
    return total / len(rows)


def assert_same(case: Case, results: list[tuple[list[Tensor], dict[str, Any]]]) -> None:
    """Bitwise: parameters on every rank, state on rank 0."""
    wanted, wanted_state = control(case)
    for rank, (params, _) in enumerate(results):
        for index, (got, want) in enumerate(zip(params, wanted, strict=True)):
            assert torch.equal(got, want), f"rank {rank}, parameter {index}: {got} != {want}"
            assert got.stride() == want.stride()
    state = results[0][1]["state"]
    for index, want in wanted_state["state"].items():
        assert state[index].keys() == want.keys()
        for key, value in want.items():
            assert torch.equal(state[index][key], value), f"{key} of parameter {index}"
    for index in state.keys() - wanted_state["state"].keys():  # never had a gradient
        assert all(not value.any() for value in state[index].values())


def _parameter(
    shape: tuple[int, ...], group: Group, generator: torch.Generator
) -> torch.nn.Parameter:
    value = torch.randn(shape, dtype=group.dtype, generator=generator)
    if group.transposed:
        value = value.permute(tuple(reversed(range(value.dim())))).contiguous()
        value = value.permute(tuple(reversed(range(value.dim()))))
    return torch.nn.Parameter(value)


def _grouped(case: Case, groups: list[list[torch.nn.Parameter]]) -> list[dict[str, Any]]:
    return [
        {"params": params, **group.options}
        for group, params in zip(case.groups, groups, strict=True)
    ]

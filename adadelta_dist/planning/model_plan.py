"""What a plan needs to know of a model: shapes, dtypes and names, no memory."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import isqrt, prod

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..checkpoints.content import Content

_BLOCK = re.compile(r"^(?:.*?\.)?\d+(?=\.)")
_NUMEL_PER_CUBED_DEPTH = 12 * 128**2
"""A decoder of L blocks of 12 d x d elements, where d is about 128 L."""
_MOST = 10**15


@dataclass(frozen=True)
class Parameter:
    """One trained parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class ModelPlan:
    """A model before it exists.

    Args:
        parameters: what is trained, in the optimizer's order.
        frozen_bytes: of parameters that are not, and of buffers.
    """

    parameters: tuple[Parameter, ...]
    frozen_bytes: int = 0

    @property
    def numel(self) -> int:
        return sum(p.numel for p in self.parameters)

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parameters)

    @property
    def largest_bytes(self) -> int:
        """Of the largest parameter, and so of the largest gradient."""
        return max((p.nbytes for p in self.parameters), default=0)

    @property
    def block_bytes(self) -> int:
        """Of the largest block, which FSDP2 and ZeRO-3 gather at a time.

        Parameters whose names agree up to their first number ("layers.3.") are a block, as in
        an `nn.ModuleList` or `nn.Sequential`; all without a number are another one.
        """
        blocks: defaultdict[str, int] = defaultdict(int)
        for p in self.parameters:
            found = _BLOCK.match(p.name)
            blocks[found.group() if found else ""] += p.nbytes
        return max(blocks.values(), default=0)

    def cast(self, dtype: torch.dtype | None) -> "ModelPlan":
        """The same with its parameters in another dtype."""
        if dtype is None:
            return self
        return replace(self, parameters=tuple(replace(p, dtype=dtype) for p in self.parameters))


def from_count(numel: int, dtype: torch.dtype = torch.float32) -> ModelPlan:
    """A decoder of so many parameters: blocks of twelve square matrices, and a vector for the rest.

    Raises:
        ValueError: fewer than one, or more than anybody can mean.
    """
    if not 1 <= numel <= _MOST:
        raise ValueError(f"a model of {numel} parameters: wanted 1 to {_MOST}")
    depth = max(1, round((numel / _NUMEL_PER_CUBED_DEPTH) ** (1 / 3)))
    side = isqrt(numel // (12 * depth))
    names = [f"blocks.{i}.{j}" for i in range(depth) for j in range(12)] if side else []
    parameters = [Parameter(name, (side, side), dtype) for name in names]
    rest = numel - len(names) * side**2
    if rest:
        parameters.append(Parameter("rest", (rest,), dtype))
    return ModelPlan(tuple(parameters))


def from_module(module: nn.Module) -> ModelPlan:
    """The trainable parameters of a module, on whatever device, "meta" as well.

    Raises:
        ValueError: a parameter has no shape yet.
    """
    trained, frozen = [], sum(map(_nbytes, module.buffers()))
    for name, p in module.named_parameters():
        if is_lazy(p):
            raise ValueError(f"{name} is lazy, and has no shape yet: give it in_features")
        if p.requires_grad:
            trained.append(Parameter(name, tuple(p.shape), p.dtype))
        else:
            frozen += _nbytes(p)
    return ModelPlan(tuple(trained), frozen)


def from_content(content: Content) -> ModelPlan:
    """The parameters of a checkpoint's optimizer; of its model, if it has no optimizer.

    Raises:
        ValueError: it does not tell a parameter's shape.
    """
    names: Iterable[str] = content.names()
    if not content.groups:
        names = [n for n, v in content.model.items() if v.dtype and v.dtype.is_floating_point]
    trained = []
    for name in names:
        value = content.parameter(name)
        if value is None or value.shape is None or value.dtype is None:
            raise ValueError(f"the checkpoint does not tell the shape of {name}")
        trained.append(Parameter(name, value.shape, value.dtype))
    known = {p.name for p in trained}
    frozen = sum(value.nbytes for name, value in content.model.items() if name not in known)
    return ModelPlan(tuple(trained), frozen)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize

"""What the peers train: a perceptron or a small transformer, equal on every rank."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
"""Inputs and labels, this rank's own."""

CLASSES = 1000


class Averaged(nn.Module):
    """The mean over a sequence: [batch, length, width] to [batch, width]."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.mean(1)


@dataclass(frozen=True)
class Perceptron:
    """Linear layers with ReLU between them.

    Args:
        widths: of the inputs, the hidden layers and the outputs.
        batch: samples per rank.
    """

    widths: tuple[int, ...]
    batch: int = 64

    def __str__(self) -> str:
        return f"perceptron {' -> '.join(map(str, self.widths))}, batch {self.batch} per rank"

    @property
    def name(self) -> str:
        return "MLP"

    def model(self) -> nn.Sequential:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(self.widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def inputs(self, rank: int) -> Batch:
        generator = torch.Generator().manual_seed(rank)
        samples = torch.randn(self.batch, self.widths[0], generator=generator)
        return samples, torch.randint(self.widths[-1], (self.batch,), generator=generator)


@dataclass(frozen=True)
class Transformer:
    """Layers of `torch.nn.TransformerEncoder` and a linear classifier of their mean.

    Args:
        width: of the residual stream; feed-forward layers are four times as wide.
        layers: how many.
        batch, length: sequences per rank, and their length.
    """

    width: int
    layers: int
    batch: int = 2
    length: int = 32

    def __str__(self) -> str:
        return (
            f"transformer of {self.layers} layers of width {self.width}, "
            f"{self.batch} sequences of {self.length} per rank"
        )

    @property
    def name(self) -> str:
        return "transformer"

    def model(self) -> nn.Sequential:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(
            self.width, 4, 4 * self.width, dropout=0.0, batch_first=True
        )
        encoder = nn.TransformerEncoder(layer, self.layers, enable_nested_tensor=False)
        return nn.Sequential(encoder, Averaged(), nn.Linear(self.width, CLASSES))

    def inputs(self, rank: int) -> Batch:
        generator = torch.Generator().manual_seed(rank)
        hidden = torch.randn(self.batch, self.length, self.width, generator=generator)
        return hidden, torch.randint(CLASSES, (self.batch,), generator=generator)


class Tensors(nn.Module):
    """Many parameters of one size, and next to nothing to compute."""

    def __init__(self, count: int, numel: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.ones(numel) for _ in range(count))

    def forward(self, scale: Tensor) -> Tensor:
        return torch.stack([weight.sum() for weight in self.weights]).mean() * scale


@dataclass(frozen=True)
class Pieces:
    """`count` parameters of `numel` elements each, for the price of a step alone."""

    count: int
    numel: int

    def model(self) -> Tensors:
        return Tensors(self.count, self.numel)

    def inputs(self, rank: int) -> Batch:
        return torch.full((), 1.0 + rank), torch.tensor(0)


Task = Perceptron | Transformer | Pieces


def numel(task: Task) -> int:
    """Of all parameters together; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in task.model().parameters())


def loss_of(output: Tensor, labels: Tensor) -> Tensor:
    return output if output.dim() == 0 else nn.functional.cross_entropy(output, labels)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The layers that FSDP2 is told to shard one by one."""
    for child in model.children():
        if isinstance(child, nn.TransformerEncoder):
            yield from child.layers
        elif not isinstance(child, nn.ParameterList) and any(True for _ in child.parameters()):
            yield child

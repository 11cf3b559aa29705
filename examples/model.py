"""The perceptron of the examples, and its hyperparameters."""

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "zeiler_mnist.json"


@dataclass(frozen=True)
class Config:
    """The hyperparameters, as in the file of `--config`."""

    hidden: list[int]
    batch_size: int
    lr: float
    rho: float
    eps: float
    epochs: dict[str, int]
    sample_every: int


def read_config(path: Path) -> Config:
    if not path.is_file():
        raise FileNotFoundError(f"--config: there is no file {path}")
    try:
        return Config(**json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"--config: {path}: {error}") from error


def perceptron(sizes: Sequence[int], seed: int) -> nn.Sequential:
    """Linear layers "layer1", "layer2", ... with tanh between them.

    Args:
        sizes: of the inputs, of each hidden layer, and of the outputs.
        seed: for the weights; torch's own random state stays as it is.
    """
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for i, (before, after) in enumerate(pairwise(sizes), 1):
            if i > 1:
                modules[f"tanh{i - 1}"] = nn.Tanh()
            modules[f"layer{i}"] = nn.Linear(before, after)
    return nn.Sequential(modules)

"""The data sets of the examples, and batches that do not depend on the number of ranks."""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

CLASSES = 10


@dataclass(frozen=True)
class Data:
    """Images, flattened, with mean 0 and variance 1 over all pixels, and their labels.

    Args:
        name: "mnist" or "digits".
        train: [n, pixels] and [n].
        test: [m, pixels] and [m].
    """

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @property
    def title(self) -> str:
        return {"mnist": "MNIST"}.get(self.name, self.name)

    @property
    def inputs(self) -> int:
        return self.train[0].shape[1]

    def to(self, device: torch.device) -> "Data":
        """The same data on a device."""
        train, test = (
            (inputs.to(device), labels.to(device)) for inputs, labels in (self.train, self.test)
        )
        return Data(self.name, train, test)


def load(folder: Path | None) -> Data:
    """MNIST from a folder, or, without one, scikit-learn's digits, which it brings along.

    Raises:
        FileNotFoundError, ValueError: a file of MNIST is missing, or is something else.
    """
    return digits() if folder is None else mnist(folder)


def mnist(folder: Path) -> Data:
    """The four IDX files of MNIST, plain or with .gz."""
    parts = []
    for part in ("train", "t10k"):
        images = _read_idx(folder, f"{part}-images-idx3-ubyte", 3)
        labels = _read_idx(folder, f"{part}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise ValueError(f"{folder}: {len(images)} {part} images, but {len(labels)} labels")
        parts.append((images.flatten(1).float(), labels.long()))
    return _standardized("mnist", parts[0], parts[1])


def digits() -> Data:
    """1797 digits of 8 x 8 pixels, a fifth of them for the test."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    train_images, test_images = (torch.from_numpy(part).float() for part in split[:2])
    train_labels, test_labels = (torch.from_numpy(part).long() for part in split[2:])
    return _standardized("digits", (train_images, train_labels), (test_images, test_labels))


def share(indices: Tensor, rank: int, world_size: int) -> Tensor:
    """The contiguous share of one rank; the shares differ in length by at most one."""
    n = len(indices)
    return indices[n * rank // world_size : n * (rank + 1) // world_size]


def batches(
    n: int, batch_size: int, seed: int, epoch: int, rank: int, world_size: int
) -> Iterator[tuple[Tensor, int]]:
    """One epoch in an order that depends on `seed` and `epoch` alone.

    Yields:
        The indices of this rank's share of a batch, and the size of the whole batch. The
        last batch may be smaller; nothing is dropped.
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    for batch in torch.randperm(n, generator=generator).split(batch_size):
        yield share(batch, rank, world_size), len(batch)


def _standardized(name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Data:
    """Shift and scale all pixels by the mean and deviation of the training set."""
    deviation, mean = torch.std_mean(train[0])
    scaled = [((images - mean) / deviation, labels) for images, labels in (train, test)]
    return Data(name, scaled[0], scaled[1])


def _read_idx(folder: Path, name: str, dimensions: int) -> Tensor:
    """A file of unsigned bytes in the IDX format."""
    plain, packed = folder / name, folder / f"{name}.gz"
    if plain.is_file():
        content = plain.read_bytes()
    elif packed.is_file():
        content = gzip.decompress(packed.read_bytes())
    else:
        raise FileNotFoundError(f"no {name} or {name}.gz in {folder}: --data names a folder of it")
    start = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:start], ">u4").astype(int)
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) - start != shape.prod():
        raise ValueError(f"{name} in {folder} is damaged, or not an IDX file")
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(*shape.tolist())

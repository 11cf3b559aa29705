"""Zeiler's perceptron with Accelerate, which trains by DeepSpeed's engine and its JSON.

    torchrun --nproc-per-node 2 examples/train_accelerate.py
    torchrun --nproc-per-node 2 examples/train_accelerate.py configs/deepspeed_zero3.json

`register()` is all that the types of this package need. What `prepare` wants in place of an
optimizer that the JSON names is a `DummyOptim`.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.utils import DummyOptim
from data import CLASSES, load
from model import perceptron
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from adadelta_dist.strategies.deepspeed import register

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "deepspeed_zero2.json"
HIDDEN, RANK_BATCH = [500, 300], 50


def start(config: Path) -> Accelerator:
    """The ranks that torchrun started. Collective."""
    register()
    plugin = DeepSpeedPlugin(hf_ds_config=str(config))
    # Of itself Accelerate finds no backend where there is no accelerator.
    backend = InitProcessGroupKwargs(backend="nccl" if torch.cuda.is_available() else "gloo")
    return Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[backend])


def train(accelerator: Accelerator, epochs: int = 2) -> list[float]:
    """Train on scikit-learn's digits. Returns the mean loss of each epoch. Collective."""
    data, generator = load(None), torch.Generator().manual_seed(0)
    loader = DataLoader(
        TensorDataset(*data.train),
        batch_size=RANK_BATCH,
        shuffle=True,
        drop_last=True,
        generator=generator,
    )
    model = perceptron([data.inputs, *HIDDEN, CLASSES], seed=0)
    model, optimizer, loader = accelerator.prepare(model, DummyOptim(model.parameters()), loader)
    dtype = next(model.parameters()).dtype
    means = []
    for epoch in range(1, epochs + 1):
        total = torch.zeros((), device=accelerator.device)
        for inputs, labels in loader:
            loss = cross_entropy(model(inputs.to(dtype)).float(), labels)
            accelerator.backward(loss)  # which takes DeepSpeed's step as well
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
        means.append(accelerator.reduce(total, "mean").item() / len(loader))
        accelerator.print(f"epoch {epoch}: loss {means[-1]:.4f}")
    return means


if __name__ == "__main__":
    job = start(Path(sys.argv[1]) if len(sys.argv) > 1 else CONFIG)
    train(job)
    job.end_training()

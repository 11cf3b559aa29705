r"""Zeiler's ADADELTA experiment with Lightning: everything is named in a YAML file.

    python examples/train_lightning.py fit --config configs/lightning_mnist.yaml
    python examples/train_lightning.py fit --config configs/lightning_mnist.yaml \
        --data.folder folder/of/mnist --trainer.max_epochs 6

It leaves Lightning's CSV log, a checkpoint and a picture in `trainer.default_root_dir`.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from data import CLASSES, Data, load
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from model import perceptron
from pictures import curves
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import adadelta_dist.strategies.lightning  # noqa: F401 (so that Trainer knows its strategy)
from adadelta_dist.strategies.callbacks import AdadeltaMonitor


class Digits(pl.LightningDataModule):
    """scikit-learn's digits, or MNIST from a folder.

    Args:
        folder: of MNIST's IDX files; None: digits.
        batch_size: of all ranks together.
    """

    def __init__(self, folder: Path | None = None, batch_size: int = 100) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.content: Data = load(folder)

    @property
    def inputs(self) -> int:
        return self.content.inputs

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.content.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.content.test, shuffle=False)

    def _loader(self, part: tuple[Tensor, Tensor], *, shuffle: bool) -> DataLoader[Any]:
        assert self.trainer is not None
        own = max(self.batch_size // self.trainer.world_size, 1)
        return DataLoader(TensorDataset(*part), own, shuffle=shuffle)


class Perceptron(pl.LightningModule):
    """Linear layers with tanh between them.

    Args:
        hidden: sizes of the hidden layers.
        inputs: pixels of an image, which the data tell.
        seed: for the weights.
    """

    def __init__(self, hidden: list[int], inputs: int, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = perceptron([inputs, *hidden, CLASSES], seed)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        inputs, labels = batch
        loss = cross_entropy(self.network(inputs), labels)
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        inputs, labels = batch
        self.accuracy(self.network(inputs), labels)
        self.log("test_accuracy", self.accuracy)


class Picture(pl.Callback):
    """Draws what the other example draws, from what AdadeltaMonitor has seen."""

    def __init__(self) -> None:
        self.history: dict[str, list[dict[str, Any]]] = {"epochs": [], "steps": []}
        self._seen: dict[str, float] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        (monitor,) = (c for c in trainer.callbacks if isinstance(c, AdadeltaMonitor))
        if monitor.latest is self._seen:
            return
        self._seen = values = monitor.latest
        layers = [key.split("/")[1] for key in values if "network." in key]
        row = {"epoch": trainer.global_step / trainer.num_training_batches}
        row["loss"] = trainer.callback_metrics["train_loss_step"].item()
        for kind in ("gradient", "update"):
            of_layer = {n: values[f"adadelta/{n}/{kind}_rms"] for n in dict.fromkeys(layers)}
            row[kind] = {name.removeprefix("network."): v for name, v in of_layer.items()}
        self.history["steps"].append(row)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        error = 100 * (1 - metrics["test_accuracy"].item())
        row = {"epoch": trainer.current_epoch + 1, "train_loss": metrics["train_loss_epoch"].item()}
        self.history["epochs"].append(row | {"test_error": error})

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "curves.png"
            curves(self.history, "Adadelta with Lightning", path)
            last = self.history["epochs"][-1]
            print(f"test error {last['test_error']:.2f} %, wrote {path}", flush=True)


class CLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.inputs", "model.inputs", apply_on="instantiate")


def main() -> None:
    CLI(
        Perceptron,
        Digits,
        trainer_defaults={"callbacks": [Picture()]},
        save_config_kwargs={"overwrite": True},
    )


if __name__ == "__main__":
    main()

"""scikit-learn's digits by Transformers' Trainer, with DeepSpeed's engine and its JSON.

    torchrun --nproc-per-node 2 examples/train_transformers.py
    torchrun --nproc-per-node 2 examples/train_transformers.py configs/deepspeed_zero3.json

`register()` is all that the types of this package need. What the JSON and `TrainingArguments`
both say must agree; "auto" in the JSON takes the latter.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from sklearn.datasets import load_digits
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from adadelta_dist.strategies.deepspeed import register

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "deepspeed_zero2.json"
RANK_BATCH = 50


class Digits(Dataset):
    """1797 images of 8 x 8 pixels between -1 and 1, and their labels."""

    def __init__(self) -> None:
        images, labels = load_digits(return_X_y=True)
        self.images = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 8 - 1
        self.labels = torch.from_numpy(labels).long()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def start() -> None:
    """Join the ranks that torchrun started. Collective.

    On CUDA the Trainer does it; of itself it finds no backend where there is no accelerator.
    """
    register()
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")


def model() -> ViTForImageClassification:
    """A vision transformer of one layer, with nothing that is random in training."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def trainer(config: Path, out: Path, epochs: int = 8, **more: Any) -> Trainer:
    """A Trainer with DeepSpeed's JSON. Collective."""
    arguments = TrainingArguments(
        output_dir=str(out),
        deepspeed=str(config),
        accelerator_config={"use_configured_state": not torch.cuda.is_available()},
        per_device_train_batch_size=RANK_BATCH,
        num_train_epochs=epochs,
        learning_rate=1.0,
        adam_epsilon=1e-6,  # what the JSON calls "eps", whatever the optimizer
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        average_tokens_across_devices=False,  # there are none: a mean over images
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_strategy="epoch",
        report_to="none",
        **more,
    )
    return Trainer(model=model(), args=arguments, train_dataset=Digits())


if __name__ == "__main__":
    start()
    json = Path(sys.argv[1]) if len(sys.argv) > 1 else CONFIG
    trainer(json, Path("runs/transformers")).train()
    torch.distributed.destroy_process_group()

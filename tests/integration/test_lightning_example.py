"""The examples, started as a user starts them: Lightning itself starts the second rank."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def start(script, *arguments, folder):
    finished = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return finished.stdout


def columns_of(file):
    with file.open() as text:
        return set(csv.DictReader(text).fieldnames)


def as_torchs_own(model, optimizer):
    """Plain torch takes both."""
    params = [torch.nn.Parameter(t) for t in model.values()]
    torch.optim.Adadelta(params).load_state_dict(optimizer)


def test_it_learns_and_leaves_what_it_promises(tmp_path):
    config = ROOT / "configs/lightning_mnist.yaml"
    changes = ["--trainer.max_epochs", "5", "--trainer.enable_progress_bar", "false"]
    printed = start("train_lightning.py", "fit", "--config", str(config), *changes, folder=tmp_path)
    error = float(printed.partition("test error ")[2].split()[0])
    assert error < 10  # 10 classes: 90 % by chance
    assert printed.count("rank 1 ") == 1, "only rank 0 prints"
    folder = tmp_path / "runs" / "lightning"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    expected = {"adadelta/network.layer1/update_rms", "step/update_ms", "train_loss_epoch"}
    assert expected <= columns_of(folder / "csv" / "metrics.csv")
    checkpoint = torch.load(folder / "checkpoint.ckpt", weights_only=True)
    as_torchs_own(checkpoint["state_dict"], checkpoint["optimizer_states"][0])


def test_the_fabric_example_goes_on_at_another_number_of_ranks(tmp_path):
    start("train_fabric.py", "--devices", "2", "--epochs", "3", "--out", "two", folder=tmp_path)
    file = tmp_path / "two" / "checkpoint.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    as_torchs_own(checkpoint["model"], checkpoint["optimizer"])
    printed = start("train_fabric.py", "--resume", str(file), "--epochs", "5", folder=tmp_path)
    assert "resumed at epoch 3" in printed
    assert "epoch 4:" in printed
    assert float(printed.partition("epoch 5:")[2].partition("test error ")[2].split()[0]) < 10
    folder = tmp_path / "runs" / "fabric"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {"step", "train_loss", "test_error"} <= columns_of(folder / "csv" / "metrics.csv")

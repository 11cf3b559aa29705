"""The example, started as a user starts it: Lightning itself starts the second rank."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def test_it_learns_and_leaves_what_it_promises(tmp_path):
    script, config = ROOT / "examples/train_lightning.py", ROOT / "configs/lightning_mnist.yaml"
    arguments = ["fit", "--config", str(config), "--trainer.max_epochs", "5"]
    quiet = ["--trainer.enable_progress_bar", "false"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, str(script), *arguments, *quiet],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=240,
    )
    error = float(finished.stdout.partition("test error ")[2].split()[0])
    assert error < 10  # 10 classes: 90 % by chance
    assert finished.stdout.count("rank 1 ") == 1, "only rank 0 prints"
    folder = tmp_path / "runs" / "lightning"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    with (folder / "csv" / "metrics.csv").open() as file:
        columns = csv.DictReader(file).fieldnames
    expected = {"adadelta/network.layer1/update_rms", "step/update_ms", "train_loss_epoch"}
    assert expected <= set(columns)
    checkpoint = torch.load(folder / "checkpoint.ckpt", weights_only=True)
    model = [torch.nn.Parameter(t) for t in checkpoint["state_dict"].values()]
    torch.optim.Adadelta(model).load_state_dict(checkpoint["optimizer_states"][0])

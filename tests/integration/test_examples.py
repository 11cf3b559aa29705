"""The main job, as a user starts it: two ranks, then resumed at other world sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "train_torchrun.py"


def run(world_size, *arguments, check=True):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    command = [sys.executable, *(launcher if world_size else []), str(EXAMPLE), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, check=check, capture_output=True, text=True)


def epochs(folder):
    return json.loads((folder / "history.json").read_text())["epochs"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    finished = run(2, "--out", str(folder), "--epochs", "5")
    return folder, finished.stdout


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    run(2, "--out", str(folder), "--epochs", "3")
    return folder / "checkpoints"


def test_it_learns_and_leaves_what_it_promises(two_ranks):
    folder, printed = two_ranks
    assert epochs(folder)[-1]["test_error"] < 8  # 10 classes: 90 % by chance
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [f.name for f in (folder / "checkpoints").iterdir()] == ["epoch-5"]
    assert "rank 0 of 2" in printed
    assert printed.count("epoch  train loss") == 1, "only rank 0 prints"


def test_world_sizes_take_the_same_steps(two_ranks, tmp_path):
    folder, _ = two_ranks
    run(0, "--out", str(tmp_path), "--epochs", "5", "--optimizer", "torch")
    for ours, torchs in zip(epochs(folder), epochs(tmp_path), strict=True):
        # Sums over ranks round otherwise than sums over a batch; it grows over 90 steps.
        assert ours["train_loss"] == pytest.approx(torchs["train_loss"], rel=1e-4)
        assert ours["test_error"] == pytest.approx(torchs["test_error"], abs=0.6)


@pytest.mark.parametrize("world_size", [0, 3])
def test_it_resumes_at_another_world_size(two_ranks, interrupted, tmp_path, world_size):
    folder, _ = two_ranks
    finished = run(
        world_size, "--resume", str(interrupted), "--out", str(tmp_path), "--epochs", "5"
    )
    assert "resumed at epoch 3, saved at world size 2" in finished.stdout
    for ours, uninterrupted in zip(epochs(tmp_path), epochs(folder), strict=True):
        assert ours["train_loss"] == pytest.approx(uninterrupted["train_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--resume", "nowhere"], "path nowhere: there is no such folder"),
        (["--optimizer", "torch"], "one process"),
    ],
)
def test_bad_arguments_end_all_ranks_with_one_line(arguments, message, tmp_path):
    finished = run(2, "--out", str(tmp_path), *arguments, check=False)
    assert finished.returncode != 0
    lines = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]

"""The examples of mixed precision, hybrid sharding and half-precision parameters learn."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(world_size, script, *arguments):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    command = [sys.executable, *launcher, str(ROOT / "examples" / script), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return finished.stdout


def last_error(printed):
    return float(re.findall(r"test error ([\d.]+) %", printed)[-1])


@pytest.mark.parametrize(("dtype", "stage"), [("float16", "1"), ("bfloat16", "2")])
def test_mixed_precision_learns(dtype, stage):
    printed = run(2, "train_amp.py", "--dtype", dtype, "--stage", stage, "--epochs", "4")
    assert last_error(printed) < 15  # 10 classes: 90 % by chance
    assert ("scale 65536" in printed) == (dtype == "float16")
    assert printed.count("epoch 1:") == 1, "only rank 0 prints"


def test_hybrid_sharding_learns():
    printed = run(4, "train_hybrid.py", "--hosts", "2", "--epochs", "4")
    assert last_error(printed) < 15
    # Two accumulators of the perceptron, and six counters.
    numel = 64 * 500 + 500 + 500 * 300 + 300 + 300 * 10 + 10
    assert f"state gathered: {2 * numel + 6} elements" in printed


def test_masters_follow_fp32_and_rounding_alone_does_not(tmp_path):
    """At a small learning rate, of which rounding to the nearest loses more."""
    printed = run(2, "half_precision.py", "--out", str(tmp_path), "--lr", "0.02", "--epochs", "3")
    errors = json.loads((tmp_path / "half_precision.json").read_text())
    assert len(errors) == len(printed.splitlines()) == 6
    behind = {
        name: abs(values[-1] - errors["float32, torch.optim.Adadelta"][-1])
        for name, values in errors.items()
    }
    one_image = 100 / 360
    assert behind["bfloat16, masters"] < 1.5 * one_image
    assert behind["bfloat16, no masters, stochastic rounding"] < 5.5 * one_image
    assert behind["bfloat16, no masters, rounded to nearest"] > 30 * one_image
    assert (tmp_path / "half_precision.png").read_bytes().startswith(b"\x89PNG")

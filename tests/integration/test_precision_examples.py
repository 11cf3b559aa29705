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


def test_variants_of_half_precision_leave_a_picture(tmp_path):
    printed = run(2, "half_precision.py", "--out", str(tmp_path), "--epochs", "1")
    errors = json.loads((tmp_path / "half_precision.json").read_text())
    assert len(errors) == len(printed.splitlines()) == 6
    assert all(error[0] < 30 for error in errors.values())
    assert (tmp_path / "half_precision.png").read_bytes().startswith(b"\x89PNG")

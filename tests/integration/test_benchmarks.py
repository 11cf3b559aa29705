"""The benchmarks run, and print what they measured."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_quick_run_leaves_a_report_and_a_picture(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "all", "--quick", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    (report,) = tmp_path.glob("*.md")
    (picture,) = tmp_path.glob("*.png")
    text = report.read_text()
    for peer in ("ShardedAdadelta", "ZeroRedundancyOptimizer", "FSDP2", "DDP + torch"):
        assert peer in text
    assert picture.read_bytes().startswith(b"\x89PNG")

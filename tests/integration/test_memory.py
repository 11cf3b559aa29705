"""Peak memory of both stages is what the formula of docs/design.md says."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_peak_memory_is_the_formulas():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [*launcher, "2", "-m", "benchmarks.memory", "--layers", "60"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    peaks = []
    for line in re.findall(r"^stage .*$", finished.stdout, re.M):
        *ranks, wanted = map(float, re.findall(r"(\d+)(?=,| MB)", line.partition(":")[2]))
        assert len(ranks) == 2
        for measured in ranks:
            assert abs(measured / wanted - 1) < 0.05, line
        peaks.append(max(ranks))
    assert peaks[1] < 0.85 * peaks[0]

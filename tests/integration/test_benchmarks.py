"""The benchmarks run, and report every peer."""

import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.report import Row, Table

ROOT = Path(__file__).parents[2]
PEERS = [
    "ShardedAdadelta",
    "DDP + torch.optim.Adadelta",
    "ZeroRedundancyOptimizer",
    "FSDP2 + torch.optim.Adadelta",
    *(f"DeepSpeed ZeRO-{stage}" for stage in (1, 2, 3)),
]


def test_a_quick_run_leaves_a_report_of_every_peer_and_pictures(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (report,) = tmp_path.glob("*.md")
    parts = re.split(r"^## (.*)$", report.read_text(), flags=re.M)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    for name in ("iteration", "memory", "checkpoint", "growth"):
        assert not [peer for peer in PEERS if f"| {peer} " not in sections[name]]
    assert "torch.compile" in sections["step"]
    assert "nan" not in report.read_text()
    for picture in re.findall(r"!\[\w+\]\((.*)\)", report.read_text()):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_a_ratio_is_the_median_over_neighbours_and_not_that_of_medians():
    row = Row("peer", values=[2.0, 30.0, 4.0], beside=[1.0, 10.0, 8.0])
    assert row.ratio == 2.0
    text = Table("title", "short", "note", [row]).markdown()
    assert "| 2.00 " in text
    assert "2 .. 30" in text

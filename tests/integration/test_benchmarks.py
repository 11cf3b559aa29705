"""The benchmarks run, report every peer, and leave no network namespace behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import namespaces
from benchmarks.report import Row, Table

ROOT = Path(__file__).parents[2]
PEERS = [
    "ShardedAdadelta",
    "DDP + torch.optim.Adadelta",
    "ZeroRedundancyOptimizer",
    "FSDP2 + torch.optim.Adadelta",
    *(f"DeepSpeed ZeRO-{stage}" for stage in (1, 2, 3)),
]
HOLD = """
import signal, subprocess, time
from benchmarks import namespaces
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
with namespaces.two_hosts() as hosts:
    worker = subprocess.Popen(namespaces.inside(hosts[0], ["sleep", "300"]))
    print(worker.pid, flush=True)
    time.sleep(300)
"""


@pytest.mark.timeout(600)  # on a new machine DeepSpeed compiles its operator first
def test_a_quick_run_leaves_a_report_of_every_peer_and_pictures(tmp_path):
    # The memory benchmark has a file of its own.
    names = ["step", "iteration", "checkpoint", "growth", "two_hosts"]
    command = [sys.executable, "-m", "benchmarks", *names, "--quick", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (report,) = tmp_path.glob("*.md")
    parts = re.split(r"^## (.*)$", report.read_text(), flags=re.M)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    for name in ("iteration", "checkpoint", "growth"):
        assert not [peer for peer in PEERS if f"| {peer} " not in sections[name]]
    assert "torch.compile" in sections["step"]
    assert "nan" not in report.read_text()
    for picture in re.findall(r"!\[\w+\]\((.*)\)", report.read_text()):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    reason = skip_reason()
    assert (reason or "| ShardedAdadelta, hybrid ") in sections["two_hosts"]
    assert not our_namespaces()


def skip_reason():
    try:
        namespaces.check()
    except namespaces.MissingError as reason:
        return str(reason)
    return ""


def our_namespaces():
    if skip_reason():
        return []
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if line.startswith(namespaces.PREFIX)]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_namespaces_and_what_runs_in_them_vanish_however_a_run_ends(how):
    if reason := skip_reason():
        pytest.skip(reason)
    run = subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    worker = int(run.stdout.readline())
    name = f"{namespaces.PREFIX}-{run.pid}-0"
    assert any(line.startswith(name) for line in our_namespaces())
    namespaces.remove_leftovers()  # of others: a living run is let alone
    assert any(line.startswith(name) for line in our_namespaces())
    run.send_signal(how)
    try:
        run.wait(timeout=60)
    finally:
        run.kill()
    run.stdout.close()
    if how == signal.SIGKILL:
        namespaces.remove_leftovers()
    assert not [line for line in our_namespaces() if line.startswith(name)]
    end = time.monotonic() + 5
    while Path(f"/proc/{worker}/root").exists() and alive(worker) and time.monotonic() < end:
        time.sleep(0.01)
    assert not alive(worker)


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_ratio_is_the_median_over_neighbours_and_not_that_of_medians():
    row = Row("peer", values=[2.0, 30.0, 4.0], beside=[1.0, 10.0, 8.0])
    assert row.ratio == 2.0
    text = Table("title", "short", "note", [row]).markdown()
    assert "| 2.00 " in text
    assert "2 .. 30" in text

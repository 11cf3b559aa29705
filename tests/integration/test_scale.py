"""The real optimizer at world sizes to 4,096, on the meta device, costs what is planned."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found():
    """In a process of its own, for it replaces the process group and functions of torch."""
    command = [sys.executable, "-W", "error", "-m", "benchmarks.scale", "--quick", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_cases_of_both_stages_and_of_replicas_run(found):
    assert {case["stage"] for case in found} == {1, 2}
    assert {case["replicas"] for case in found} == {1, 4}
    assert max(case["world_size"] for case in found) == 4096
    assert max(case["numel"] for case in found) > 8e9


def test_memory_and_bytes_are_as_planned(found):
    for case in found:
        assert case["held_bytes"] == case["planned_held_bytes"], case
        assert case["sent_bytes"] == pytest.approx(case["planned_sent_bytes"], rel=1e-9), case
        # Activations and the temporaries of a step are in the one and not in the other.
        assert case["peak_bytes"] == pytest.approx(case["planned_peak_bytes"], rel=0.01), case


def test_shards_are_balanced_and_laid_out_at_once(found):
    for case in found:
        assert case["balance"] <= 1.001, case
        assert case["layout_s"] < 2, case

"""What starts many hosts, as far as one machine can tell."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
EXAMPLE = "examples/train_torchrun.py"


def environment(**variables):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "RANKS_PER_HOST": "1"} | variables


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_hosts(hosts, out, epochs):
    """What `hosts` agents print that meet over loopback."""
    env = environment(HOSTS=str(hosts), RENDEZVOUS=f"localhost:{free_port()}", JOB="test")
    command = [CONFIGS / "start_host.sh", out, "--epochs", str(epochs)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    agents = [subprocess.Popen(command, cwd=ROOT, env=env, **pipes) for _ in range(hosts)]
    try:
        printed = [agent.communicate(timeout=120)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
    assert [agent.returncode for agent in agents] == [0] * hosts, printed
    return "".join(printed)


def test_two_hosts_meet_and_one_goes_on(tmp_path):
    out = tmp_path / "a folder"
    run_hosts(2, out, 1)
    assert "saved at world size 2, now 1" in run_hosts(1, out, 2)
    history = json.loads((out / "history.json").read_text())
    assert [row["world_size"] for row in history["epochs"]] == [2, 1]


@pytest.mark.parametrize("missing", ["HOSTS", "RENDEZVOUS", "folder"])
def test_what_is_missing_is_named(missing):
    variables = {"HOSTS": "2", "RENDEZVOUS": "host:1"}
    variables.pop(missing, None)
    command = [CONFIGS / "start_host.sh", *(["out"] if missing != "folder" else [])]
    env = {k: v for k, v in environment().items() if k not in ("HOSTS", "RENDEZVOUS")}
    done = subprocess.run(command, cwd=ROOT, env=env | variables, capture_output=True, text=True)
    assert done.returncode
    assert (missing if missing != "folder" else "a folder that all hosts share") in done.stderr


def test_slurm_names_the_first_host_and_hands_arguments_on(tmp_path):
    """Its shell, with stand-ins for SLURM's commands."""
    stubs = {
        "scontrol": 'test "$*" = "show hostnames n[7-8]" && printf "n7\\nn8\\n"',
        "srun": 'echo "$HOSTS" "$JOB" "$RENDEZVOUS"; printf "<%s>" "$@"',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "41005"}
    env = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", CONFIGS / "slurm.sbatch", "a folder", "--epochs", "8"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "2 41005 n7:29405"
    assert second == "<--kill-on-bad-exit=1><configs/start_host.sh><a folder><--epochs><8>"


def test_the_pytorchjob_starts_the_example_on_every_host():
    job = yaml.safe_load((CONFIGS / "kubeflow_pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(job["spec"]["pytorchReplicaSpecs"]) == {"Master", "Worker"}
    for host in job["spec"]["pytorchReplicaSpecs"].values():
        (container,) = host["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert container["command"][:2] == ["torchrun", EXAMPLE]
        volumes = {volume["name"] for volume in host["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        assert job["spec"]["nprocPerNode"] == str(gpus)
    assert (ROOT / EXAMPLE).exists()

"""The configurations, and the example as a user starts it: by two launchers."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import deepspeed_jobs as jobs
import pytest
import torch

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("deepspeed_*.json"))
DEADLINE = 240.0


def run_configs(rank, paths):
    """One step with each; what DeepSpeed made of it."""
    jobs.prepare(rank, 2)
    from adadelta_dist.strategies.deepspeed import initialize

    made = {}
    for path in paths:
        engine = initialize(model=jobs.network(), config=path)[0]
        inputs, targets = jobs.global_batch(0)
        dtype = next(engine.module.parameters()).dtype
        loss = torch.nn.functional.mse_loss(engine(inputs.to(dtype)).float(), targets)
        engine.backward(loss)
        engine.step()
        basic = engine.basic_optimizer
        made[Path(path).stem] = {
            "type": type(basic).__name__,
            "stage": engine.zero_optimization_stage(),
            "offload": bool(engine.zero_cpu_offload()),
            "bf16": engine.bfloat16_enabled(),
            "clip": engine.gradient_clipping(),
            "hyperparameters": [basic.param_groups[0][key] for key in ("lr", "rho", "eps")],
            "state": {getattr(e["square_avg"], "dtype", None) for e in basic.state.values()},
        }
    return made


def test_every_configuration_is_loaded_and_steps(deepspeed_pool):
    first, second = deepspeed_pool(2).run(run_configs, list(map(str, CONFIGS)), deadline=DEADLINE)
    assert first == second
    zero = {name.removeprefix("deepspeed_"): made for name, made in first.items()}
    assert zero.keys() == {"zero0", "zero1", "zero2", "zero3", "zero2_offload", "bf16"}
    for name, made in zero.items():
        assert made["type"] == ("StageZeroAdadelta" if name == "zero0" else "FusedAdadelta")
        assert made["stage"] == int(name[4]) if name.startswith("zero") else 2
        assert made["offload"] == (name == "zero2_offload")
        assert made["bf16"] == (name == "bf16")
        assert made["hyperparameters"] == [1.0, 0.95, 1e-6]
        assert made["clip"] == 0.0, "DeepSpeed's default is 1.0"
        assert made["state"] == {torch.float32}


def start(launcher, *arguments):
    command = [*launcher, str(ROOT / "examples" / "train_deepspeed.py"), *arguments]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the launcher's python
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path}
    job = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = job.communicate(timeout=DEADLINE)
    finally:  # with all of its ranks, which a launcher that is killed would leave behind
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 0, printed[-3000:]
    return printed


def history(folder):
    return json.loads((folder / "history.json").read_text())


def epochs_alone(count):
    """The example's mean losses with torch's own optimizer in this process."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from data import batches, digits
        from model import perceptron
    finally:
        sys.path.pop(0)
    (inputs, labels), means = digits().train, []
    model = perceptron([64, 500, 300, 10], 0)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0, rho=0.95, eps=1e-6)
    for epoch in range(1, count + 1):
        total = 0.0
        for indices, _ in batches(len(inputs), 100, 0, epoch, 0, 1):
            loss = torch.nn.functional.cross_entropy(model(inputs[indices]), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(indices)
        means.append(total / len(inputs))
    return means


@pytest.mark.timeout(2 * DEADLINE + 60)
def test_the_launcher_starts_it_and_torchrun_goes_on_with_another_number(tmp_path):
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2"]
    launcher += ["--master_port", "29517"]  # not the default, which another job may have
    start(launcher, "--out", str(tmp_path / "two"), "--epochs", "2")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    printed = start(
        [*torchrun, "--nproc-per-node", "1"],
        *("--resume", str(tmp_path / "two"), "--out", str(tmp_path / "one"), "--epochs", "3"),
        *("--deepspeed_config", str(ROOT / "configs" / "deepspeed_zero3.json")),
    )
    assert "digits on 1 ranks, 2 epochs done" in printed
    losses = [row["train_loss"] for row in history(tmp_path / "one")]
    # Sums over ranks round otherwise than sums over a batch; it grows over 45 steps.
    assert losses == pytest.approx(epochs_alone(3), rel=1e-4)
    assert history(tmp_path / "one")[:2] == history(tmp_path / "two")

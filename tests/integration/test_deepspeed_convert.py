"""`adadelta-dist convert` from DeepSpeed's checkpoints, and to them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed_jobs import Odd, build, config, prepare, read_forms, run_steps
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]


def save(rank, folder):
    prepare(rank, 2)
    engine = build(config(2), model=Odd(), several=True)[0]
    run_steps(engine, rank, 2, range(2))
    engine.save_checkpoint(str(folder))


def convert(rank, folder, ways):
    """The command, within a process that has imported DeepSpeed already."""
    from adadelta_dist.cli import app

    for src, dst, to in [] if rank else ways:
        arguments = ["convert", str(folder / src), str(folder / dst), "--to", to]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (src, to, result.output)


def convert_alone(src, dst, to):
    command = [sys.executable, "-m", "adadelta_dist.cli", "convert", str(src), str(dst), "--to", to]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    return done.returncode, done.stderr


def assert_equal(got, want):
    assert got["model"].keys() == want["model"].keys()
    for name, tensor in want["model"].items():
        assert torch.equal(got["model"][name], tensor)
    ours, theirs = got["optimizer"], want["optimizer"]
    for group, other in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        for key in ("params", "param_names", "lr", "rho", "weight_decay"):
            assert group[key] == other[key]
    assert ours["state"].keys() == theirs["state"].keys()
    for i, entry in theirs["state"].items():
        assert all(torch.equal(ours["state"][i][key], value) for key, value in entry.items())


def test_deepspeed_to_every_form_and_back(deepspeed_pool, tmp_path):
    deepspeed_pool(2).run(save, tmp_path / "run", deadline=200.0)
    ways = [
        ("run", "a.pt", "torch"),
        ("run", "folder", "dcp"),
        ("folder", "b.pt", "torch"),
        ("folder", "universal", "universal"),
        ("universal", "c.pt", "torch"),
        ("run", "universal-2", "universal"),
        ("universal-2", "d.pt", "torch"),
    ]
    deepspeed_pool(2).run(convert, tmp_path, ways, deadline=200.0)
    want = torch.load(tmp_path / "a.pt", weights_only=True)
    assert_equal(want, deepspeed_pool(1).run(read_forms, str(tmp_path), ["run"])[0]["run"])
    assert want["optimizer"]["state"][0]["step"] == 2
    assert want["optimizer"]["state"][0]["square_avg"].any()
    for file in ("b.pt", "c.pt", "d.pt"):
        assert_equal(torch.load(tmp_path / file, weights_only=True), want)


def test_what_cannot_become_universal_is_refused_in_one_line(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "a.pt")
    status, errors = convert_alone(tmp_path / "a.pt", tmp_path / "universal", "universal")
    assert status == 1
    assert "has no optimizer: a universal checkpoint needs both" in errors.replace("\n", " ")
    assert [f.name for f in tmp_path.iterdir()] == ["a.pt"]


def of_half_precision(rank, folder, kind):
    """Names of the parameters whose state comes out of a stage 0 checkpoint in bf16."""
    prepare(rank, 2)
    from adadelta_dist.strategies.deepspeed_checkpoint import to_torch
    from adadelta_dist.strategies.deepspeed_reading import read_deepspeed

    engine = build(config(0, kind=kind, bf16={"enabled": True}), model=Odd())[0]
    run_steps(engine, rank, 2, range(2), torch.bfloat16)
    engine.save_checkpoint(str(folder))
    torch.distributed.barrier()
    if rank:
        return None
    group = to_torch(read_deepspeed(folder))["optimizer"]["param_groups"][0]
    return sorted(group["param_names"])


@pytest.mark.parametrize("kind", ["ShardedAdadelta", "FusedAdadelta"])
def test_frozen_layers_are_left_out_of_stage_0_in_half_precision(deepspeed_pool, tmp_path, kind):
    names, _ = deepspeed_pool(2).run(of_half_precision, tmp_path, kind, deadline=240.0)
    assert names == ["inner.bias", "inner.weight", "out.bias", "out.weight", "tied.bias"]

"""`adadelta-dist plan`: what it takes, what it prints, and how it says no."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import build, save_dcp, save_torch
from test_cli import on_terminal
from typer.testing import CliRunner

from adadelta_dist import ShardPolicy
from adadelta_dist.cli import app
from adadelta_dist.planning.model_plan import from_count
from adadelta_dist.planning.planner import Cluster, sharded

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or")
PEERS = [
    "ShardedAdadelta stage 1",
    "ShardedAdadelta stage 2",
    "DDP",
    "ZeroRedundancyOptimizer",
    "DeepSpeed ZeRO-1",
    "DeepSpeed ZeRO-2",
    "DeepSpeed ZeRO-3",
    "FSDP2",
]

MODULE = """
import torch
def net():
    return torch.nn.Sequential(torch.nn.Linear(1000, 500), torch.nn.Linear(500, 10))
def huge():
    return torch.nn.Linear(10**6, 10**6)
def broken():
    raise KeyError("mine")
number = int
empty = torch.nn.Identity
def nothing():
    return torch.nn.ParameterList([torch.zeros(0)])
def lazy():
    return torch.nn.LazyLinear(3)
"""


def plan(*args):
    result = CliRunner().invoke(app, ["plan", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def facts(*args):
    result = plan(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planned.py").write_text(MODULE)
    yield tmp_path
    sys.modules.pop("planned", None)


def test_a_count_is_planned_as_the_planner_says():
    found = facts("25M", "-n", 4, "--backend", "gloo", "--dtype", "bfloat16")
    assert found["model"] == {"frozen_bytes": 0, "nbytes": 50_000_000, "numel": 25_000_000}
    assert [cost["peer"] for cost in found["costs"]] == PEERS
    model, cluster = from_count(25_000_000, torch.bfloat16), Cluster(4, backend="gloo")
    for stage, cost in zip((1, 2), found["costs"], strict=False):
        wanted = sharded(model, cluster, ShardPolicy(stage=stage))
        assert cost["memory"] == dict(wanted.memory)
        assert (cost["peak"], cost["balance"]) == (wanted.peak, wanted.balance)
        assert cost["traffic"]["seconds"] == wanted.traffic.seconds
    assert all(cost["source"] for cost in found["costs"])
    assert found["limit_bytes"] is None
    assert "smallest_world_size" not in found["costs"][0]


def test_every_option_arrives():
    options = ["--stage", 2, "-n", 32, "--replicas", 4, "--ranks-per-host", 4, "--bucket-mb", 5]
    options += ["--within-gbit", 100, "--between-gbit", 10, "--dtype", "bfloat16"]
    options += ["--state-dtype", "bfloat16", "--reduce-dtype", "float32", "--stochastic-rounding"]
    found = facts("100M", *options)
    policy = ShardPolicy(
        stage=2,
        bucket_mb=5,
        state_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
        stochastic_rounding=True,
    )
    wanted = sharded(from_count(10**8, torch.bfloat16), Cluster(32, 4, 4, "nccl", 100, 10), policy)
    assert found["costs"][0]["memory"] == dict(wanted.memory)
    assert found["costs"][0]["traffic"]["crossing"] == wanted.traffic.crossing
    assert found["policy"]["reduce_dtype"] == "torch.float32"
    assert [cost["peer"] for cost in found["costs"]] == PEERS[1:]
    narrow = facts("100M", "--gather-dtype", "bfloat16")["costs"][0]["traffic"]["sent"]
    assert narrow == 0.75 * facts("100M")["costs"][0]["traffic"]["sent"]


@pytest.mark.parametrize(
    ("count", "numel"), [("7B", 7e9), ("1.5b", 1.5e9), ("12k", 12e3), ("2T", 2e12), ("100", 100)]
)
def test_counts(count, numel):
    assert facts(count)["model"]["numel"] == numel


def test_a_model_is_built_without_memory(here):
    assert facts("planned:net")["model"]["numel"] == 1000 * 500 + 500 + 5000 + 10
    assert facts("planned:huge")["model"]["numel"] == 10**12 + 10**6
    assert "" not in sys.path


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_checkpoint_is_planned_unread(tmp_path, form):
    model, optimizer = build()
    path = tmp_path / form
    {"file": save_torch, "folder": save_dcp}[form](path, model, optimizer)
    found = facts(path)["model"]
    of_optimizer = [p for group in optimizer.param_groups for p in group["params"]]
    assert found["numel"] == sum(p.numel() for p in of_optimizer)
    everything = sum(t.nbytes for t in model.state_dict().values())
    assert found["nbytes"] + found["frozen_bytes"] == everything


def test_the_smallest_world_size_is_told():
    found = facts("1B", "--fit", "10GB")
    assert found["limit_bytes"] == 10e9
    sizes = {cost["peer"]: cost["smallest_world_size"] for cost in found["costs"]}
    assert sizes["DDP"] is None  # 16 bytes a parameter
    assert sizes["ShardedAdadelta stage 2"] == 3  # 4 + 12 / N, and what travels
    text = plan("1B", "--fit", "10GB").stdout
    assert re.search(r"^DDP .* never$", text, re.M)
    assert re.search(r"^ShardedAdadelta stage 2 .* 3$", text, re.M)


@pytest.mark.parametrize(
    ("text", "nbytes"), [("80GB", 80e9), ("80 GiB", 80 * 2**30), ("1.5tb", 1.5e12), ("9", 9)]
)
def test_sizes(text, nbytes):
    assert facts("1k", "--fit", text)["limit_bytes"] == nbytes


def test_it_prints_plain_text_into_a_pipe():
    result = plan("7B", "-n", 16, "--dtype", "bfloat16", "--replicas", 2)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "model: 7,000,000,000 parameters, 14.0 GB of bfloat16"
    assert lines[1] == "ranks: 16, 2 replicas of 8, 8 a host, nccl"
    for peer in PEERS:
        assert sum(line.startswith(f"{peer} ") for line in lines) == 2, peer
    assert re.search(
        r"^DDP +14.0 GB +14.0 GB +- +28.0 GB +- +[\d.]+ MB +56.0 GB$", result.stdout, re.M
    )
    assert "have no masters: all is in the parameters' dtype" in result.stdout
    assert "\x1b" not in result.stdout


def test_the_document_shows_what_is_printed():
    document = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    shown = re.search(r"^```text\n\$ adadelta-dist plan (.*?)\n(.*?)^```$", document, re.M | re.S)
    assert plan(*shown[1].split()).stdout == shown[2]


def test_on_a_terminal_there_are_tables():
    assert "│ FSDP2 " in on_terminal(("plan", "25M"))


def test_a_picture_is_written(tmp_path):
    path = tmp_path / "plan.png"
    assert plan("25M", "--picture", path, "--fit", "1GB").exit_code == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = plan("25M", "--picture", tmp_path / "plan.png")
    assert result.exit_code == 1
    assert "error: --picture needs matplotlib.figure: pip install matplotlib" in result.stderr


def test_errors_are_one_line_and_1(here):
    cases = {
        ("absent",): "No such file or directory: 'absent'",
        ("0",): "a model of 0 parameters: wanted 1 to 1000000000000000",
        ("99999999T",): "parameters: wanted 1 to 1000000000000000",
        ("planned:lazy",): "weight is lazy, and has no shape yet: give it in_features",
        ("planned:nothing",): "planned:nothing has no parameters to train",
        (".",): ". is not a checkpoint: it has no .metadata",
        ("nowhere:f",): "nowhere:f raised ModuleNotFoundError: No module named 'nowhere'",
        ("planned:net2",): "planned:net2 raised AttributeError: module 'planned' has no attribute",
        ("planned:broken",): "planned:broken raised KeyError: 'mine'",
        ("planned:number",): "planned:number returned a int, wanted a torch.nn.Module",
        ("planned:empty",): "planned:empty has no parameters to train",
        ("1B", "-n", 0): "world_size must be positive and finite, got 0",
        ("1B", "-n", 6, "--replicas", 4): "replicas=4 of world_size=6: wanted a divisor",
        ("1B", "--stage", 3): "stage must be 1 or 2, got 3",
        ("1B", "--bucket-mb", 0): "bucket_mb must be positive and finite, got 0",
        ("1B", "--fit", "much"): "--fit much: wanted a size such as 80GB or 80GiB",
        ("1B", "--gather-dtype", "float64"): "gather_dtype=torch.float64 for parameters of",
        ("1B", "--picture", "no/where.png"): "No such file or directory: 'no/where.png'",
    }
    for args, message in cases.items():
        result = plan(*args)
        assert (result.exit_code, result.stdout) == (1, ""), args
        assert re.fullmatch(f"error: .*{re.escape(message)}.*\n", result.stderr), result.stderr


def test_wrong_use_is_2():
    for args in ((), ("1B", "--dtype", "int8"), ("1B", "-n", "many"), ("1B", "--backend", "mpi")):
        assert plan(*args).exit_code == 2, args

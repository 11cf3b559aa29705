"""One process saves: what is refused before it is written, and what happens behind training."""

import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import assert_same, build, train
from torch import nn

from adadelta_dist import (
    Adadelta,
    CheckpointError,
    ShardedAdadelta,
    async_save_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from adadelta_dist.checkpoints.named_state import named_state
from adadelta_dist.checkpoints.saving import _own_share
from adadelta_dist.functional import ACCUMULATORS
from adadelta_dist.groups import Group

ROOT = Path(__file__).parents[2]


class Odd:
    """Of a class that no `weights_only` file may name."""


class Noted(nn.Linear):
    """Has an extra state."""

    note: object = None

    def get_extra_state(self):
        return self.note

    def set_extra_state(self, state):
        self.note = state


def noted(note):
    torch.manual_seed(0)
    module = Noted(3, 2)
    module.note = note
    return module, ShardedAdadelta(module.parameters())


@pytest.mark.parametrize(
    ("extra", "note", "option", "words"),
    [
        (Odd(), 1, 1, "extra holds a pickle with code in it: .*Odd"),
        (lambda: 0, 1, 1, "extra cannot be saved: .*lambda"),
        (1, Odd(), 1, "model._extra_state holds a pickle with code in it: .*Odd"),
        (1, {"a": [np.float32(1)]}, 1, "model._extra_state.a holds a pickle with code in it"),
        (1, {"a": [{2: 3}]}, 1, r"model._extra_state.a.0 cannot be saved: its key 2 is int"),
        (1, 1, {0.5: 3}, r"optimizer.param_groups.0.option cannot be saved: its key 0.5 is float"),
        (1, 1, Odd(), r"optimizer.param_groups.0.option holds a pickle with code in it: .*Odd"),
    ],
)
@pytest.mark.parametrize("save", [save_checkpoint, async_save_checkpoint])
def test_what_could_not_be_read_again_is_not_saved(tmp_path, save, extra, note, option, words):
    module, optimizer = noted(note)
    optimizer.param_groups[0]["option"] = option
    with pytest.raises(TypeError, match=words):
        save(tmp_path / "a", module, optimizer, extra=extra)
    assert os.listdir(tmp_path) == []


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantized_buffer_is_refused(tmp_path):
    module, optimizer = noted(1)
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    module.register_buffer("quantized", quantized)
    with pytest.raises(TypeError, match=r"model\.quantized cannot be saved: it is quantized"):
        save_checkpoint(tmp_path / "a", module, optimizer)
    assert os.listdir(tmp_path) == []


def test_a_learning_rate_of_numpy_is_a_number(tmp_path):
    module, optimizer = noted(1)
    optimizer.param_groups[0]["lr"] = np.float64(0.3)
    save_checkpoint(tmp_path / "a", module, optimizer)
    module, optimizer = noted(1)
    load_checkpoint(tmp_path / "a", module, optimizer)
    assert type(optimizer.param_groups[0]["lr"]) is float
    assert optimizer.param_groups[0]["lr"] == 0.3


@pytest.mark.parametrize("cls", [torch.optim.Adadelta, Adadelta, ShardedAdadelta])
def test_what_is_written_behind_training_is_the_moment_of_the_call(tmp_path, monkeypatch, cls):
    monkeypatch.chdir(tmp_path)
    module, optimizer = build(cls=cls)
    saving = async_save_checkpoint("runs/a", module, optimizer, extra={"epoch": 1})
    monkeypatch.chdir("/")
    train(module, optimizer, [7])
    optimizer.param_groups[0]["lr"].fill_(9)
    optimizer.param_groups[1]["lr"] = 9
    optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(2)))]})
    assert saving.result() == tmp_path / "runs" / "a"
    got = build(seed=1, steps=1, cls=cls)
    assert load_checkpoint(tmp_path / "runs" / "a", *got).extra == {"epoch": 1}
    assert_same(got, build(cls=cls))


def test_the_manifest_has_what_the_optimizer_has(tmp_path):
    module, optimizer = build(cls=ShardedAdadelta)
    path = save_checkpoint(tmp_path / "a", module, optimizer)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["optimizer"] == "ShardedAdadelta"
    assert manifest["world_size"] == 1
    assert manifest["parameters"]["brain"] == {"shape": [6, 5], "dtype": "torch.bfloat16"}
    names = [name for name, _ in module.named_parameters()]
    assert [group["params"] for group in manifest["groups"]] == [names[::2], names[1::2]]
    assert [group["lr"] for group in manifest["groups"]] == [pytest.approx(0.7), 0.5]


def test_the_filters_of_warnings_are_left_alone(tmp_path):
    module = nn.Linear(700, 700)
    optimizer = Adadelta(module.parameters())
    with warnings.catch_warnings():
        for i in range(5):
            saving = async_save_checkpoint(tmp_path / f"{i}", module, optimizer)
            while not any(tmp_path.glob(f".{i}.*/*")):
                assert not saving.done()
            warnings.filterwarnings("ignore", f"set while it was written {i}")
            mine = warnings.filters[0]
            saving.result()
            assert warnings.filters[0] is mine


SCRIPT = """
import resource, signal, sys
import torch
from adadelta_dist import Adadelta, async_save_checkpoint

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = torch.nn.Linear(100, 100)
optimizer = Adadelta(model.parameters())
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))
async_save_checkpoint(sys.argv[1], model, optimizer)
"""


def test_a_save_that_failed_last_is_told_of_when_the_program_ends(tmp_path):
    """Nobody asked for its result, and no other save followed."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "a")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "a could not be written: rank 0 had OSError" in done.stderr
    assert "CheckpointError" in done.stderr
    assert os.listdir(tmp_path) == []


def test_an_error_behind_training_is_raised_once(tmp_path):
    module, optimizer = noted(1)
    (tmp_path / "file").write_text("")
    failing = async_save_checkpoint(tmp_path / "file" / "a", module, optimizer)
    with pytest.raises(CheckpointError, match="the asynchronous save before this failed: path"):
        save_checkpoint(tmp_path / "b", module, optimizer)
    assert not (tmp_path / "b").exists()
    save_checkpoint(tmp_path / "b", module, optimizer)
    assert isinstance(failing.exception(), CheckpointError)


@pytest.mark.parametrize("keep", [0, -1])
def test_keep_must_keep_something(tmp_path, keep):
    with pytest.raises(ValueError, match=f"keep must be at least 1.*got {keep}"):
        save_checkpoint(tmp_path / "a", *noted(1), keep=keep)


def test_a_dangling_link_is_in_the_way_too(tmp_path):
    (tmp_path / "a").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="a exists: remove it, or give another name"):
        save_checkpoint(tmp_path / "a", *noted(1))


def test_a_path_that_somebody_else_makes_meanwhile_is_left_to_them(tmp_path):
    module = nn.Linear(700, 700)
    saving = async_save_checkpoint(tmp_path / "a", module, Adadelta(module.parameters()))
    while not any(tmp_path.glob(".a.*/*")):
        assert not saving.done()
    (tmp_path / "a").mkdir()
    with pytest.raises(FileExistsError, match="a exists: remove it, or give another name"):
        saving.result()
    assert [f.name for f in tmp_path.rglob("*")] == ["a"]
    with pytest.raises(CheckpointError, match="the asynchronous save before this failed"):
        save_checkpoint(tmp_path / "b", module, Adadelta(module.parameters()))


def test_each_rank_has_its_own_share_of_what_is_equal_and_rank_0_the_rest():
    module = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Linear(30, 20))
    optimizer = torch.optim.Adadelta(module.parameters())
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    whole = named_state(module, optimizer)
    parameters = dict(module.named_parameters())
    shares = [_own_share(whole, parameters, Group(None, rank, 3)) for rank in range(3)]
    owners = Counter(name for share in shares for name in share["model"])
    assert owners == Counter(whole["model"].keys())  # each once
    assert {"1.running_mean", "1.running_var"} <= shares[0]["model"].keys()
    entries = Counter(
        (name, key)
        for share in shares
        for name, entry in share["optimizer"]["state"].items()
        for key in entry
    )
    assert entries == Counter((n, k) for n in parameters for k in ("step", *ACCUMULATORS))
    held = [sum(t.nbytes for t in tensors(share)) for share in shares]
    assert max(held) - min(held) < max(p.nbytes for p in module.parameters())


def tensors(share):
    entries = share["optimizer"]["state"].values()
    return [*share["model"].values(), *(value for entry in entries for value in entry.values())]

"""Which checkpoints of a run there are, which is the newest, and which go."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from adadelta_dist import (
    Adadelta,
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from adadelta_dist.checkpoints.history import checkpoints_in, prune


def save(path, saved_at=None, keep=None):
    module = nn.Linear(2, 1)
    save_checkpoint(path, module, Adadelta(module.parameters()), extra=path.name, keep=keep)
    if saved_at:
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | {"saved_at": saved_at}))
    return path


def test_the_order_is_that_of_saving_whatever_the_names_say(tmp_path):
    paths = [save(tmp_path / name) for name in ("step-9", "step-10", "a", "step-1")]
    assert checkpoints_in(tmp_path) == paths
    assert latest_checkpoint(str(tmp_path)) == paths[-1]


def spoil(path, what):
    match what:
        case "no manifest":
            (path / "manifest.json").unlink()
        case "no sums":
            (path / "SHA256SUMS").unlink()
        case "a damaged manifest":
            os.truncate(path / "manifest.json", 20)
        case "a manifest of no text":
            (path / "manifest.json").write_bytes(b"\xff\xfe")
        case "a later format":
            (path / "manifest.json").write_text('{"format": 2}')
        case "an incomplete name":
            path.rename(path.with_name(".b.0123456789abcdef.incomplete"))
        case "a file":
            path.rename(path.with_name("b.away"))
            path.write_text("")


@pytest.mark.parametrize(
    "what",
    [
        "no manifest",
        "no sums",
        "a damaged manifest",
        "a manifest of no text",
        "a later format",
        "an incomplete name",
    ],
)
def test_what_is_no_complete_checkpoint_does_not_count(tmp_path, what):
    older, newer = save(tmp_path / "a"), save(tmp_path / "b")
    assert latest_checkpoint(tmp_path) == newer
    spoil(newer, what)
    assert checkpoints_in(tmp_path) == [older]
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert latest_checkpoint(tmp_path) == older


def test_a_folder_without_any_has_no_newest(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(FileNotFoundError):
        latest_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("keep", "left"), [(1, "d"), (2, "cd"), (3, "bcd"), (4, "abcd"), (9, "abcd")]
)
def test_the_newest_are_kept(tmp_path, keep, left):
    paths = [save(tmp_path / name) for name in "abcd"]
    dead = tmp_path / ".x.0123456789abcdef.incomplete"
    dead.mkdir()
    (tmp_path / ".hidden").mkdir()
    prune(paths[-1], keep)
    assert sorted(os.listdir(tmp_path)) == [".hidden", *left]


def test_what_was_just_saved_stays_though_the_clock_was_set_back(tmp_path):
    future = save(tmp_path / "a", "2999-01-01T00:00:00.000000+00:00")
    save(tmp_path / "b", keep=2)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    save(tmp_path / "c", keep=2)
    assert sorted(os.listdir(tmp_path)) == ["a", "c"]
    save(tmp_path / "d", keep=1)
    assert os.listdir(tmp_path) == ["d"]
    assert not future.exists()


def test_links_are_neither_counted_nor_removed_but_are_followed(tmp_path):
    runs = tmp_path / "runs"
    for name in "abc":
        save(runs / name, keep=2)
        (runs / "latest").unlink(missing_ok=True)
        (runs / "latest").symlink_to(name)
    assert sorted(os.listdir(runs)) == ["b", "c", "latest"]
    (tmp_path / "link").symlink_to(runs)
    module = nn.Linear(2, 1)
    optimizer = Adadelta(module.parameters())
    for path in (runs, tmp_path / "link", runs / "latest"):
        with torch.no_grad():
            module.weight.zero_()
        assert load_checkpoint(path, module, optimizer).extra == "c"
        assert module.weight.any()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c").symlink_to(runs / "c")
    assert latest_checkpoint(tmp_path / "elsewhere") == tmp_path / "elsewhere" / "c"


def test_a_folder_that_may_not_be_read_is_passed_over(tmp_path, monkeypatch):
    paths = [save(tmp_path / name) for name in "ab"]
    (tmp_path / "lost+found").mkdir()
    is_file = Path.is_file

    def refused(path):
        if path.parent.name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refused)
    assert checkpoints_in(tmp_path) == paths
    save(tmp_path / "c", keep=1)
    assert latest_checkpoint(tmp_path) == tmp_path / "c"


def test_what_cannot_be_removed_is_no_failure_to_write(tmp_path, monkeypatch):
    save(tmp_path / "a")
    rename = Path.rename

    def refused(path, target):
        if path.name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(CheckpointError, match=r"b is complete, but .* newest 1 could be removed"):
        save(tmp_path / "b", keep=1)
    assert latest_checkpoint(tmp_path) == tmp_path / "b"

"""What cannot be saved or loaded is an error on all ranks, and changes nothing."""

import copy
import os
import resource
import signal
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_checkpoint import resume, run, save
from test_dcp import assert_equal, build, controls, torchs_own_warning, whole

from adadelta_dist import (
    CheckpointError,
    RankError,
    async_save_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from adadelta_dist.checkpoints.named_state import named_state

ADAM = {"step": 0.0, "exp_avg": torch.zeros(5, 7), "exp_avg_sq": torch.zeros(5, 7)}


def failing_save(rank, path, what):
    module, optimizer = build(25, [0])
    extra, keep = None, None
    if what == "extra" and rank == 1:
        extra = {"f": failing_save}
    if what == "keep":
        keep = 0
    if what == "names" and rank == 1:
        path = path.with_name("b")
    if what == "model":
        module = torch.nn.Linear(2, 2)
    if what == "optimizer":
        optimizer = torch.optim.SGD(module.parameters())
    try:
        save_checkpoint(path, module, optimizer, extra=extra, keep=keep)
    except (CheckpointError, RankError, OSError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("extra", "extra holds a pickle with code in it"),
        ("keep", "keep must be at least 1"),
        ("names", "the ranks disagree. Rank 0 has path="),
        ("model", "is in the optimizer and not in the model"),
        ("optimizer", "SGD, wanted ShardedAdadelta, Adadelta or torch.optim.Adadelta"),
        ("exists", "exists: remove it, or give another name"),
        ("file", "could not be made: [Errno 17] File exists"),
        ("read-only", "could not be made: [Errno "),
    ],
)
def test_a_save_that_cannot_be_fails_on_all_ranks_and_writes_nothing(pool, tmp_path, what, words):
    path = tmp_path / "a"
    if what == "exists":
        path.mkdir()
    if what == "file":
        path.write_text("")
        path = path / "b"
    if what == "read-only":  # for whoever runs this, root too
        path = Path("/proc/self/attr/a")
    before = sorted(tmp_path.rglob("*"))
    for message in pool(2).run(failing_save, path, what):
        assert words in message
    assert sorted(tmp_path.rglob("*")) == before


def no_space(rank, path, asynchronous, extra=None):
    """A limit to file sizes fails as a full disk does: in the middle of a write."""
    module, optimizer = build(25, [0])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = None
    try:
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        if asynchronous:
            async_save_checkpoint(path, module, optimizer, extra=extra)
            load_checkpoint(path, module, optimizer)  # where the error comes out
        else:
            save_checkpoint(path, module, optimizer, extra=extra)
    except (CheckpointError, RankError) as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return message


@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_space_left_leaves_the_checkpoint_before(pool, tmp_path, asynchronous):
    pool(2).run(save, tmp_path / "a", 25)
    for message in pool(2).run(no_space, tmp_path / "b", asynchronous):
        assert "could not be written: rank 1 had OSError" in message
        assert ("the asynchronous save before this failed" in message) == asynchronous
    assert [f.name for f in tmp_path.iterdir()] == ["a"]
    run(pool, 2, resume, tmp_path)


def load_badly(rank, path, strict, bucket_mb=25):
    module, optimizer = build(bucket_mb, [7])
    before = copy.deepcopy((module.state_dict(), whole(module, optimizer)))
    try:
        loaded = load_checkpoint(path, module, optimizer, strict=strict)
        return loaded.skipped, whole(module, optimizer)
    except (CheckpointError, RankError, OSError, ValueError) as error:
        assert_equal(module.state_dict(), before[0])
        assert_equal(whole(module, optimizer), before[1])
        return f"{type(error).__name__}: {error}"


def damage(folder, what):
    """Spoil a checkpoint in one way; returns what to load."""
    data = sorted(folder.glob("__*"))[-1]
    if what == "truncated":
        os.truncate(data, data.stat().st_size - 1)
    elif what == "flipped":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 4
        data.write_bytes(content)
    elif what == "file missing":
        data.unlink()
    elif what == "file too much":
        (folder / "extra-9.pt").write_text("")
    elif what == "half-written":
        (folder / ".metadata").unlink()
    elif what == "no sums":
        (folder / "SHA256SUMS").unlink()
    elif what == "not there":
        return folder / "b"
    return folder


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("truncated", "has changed: its checksum is another"),
        ("flipped", "has changed: its checksum is another"),
        ("file missing", "is missing"),
        ("file too much", "extra-9.pt is not listed"),
        ("half-written", "is no complete checkpoint, and holds none"),
        ("no sums", "SHA256SUMS is missing"),
        ("not there", "there is no such folder"),
    ],
)
def test_a_damaged_checkpoint_is_an_error_on_all_ranks(pool, tmp_path, what, words):
    pool(2).run(save, tmp_path / "older", 25)
    pool(2).run(save, tmp_path / "a", 25)
    path = damage(tmp_path / "a", what)
    for message in pool(3).run(load_badly, path, False):
        assert words in message
        if "is damaged: " in message:
            assert f"{tmp_path / 'older'} is the newest of the others" in message


def save_other(path, edit):
    """A plain folder of `torch.distributed.checkpoint` that fits, but for `edit`."""
    module, optimizer = build(None, [0, 1])
    named = copy.deepcopy(named_state(module, optimizer))
    edit(named)
    with torchs_own_warning():
        dcp.save(named, checkpoint_id=path)


def adam(named):
    named["optimizer"]["state"]["matrix"] = ADAM


def missing(named):
    del named["model"]["matrix"]
    del named["optimizer"]["state"]["matrix"]
    for group in named["optimizer"]["param_groups"]:
        group["params"] = [name for name in group["params"] if name != "matrix"]


def extra(named):
    named["model"]["stranger"] = torch.ones(3)
    named["optimizer"]["state"]["stranger"] = dict(named["optimizer"]["state"]["matrix"])
    named["optimizer"]["param_groups"][0]["params"].append("stranger")


def shapes(named):
    named["model"]["matrix"] = torch.ones(5, 8)
    named["optimizer"]["state"]["matrix"]["square_avg"] = torch.ones(5, 8)


def groups(named):
    named["optimizer"]["param_groups"].append(
        named["optimizer"]["param_groups"][0] | {"params": []}
    )


def no_groups(named):
    del named["optimizer"]["param_groups"]


@pytest.mark.parametrize(
    ("edit", "lines"),
    [
        (missing, ["matrix is not in the checkpoint",
                   "optimizer state of matrix is not in the checkpoint",
                   "no group of the checkpoint has the parameters of group 0"]),
        (extra, ["stranger is in the checkpoint alone",
                 "optimizer state of stranger is in the checkpoint alone",
                 "no group of the checkpoint has the parameters of group 0"]),
        (shapes, ["matrix has shape (5, 8) in the checkpoint, (5, 7) here",
                  "square_avg of matrix has shape (5, 8) in the checkpoint, (5, 7) here"]),
        (groups, ["the checkpoint has 3 parameter groups, the optimizer 2"]),
    ],
)  # fmt: skip
def test_what_does_not_match_is_refused_or_listed(pool, tmp_path, edit, lines):
    save_other(tmp_path / "a", edit)
    for message in pool(2).run(load_badly, tmp_path / "a", True):
        assert "does not match: " + "; ".join(lines) in message
        assert "strict=False loads what matches" in message
    saved = controls()[0]
    own = pool(2).run(whole_of_build, 7)[0]
    touched = edit in (missing, shapes)
    for skipped, got in pool(2).run(load_badly, tmp_path / "a", False):
        assert list(skipped) == lines
        for key, value in got.items():
            stays = touched and "matrix" in key.split(".")
            want = own[key] if stays else saved.get(key, torch.zeros_like(value))
            assert torch.equal(value, want), key


def whole_of_build(rank, step):
    return whole(*build(25, [step]))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (adam, "this holds Adam state: exp_avg, exp_avg_sq; Adadelta's is square_avg, acc_delta"),
        (no_groups, "has no optimizer.param_groups: save"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_what_holds_no_adadelta_is_refused_either_way(pool, tmp_path, edit, words, strict):
    save_other(tmp_path / "a", edit)
    for message in pool(2).run(load_badly, tmp_path / "a", strict):
        assert words in message


MARK = os.path.join(tempfile.gettempdir(), "adadelta-dist-ran-code")


class Code:
    def __reduce__(self):
        return os.mkdir, (MARK,)


def code(named):
    named["optimizer"]["param_groups"][0]["lr"] = Code()


def code_in_model(named):
    named["model"]["matrix"] = [Code()]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (code, "optimizer.param_groups.0.lr holds a pickle with code in it: posix.mkdir"),
        (code_in_model, "matrix is a tensor on one side only"),  # and is never read
    ],
)
def test_code_in_a_pickle_does_not_run(pool, tmp_path, edit, words):
    save_other(tmp_path / "a", edit)
    for message in pool(2).run(load_badly, tmp_path / "a", True):
        assert words in message
    assert not os.path.exists(MARK)


def test_code_in_extra_does_not_run(pool, tmp_path):
    save_other(tmp_path / "a", lambda named: None)
    torch.save({"epoch": Code()}, tmp_path / "a" / "extra-0.pt")
    for message in pool(2).run(load_badly, tmp_path / "a", True):
        assert "extra-0.pt holds a pickle with code in it: posix.mkdir" in message
    assert not os.path.exists(MARK)

"""What cannot work is refused on every rank, with a reason and a remedy."""

import re

import pytest
import torch
from lightning_jobs import Job, fail, run

CASES = {
    "another optimizer": (
        Job(optimizer="SGD"),
        ["TypeError", "TypeError"],
        r"configure_optimizers: torch\.optim\.sgd\.SGD, and sharded_adadelta shards Adadelta alone",
    ),
    "another optimizer on one rank": (
        Job(optimizer="SGD on rank 1"),
        ["RankError", "TypeError"],
        r"torch\.optim\.sgd\.SGD",
    ),
    "no optimizer": (
        Job(optimizer="none"),
        ["TypeError", "TypeError"],
        "configure_optimizers returned None",
    ),
    "an error in configure_optimizers of one rank": (
        Job(optimizer="raises on rank 1"),
        ["RankError", "ZeroDivisionError"],
        "division by zero",
    ),
    "an optimizer over other ranks": (
        Job(optimizer="over one rank"),
        ["RuntimeError", "RuntimeError"],
        "a ShardedAdadelta over 1 of 2 ranks",
    ),
    "a name with a typo": (
        Job(strategy="sharded_adadelt"),
        ["ValueError", "ValueError"],
        "sharded_adadelt",
    ),
    "another kind of checkpoint": (
        Job(strategy={"checkpoint": "whole"}),
        ["ValueError", "ValueError"],
        "'full' or 'sharded', got 'whole'",
    ),
    "NCCL on CPUs": (
        Job(strategy={"process_group_backend": "nccl"}),
        ["ValueError", "ValueError"],
        "this Trainer uses CPUs",
    ),
    "no such checkpoint": (
        Job(resume="nowhere.ckpt"),
        ["FileNotFoundError", "FileNotFoundError"],
        "nowhere.ckpt",
    ),
}


def words(kind_and_message):
    return kind_and_message[1]


@pytest.mark.parametrize("case", CASES)
def test_every_rank_says_so(pool, case):
    job, kinds, message = CASES[case]
    raised = pool(2).run(fail, 2, job, deadline=30)
    assert [kind for kind, _ in raised] == kinds
    for text in map(words, raised):
        assert re.search(message, text), text


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_checkpoint_of_another_model(pool, tmp_path, kind):
    save = {"dirpath": str(tmp_path), "filename": "last"}
    pool(2).run(run, 2, Job(module="without bias", strategy={"checkpoint": kind}, save=save))
    for _, text in pool(2).run(fail, 2, Job(resume=str(tmp_path / "last.ckpt")), deadline=30):
        assert "head.bias" in text


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_checkpoint_of_other_optimizers(pool, tmp_path, kind):
    save = {"dirpath": str(tmp_path), "filename": "last"}
    pool(2).run(run, 2, Job(strategy={"checkpoint": kind}, save=save))
    job = Job(module="manual", resume=str(tmp_path / "last.ckpt"))
    for _, text in pool(2).run(fail, 2, job, deadline=30):
        assert "the state of 1 optimizers, and configure_optimizers returned 2" in text


def test_a_file_that_is_no_checkpoint(pool, tmp_path):
    torch.save([1, 2, 3], tmp_path / "list.ckpt")
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    for name in ("list.ckpt", "text.ckpt"):
        raised = pool(2).run(fail, 2, Job(resume=str(tmp_path / name)), deadline=30)
        assert len(raised) == 2


def test_the_ranks_go_on_after_an_error(pool):
    pool(2).run(fail, 2, Job(optimizer="SGD"), deadline=30)
    zero, _ = pool(2).run(run, 2, Job())
    assert len(zero["losses"]) == 16

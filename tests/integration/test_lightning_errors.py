"""What cannot work is refused on every rank, with a reason and a remedy."""

import re

import lightning.pytorch as pl
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
        "configure_optimizers returned no optimizer",
    ),
    "an empty list of optimizers": (
        Job(optimizer="empty list"),
        ["TypeError", "TypeError"],
        "configure_optimizers returned no optimizer",
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
        "this job uses CPUs",
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
    words = {"full": 'Missing key(s) in state_dict: "head.bias"', "sharded": "lacks ['head.bias']"}
    for _, text in pool(2).run(fail, 2, Job(resume=str(tmp_path / "last.ckpt")), deadline=30):
        assert words[kind] in text


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_checkpoint_of_other_optimizers(pool, tmp_path, kind):
    save = {"dirpath": str(tmp_path), "filename": "last"}
    pool(2).run(run, 2, Job(strategy={"checkpoint": kind}, save=save))
    job = Job(module="manual", resume=str(tmp_path / "last.ckpt"))
    for _, text in pool(2).run(fail, 2, job, deadline=30):
        assert "the state of 1 optimizers, and configure_optimizers returned 2" in text


class ReadsGradients(pl.Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        module.head.weight.grad.norm()


def test_gradients_that_stage_2_has_freed(pool):
    job = Job(strategy="sharded_adadelta_zero2", trainer={"callbacks": [ReadsGradients()]})
    for kind, text in pool(2).run(fail, 2, job, deadline=30):
        assert kind == "AttributeError"
        assert "has no attribute 'norm'. If that was a gradient: ZeRO stage 2 frees" in text
    pool(2).run(run, 2, Job(trainer={"callbacks": [ReadsGradients()]}))


def test_a_module_that_may_look_for_them_is_warned(pool):
    """As an error, for here warnings are."""
    job = Job(strategy="sharded_adadelta_zero2", module="clips by itself")
    for kind, text in pool(2).run(fail, 2, job, deadline=30):
        assert kind == "UserWarning"
        assert text.startswith("configure_gradient_clipping: ZeRO stage 2 frees")
    pool(2).run(run, 2, Job(module="clips by itself", trainer={"gradient_clip_val": 0.05}))


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

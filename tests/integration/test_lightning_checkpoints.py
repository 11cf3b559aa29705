"""Checkpoints that go on at another world size, and in stock Lightning."""

import subprocess
import sys
import tempfile
import warnings

import numpy as np
import pytest
import torch
from lightning_jobs import (
    REMARKS,
    Job,
    become_rank,
    loader,
    make_module,
    make_trainer,
    run,
    run_alone,
)
from ranks import RankFailure

# In mid-epoch: an epoch has 8 steps.
SAVE = {"every_n_train_steps": 3, "save_top_k": -1, "filename": "{step}"}
WHOLE = 16


def save_at(folder):
    return SAVE | {"dirpath": str(folder)}


def curve(ranks):
    return np.mean([rank["losses"] for rank in ranks], axis=0)


@pytest.fixture(scope="module")
def uninterrupted():
    return run_alone(Job(scheduler="step"))["losses"]


@pytest.fixture(scope="module", params=["full", "sharded"])
def saved(request, pool, tmp_path_factory):
    """What two ranks have saved at step 12 of 16."""
    folder = tmp_path_factory.mktemp(request.param)
    job = Job(strategy={"checkpoint": request.param}, scheduler="step", save=save_at(folder))
    pool(2).run(run, 2, job)
    return folder / "step=12.ckpt"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_it_goes_on_at_another_world_size(pool, saved, uninterrupted, world_size):
    ranks = pool(world_size).run(run, world_size, Job(scheduler="step", resume=str(saved)))
    assert ranks[0]["step"] == WHOLE
    np.testing.assert_allclose(curve(ranks), uninterrupted[12:], rtol=1e-6)


def consolidated(path):
    """One file, made by Lightning's own command where ranks have written a folder."""
    if path.is_file():
        return path
    file = path.with_suffix(".consolidated")
    if not file.exists():
        command = "lightning.pytorch.utilities.consolidate_checkpoint"
        arguments = [str(path), "--output_file", str(file)]
        subprocess.run([sys.executable, "-m", command, *arguments], check=True)
    return file


def test_stock_lightning_goes_on_with_it(saved, uninterrupted):
    resumed = run_alone(Job(scheduler="step", resume=str(consolidated(saved))))
    np.testing.assert_allclose(resumed["losses"], uninterrupted[12:], rtol=1e-6)


def test_one_file_of_either_kind_goes_on_sharded(pool, saved, uninterrupted):
    job = Job(scheduler="step", resume=str(consolidated(saved)))
    np.testing.assert_allclose(curve(pool(2).run(run, 2, job)), uninterrupted[12:], rtol=1e-6)


@pytest.mark.parametrize(
    ("strategy", "optimizer"), [("auto", "torch"), ("ddp", "torch"), ("ddp", "Sharded averaged")]
)
def test_a_stock_checkpoint_goes_on_sharded(pool, tmp_path, uninterrupted, strategy, optimizer):
    job = Job(strategy=strategy, optimizer=optimizer, scheduler="step", save=save_at(tmp_path))
    if strategy == "auto":
        run_alone(job)
    else:
        pool(2).run(run, 2, job)
    job = Job(scheduler="step", resume=str(tmp_path / "step=12.ckpt"))
    np.testing.assert_allclose(curve(pool(2).run(run, 2, job)), uninterrupted[12:], rtol=1e-6)


@pytest.mark.parametrize("world_size", [1, 3])
def test_it_goes_on_in_stock_ddp_with_the_sharded_optimizer(pool, saved, uninterrupted, world_size):
    """Lightning loads the file on every rank there, and the optimizer takes its slices."""
    path = str(consolidated(saved))
    job = Job(strategy="ddp", optimizer="Sharded averaged", scheduler="step", resume=path)
    ranks = pool(world_size).run(run, world_size, job)
    np.testing.assert_allclose(curve(ranks), uninterrupted[12:], rtol=1e-6)


def evaluate(rank, world_size, path):
    job = Job(strategy="auto" if rank is None else {})
    if rank is not None:
        become_rank(rank, world_size)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        for remark in REMARKS:
            warnings.filterwarnings("ignore", message=remark)
        module, data = make_module(job, world_size), loader(world_size)
        trainer = make_trainer(job, world_size, folder)
        return trainer.test(module, data, ckpt_path=path)[0]["test_loss"]


def test_a_checkpoint_is_evaluated(pool, saved):
    alone = evaluate(None, 1, str(consolidated(saved)))
    for loss in pool(2).run(evaluate, 2, str(saved)):
        assert loss == pytest.approx(alone, rel=1e-6)


def test_a_full_file_is_what_torch_saves(saved):
    checkpoint = torch.load(consolidated(saved), weights_only=True)
    (state,) = checkpoint["optimizer_states"]
    assert set(state) == {"state", "param_groups"}
    entries = [state["state"][i] for group in state["param_groups"] for i in group["params"]]
    for entry in entries:
        assert set(entry) == {"step", "square_avg", "acc_delta"}
        assert entry["step"] == 12
    shapes = [tuple(entry["square_avg"].shape) for entry in entries]
    assert shapes == [(16, 20), (16,), (5, 16), (5,), (5, 20)]


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_two_optimizers(pool, tmp_path, kind):
    whole = run_alone(Job(module="manual"))["losses"]
    save = {"every_n_train_steps": 6, "save_top_k": -1, "dirpath": str(tmp_path)}
    strategy = {"checkpoint": kind}
    pool(2).run(run, 2, Job(module="manual", strategy=strategy, save=save | {"filename": "{step}"}))
    (path, *_) = sorted(tmp_path.iterdir())
    resumed = curve(pool(3).run(run, 3, Job(module="manual", resume=str(path))))
    np.testing.assert_allclose(resumed, whole[-len(resumed) :], rtol=1e-6)


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_running_statistics_go_on_as_those_of_rank_0(pool, tmp_path, kind):
    """They differ over the ranks when a checkpoint is written, in mid-epoch."""
    whole = pool(2).run(run, 2, Job(module="normalised"))[0]["state"]
    job = Job(module="normalised", strategy={"checkpoint": kind}, save=save_at(tmp_path))
    pool(2).run(run, 2, job)
    resumed = Job(module="normalised", resume=str(tmp_path / "step=12.ckpt"))
    state = pool(2).run(run, 2, resumed)[0]["state"]
    buffers = [name for name in whole if "running" in name or name == "seen"]
    assert len(buffers) == 3
    for name in buffers:
        np.testing.assert_allclose(state[name], whole[name], rtol=1e-6)


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_masters_are_made_where_there_are_none_and_never_dropped(pool, tmp_path, kind):
    saved = {}
    for precision in ("32-true", "bf16-true"):
        save = save_at(tmp_path / precision)
        job = Job(strategy={"checkpoint": kind}, save=save, trainer={"precision": precision})
        pool(2).run(run, 2, job)
        saved[precision] = str(tmp_path / precision / "step=12.ckpt")
    pool(2).run(run, 2, Job(resume=saved["32-true"], trainer={"precision": "bf16-true"}))
    with pytest.raises(RankFailure, match="would be dropped"):
        pool(2).run(run, 2, Job(resume=saved["bf16-true"], trainer={"precision": "32-true"}))


def test_a_link_to_a_folder_is_removed_and_the_folder_stays(tmp_path):
    from adadelta_dist.strategies import sharded_checkpoint

    folder, link = tmp_path / "step=1.ckpt", tmp_path / "last.ckpt"
    folder.mkdir()
    (folder / sharded_checkpoint._META).touch()
    link.symlink_to(folder)
    sharded_checkpoint.remove(link)
    assert not link.is_symlink()
    assert folder.exists()
    sharded_checkpoint.remove(folder)
    assert not folder.exists()

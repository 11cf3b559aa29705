"""Exceptions that end training: a checkpoint if every rank has one, and no waiting if not."""

import time
from datetime import timedelta

import lightning.pytorch as pl
import pytest
from lightning_jobs import Job, fail, run, run_script


class Stop(pl.Callback):
    """Raises in the middle of the second epoch, on every rank."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 11:
            raise KeyError("on purpose")


@pytest.mark.parametrize("saver", ["OnExceptionCheckpoint", "ModelCheckpoint"])
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_all_ranks_save_upon_an_exception_of_all(pool, tmp_path, kind, saver):
    if saver == "OnExceptionCheckpoint":
        callback = pl.callbacks.OnExceptionCheckpoint(str(tmp_path), "exception")
    else:
        callback = pl.callbacks.ModelCheckpoint(
            str(tmp_path), "exception", save_on_exception=True, every_n_epochs=9
        )
    arguments = {"callbacks": [Stop(), callback], "enable_checkpointing": True}
    raised = pool(2).run(fail, 2, Job(strategy={"checkpoint": kind}, trainer=arguments))
    assert [kind for kind, _ in raised] == ["KeyError", "KeyError"]
    zero, _ = pool(2).run(run, 2, Job(resume=str(tmp_path / "exception.ckpt")))
    assert zero["step"] == 16
    assert len(zero["losses"]) == 5
    assert zero["callbacks"] == [], "as given"


SCRIPT = """
import os, warnings
from datetime import timedelta
import torch, lightning.pytorch as pl
import adadelta_dist.strategies.lightning
from adadelta_dist.strategies import meeting

meeting.PATIENCE = timedelta(seconds=2)
warnings.filterwarnings("ignore", message=".*does not have many workers.*")

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 4)

    def training_step(self, batch, index):
        if index == 2 and self.global_rank == ALONE:
            raise KeyError("on purpose")
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adadelta(self.parameters())

trainer = pl.Trainer(
    strategy="sharded_adadelta", accelerator="cpu", devices=2, max_epochs=1, logger=False,
    enable_progress_bar=False, enable_model_summary=False,
    callbacks=[pl.callbacks.OnExceptionCheckpoint("saved"),
               pl.callbacks.ModelCheckpoint("saved", save_on_exception=True)],
)
trainer.fit(Net(), torch.utils.data.DataLoader(torch.randn(32, 8), batch_size=4))
"""


@pytest.mark.parametrize("alone", [0, 1])
def test_a_rank_alone_with_an_exception_ends_the_job(tmp_path, alone):
    """With the default timeout of the process group, which is half an hour."""
    finished = run_script(SCRIPT.replace("ALONE", str(alone)), tmp_path, timeout=120)
    assert finished.returncode != 0
    assert "KeyError: 'on purpose'" in finished.stderr
    assert f"rank {alone}: KeyError at step 2, not on all of the 2 ranks" in finished.stderr
    assert not (tmp_path / "saved").exists()


def meet(rank, names, waits):
    from adadelta_dist.strategies.meeting import all_meet

    time.sleep(waits[rank])
    start = time.monotonic()
    met = all_meet(names[rank], 2, timedelta(seconds=1))
    return met, time.monotonic() - start


def test_ranks_meet(pool):
    """One that comes too late is told at once."""
    ranks = pool(2)
    assert all(met for met, _ in ranks.run(meet, ["in time", "in time"], [0.0, 0.2]))
    (early, _), (late, waited) = ranks.run(meet, ["late", "late"], [0.0, 4.0])
    assert (early, late) == (False, False)
    assert waited < 0.5
    assert not any(met for met, _ in ranks.run(meet, ["2", "3"], [0.0, 0.0]))

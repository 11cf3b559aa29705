"""Ranks that the Trainer itself starts, and what ModelCheckpoint keeps."""

import lightning.pytorch as pl
import pytest
from lightning_jobs import Job, run, run_script

SCRIPT = """
import sys, warnings
warnings.filterwarnings("ignore")
import torch, lightning.pytorch as pl
from adadelta_dist.strategies.lightning import ShardedAdadeltaStrategy

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 4)

    def training_step(self, batch, index):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adadelta(self.parameters(), rho=0.95)

if __name__ == "__main__":
    data = torch.utils.data.DataLoader(torch.randn(16, 8), batch_size=4)
    for start_method in ("fork", "spawn"):
        net = Net()
        before = net.layer.weight.detach().clone()
        trainer = pl.Trainer(
            strategy=ShardedAdadeltaStrategy(start_method=start_method),
            accelerator="cpu", devices=2, max_epochs=2, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )
        trainer.fit(net, data)
        # The weights came back from the process that trained them.
        assert not torch.equal(net.layer.weight, before)
        print(start_method)
"""


def test_fork_and_spawn(tmp_path):
    finished = run_script(SCRIPT, tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.split() == ["fork", "spawn"]


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_model_checkpoint_keeps_the_best_and_the_last(pool, tmp_path, kind):
    save = {"save_top_k": 2, "monitor": "validation_loss", "save_last": True}
    save |= {"dirpath": str(tmp_path), "filename": "{epoch}"}
    job = Job(strategy={"checkpoint": kind}, save=save, trainer={"max_epochs": 4})
    pool(2).run(run, 2, job)
    # Validation improves each time, so the last two are the best; the others are gone.
    assert {path.name for path in tmp_path.iterdir()} == {
        "epoch=2.ckpt",
        "epoch=3.ckpt",
        "last.ckpt",
    }
    assert all(path.is_dir() == (kind == "sharded") for path in tmp_path.iterdir())
    zero, _ = pool(2).run(
        run, 2, Job(resume=str(tmp_path / "last.ckpt"), trainer={"max_epochs": 5})
    )
    assert zero["epoch"] == 5
    assert len(zero["losses"]) == 8


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_an_older_checkpoint_is_replaced_whatever_it_is(pool, tmp_path, kind):
    other = {"full": "sharded", "sharded": "full"}[kind]
    save = {"dirpath": str(tmp_path), "filename": "one", "enable_version_counter": False}
    for form in (other, kind, kind):
        pool(2).run(run, 2, Job(strategy={"checkpoint": form}, save=save))
    (path,) = tmp_path.iterdir()
    assert path.is_dir() == (kind == "sharded")


def test_early_stopping(pool):
    stop = pl.callbacks.EarlyStopping("validation_loss", patience=1, min_delta=100.0)
    ranks = pool(2).run(run, 2, Job(trainer={"callbacks": [stop], "max_epochs": 9}))
    assert [rank["epoch"] for rank in ranks] == [2, 2]

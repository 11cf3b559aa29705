"""The same for those who have `pytorch_lightning`, whose classes are not those of `lightning`."""

from lightning_jobs import run_script

SCRIPT = """
import os, sys, warnings
warnings.filterwarnings("ignore")
import torch, pytorch_lightning as pl
import adadelta_dist.strategies.fabric, adadelta_dist.strategies.lightning
from adadelta_dist.strategies import callbacks
from adadelta_dist.strategies.lightning import ShardedAdadeltaStrategy
from lightning_fabric import Fabric

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(8, 4)

    def training_step(self, batch, index):
        loss = self.layer(batch).square().mean()
        self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch, index):
        self.log("score", self.layer(batch).square().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.Adadelta(self.parameters(), rho=0.95)

def train(strategy, devices, epochs, path=None, batch_size=2, watch=()):
    rows = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    rank = int(os.environ.get("LOCAL_RANK", 0)) if devices > 1 else 0
    sampler = torch.utils.data.DistributedSampler(rows, devices, rank, shuffle=False)
    data = torch.utils.data.DataLoader(rows, batch_size=batch_size, sampler=sampler)
    trainer = pl.Trainer(
        strategy=strategy, accelerator="cpu", devices=devices, max_epochs=epochs, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        gradient_clip_val=0.1, callbacks=list(watch), log_every_n_steps=1,
        use_distributed_sampler=False,
    )
    net = Net()
    trainer.fit(net, data, data, ckpt_path=path)
    return trainer, net.layer.weight.detach()

watch = [callbacks.AdadeltaMonitor(1), callbacks.StepTimer(1), callbacks.ShardReport(),
         callbacks.EpsDecay("score", min_delta=9.0)]
trainer, _ = train(ShardedAdadeltaStrategy(checkpoint="sharded"), 2, 1, watch=watch)
assert type(trainer.optimizers[0]).__name__ == "ShardedAdadelta"
assert watch[0].latest["adadelta/gradient_norm"] > 0 < watch[1].latest["step/update_ms"]
trainer.save_checkpoint("folder.ckpt")
trainer, _ = train("sharded_adadelta_zero2", 2, 2, "folder.ckpt")
trainer.save_checkpoint("file.ckpt")
trainer, ours = train("sharded_adadelta", 2, 3, "file.ckpt")

fabric = Fabric(accelerator="cpu", devices=2, strategy="sharded_adadelta")
fabric.launch()
model = torch.nn.Linear(8, 4)
model, optimizer = fabric.setup(model, torch.optim.Adadelta(model.parameters()))
fabric.backward(model(torch.randn(4, 8)).square().mean())
assert fabric.clip_gradients(model, optimizer, max_norm=1.0) > 0
optimizer.step()

assert not any(name.split(".")[0] == "lightning" for name in sys.modules)
if trainer.global_rank == 0:
    _, alone = train("auto", 1, 3, batch_size=4)
    torch.testing.assert_close(ours, alone, rtol=1e-6, atol=1e-7)
    print("equal")
"""


def test_all_of_it_works_with_pytorch_lightning(tmp_path):
    finished = run_script(SCRIPT, tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.endswith("equal\n")

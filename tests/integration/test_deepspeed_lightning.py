"""Lightning's own DeepSpeedStrategy with our JSON, after `register()`.

It insists on CUDA in three places; `OnCpu` overrides those and nothing else.
"""

import os
import warnings

import deepspeed_jobs as jobs
import pytest
import torch
from ranks import Ranks
from torch.utils.data import DataLoader, Dataset

STEPS = 4
DEADLINE = 240.0

REMARKS = (  # Lightning's, on jobs as small as these
    ".*does not have many workers.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    "When saving the DeepSpeed Stage 3 checkpoint, each worker will save a shard.*",
)


class Batches(Dataset):
    """This rank's share of each global batch, as one item."""

    def __init__(self, rank, world_size):
        self.rank, self.world_size = rank, world_size

    def __len__(self):
        return STEPS

    def __getitem__(self, step):
        return next(jobs.shares(step, self.rank, self.world_size, 1))


def fit(rank, world_size, stages, folder):
    jobs.prepare(rank, world_size)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for remark in REMARKS:
        warnings.filterwarnings("ignore", message=remark)
    import deepspeed
    import lightning.pytorch as pl
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy

    from adadelta_dist.strategies.callbacks import (
        AdadeltaMonitor,
        EpsDecay,
        ShardReport,
        StepTimer,
    )
    from adadelta_dist.strategies.deepspeed import register, unregister

    class OnCpu(DeepSpeedStrategy):
        def setup_environment(self):
            Strategy.setup_environment(self)  # without the question for CUDA
            self.setup_distributed()

        def setup_distributed(self):
            self.set_world_ranks()
            self._init_deepspeed_distributed()

        def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
            parameters = [p for p in model.parameters() if p.requires_grad]
            return deepspeed.initialize(
                config=self.config,
                model=model,
                model_parameters=parameters,
                optimizer=optimizer,
                lr_scheduler=lr_scheduler,
                dist_init_required=False,
            )[:2]

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = jobs.network()

        def training_step(self, batch, _):
            inputs, targets = batch
            loss = torch.nn.functional.mse_loss(self.net(inputs), targets)
            self.log("loss", loss)
            return loss

        def validation_step(self, batch, _):
            self.log("score", 1.0, sync_dist=True)

        def configure_optimizers(self):
            raise AssertionError("the optimizer is named in the JSON")

    class Losses(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.seen.append(outputs["loss"].item())

    class Environment(LightningEnvironment):
        creates_processes_externally = True

    results = {}
    register()
    try:
        for stage in stages:
            config = jobs.config(stage)
            del config["train_batch_size"], config["gradient_accumulation_steps"]
            config["train_micro_batch_size_per_gpu"] = jobs.BATCH // world_size
            strategy = OnCpu(config=config)
            losses, monitor = Losses(), AdadeltaMonitor(every_n_steps=1)
            timer, report = StepTimer(every_n_steps=1), ShardReport()
            decay = EpsDecay("score")  # the second of two equal validations is no better
            saver = ModelCheckpoint(f"{folder}/{stage}", filename="last", save_top_k=-1)
            trainer = pl.Trainer(
                accelerator="cpu",
                devices=world_size,
                strategy=strategy,
                plugins=[Environment()],
                max_epochs=1,
                callbacks=[losses, saver, monitor, timer, report, decay],
                val_check_interval=STEPS // 2,
                num_sanity_val_steps=0,
                use_distributed_sampler=False,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            data = DataLoader(Batches(rank, world_size), batch_size=None)
            trainer.fit(Module(), data, data)
            kind = type(strategy.model.basic_optimizer).__name__
            files = sorted(os.listdir(f"{folder}/{stage}/last.ckpt"))
            eps = strategy.model.basic_optimizer.param_groups[0]["eps"]
            others = timer.latest, report.bytes_by_rank, report.replicated_bytes, eps
            results[stage] = losses.seen, kind, files, monitor.latest, others
    finally:
        unregister()
    return results


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    ranks = Ranks(2)
    try:
        folder = str(tmp_path_factory.mktemp("lightning"))
        return ranks.run(fit, 2, [0, 1, 2, 3], folder, deadline=DEADLINE)
    finally:
        ranks.close()


@pytest.mark.parametrize("stage", range(4))
def test_a_trainer_takes_the_steps_of_one_process(fitted, stage):
    losses = [sum(step) / 2 for step in zip(*(r[stage][0] for r in fitted), strict=True)]
    assert losses == pytest.approx(jobs.train_alone(STEPS), rel=1e-5)
    for _, kind, files, *_ in (of_rank[stage] for of_rank in fitted):
        assert kind == ("FusedAdadelta" if stage else "StageZeroAdadelta")
        assert "checkpoint" in files, "DeepSpeed's own folder"


def test_the_other_callbacks_work_there_too(fitted):
    for stage in range(4):
        zero, one = (of_rank[stage][4] for of_rank in fitted)
        assert zero[1:] == one[1:]
        timing, by_rank, replicated, eps = zero
        assert timing["step/update_ms"] > 0
        whole = fitted[0][0][4][2]  # what stage 0 says that a replicated state takes
        assert sum(by_rank) == pytest.approx(whole, rel=0.05), "a half each, and padding"
        assert replicated == pytest.approx(whole, rel=0.05)
        assert eps == pytest.approx(jobs.HYPERPARAMETERS["eps"] * 0.01)


def test_the_monitor_sees_the_same_at_every_stage(fitted):
    zero, one = fitted
    for stage in range(4):
        assert zero[stage][3] == one[stage][3]
        for key, value in zero[0][3].items():
            padded = stage and key.endswith("_rms")  # DeepSpeed's padding counts as elements
            assert zero[stage][3][key] == pytest.approx(value, rel=5e-3 if padded else 1e-4)
    assert zero[0][3]["adadelta/gradient_norm"] > 0
    assert zero[0][3]["adadelta/group_0/effective_lr"] > 0

"""What else a Trainer does with the strategy: loops, precisions, buffers, launchers, errors."""

import tempfile
import time
import warnings
from itertools import islice

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import LayerSync
from lightning_jobs import (
    REMARKS,
    Job,
    become_rank,
    counted,
    fail,
    loader,
    make_module,
    make_trainer,
    run,
    run_alone,
    run_script,
)
from torch import nn
from torch.utils.data import DataLoader


def test_all_loops_run_and_agree_with_one_process(pool):
    job = Job(then=("validate", "test", "predict"))
    alone = run_alone(job)
    ranks = pool(2).run(run, 2, job)
    for stage in ("validate", "test"):
        (metrics,) = alone["results"][stage]
        for rank in ranks:
            (theirs,) = rank["results"][stage]
            assert theirs == pytest.approx(metrics, rel=1e-6)
    for whole, *halves in zip(*(r["results"]["predict"] for r in [alone, *ranks]), strict=True):
        assert whole[0::2] == halves[0]
        assert whole[1::2] == halves[1]


def test_ranks_have_one_model_afterwards(pool):
    """Parameters, those that nobody trains, and buffers, which ranks change differently."""
    zero, one = pool(2).run(run, 2, Job())
    for name, value in zero["state"].items():
        np.testing.assert_array_equal(value, one["state"][name], err_msg=name)
    assert zero["state"]["seen"] == 16, "rank 0's count, a step at a time"


def averaged(rank):
    callback = EMAWeightAveraging(decay=0.5)
    return run(rank, 2, Job(module="normalised", trainer={"callbacks": [callback]}))["state"]


def test_averaged_buffers_are_rank_0s(pool):
    """The callback swaps others in when validation has begun, and leaves them in the end."""
    zero, one = pool(2).run(averaged)
    for name, value in zero.items():
        np.testing.assert_array_equal(value, one[name], err_msg=name)


class Uneven(torch.utils.data.IterableDataset):
    """Batches for rank 0 alone."""

    def __init__(self, rank):
        self.rank = rank

    def __iter__(self):
        return islice(iter(loader(2)), 2 if self.rank == 0 else 0)


def validated_on_one(rank):
    """How many batches were validated, and which callbacks are left."""
    become_rank(rank, 2)
    job = Job(module="normalised")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        for remark in REMARKS:
            warnings.filterwarnings("ignore", message=remark)
        module, trainer = make_module(job, 2), make_trainer(job, 2, folder)
        seen = []
        module.validation_step = lambda batch, batch_idx: seen.append(batch_idx)
        before = list(trainer.callbacks)
        trainer.fit(module, loader(2), DataLoader(Uneven(rank), batch_size=None))
    return len(seen), trainer.callbacks == before


def test_a_rank_may_have_nothing_to_validate(pool):
    assert pool(2).run(validated_on_one) == [(4, True), (0, True)]


def backward_afterwards(rank, strategy):
    """What a backward on rank 0 alone sends, and leaves in `grad`, when fit is over."""
    become_rank(rank, 2)
    job = Job(strategy=strategy)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        for remark in REMARKS:
            warnings.filterwarnings("ignore", message=remark)
        module, trainer = make_module(job, 2), make_trainer(job, 2, folder, max_epochs=1)
        trainer.fit(module, loader(2), loader(2))
    module.zero_grad()
    with counted() as sent:
        if rank == 0:
            module.loss(next(iter(loader(2)))).backward()
        time.sleep(0.2)  # for a thread that might send
    return sent, module.head.weight.grad is not None


@pytest.mark.parametrize("strategy", ["sharded_adadelta", "sharded_adadelta_zero2"])
def test_a_backward_after_fit_is_this_ranks_own(pool, strategy):
    assert pool(2).run(backward_afterwards, strategy) == [([], True), ([], False)]


def test_buffers_stay_apart_if_asked(pool):
    zero, one = pool(2).run(run, 2, Job(strategy={"broadcast_buffers": False}))
    assert (zero["state"]["seen"], one["state"]["seen"]) == (16, 32)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_half_precision_trains(pool, precision):
    job = Job(trainer={"precision": precision, "max_epochs": 6, "gradient_clip_val": 1.0})
    alone = run_alone(job)
    ranks = pool(2).run(run, 2, job)
    losses = np.mean([rank["losses"] for rank in ranks], axis=0)
    np.testing.assert_allclose(losses, alone["losses"], rtol=0.1)  # bfloat16 has 8 bits
    assert losses[-8:].mean() < losses[:8].mean()


@pytest.mark.parametrize("trainer", [{}, {"accumulate_grad_batches": 4, "gradient_clip_val": 0.05}])
def test_zero_stage_2_takes_the_same_steps(pool, trainer):
    alone = run_alone(Job(trainer=trainer))
    ranks = pool(2).run(run, 2, Job(trainer=trainer, strategy="sharded_adadelta_zero2"))
    losses = np.mean([rank["losses"] for rank in ranks], axis=0)
    np.testing.assert_allclose(losses, alone["losses"], rtol=1e-6)


def test_one_rank_is_torch_bit_by_bit(pool):
    job = Job(trainer={"gradient_clip_val": 0.05})
    (ours,) = pool(1).run(run, 1, job)
    assert ours["losses"] == run_alone(job)["losses"]


def test_stock_ddp_with_the_sharded_optimizer(pool):
    """Correct, only slower: gradients are averaged by DDP, and seen to be so."""
    alone = run_alone(Job())
    ranks = pool(2).run(run, 2, Job(strategy="ddp", optimizer="Sharded averaged"))
    losses = np.mean([rank["losses"] for rank in ranks], axis=0)
    np.testing.assert_allclose(losses, alone["losses"], rtol=1e-6)
    assert ranks[0]["wrapped"] == "DistributedDataParallel"


class Sum(torch.autograd.Function):
    """Over all ranks."""

    @staticmethod
    def forward(ctx, x):
        dist.all_reduce(total := x.clone())
        return total

    backward = forward


class SyncedOnCPU(nn.BatchNorm1d):
    """What torch's SyncBatchNorm does, which CPUs do not have: collectives in backward, too."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        mean = Sum.apply(x.mean(0)) / dist.get_world_size()
        variance = Sum.apply((x - mean).square().mean(0)) / dist.get_world_size()
        with torch.no_grad():
            unbiased = variance * (n := len(x) * dist.get_world_size()) / (n - 1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
            self.num_batches_tracked.add_(1)
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias


class LayerSyncOnCPU(LayerSync):
    def apply(self, model):
        for module in model.modules():
            if type(module) is nn.BatchNorm1d:
                module.__class__ = SyncedOnCPU
        return model

    def revert(self, model):
        for module in model.modules():
            if type(module) is SyncedOnCPU:
                module.__class__ = nn.BatchNorm1d
        return model


def test_batch_norm_in_step_with_the_other_ranks(pool):
    """Its collectives run during backward, and so do ours."""
    alone = run_alone(Job(module="normalised"))
    job = Job(module="normalised", trainer={"plugins": [LayerSyncOnCPU()]})
    zero, one = pool(2).run(run, 2, job)
    losses = np.mean([zero["losses"], one["losses"]], axis=0)
    np.testing.assert_allclose(losses, alone["losses"], rtol=1e-5)  # sums over a batch differ
    for rank in (zero, one):
        for name in ("body.2.running_mean", "body.2.running_var"):
            np.testing.assert_allclose(rank["state"][name], alone["state"][name], rtol=1e-4)


def test_torchs_own_synced_batch_norm_is_put_in_and_says_what_it_needs(pool):
    job = Job(module="normalised", trainer={"sync_batchnorm": True})
    for kind, text in pool(2).run(fail, 2, job, deadline=30):
        assert kind == "ValueError"
        assert "SyncBatchNorm expected input tensor to be on" in text


ON_GPUS = """
import os, sys, warnings
warnings.filterwarnings("ignore")
import torch, lightning.pytorch as pl
import adadelta_dist.strategies.lightning

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 4)
        )

    def on_train_start(self):
        assert isinstance(self.net[1], torch.nn.SyncBatchNorm) or sys.argv[1] == "cpu"

    def training_step(self, batch, index):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adadelta(self.parameters(), rho=0.95)

rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
found = []
for strategy in ("ddp", "sharded_adadelta"):
    rank = int(os.environ.get("LOCAL_RANK", 0))
    sampler = torch.utils.data.DistributedSampler(rows, 2, rank, shuffle=False)
    trainer = pl.Trainer(
        strategy=strategy, accelerator=sys.argv[1], devices=2, max_epochs=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, sync_batchnorm=sys.argv[1] != "cpu",
    )
    net = Net()
    trainer.fit(net, torch.utils.data.DataLoader(rows, batch_size=4, sampler=sampler))
    found.append({name: value.cpu() for name, value in net.state_dict().items()})
torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_torchs_own_synced_batch_norm_trains_as_under_ddp(tmp_path):
    finished = run_script(ON_GPUS, tmp_path, "cuda")
    assert finished.returncode == 0, finished.stderr[-3000:]

"""What else a Trainer does with the strategy: loops, precisions, buffers, launchers, errors."""

import numpy as np
import pytest
from lightning_jobs import Job, run, run_alone


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

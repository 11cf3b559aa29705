"""A Trainer on two ranks takes the steps of one process with torch's optimizer."""

from functools import cache

import numpy as np
import pytest
from lightning_jobs import Job, counted, run, run_alone

CASES = {
    "plain": {},
    "accumulate": {"trainer": {"accumulate_grad_batches": 4}},
    "clip norm": {"trainer": {"gradient_clip_val": 0.05}},
    "clip value": {"trainer": {"gradient_clip_val": 0.005, "gradient_clip_algorithm": "value"}},
    "scheduler": {"scheduler": "step"},
    "two optimizers": {"module": "manual"},
    "gradients missing on rank 1": {"missing_on": 1},
    "double precision": {"trainer": {"precision": "64-true"}},
    "Adadelta": {"optimizer": "Adadelta"},
    "ShardedAdadelta": {"optimizer": "Sharded"},
    "compiled in part": {"compiled": "part"},
    "compiled as a whole": {"compiled": "whole"},
    "clipped in a hook": {"module": "clips by itself", "trainer": {"gradient_clip_val": 0.05}},
}


@cache
def reference(case):
    return run_alone(Job(**CASES[case]))


def mean_losses(ranks):
    return np.mean([rank["losses"] for rank in ranks], axis=0)


@pytest.mark.parametrize("case", CASES)
def test_the_loss_curve_is_that_of_one_process(pool, case):
    alone = reference(case)
    ranks = pool(2).run(run, 2, Job(**CASES[case]))
    assert len(alone["losses"]) == 16
    np.testing.assert_allclose(mean_losses(ranks), alone["losses"], rtol=1e-6)
    for rank in ranks:
        assert rank["lr"] == alone["lr"]
        assert set(rank["optimizers"]) == {"ShardedAdadelta"}
        assert rank["wrapped"] in ("Net", "Clipping"), "not by DistributedDataParallel"


def sent(rank, world_size, job):
    with counted() as found:
        run(rank, world_size, job)
    return sum(found)


@pytest.mark.parametrize("strategy", [{}, "sharded_adadelta_zero2"])
def test_what_is_accumulated_is_sent_once(pool, strategy):
    plain = pool(2).run(sent, 2, Job(strategy=strategy))
    accumulated = pool(2).run(sent, 2, Job(strategy=strategy, **CASES["accumulate"]))
    assert accumulated == [n / 4 for n in plain]


def test_the_cases_are_not_all_the_same():
    """Negative control: clipping that does nothing would pass above."""
    assert len({tuple(reference(case)["losses"]) for case in list(CASES)[:7]}) == 7

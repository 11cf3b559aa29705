"""fp16, which DeepSpeed has on CUDA alone; skipped, with the reason, where there is no device."""

import deepspeed_jobs as jobs
import pytest
import torch
from ranks import Ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS, DEADLINE = 5, 240.0
HUGE = {"enabled": True, "initial_scale_power": 32, "hysteresis": 1}  # overflows at first


def fp16_case(stage, kind=None, **scaling):
    fp16 = {"enabled": True, "loss_scale": 128.0} | scaling
    return jobs.config(stage, kind=kind, params={"weight_decay": 0.01}, fp16=fp16)


def train(rank, world_size, cases):
    """By case: the losses, what was skipped, and the state before and after training."""
    jobs.prepare(rank, world_size, accelerator="cuda")
    torch.cuda.set_device(rank)
    results = {}
    for name, settings in cases.items():
        engine = jobs.build(settings)[0]
        state = engine.basic_optimizer.state
        before = {float(entry["step"]) for entry in state.values()}
        losses = jobs.run_steps(engine, rank, world_size, range(STEPS), torch.float16)
        results[name] = {
            "losses": losses,
            "skipped": engine.skipped_steps,
            "before": before,
            "after": {float(entry["step"]) for entry in state.values()},
            "dtypes": {entry["square_avg"].dtype for entry in state.values()},
        }
    return results


CASES = {f"stage {stage}": fp16_case(stage) for stage in range(4)}
CASES |= {"stage 0, fused": fp16_case(0, "FusedAdadelta")}
OVERFLOWING = {
    f"stage {stage}, overflowing": fp16_case(stage, loss_scale=0, **HUGE) for stage in range(4)
}


@pytest.fixture(scope="module", params=[1, 2])
def trained(request):
    world_size = request.param
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} CUDA devices")
    ranks = Ranks(world_size, timeout=120.0, backend="nccl")
    try:
        yield ranks.run(train, world_size, CASES | OVERFLOWING, deadline=DEADLINE)
    finally:
        ranks.close()


@pytest.mark.parametrize("name", CASES)
def test_fp16_follows_one_process_in_fp32(trained, name):
    columns = (of_rank[name]["losses"] for of_rank in trained)
    losses = [sum(step) / len(trained) for step in zip(*columns, strict=True)]
    assert losses == pytest.approx(jobs.train_alone(STEPS, weight_decay=0.01), rel=5e-3)
    for of_rank in trained:
        assert of_rank[name]["before"] <= {0.0}, "the step before training left something"
        assert of_rank[name]["after"] == {float(STEPS)}
        assert of_rank[name]["dtypes"] == {torch.float32}


@pytest.mark.parametrize("name", OVERFLOWING)
def test_a_step_that_overflows_is_skipped_and_moves_no_accumulator(trained, name):
    for of_rank in trained:
        skipped = of_rank[name]["skipped"]
        assert skipped > 0
        assert of_rank[name]["after"] <= {float(STEPS - skipped)}

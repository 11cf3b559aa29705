"""GradScaler and `skip_nonfinite`: what one rank overflows all ranks skip, and then go on."""

import pytest
import torch
from torch import nn

from adadelta_dist import RankError, ShardedAdadelta, ShardPolicy

STEPS = 7
INF_AT, HUGE_AT, NOTHING_AT = 2, 4, 5
"""Steps at which one rank's gradient is infinite; both are finite, not their sum; one has none."""


def parameters():
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(n, generator=generator)) for n in (5, 1, 7)]


def gradients(rank, step):
    """Exact in fp32 under a scale that is a power of two."""
    if step == NOTHING_AT and rank == 1:
        return []
    generator = torch.Generator().manual_seed(10 * step + rank)
    grads = [torch.randn(n, generator=generator) for n in (5, 1, 7)]
    if step == INF_AT and rank == 1:
        grads[2][3] = float("inf")
    if step == HUGE_AT:
        grads[0][0] = 2.0e38 / 512  # times that step's scale: finite, but two of them are not
    return grads


def new_scaler():
    return torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=2)


def train_fused(rank):
    return train(rank, ShardPolicy(), False, fused=True)


def train(rank, policy, unscale, **options):
    """Parameters and scale after each step, and how many were skipped."""
    params, scaler = parameters(), new_scaler()
    optimizer = ShardedAdadelta(params, weight_decay=0.1, policy=policy, **options)
    # The scheduler wraps `step`, so the scaler is not its direct caller.
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    history = []
    for step in range(STEPS):
        optimizer.zero_grad()
        grads = gradients(rank, step)
        losses = [(p * g).sum() for p, g in zip(params, grads, strict=False)]
        scaler.scale(sum(losses) if losses else torch.zeros(()))
        if losses:
            scaler.scale(sum(losses)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        history.append(([p.detach().clone() for p in params], scaler.get_scale()))
    return history, optimizer.skipped_steps


def control(world_size):
    """One process with torch's optimizer, on the averages of the scaled gradients."""
    params, scaler = parameters(), new_scaler()
    optimizer = torch.optim.Adadelta(params, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    history = []
    for step in range(STEPS):
        scale = scaler.scale(torch.ones(()))
        for i, p in enumerate(params):
            rows = [
                gradients(rank, step) or [torch.zeros_like(p)] * 3 for rank in range(world_size)
            ]
            total = rows[0][i] * scale
            for row in rows[1:]:
                total = total + row[i] * scale
            p.grad = total / world_size
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        history.append(([p.detach().clone() for p in params], scaler.get_scale()))
    return history


POLICIES = {
    "overlap": ShardPolicy(bucket_mb=1e-5),
    "no overlap": ShardPolicy(bucket_mb=1e-5, overlap=False),
    "stage 2": ShardPolicy(bucket_mb=1e-5, stage=2),
}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_all_ranks_skip_and_their_scales_are_one_process_s(pool, world_size, policy):
    wanted = control(world_size)
    scales = [scale for _, scale in wanted]
    assert scales[INF_AT] < scales[INF_AT - 1], "the control must skip"
    assert scales[HUGE_AT] < scales[HUGE_AT - 1]
    for history, skipped in pool(world_size).run(train, policy, False):
        assert [scale for _, scale in history] == scales
        assert skipped == 2
        for (got, _), (want, _) in zip(history, wanted, strict=True):
            assert all(map(torch.equal, got, want))


def test_the_fused_step_unscales(pool):
    wanted = control(2)
    for history, skipped in pool(2).run(train_fused):
        assert skipped == 2
        for (got, scale), (want, wanted_scale) in zip(history, wanted, strict=True):
            assert scale == wanted_scale
            # A few units in the last place a step: docs/design.md.
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_gradients_that_were_unscaled_already(pool):
    """The sum of what is huge is finite then, as it would be without a scaler."""
    policy = ShardPolicy(bucket_mb=1e-5, overlap=False)
    (first, skipped), (second, _) = pool(2).run(train, policy, True)
    wanted = control(2)
    assert skipped == 1
    assert [scale for _, scale in first] == [scale for _, scale in second]
    for (a, _), (b, _), (want, _) in list(zip(first, second, wanted, strict=True))[:HUGE_AT]:
        assert all(map(torch.equal, a, b))
        assert all(map(torch.equal, a, want))


def other_scale(rank):
    params = parameters()
    optimizer = ShardedAdadelta(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (8 + rank))
    scaler.scale(sum(p.sum() for p in params)).backward()
    with pytest.raises(RankError, match=r"gradients times 0\.00390625.*times 0\.001953125"):
        scaler.step(optimizer)


def test_scales_that_differ_are_an_error_on_every_rank(pool):
    pool(2).run(other_scale)


def clip(rank):
    """Clipping what is scaled at the scaled norm is clipping."""
    scaler, results = new_scaler(), []
    for scaled in (True, False):
        params = parameters()
        optimizer = ShardedAdadelta(params)
        for step in range(INF_AT):
            optimizer.zero_grad()
            loss = sum((p * g).sum() for p, g in zip(params, gradients(rank, step), strict=True))
            (scaler.scale(loss) if scaled else loss).backward()
            optimizer.clip_grad_norm_(1.0 * (scaler.get_scale() if scaled else 1.0))
            if scaled:
                scaler.step(optimizer)
                scaler.update(512.0)
            else:
                optimizer.step()
        results.append([p.detach() for p in params])
    return results


def test_clipping_at_the_scaled_norm(pool):
    for scaled, plain in pool(2).run(clip):
        for a, b in zip(scaled, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def guarded(rank, world_size):
    """Without a scaler: a NaN at one step, on one rank alone."""
    params = parameters()
    optimizer = ShardedAdadelta(params, policy=ShardPolicy(bucket_mb=1e-5, skip_nonfinite=True))
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    for step in range(4):
        for i, p in enumerate(params):
            p.grad = gradients(rank, step)[i]
        if step in (1, INF_AT) and rank == world_size - 1:
            params[1].grad[0] = float("nan")
        optimizer.step()
    steps = {float(entry["step"]) for entry in optimizer.state.values()}
    return [p.detach() for p in params], optimizer.skipped_steps, len(calls), steps


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step_with_a_nan_is_skipped_without_a_scaler(pool, world_size):
    params = parameters()
    optimizer = torch.optim.Adadelta(params)
    for step in (0, 3):
        for i, p in enumerate(params):
            rows = [gradients(rank, step)[i] for rank in range(world_size)]
            p.grad = sum(rows[1:], rows[0]) / world_size
        optimizer.step()
    for got, skipped, calls, steps in pool(world_size).run(guarded, world_size):
        assert all(map(torch.equal, got, params))
        assert (skipped, calls, steps) == (2, 4, {2.0})


def float16_parameters(rank):
    """Trained with a scaler, masters and one overflow; and the exact parameters."""
    p = nn.Parameter(torch.linspace(-1, 1, 30).half())
    optimizer = ShardedAdadelta([p])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scales = []
    for step in range(4):
        optimizer.zero_grad()
        grad = torch.linspace(0.25, 1, 30).half() * 2.0 ** (8 if step == 1 and rank == 0 else -3)
        scaler.scale((p * grad).sum().float()).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return p.detach(), scales, optimizer.skipped_steps


@pytest.mark.parametrize("world_size", [1, 2])
def test_float16_parameters_at_any_world_size(pool, world_size):
    p = nn.Parameter(torch.linspace(-1, 1, 30).half().float())
    optimizer = torch.optim.Adadelta([p])
    for _ in range(3):  # the second of the four is skipped
        p.grad = torch.linspace(0.25, 1, 30).half().float() * 2.0**-3
        optimizer.step()
    for got, scales, skipped in pool(world_size).run(float16_parameters):
        assert torch.equal(got, p.half())
        assert (scales, skipped) == ([1024.0, 512.0, 512.0, 512.0], 1)

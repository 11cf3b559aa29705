"""What ranks do differently, and what changes between backward and step."""

import time
import warnings

import pytest
import torch
import torch.distributed as dist
from test_gradients import assert_close, batch, loss_of, model, reference, values
from torch import nn

from adadelta_dist import (
    RankError,
    ShardedAdadelta,
    ShardPolicy,
    collectives,
    reduction,
    sharded,
)


def dropped_while_gathers_are_open(rank):
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=ShardPolicy(overlap_gather=True))
    optimizer.attach(module)
    loss_of(module, batch(rank, 0)).backward()
    shard_step = sharded.step_

    def step_late(*args, **kwargs):
        time.sleep(0.3 * rank)
        shard_step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sharded, "step_", step_late)
        optimizer.step()
    del optimizer, module
    ones = torch.ones(1)
    dist.all_reduce(ones)
    return ones.item()


def test_the_group_is_left_in_order(pool):
    assert pool(2).run(dropped_while_gathers_are_open) == [2.0, 2.0]


def frozen_after_a_clip(rank):
    """A step skipped after a clip; then other layers train, on one rank."""
    first, second = nn.Parameter(torch.ones(40)), nn.Parameter(torch.ones(4))
    optimizer = ShardedAdadelta([first])
    with optimizer.no_sync():
        first.sum().backward()
    optimizer.clip_grad_norm_(1.0)
    optimizer.zero_grad()
    first.requires_grad_(False)
    optimizer.add_param_group({"params": [second]})
    if rank == 0:
        second.sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the first ones were reduced again
        optimizer.step()
    return second.unique().tolist()


def test_a_bucket_is_launched_once(pool):
    found = pool(2).run(frozen_after_a_clip)
    assert found[0] == found[1] != [1.0]


def added_after_unequal_backwards(rank):
    first, second = nn.Parameter(torch.ones(64)), nn.Parameter(torch.ones(64))
    optimizer = ShardedAdadelta([first], policy=ShardPolicy(stage=2))
    if rank == 0:
        (first * 2).sum().backward()
    optimizer.add_param_group({"params": [second]})
    (first + 4 * second).sum().backward()
    averages = [optimizer.grad_shard(p).local.unique().tolist() for p in (first, second)]
    optimizer.step()
    return averages


def test_groups_are_added_when_all_have_sent_what_there_was(pool):
    assert pool(2).run(added_after_unequal_backwards) == [[[2.0], [4.0]]] * 2


def zeroed_on_one(rank):
    module = model()
    optimizer = ShardedAdadelta(module.parameters())
    loss_of(module, batch(rank, 0)).backward()
    optimizer.clip_grad_norm_(1.0)
    if rank == 0:
        optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="gradients changed after"):
        optimizer.step()


def scaler_on_one(rank):
    p = nn.Parameter(torch.ones(4))
    optimizer = ShardedAdadelta([p])
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, enabled=rank == 0)
    scaler.scale(p.sum()).backward()
    with pytest.raises(RuntimeError, match="under a GradScaler"):
        scaler.step(optimizer)


def no_number_on_one(rank):
    p = nn.Parameter(torch.ones(4))
    optimizer = ShardedAdadelta([p])
    p.sum().backward()
    with pytest.raises((ValueError, RuntimeError), match=r"could not convert|rank 0"):
        optimizer.clip_grad_norm_(1.0, 2.0 if rank else "two")


@pytest.mark.parametrize("what", [zeroed_on_one, scaler_on_one, no_number_on_one])
def test_all_ranks_hear_of_it(pool, what):
    pool(2).run(what, deadline=15.0)


BETWEEN = {
    "group added": lambda o: o.add_param_group({"params": [nn.Parameter(torch.ones(4))]}),
    "gathered": lambda o: o.gather_state_dict(),
    "scattered": lambda o: o.scatter_state_dict(o.gather_state_dict() or None),
}
CALLS = [
    (reduction.Reduction, "start"),
    (reduction.Reduction, "start_adding"),
    *((collectives, name) for name in ("broadcast", "gather_slices", "scatter_slices")),
]


def order_of_collectives(rank, between, stage):
    """What goes over the way of the reductions, where backward reaches more layers on rank 1."""
    module = model()
    policy = ShardPolicy(stage=stage, bucket_mb=1e-4)
    optimizer = ShardedAdadelta(module.parameters(), policy=policy)
    order = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for where, name in CALLS:
            monkeypatch.setattr(where, name, recorded(order, getattr(where, name), name))
        used = module if rank == 1 else module[-1]
        sum(p.sum() for p in used.parameters()).backward()
        BETWEEN[between](optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    return order


def recorded(order, function, name):
    def record(*args, **kwargs):
        order.append(name)
        return function(*args, **kwargs)

    return record


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("between", BETWEEN)
def test_all_ranks_call_native_collectives_in_one_order(pool, between, stage):
    first, second = pool(2).run(order_of_collectives, between, stage)
    assert first == second
    assert len(set(first)) > 1


def more_after_clipping(rank, policy, then):
    """torch would add to gradients that are clipped; ours are clipped in the shards alone."""
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=policy)
    loss_of(module, batch(rank, 0)).backward()
    optimizer.clip_grad_norm_(1.0)
    if rank == 1:
        loss_of(module, batch(rank, 1)).backward()
    with pytest.raises(RankError, match="clip once, after all that adds to them"):
        optimizer.step() if then == "step" else optimizer.clip_grad_norm_(1.0)


@pytest.mark.parametrize(
    ("policy", "then"),
    [
        (ShardPolicy(), "step"),
        (ShardPolicy(), "clip"),
        (ShardPolicy(overlap=False), "step"),
        (ShardPolicy(overlap=False), "clip"),
        (ShardPolicy(stage=2), "step"),
    ],
)
def test_gradients_are_clipped_when_all_are_there(pool, policy, then):
    pool(2).run(more_after_clipping, policy, then)


def clipped_and_skipped(rank, policy, then):
    """A step skipped after a clip; then part of the model has gradients."""
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=policy)
    loss_of(module, batch(rank, 0)).backward()
    optimizer.clip_grad_norm_(1.0)
    module.zero_grad()
    sum(p.sum() for p in module[-1].parameters()).backward()
    if then == "clip":
        optimizer.clip_grad_norm_(1e9)
    before = [p.clone() for p in module.parameters()]
    with warnings.catch_warnings():
        if policy.gradients == "local":
            warnings.simplefilter("ignore")  # that those of other layers were sent before
        optimizer.step()
    return [torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True)]


@pytest.mark.parametrize("then", ["step", "clip"])
@pytest.mark.parametrize("gradients", ["local", "averaged"])
def test_a_clip_whose_step_was_skipped_is_forgotten(pool, gradients, then):
    policy = ShardPolicy(bucket_mb=1e-4, gradients=gradients)
    for unchanged in pool(2).run(clipped_and_skipped, policy, then):
        assert unchanged[-2:] == [False, False]
        assert all(unchanged[:-2])


def after_a_nan(rank):
    """Norms of ones, after a clip to a norm that was NaN; the bucket has padding."""
    module = nn.Linear(3, 3)
    policy = ShardPolicy(gradients="averaged", skip_nonfinite=True)
    optimizer = ShardedAdadelta(module.parameters(), policy=policy)
    norms = []
    for value in (float("nan"), 1.0):
        optimizer.zero_grad()
        for p in module.parameters():
            p.grad = torch.full_like(p, value)
        norms.append(optimizer.clip_grad_norm_(1.0).item())
        optimizer.step()
    return norms[1], optimizer.skipped_steps


def test_a_norm_that_is_not_finite_spoils_no_later_one(pool):
    assert pool(2).run(after_a_nan) == [(pytest.approx(12**0.5), 1)] * 2


@pytest.mark.parametrize(
    "options", [{"policy": ShardPolicy(gradients="averaged")}, {"differentiable": True}]
)
def test_an_optimizer_before_this_one_takes_no_gradients(options):
    p = nn.Parameter(torch.ones(4))
    before = ShardedAdadelta([p], policy=ShardPolicy(stage=2))
    ShardedAdadelta([p], **options)
    p.sum().backward()
    assert p.grad.tolist() == [1.0] * 4
    assert before.param_groups[0]["params"] == [p]


def unhooked(rank, policy):
    """What is sent before a step while hooks are off, and afterwards; and the values."""
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=policy)
    optimizer._reducer.unhook()
    launched = []
    for step in range(2):
        optimizer.zero_grad()
        loss_of(module, batch(rank, 10 * step)).backward()
        launched.append(
            bool(optimizer._reducer._rounds if policy.stage == 2 else optimizer._reducer._next)
        )
        optimizer.step()
    return launched, values(module)


@pytest.mark.parametrize(
    "policy", [ShardPolicy(), ShardPolicy(stage=2)], ids=["stage 1", "stage 2"]
)
def test_hooks_that_were_taken_off_come_back_with_a_step(pool, policy):
    for launched, got in pool(2).run(unhooked, policy):
        assert launched == [False, True]
        assert_close(got, reference(2, 2))


REPLACED = {
    "replaced": lambda p: setattr(p, "grad", p.grad * 2),
    "in place": lambda p: p.grad.mul_(2),
    "with a graph": lambda p: (p**2).sum().backward(create_graph=True),
}


def changed_after_a_clip(rank, how, overlap):
    p = nn.Parameter(torch.ones(8, dtype=torch.float64))
    optimizer = ShardedAdadelta([p], policy=ShardPolicy(overlap=overlap))
    (p**2).sum().backward()
    optimizer.clip_grad_norm_(1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of create_graph
        REPLACED[how](p)
    with pytest.raises(RankError, match="clip once"):
        optimizer.step()
    p.grad = None  # a graph holds the parameter


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("how", REPLACED)
def test_a_clip_is_not_lost_however_gradients_change(pool, how, overlap):
    pool(2).run(changed_after_a_clip, how, overlap)


def skipped_with_more(rank, policy):
    """A clip and one more backward, whose step is skipped; then iterations as ever."""
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=policy)
    loss_of(module, batch(rank, 7)).backward()
    optimizer.clip_grad_norm_(1.0)
    loss_of(module, batch(rank, 8)).backward()
    module.zero_grad()
    for step in range(2):
        loss_of(module, batch(rank, 10 * step)).backward()
        optimizer.clip_grad_norm_(1e9)
        optimizer.step()
        module.zero_grad()
    return values(module)


def test_a_clip_that_was_skipped_with_more_gradients_is_forgotten(pool):
    for got in pool(2).run(skipped_with_more, ShardPolicy()):
        assert_close(got, reference(2, 2))


def norms_of_micro_batches(rank, stage):
    """Norms alone, which nothing is clipped to."""
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=ShardPolicy(stage=stage))
    norms = []
    for _ in range(2):
        loss_of(module, batch(0, 0)).backward()
        norms.append(optimizer.clip_grad_norm_(float("inf")).item())
    optimizer.step()
    return norms[1] / norms[0]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_norm_may_be_asked_for_after_each_micro_batch(pool, stage):
    assert pool(2).run(norms_of_micro_batches, stage) == [pytest.approx(2.0)] * 2


def test_an_optimizer_hooks_no_parameter_of_a_later_one():
    p = nn.Parameter(torch.ones(4))
    before = ShardedAdadelta([p], policy=ShardPolicy(stage=2))
    before._reducer.unhook()
    after = ShardedAdadelta([p], policy=ShardPolicy(gradients="local"))
    before.step()
    p.sum().backward()
    assert p.grad.tolist() == [1.0] * 4
    after.step()
    assert p[0].item() != 1.0

"""The Optimizer API on several ranks: hooks, schedulers, closures, tied weights, bytes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_gradients import assert_close, batch, loss_of, model, reference, values
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from adadelta_dist import ShardedAdadelta, ShardPolicy

SMALL_BUCKETS = ShardPolicy(bucket_mb=1e-4)


def hooks(rank):
    torch.optim.Adadelta([torch.zeros(1)])  # patches torch's class: nothing may fire twice
    module = model()
    optimizer = ShardedAdadelta(module.parameters())
    calls = []

    def note(name):
        return lambda *_: calls.append(name)

    optimizer.register_step_pre_hook(note("step_pre"))
    optimizer.register_step_post_hook(note("step_post"))
    optimizer.register_state_dict_pre_hook(note("state_dict_pre"))
    optimizer.register_state_dict_post_hook(note("state_dict_post"))
    optimizer.register_load_state_dict_pre_hook(note("load_pre"))
    optimizer.register_load_state_dict_post_hook(note("load_post"))
    handles = [
        register_optimizer_step_pre_hook(note("global_pre")),
        register_optimizer_step_post_hook(note("global_post")),
    ]
    loss_of(module, batch(rank, 0)).backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.consolidate_state_dict(to=rank * 0)
    optimizer.state_dict()
    for handle in handles:
        handle.remove()
    return calls


def test_every_hook_is_called_exactly_once(pool):
    wanted = ["global_pre", "step_pre", "step_post", "global_post"]
    wanted += ["state_dict_pre", "state_dict_post", "load_pre", "load_post"]
    wanted += ["state_dict_pre", "state_dict_post"]
    assert pool(2).run(hooks) == [wanted] * 2


def hook_views(rank):
    """A pre-hook sees every gradient, a post-hook every new parameter."""
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=SMALL_BUCKETS)
    seen = {}
    optimizer.register_step_pre_hook(
        lambda *_: seen.update(grads=all(p.grad.any() for p in module.parameters()))
    )
    optimizer.register_step_post_hook(lambda *_: seen.update(params=values(module)))
    loss_of(module, batch(rank, 0)).backward()
    optimizer.step()
    return seen


def test_hooks_see_all_gradients_and_all_new_parameters(pool):
    for seen in pool(2).run(hook_views):
        assert seen["grads"]
        assert_close(seen["params"], reference(2, 1))


def closures_and_schedulers(rank):
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), lr=2.0, policy=SMALL_BUCKETS)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    calls, losses = 0, []
    for step in range(4):

        def closure(step=step):
            nonlocal calls
            calls += 1
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = loss_of(module, batch(rank, 10 * step))
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
        scheduler.step()
    return values(module), calls, losses, scheduler.get_last_lr()


def test_closures_run_once_and_schedules_apply(pool):
    module = model()
    optimizer = torch.optim.Adadelta(module.parameters(), lr=2.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    for step in range(4):
        optimizer.zero_grad()
        for rank in range(2):
            (loss_of(module, batch(rank, 10 * step)) / 2).backward()
        optimizer.step()
        scheduler.step()
    for got, calls, losses, lr in pool(2).run(closures_and_schedulers):
        assert_close(got, values(module))
        assert (calls, len(losses), lr) == (4, 4, [0.5])


def tied(rank):
    module = model()
    module.append(nn.Linear(3, 5, dtype=torch.float64))
    module.append(nn.Linear(5, 3, dtype=torch.float64))
    module[4].weight = module[2].weight
    optimizer = ShardedAdadelta(module.parameters(), policy=SMALL_BUCKETS)
    loss_of(module, batch(rank, 0)).backward()
    optimizer.step()
    return module[4].weight is module[2].weight, values(module)


def test_tied_weights(pool):
    module = model()
    module.append(nn.Linear(3, 5, dtype=torch.float64))
    module.append(nn.Linear(5, 3, dtype=torch.float64))
    module[4].weight = module[2].weight
    optimizer = torch.optim.Adadelta(module.parameters())
    for rank in range(2):
        (loss_of(module, batch(rank, 0)) / 2).backward()
    optimizer.step()
    for same, got in pool(2).run(tied):
        assert same
        assert_close(got, values(module))


def broadcast(rank):
    p = nn.Parameter(torch.full((3, 4), float(rank)).t())
    ShardedAdadelta([p])
    return p.detach().clone(), p.stride()


def test_parameters_are_broadcast_from_rank_0_in_their_own_memory_order(pool):
    for got, stride in pool(3).run(broadcast):
        assert torch.equal(got, torch.zeros(4, 3))
        assert stride == (1, 4)


def autograd_notices(rank):
    """A second backward through parameters that a step has changed is torch's error."""
    module = model()
    optimizer = ShardedAdadelta(module.parameters())
    loss = loss_of(module, batch(rank, 0))
    loss.backward(retain_graph=True)
    optimizer.step()
    try:
        loss.backward()
    except RuntimeError as error:
        return "modified by an inplace operation" in str(error)


def test_a_stale_graph_is_torchs_error(pool):
    assert pool(2).run(autograd_notices) == [True, True]


def compiled(rank):
    module = model(torch.float32)
    optimizer = ShardedAdadelta(module.parameters())
    fast = torch.compile(module, backend="aot_eager")
    for step in range(2):
        optimizer.zero_grad()
        loss_of(fast, batch(rank, 10 * step, torch.float32)).backward()
        optimizer.step()
    return values(module)


def test_a_compiled_model(pool):
    first, second = pool(2).run(compiled)
    for got, other, want in zip(first, second, reference(2, 2), strict=True):
        assert torch.equal(got, other)
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)


def autocast(rank):
    module = model(torch.float32)
    optimizer = ShardedAdadelta(module.parameters(), policy=SMALL_BUCKETS)
    for step in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(module, batch(rank, 10 * step, torch.float32))
        loss.backward()
        optimizer.step()
    return values(module)


def test_bfloat16_autocast(pool):
    module = model(torch.float32)
    optimizer = torch.optim.Adadelta(module.parameters())
    for step in range(2):
        optimizer.zero_grad()
        for rank in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(module, batch(rank, 10 * step, torch.float32))
            (loss / 2).backward()
        optimizer.step()
    for results in pool(2).run(autocast):
        for got, want in zip(results, values(module), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def bytes_sent(rank, path, steps):
    """Bytes that crossed the loopback device in `steps` iterations, as the kernel counts."""
    p = nn.Parameter(torch.zeros(4, 2**20))
    policy = ShardPolicy(bucket_mb=4)
    optimizer = ShardedAdadelta([p, nn.Parameter(torch.zeros(2**20))], policy=policy)
    params = optimizer.param_groups[0]["params"]

    def iteration():
        optimizer.zero_grad()
        sum(p.sum() for p in params).backward()
        optimizer.step()

    iteration()
    dist.barrier()
    before = int(Path(path).read_text())
    dist.barrier()
    for _ in range(steps):
        iteration()
    dist.barrier()
    sent = int(Path(path).read_text()) - before
    return sent / steps / dist.get_world_size(), sum(p.numel() * 4 for p in params)


COUNTER = "/sys/class/net/lo/statistics/tx_bytes"


@pytest.mark.skipif(not Path(COUNTER).exists(), reason="needs Linux's interface counters")
@pytest.mark.parametrize("world_size", [2, 4])
def test_bytes_moved_are_those_of_one_all_reduce(pool, world_size):
    """2(N-1)/N of the parameter bytes per rank; TCP's own headers are below 3 %."""
    sent, param_bytes = pool(world_size).run(bytes_sent, COUNTER, 4)[0]
    wanted = 2 * (world_size - 1) / world_size * param_bytes
    assert wanted <= sent <= 1.03 * wanted

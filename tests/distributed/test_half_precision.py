"""Half-precision parameters: masters, what travels in which dtype, and what enters and leaves."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_dcp import torchs_own_warning
from torch import nn

from adadelta_dist import RankError, ShardedAdadelta, ShardPolicy

TINY = ShardPolicy(bucket_mb=1e-4)
ABSENT = (2, 1)
"""The step and the parameter for which no rank has a gradient."""


def parameters(dtype):
    generator = torch.Generator().manual_seed(3)
    shapes = (3, 40), (5,), (), (2, 3, 2)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def gradient(p, step, rank, index):
    generator = torch.Generator().manual_seed(100 * step + 10 * rank + index)
    return torch.randn(p.shape, generator=generator).to(p.dtype)


def write(params, step):
    """What a user does to weights between two steps, in the half-precision parameters."""
    with torch.no_grad():
        if step == 1:
            params[0].clamp_(-0.5, 0.5)
        if step == 3:
            params[3].data[0].fill_(0.25)


def train(params, optimizer, rank, steps):
    for step in steps:
        for i, p in enumerate(params):
            p.grad = None if (step, i) == ABSENT else gradient(p, step, rank, i)
        optimizer.step()
        write(params, step)


def build(dtype, policy, **options):
    params = parameters(dtype)
    return params, ShardedAdadelta(params, weight_decay=0.01, policy=policy, **options)


def control(dtype, world_size, steps, wire=None, rounded=None):
    """fp32 parameters in one process; those of the model are rounded from them.

    Args:
        wire: dtype in which gradients travel.
        rounded: dtype that the model's parameters are rounded to.
    """
    params, wire, rounded = parameters(dtype), wire or dtype, rounded or dtype
    exact = [nn.Parameter(p.detach().float().clone()) for p in params]
    optimizer = torch.optim.Adadelta(exact, weight_decay=0.01)
    for step in steps:
        for i, (p, x) in enumerate(zip(params, exact, strict=True)):
            rows = [gradient(p, step, rank, i).to(wire).float() for rank in range(world_size)]
            x.grad = None if (step, i) == ABSENT else sum(rows[1:], rows[0]) / world_size
        optimizer.step()
        with torch.no_grad():
            for p, x in zip(params, exact, strict=True):
                p.copy_(x.to(rounded))
            write(params, step)
            for p, x in zip(params, exact, strict=True):
                x.copy_(torch.where(p == x.to(rounded).to(dtype), x, p.float()))
    return params, exact, optimizer


def masters(rank, dtype, policy):
    params, optimizer = build(dtype, policy)
    train(params, optimizer, rank, range(5))
    return [p.detach() for p in params], optimizer.gather_state_dict(0)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_follow_fp32_bit_by_bit_and_notice_what_users_write(pool, dtype, world_size):
    wanted, exact, single = control(dtype, world_size, range(5))
    results = pool(world_size).run(masters, dtype, TINY)
    for params, _ in results:
        assert all(map(torch.equal, params, wanted))
    state = results[0][1]["state"]
    for i, x in enumerate(exact):
        assert list(state[i]) == ["step", "square_avg", "acc_delta", "master"]
        # The last write is seen at the next step.
        kept = state[i]["master"].to(dtype) == wanted[i]
        assert torch.equal(torch.where(kept, state[i]["master"], wanted[i].float()), x)
        for key in ("step", "square_avg", "acc_delta"):
            assert torch.equal(state[i][key], single.state[x][key])


WIRES = [
    (torch.float32, ShardPolicy(1e-4, reduce_dtype=torch.bfloat16)),
    (torch.bfloat16, ShardPolicy(1e-4, reduce_dtype=torch.float32)),
    (torch.float32, ShardPolicy(1e-4, gather_dtype=torch.bfloat16)),
    (torch.float32, ShardPolicy(reduce_dtype=torch.float16, gather_dtype=torch.float16)),
]


@pytest.mark.parametrize(("dtype", "policy"), WIRES)
def test_gradients_and_parameters_travel_in_the_dtypes_of_the_policy(pool, dtype, policy):
    wire = policy.reduce_dtype or dtype
    wanted, _, _ = control(dtype, 2, range(5), wire, policy.gather_dtype or dtype)
    for params, state in pool(2).run(masters, dtype, policy):
        assert all(map(torch.equal, params, wanted))
        for entry in state.get("state", {}).values():
            assert ("master" in entry) == (policy.gather_dtype is not None or dtype.itemsize == 2)


def bytes_sent(rank, policy):
    """Of one step, counted where messages leave."""
    import adadelta_dist.collectives as collectives

    p = nn.Parameter(torch.randn(1000))
    optimizer = ShardedAdadelta([p], policy=policy)
    sent, send = [], collectives._send

    def spy(group, tensor, *args, **kwargs):
        sent.append(tensor.numel() * tensor.element_size())
        return send(group, tensor, *args, **kwargs)

    p.grad = torch.randn(1000)
    collectives._send = spy
    try:
        optimizer.step()
    finally:
        collectives._send = send
    return sent


def test_half_the_bytes(pool):
    half = ShardPolicy(reduce_dtype=torch.bfloat16, gather_dtype=torch.bfloat16)
    assert pool(2).run(bytes_sent, ShardPolicy()) == [[2000, 2000]] * 2
    assert pool(2).run(bytes_sent, half) == [[1000, 1000]] * 2


def resume(rank, state, way, path, policy):
    """Go on from a state of another world size; the parameters are the checkpoint's."""
    params, optimizer = build(torch.bfloat16, policy)
    with torch.no_grad():
        for p, value in zip(params, state["params"], strict=True):
            p.copy_(value)
    if way == "load":
        optimizer.load_state_dict(state["optimizer"])
    elif way == "scatter":
        optimizer.scatter_state_dict(state["optimizer"] if rank == 0 else None)
    else:
        own = optimizer.state_dict()["state"]
        with torchs_own_warning():
            dcp.load({"state": own}, checkpoint_id=path)
        optimizer.load_state_dict(optimizer.state_dict() | {"state": own})
    train(params, optimizer, rank, range(5, 8))
    return [p.detach() for p in params], optimizer.gather_state_dict(0)


def save(rank, path, policy):
    params, optimizer = build(torch.bfloat16, policy)
    train(params, optimizer, 0, range(5))
    dcp.save({"state": optimizer.state_dict()["state"]}, checkpoint_id=path)
    return {"params": [p.detach() for p in params], "optimizer": optimizer.gather_state_dict(0)}


@pytest.mark.parametrize("way", ["load", "scatter", "dcp"])
def test_masters_resume_at_another_world_size(pool, way, tmp_path):
    """From two ranks to one and to three, as if nothing had happened on one rank."""
    saved = pool(2).run(save, tmp_path, TINY)[0]
    one = pool(1).run(resume, saved, way, tmp_path, TINY)[0]
    wanted, _, _ = control(torch.bfloat16, 1, range(8))
    assert all(map(torch.equal, one[0], wanted))
    three = pool(3).run(resume, saved, way, tmp_path, TINY)
    again = pool(2).run(resume, saved, way, tmp_path, TINY)
    assert len(three) == 3
    for params, _ in again[1:]:
        assert all(map(torch.equal, params, again[0][0]))


def without_masters(rank, saved):
    """They are rebuilt from the parameters."""
    for entry in saved["optimizer"]["state"].values():
        del entry["master"]
    for way in ("load", "scatter"):
        params, optimizer = build(torch.bfloat16, TINY)
        with torch.no_grad():
            for p, value in zip(params, saved["params"], strict=True):
                p.copy_(value)
        if way == "load":
            optimizer.load_state_dict(saved["optimizer"])
        else:
            optimizer.scatter_state_dict(saved["optimizer"] if rank == 0 else None)
        state = optimizer.gather_state_dict(0).get("state", {})
        for index, entry in state.items():
            assert torch.equal(entry["master"], saved["params"][index].float())
            assert torch.equal(entry["acc_delta"], saved["optimizer"]["state"][index]["acc_delta"])


@pytest.mark.parametrize("world_size", [1, 2])
def test_masters_are_rebuilt_when_a_checkpoint_has_none(pool, world_size, tmp_path):
    saved = pool(2).run(save, tmp_path, TINY)[0]
    pool(world_size).run(without_masters, saved)


def test_torch_loads_the_state(pool, tmp_path):
    saved = pool(2).run(save, tmp_path, TINY)[0]
    params = parameters(torch.float32)
    optimizer = torch.optim.Adadelta(params)
    optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    for i, p in enumerate(params):
        for key in ("square_avg", "acc_delta"):
            assert torch.equal(optimizer.state[p][key], saved["optimizer"]["state"][i][key])
    train(params, optimizer, 0, range(1))


def switched_off(rank, saved):
    policy = ShardPolicy(master_weights=False)
    for call in ("load", "scatter"):
        _, optimizer = build(torch.bfloat16, policy)
        before = str(optimizer.gather_state_dict(0))
        state = saved["optimizer"] if call == "load" or rank == 0 else None
        with pytest.raises((ValueError, RankError), match=r"parameter \d.*would be dropped"):
            getattr(optimizer, f"{call}_state_dict")(state)
        assert str(optimizer.gather_state_dict(0)) == before


def test_masters_that_would_be_dropped_are_an_error_on_every_rank(pool, tmp_path):
    saved = pool(2).run(save, tmp_path, TINY)[0]
    pool(2).run(switched_off, saved)


def refused(rank):
    p = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    bad = [ShardPolicy(gather_dtype=torch.float32)] * 2
    if rank == 1:  # fine by itself; but rank 0 is not
        bad[1] = ShardPolicy()
    for policy in bad:
        with pytest.raises((ValueError, RankError), match=r"gather_dtype=torch.float32 for param"):
            ShardedAdadelta([p], policy=policy)


def test_a_wider_gather_dtype_is_an_error_on_every_rank(pool):
    pool(2).run(refused)


STORED = [
    ShardPolicy(1e-4, stochastic_rounding=True),
    ShardPolicy(1e-4, state_dtype=torch.bfloat16),
    ShardPolicy(1e-4, state_dtype=torch.bfloat16, master_weights=False),
]


def rounded(rank, policy):
    """Train, and train with a stop in the middle: the noise is the same."""
    straight, optimizer = build(torch.bfloat16, policy)
    train(straight, optimizer, rank, range(5))
    train(straight, optimizer, rank, range(5, 8))
    again, optimizer = build(torch.bfloat16, policy)
    train(again, optimizer, rank, range(5))
    whole = optimizer.gather_state_dict(0)
    stopped, optimizer = build(torch.bfloat16, policy)
    with torch.no_grad():
        for p, value in zip(stopped, again, strict=True):
            p.copy_(value)
    optimizer.scatter_state_dict(whole if rank == 0 else None)
    train(stopped, optimizer, rank, range(5, 8))
    state = next(iter(optimizer.state.values()))
    dtypes = {key: value.dtype for key, value in state.items()}
    return [p.detach() for p in straight], [p.detach() for p in stopped], dtypes


@pytest.mark.parametrize("policy", STORED)
def test_stochastic_rounding_is_reproduced_after_a_stop(pool, policy):
    results = pool(2).run(rounded, policy)
    wanted, _, _ = control(torch.bfloat16, 2, range(8))
    for straight, stopped, dtypes in results:
        assert all(map(torch.equal, straight, stopped))
        assert all(map(torch.equal, straight, results[0][0]))
        assert dtypes["square_avg"] == (policy.state_dtype or torch.float32)
        for got, want in zip(straight, wanted, strict=True):
            # A parameter moves by about 0.003 a step and is rounded to about 0.004 at 1.
            torch.testing.assert_close(got, want, rtol=0.05, atol=0.02)


def small_steps(rank, policy):
    """200 updates that are each less than half of a unit in the last place."""
    p = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    optimizer = ShardedAdadelta([p], lr=0.08, rho=0.0, eps=1e-5, policy=policy)
    for _ in range(200):
        p.grad = torch.full_like(p, -1.0)
        optimizer.step()
    return p.detach().float().mean().item()


def test_without_masters_small_updates_are_lost_unless_rounded_stochastically(pool):
    nearest, stochastic, master = (
        pool(2).run(small_steps, policy)[0]
        for policy in (
            ShardPolicy(master_weights=False),
            ShardPolicy(stochastic_rounding=True),
            ShardPolicy(),
        )
    )
    assert nearest == 1.0
    assert master > 1.02
    # 20,000 independent sums of 200 roundings with a deviation below 0.004 each.
    assert abs(stochastic - master) < 5 * 0.004 * 200**0.5 / 20_000**0.5 + 2**-9

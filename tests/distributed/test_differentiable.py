"""Gradients through a step on several ranks are those through one process's step."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join

from adadelta_dist import Adadelta, RankError, ShardedAdadelta, collectives

SHAPES = ((2, 3), (4,), (3,))
MISSING = (1, 1)
"""This rank has no gradient of this parameter; nobody has one of the last parameter."""


def inputs(kind, dtype):
    generator = torch.Generator().manual_seed(kind)
    return [
        torch.rand(shape, dtype=dtype, generator=generator).add(0.1).requires_grad_()
        for shape in SHAPES
    ]


def stepped(optimizer_class, start, grads, lr=0.5, **options):
    """Parameters after two steps, as functions of what they began with and of the gradients."""
    params = [x.clone() for x in start]
    optimizer = optimizer_class(params, lr=lr, differentiable=True, **options)
    for _ in range(2):
        for p, grad in zip(params[:2], grads, strict=False):
            p.grad = grad
        params[2].grad = torch.zeros_like(params[2])
        optimizer.step()
    return params


def loss_on(rank, params):
    return sum(((rank + 1) * p * p.conj()).real.sum() for p in params)


def derivatives(loss, grads):
    """Of the loss, and of the size of its gradients: first and second order."""
    grads = [g for g in grads if g is not None]
    first = torch.autograd.grad(loss, grads, create_graph=True)
    size = sum((g * g.conj()).real.sum() for g in first)
    return [g.detach() for g in first], torch.autograd.grad(size, grads)


def on_ranks(rank, dtype, options):
    start = inputs(99, dtype)
    grads = inputs(rank, dtype)[:2]
    if rank == MISSING[0]:
        grads[MISSING[1]] = None
    params = stepped(ShardedAdadelta, start, grads, **options)
    of_start = torch.autograd.grad(loss_on(rank, params), start, retain_graph=True)
    first, second = derivatives(loss_on(rank, params), grads)
    return [p.detach() for p in params], of_start, first, second


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "maximize": True}])
@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_flow_through_the_average(pool, world_size, dtype, options):
    start = inputs(99, dtype)
    by_rank = [inputs(rank, dtype)[:2] for rank in range(world_size)]
    by_rank[MISSING[0]][MISSING[1]] = torch.zeros(4, dtype=dtype)
    mean = [sum(rows[1:], rows[0]) / world_size for rows in zip(*by_rank, strict=True)]
    params = stepped(Adadelta, start, mean, **options)
    total = sum(loss_on(rank, params) for rank in range(world_size))
    del by_rank[MISSING[0]][MISSING[1]]
    of_start = torch.autograd.grad(total, start, retain_graph=True)
    first, second = derivatives(total, [g for grads in by_rank for g in grads])
    results = pool(world_size).run(on_ranks, dtype, options)
    for got, *_ in results:
        torch.testing.assert_close(got, [p.detach() for p in params], rtol=1e-12, atol=0)
    ours = [sum(parts) for parts in zip(*(of for _, of, _, _ in results), strict=True)]
    torch.testing.assert_close(ours, list(of_start), rtol=1e-10, atol=1e-14)
    for index, want in ((2, first), (3, second)):
        flat = [g for result in results for g in result[index]]
        torch.testing.assert_close(flat, list(want), rtol=1e-10, atol=1e-14)


def one_process(*grads):
    params = stepped(Adadelta, inputs(99, torch.float64), grads)
    return loss_on(0, params)


def test_the_control_passes_gradcheck():
    assert torch.autograd.gradcheck(one_process, inputs(0, torch.float64)[:2])


HYPER = torch.tensor([0.5, 0.1], dtype=torch.float64)
"""Learning rate and weight decay."""


def updated(dtype, lr, weight_decay, *grads):
    """As `stepped`, with hyperparameters that gradients flow into."""
    options = {"weight_decay": weight_decay, "maximize": True}
    return stepped(Adadelta, inputs(99, dtype), grads, lr=lr, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradients_of_hyperparameters_pass_gradcheck(dtype):
    def step(*args):
        return torch.cat([torch.view_as_real(p + 0j).flatten() for p in updated(dtype, *args)])

    lr, weight_decay = HYPER[:1].clone().requires_grad_(), HYPER[1].clone().requires_grad_()
    args = [lr, weight_decay, *inputs(0, dtype)[:2]]
    assert torch.autograd.gradcheck(step, args)
    assert torch.autograd.gradgradcheck(step, args)
    assert torch.autograd.gradcheck(step, [lr, torch.zeros_like(lr), *args[2:]])
    assert torch.autograd.gradcheck(step, [0.5, weight_decay, *args[2:]])
    options = {"weight_decay": 0.1, "maximize": True}
    plain = stepped(torch.optim.Adadelta, inputs(99, dtype), args[2:], **options)
    assert all(map(torch.equal, updated(dtype, *args), plain))


def loss_at(step, rank, params):
    """Of one linear layer, on inputs of its own."""
    weight, bias = params
    generator = torch.Generator().manual_seed(10 * step + rank)
    batch = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    return (batch @ weight + bias).tanh().square().mean()


def learned(optimizer_class, ranks, hyper):
    """The loss after three steps, each on the gradients of the parameters then."""
    generator = torch.Generator().manual_seed(4)
    params = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((3, 4), 4)]
    optimizer = optimizer_class(params, *hyper_options(hyper), differentiable=True)
    for step in range(3):
        now = [p.clone().requires_grad_() for p in params]
        losses = [loss_at(step, rank, now) for rank in ranks]
        grads = torch.autograd.grad(sum(losses) / len(losses), now, create_graph=step > 0)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()
    return sum(loss_at(3, rank, params) for rank in ranks)


def hyper_options(hyper):
    lr, weight_decay = hyper
    return lr, 0.9, 1e-3, weight_decay


def of_hyperparameters(rank):
    hyper = HYPER.clone().requires_grad_()
    loss = learned(ShardedAdadelta, [rank], hyper)
    (derivative,) = torch.autograd.grad(loss, hyper)
    dist.all_reduce(derivative)  # each rank has what its own copies contribute
    h = 1e-5 * torch.eye(2, dtype=torch.float64)
    around = [[learned(ShardedAdadelta, [rank], HYPER + s * row) for s in (1, -1)] for row in h]
    differences = torch.stack([(up - down).detach() / 2e-5 for up, down in around])
    dist.all_reduce(differences)
    return loss.item(), derivative, differences


@pytest.mark.parametrize("world_size", [2, 3])
def test_hyperparameters_are_learned_through_several_steps(pool, world_size):
    hyper = HYPER.clone().requires_grad_()
    loss = learned(Adadelta, range(world_size), hyper)
    (wanted,) = torch.autograd.grad(loss, hyper)
    results = pool(world_size).run(of_hyperparameters)
    assert sum(loss for loss, *_ in results) == pytest.approx(loss.item(), rel=1e-12)
    for _, derivative, differences in results:
        torch.testing.assert_close(derivative, wanted, rtol=1e-10, atol=0)
        torch.testing.assert_close(differences, wanted, rtol=1e-6, atol=0)


def refusals(rank):
    p = torch.zeros(2).clone()
    p.grad = torch.ones(2)
    optimizer = ShardedAdadelta([p], differentiable=True)
    for call in (
        lambda: optimizer.clip_grad_norm_(1.0),
        lambda: optimizer.grad_shard(p),
        lambda: optimizer.scatter_state_dict(None),
    ):
        with pytest.raises(RuntimeError, match="shards nothing"):
            call()
    optimizer.step()
    whole = optimizer.gather_state_dict(0)
    assert bool(whole) == (rank == 0)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.5 + rank
    with pytest.raises(RankError, match=r"lr=0.5; rank 1 has .*lr=1.5"):
        optimizer.step()
    assert torch.equal(p.grad, torch.ones(2))


def test_what_needs_shards_is_refused_and_ranks_must_agree(pool):
    pool(2).run(refusals)


def sparse(rank):
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2).to_sparse() if rank else torch.ones(2)
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        ShardedAdadelta([p], differentiable=True).step()


def test_a_sparse_gradient_is_an_error_on_every_rank(pool):
    pool(2).run(sparse)


def state_of_several_moments(rank):
    """Steps by what is consolidated and then outdated, by what is loaded, and by `gather`."""
    p, factor = torch.zeros(2).clone(), torch.ones(2, requires_grad=True)
    optimizer = ShardedAdadelta([p], differentiable=True)

    def step():
        p.grad = 2 * factor
        optimizer.step()

    def steps():
        return int(optimizer.state_dict()["state"][0]["step"])

    step()
    optimizer.consolidate_state_dict(0)
    step()
    stepped = steps()
    gathered = optimizer.gather_state_dict(0)
    optimizer.consolidate_state_dict(0)
    loaded = copy.deepcopy(optimizer.state_dict()) if rank == 0 else None
    loaded = collectives.all_gather_object(optimizer._group, loaded)[0]
    loaded["state"][0]["step"].fill_(7)
    optimizer.load_state_dict(loaded)
    entry = gathered["state"][0] if rank == 0 else {}
    return stepped, steps(), any(value.requires_grad for value in entry.values()), len(entry)


def test_state_is_that_of_the_moment_and_gathers_without_its_graph(pool):
    assert pool(2).run(state_of_several_moments) == [(2, 7, False, 3), (2, 7, False, 0)]


def scaled(rank, ranks_that_scale):
    """A GradScaler would decide on each rank alone, and change gradients in place."""
    p = torch.zeros(4)
    optimizer = ShardedAdadelta([p], differentiable=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=rank in ranks_that_scale)
    p.grad = scaler.scale(torch.ones(4))
    with pytest.raises(RuntimeError, match="on several ranks under a GradScaler"):
        scaler.step(optimizer)
    p.grad = torch.ones(4)
    optimizer.step()  # nothing is left of the scaler
    return p[0].item() != 0


@pytest.mark.parametrize("ranks_that_scale", [[0, 1], [1]])
def test_a_scaler_is_an_error_on_every_rank(pool, ranks_that_scale):
    assert pool(2).run(scaled, ranks_that_scale, deadline=15.0) == [True, True]


def joined(rank):
    optimizer = ShardedAdadelta([nn.Parameter(torch.ones(4))], differentiable=True)
    with (
        pytest.raises(NotImplementedError, match="Join with differentiable=True"),
        Join([optimizer]),
    ):
        pass


def test_loops_of_unequal_length_are_refused(pool):
    pool(2).run(joined, deadline=15.0)

"""Gradients through a step on several ranks are those through one process's step."""

import pytest
import torch
from torch import nn

from adadelta_dist import Adadelta, RankError, ShardedAdadelta

SHAPES = ((2, 3), (4,), (3,))
MISSING = (1, 1)
"""This rank has no gradient of this parameter; nobody has one of the last parameter."""


def inputs(kind, dtype):
    generator = torch.Generator().manual_seed(kind)
    return [
        torch.rand(shape, dtype=dtype, generator=generator).add(0.1).requires_grad_()
        for shape in SHAPES
    ]


def stepped(optimizer_class, start, grads, **options):
    """Parameters after two steps, as functions of what they began with and of the gradients."""
    params = [x.clone() for x in start]
    optimizer = optimizer_class(params, lr=0.5, differentiable=True, **options)
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

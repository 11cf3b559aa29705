"""Every input that torch's own optimizer tests give Adadelta, given to ours.

They come from the installed `torch.testing._internal.common_optimizers`: what torch's
class accepts ours must follow bit by bit, what it refuses ours must refuse alike.
"""

import copy

import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import optim_db

from adadelta_dist import Adadelta, ShardedAdadelta

INFO = next(info for info in optim_db if info.optim_cls is torch.optim.Adadelta)
CPU = torch.device("cpu")


def inputs():
    """All keyword arguments that run on a CPU, with every value of foreach."""
    given = [entry.kwargs for entry in INFO.optim_inputs_func(device=CPU)]
    on_cpu = [kwargs for kwargs in given if not kwargs.get("capturable")]
    assert len(on_cpu) >= 5
    return [kwargs | {"foreach": foreach} for kwargs in on_cpu for foreach in (None, False, True)]


def train(cls, kwargs):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    optimizer = cls(module.parameters(), **copy.deepcopy(kwargs))
    for step in range(4):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        module(torch.randn(3, 5, generator=generator)).square().sum().backward()
        optimizer.step()
    return [p.detach().clone() for p in module.parameters()]


def train_all(rank):
    return [(kwargs, train(ShardedAdadelta, kwargs)) for kwargs in inputs()]


@pytest.mark.parametrize("world_size", [1, 2])
def test_sharded_follows_torch_on_torchs_inputs(pool, world_size):
    """In lockstep: every rank has the same gradients, whose mean over two is exact."""
    for results in pool(world_size).run(train_all):
        assert len(results) == len(inputs())
        for kwargs, got in results:
            for a, b in zip(got, train(torch.optim.Adadelta, kwargs), strict=True):
                assert torch.equal(a, b), kwargs


@pytest.mark.parametrize("cls", [Adadelta, ShardedAdadelta])
def test_one_process_follows_torch_on_torchs_inputs(cls):
    for kwargs in inputs():
        for a, b in zip(train(cls, kwargs), train(torch.optim.Adadelta, kwargs), strict=True):
            assert torch.equal(a, b), kwargs


def refusals(rank, cls):
    found = []
    for entry in INFO.optim_error_inputs_func(device=CPU, dtype=torch.float32):
        given = entry.optimizer_error_input
        try:
            cls(given.params, **given.kwargs)
        except Exception as error:
            found.append((type(error).__name__, str(error)))
        else:
            found.append(("accepted", given.desc))
    return found


def test_what_torch_refuses_is_refused_alike(pool):
    wanted = refusals(0, torch.optim.Adadelta)
    assert len(wanted) >= 4
    assert all(kind != "accepted" for kind, _ in wanted)
    assert refusals(0, Adadelta) == wanted
    assert refusals(0, ShardedAdadelta) == wanted
    assert pool(2).run(refusals, ShardedAdadelta) == [wanted] * 2

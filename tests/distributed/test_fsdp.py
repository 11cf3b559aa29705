"""`Adadelta` under FSDP2: DTensor parameters step on their local shards."""

import warnings

import pytest
import torch
import torch.distributed as dist
from test_gradients import batch, loss_of, model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from adadelta_dist import Adadelta, ShardedAdadelta


def train(rank, cls, kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP2's own
        module = model()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(module, mesh=mesh)
        optimizer = cls(module.parameters(), **kwargs)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(module, batch(rank, 10 * step)).backward()
            optimizer.step()
        return [p.full_tensor().detach() for p in module.parameters()]


@pytest.mark.parametrize("kwargs", [{"fused": True}, {"fused": False}])
def test_fully_sharded_parameters_step_as_torchs(pool, kwargs):
    wanted = pool(2).run(train, torch.optim.Adadelta, {})[0]
    for got in pool(2).run(train, Adadelta, kwargs):
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)  # a few ulp of fp64


def refused(rank):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = model()
        fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    try:
        ShardedAdadelta(module.parameters())
    except TypeError as error:
        return str(error)


def test_sharding_what_is_sharded_is_refused_with_the_remedy(pool):
    assert all("use Adadelta" in message for message in pool(2).run(refused))

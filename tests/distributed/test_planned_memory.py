"""What a plan says of memory is what optimizers on real ranks hold."""

import gc
from itertools import pairwise

import pytest
import torch
from torch import nn

from adadelta_dist import FlatSlice, ShardedAdadelta, ShardPolicy
from adadelta_dist.planning.model_plan import from_module
from adadelta_dist.planning.planner import Cluster, sharded

VARIANTS = {
    "float32": (torch.float32, {}),
    "float32, stage 2": (torch.float32, {"stage": 2}),
    "bfloat16, masters": (torch.bfloat16, {}),
    "bfloat16, masters, stage 2": (torch.bfloat16, {"stage": 2}),
    "bfloat16, stochastic": (
        torch.bfloat16,
        {"stochastic_rounding": True, "state_dtype": torch.bfloat16},
    ),
}


def prepared(name):
    dtype, options = VARIANTS[name]
    sizes = (61, 200, 97, 10)  # which ranks do not divide
    model = nn.Sequential(*(nn.Linear(a, b, dtype=dtype) for a, b in pairwise(sizes)))
    return model, torch.ones(3, sizes[0], dtype=dtype), ShardPolicy(bucket_mb=0.05, **options)


def nbytes(tensors):
    """Bytes of the memory that tensors are in, each counted once."""
    locals_ = (t.local if isinstance(t, FlatSlice) else t for t in tensors)
    storages = (t.untyped_storage() for t in locals_)
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def everything():
    """The tensors of this process."""
    gc.collect()
    things = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return [t for t in things if type(t) in (torch.Tensor, nn.Parameter)]


def held(rank, name):
    """(bytes of state, of gradients, of everything) that this rank holds."""
    before = nbytes(everything())
    model, inputs, policy = prepared(name)
    optimizer = ShardedAdadelta(model.parameters(), fused=False, policy=policy)
    for _ in range(2):
        optimizer.zero_grad()
        model(inputs).sum().backward()
        optimizer.step()
    after = nbytes(everything()) - before - inputs.nbytes
    state = [entry[key] for entry in optimizer.state.values() for key in entry if key != "step"]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model(inputs).sum().backward()
    shards = [optimizer.grad_shard(p) for p in model.parameters()]
    optimizer.step()  # so that all ranks are done with one another
    return nbytes(state), nbytes([*grads, *shards]), after


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_state_and_gradients_are_as_planned(pool, world_size, name):
    model, _, policy = prepared(name)
    cost = sharded(from_module(model), Cluster(world_size, backend="gloo"), policy)
    between_steps = ["averaged gradients", "gradients"][: 3 - policy.stage]
    gradients = sum(cost.memory[kind] for kind in between_steps)
    state = cost.memory["accumulators"] + cost.memory["masters"]
    total = state + gradients + cost.memory["parameters"]
    for measured in pool(world_size).run(held, name):
        assert measured[:2] == (state, gradients)
        # Beside them: how often each parameter was updated, and what ranks told one another.
        assert total <= measured[2] <= 1.02 * total

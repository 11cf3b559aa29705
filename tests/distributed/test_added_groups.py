"""Parameter groups that a callback assigns behind those that are sharded."""

import copy

from test_gradients import assert_close, batch, loss_of, model, values

from adadelta_dist import ShardedAdadelta
from adadelta_dist.strategies import conversion


def finetuned(rank, resume):
    """The values after three steps, of which the last two have the first layer as well."""
    module = model()

    def train(optimizer, step):
        optimizer.zero_grad()
        loss_of(module, batch(rank, step)).backward()
        optimizer.step()

    optimizer = ShardedAdadelta(module[2].parameters())
    train(optimizer, 0)
    optimizer.add_param_group({"params": list(module[0].parameters()), "lr": 0.5})
    train(optimizer, 1)
    if resume:  # as Lightning's finetuning callbacks do
        state, groups = optimizer.state_dict(), list(map(dict, optimizer.param_groups))
        state = copy.deepcopy(state)
        optimizer = ShardedAdadelta(module[2].parameters())
        optimizer.param_groups = groups
        conversion.shard_added_groups_(optimizer)
        optimizer.load_state_dict(state)
    train(optimizer, 2)
    return values(module)


def test_they_are_sharded_and_go_on(pool):
    for got, wanted in zip(
        pool(2).run(finetuned, True), pool(2).run(finetuned, False), strict=True
    ):
        assert_close(got, wanted)

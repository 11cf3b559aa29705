"""What we make for ourselves lies where we need it, whatever the user's default device is."""

import pytest
import torch
from test_gradients import assert_close, batch, loss_of, model, values

from adadelta_dist import ShardedAdadelta, ShardPolicy, load_checkpoint, save_checkpoint

POLICIES = {
    "plain": ShardPolicy(),
    "sharded gradients": ShardPolicy(stage=2),
    "skipping": ShardPolicy(skip_nonfinite=True, overlap=False),
    "bf16 wire": ShardPolicy(reduce_dtype=torch.bfloat16, gather_dtype=torch.bfloat16),
}


def trained(rank, policy, device, path):
    """All that an optimizer does, on the CPU, where tensors are made on `device` by default."""
    module, late = model(), torch.nn.Parameter(torch.ones(4))
    torch.set_default_device(device)
    try:
        optimizer = ShardedAdadelta(module.parameters(), policy=policy)
        for step in range(2):
            optimizer.zero_grad()
            with torch.device("cpu"):
                loss = loss_of(module, batch(rank, 10 * step))
            loss.backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        whole = optimizer.gather_state_dict()
        optimizer.scatter_state_dict(whole or None)
        save_checkpoint(path, module, optimizer)
        load_checkpoint(path, module, optimizer)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.add_param_group({"params": [late]})
        late.grad = torch.ones(4, device="cpu")
        optimizer.step()
    finally:
        torch.set_default_device(None)
    return [*values(module), late.detach()]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_training_is_the_same(pool, world_size, policy, tmp_path):
    devices = [(device, tmp_path / device) for device in ("cpu", "meta")]
    wanted, got = (pool(world_size).run(trained, policy, *where) for where in devices)
    for one, other in zip(got, wanted, strict=True):
        assert_close(one, other)

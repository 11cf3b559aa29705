"""Steps under CUDA graph capture, as far as a CPU can tell what a graph would repeat.

torch is told that a capture is going on. Then nothing may be read on the host or copied from
device to device, and what needs either is refused on every rank.
"""

from contextlib import ExitStack
from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adadelta_dist import Adadelta, ShardedAdadelta, ShardPolicy, collectives, kernels
from adadelta_dist.buckets import FlatBucket
from adadelta_dist.collectives import Pending

HOST_READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}


class OnDevice(TorchDispatchMode):
    """Within it an operation that makes the host wait for a device is an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors}
        assert func._schema.name not in HOST_READS, f"the host reads: {func}"
        assert len(devices) < 2, f"between devices: {func}"
        return result


def told(going_on=True):
    """Tell torch that a capture is going on, or is not."""
    names = ("is_initialized", "is_current_stream_capturing")
    return mock.patch.multiple(torch.cuda, **dict.fromkeys(names, lambda: going_on))


def capture(going_on=True):
    """Tell torch so, and watch what is done."""
    context = ExitStack()
    if going_on:
        context.enter_context(told())
        context.enter_context(OnDevice())
    return context


def model(dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 3))
    module.register_parameter("idle", nn.Parameter(torch.ones(5)))
    return module.to(device, dtype)


def batch(step, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, 6, generator=generator)


def train(rank, dtype, policy, backward, step):
    """Three iterations; of the last two `backward` and `step` are captured, if told so."""
    module = model(dtype)
    optimizer = ShardedAdadelta(module.parameters(), lr=0.5, policy=policy)
    optimizer.attach(module)
    for t in range(3):
        optimizer.zero_grad()
        loss = module(batch(t, rank).to(dtype)).float().square().sum()
        with capture(backward and t > 0):
            loss.backward()
        with capture(step and t > 0):
            optimizer.step()
        leaves_gathers = policy.overlap_gather and not (step and t > 0)
        assert bool(optimizer._gathers._pending) == leaves_gathers
    optimizer.wait()
    return [p.detach() for p in module.parameters()], optimizer.gather_state_dict(0)


@pytest.mark.parametrize(
    ("dtype", "policy"),
    [
        (torch.float32, ShardPolicy(overlap=False)),
        (torch.bfloat16, ShardPolicy(overlap=False, reduce_dtype=torch.float32)),
        (torch.float32, ShardPolicy(bucket_mb=1e-3, overlap_gather=True)),
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_captured_step_is_the_eager_one_and_asks_no_host(pool, dtype, policy, world_size):
    ranks = pool(world_size)
    eager = ranks.run(train, dtype, policy, False, False)
    ways = [(True, True), (True, False)] + [(False, True)] * (not policy.overlap)
    for way in ways:
        for (got, state), (want, wanted) in zip(
            ranks.run(train, dtype, policy, *way), eager, strict=True
        ):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
            torch.testing.assert_close(state, wanted, rtol=0, atol=0)


SUPPORTED = "_get_capturable_supported_devices"


def is_set_to(a, b):
    """torch has none for the meta device."""
    at = [(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()) for t in (a, b)]
    return at[0] == at[1]


def native(rank):
    """A device other than the CPU: state, `step` and a Tensor `lr` there, native collectives."""
    calls = []

    def record(name):
        return lambda *args, **kwargs: calls.append(name) or Pending()

    patches = {f"_native_{name}": record(name) for name in ("reduce_scatter", "all_gather")}
    module = model(device="meta")
    with (
        mock.patch.object(torch.Tensor, "is_set_to", is_set_to),
        mock.patch.multiple(collectives, broadcast=lambda *_: None, **patches),
        mock.patch(f"{torch.optim.Adadelta.__module__}.{SUPPORTED}", return_value=["meta"]),
    ):
        optimizer = ShardedAdadelta(module.parameters(), capturable=True, foreach=True)
        optimizer.param_groups[0]["lr"] = torch.ones((), device="meta")
        for t in range(2):
            with capture(t > 0):
                module(torch.empty(4, 6, device="meta")).square().sum().backward()
                optimizer.step()
    steps = {entry["step"].device.type for entry in optimizer.state.values()}
    return calls, steps


@pytest.mark.parametrize("world_size", [1, 2])
def test_nothing_goes_between_host_and_device(pool, world_size):
    each = ["reduce_scatter", "all_gather"] * (world_size > 1)
    for calls, steps in pool(world_size).run(native):
        assert calls == 2 * each
        assert steps == {"meta"}


def refused(rank, words, policy, what):
    module = model()
    module.idle.requires_grad_(False)  # nobody waits for it
    optimizer = ShardedAdadelta(module.parameters(), policy=policy)
    before = [p.detach().clone() for p in module.parameters()]
    module(batch(0, rank)).square().sum().backward()
    if what == "scaler":
        optimizer.grad_scale = optimizer.found_inf = torch.ones((), device="meta")  # unreadable
    if what == "state":
        optimizer.state.clear()
    if what == "parameter":
        module[0].weight.data = module[0].weight.detach().clone()
    captures = rank > 0 or what != "alone"
    call = partial(optimizer.clip_grad_norm_, 1.0) if what == "clip" else optimizer.step
    reads = mock.patch.object(FlatBucket, "is_current", side_effect=AssertionError("host reads"))
    with told(captures), reads, pytest.raises(RuntimeError, match=words):
        call()
    assert all(map(torch.equal, before, module.parameters()))
    optimizer.step()
    assert not torch.equal(before[0], module[0].weight)


LATE = ShardPolicy(overlap=False)


@pytest.mark.parametrize(
    ("words", "policy", "what"),
    [
        ("reductions that began before the capture", ShardPolicy(), ""),
        ("with GradScaler", LATE, "scaler"),
        ("with skip_nonfinite", ShardPolicy(overlap=False, skip_nonfinite=True), ""),
        ("with stage=2", ShardPolicy(stage=2), ""),
        ("with stochastic", ShardPolicy(overlap=False, state_dtype=torch.bfloat16), ""),
        ("clip_grad_norm_.* which the host reads", LATE, "clip"),
        ("state was replaced, and is adopted while", LATE, "state"),
        ("replaced, and is adopted while a CUDA graph", LATE, "parameter"),
        ("the ranks disagree.*captured", LATE, "alone"),
    ],
)
def test_what_needs_the_host_is_refused_on_every_rank(pool, words, policy, what):
    pool(2).run(refused, words, policy, what)


def differentiable(rank):
    p = torch.zeros(2).clone()
    p.grad = torch.ones(2)
    with told(), pytest.raises(RuntimeError, match="with differentiable=True on several ranks"):
        ShardedAdadelta([p], differentiable=True).step()


def test_averages_that_gradients_flow_through_are_not_captured(pool):
    pool(2).run(differentiable)


def test_what_is_done_once_is_done_before_the_capture():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = Adadelta([p])
    with told(), pytest.raises(RuntimeError, match="state is allocated while a CUDA graph"):
        optimizer.step()
    optimizer.step()
    with capture():
        optimizer.step()
    with told(), pytest.raises(RuntimeError, match="is compiled while a CUDA graph"):
        kernels.missing.__wrapped__(kernels.step_kernel, "cpu", torch.float32)

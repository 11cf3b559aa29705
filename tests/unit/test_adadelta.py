"""Adadelta is a drop-in for torch.optim.Adadelta, and its fused step the same step."""

import copy
import inspect
import pickle

import pytest
import torch
from torch.distributed.tensor import distribute_tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from trajectory import (
    SHAPES,
    assert_equal,
    assert_same_state,
    gradient,
    message_of,
    parameters,
    train,
)

from adadelta_dist import Adadelta, ShardedAdadelta
from adadelta_dist import adadelta as module

OPTIONS = [
    {},
    {"lr": 0.3, "rho": 0.95, "eps": 1e-7, "weight_decay": 0.1},
    {"maximize": True},
    {"foreach": True},
    {"foreach": False},
    {"lr": torch.tensor(0.3)},
]


def close(got, want):
    """Fused against eager: a few roundings a step, of terms of size one."""
    for a, b in zip(got, want, strict=True):
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=64 * eps, atol=64 * eps)


def test_every_argument_of_torch_is_there_with_its_default():
    ours = inspect.signature(Adadelta.__init__).parameters
    for name, parameter in inspect.signature(torch.optim.Adadelta.__init__).parameters.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind)
    assert set(ours) - set(inspect.signature(torch.optim.Adadelta.__init__).parameters) == {"fused"}


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_small_models_are_trained_as_by_torch_bit_by_bit(dtype, options, fused):
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    a, b = Adadelta(ours, **options, fused=fused), torch.optim.Adadelta(theirs, **options)
    assert_equal(train(a, ours, without_grad=[1]), train(b, theirs, without_grad=[1]))
    assert_same_state(a.state_dict(), b.state_dict())


@pytest.mark.parametrize("kinds", [(Adadelta, torch.optim.Adadelta)] * 2, ids=["to", "from"])
def test_state_dicts_are_interchangeable_with_torch(kinds, request):
    first, second = kinds if request.node.callspec.id == "to" else kinds[::-1]
    params, wanted = parameters(), parameters()
    optimizer, control = first(params, lr=0.5), torch.optim.Adadelta(wanted, lr=0.5)
    train(optimizer, params, range(3))
    train(control, wanted, range(3))
    saved = optimizer.state_dict()
    optimizer = second(params)
    optimizer.load_state_dict(saved)
    assert_equal(train(optimizer, params, range(3, 6)), train(control, wanted, range(3, 6)))


MIXED = [
    lambda dtype: torch.randn(300, 300, dtype=dtype),
    lambda dtype: torch.randn(300, 400, dtype=dtype).t(),
    lambda dtype: torch.randn(64, 64, 6, 6, dtype=dtype).to(memory_format=torch.channels_last),
    lambda dtype: torch.randn(300, 700, dtype=dtype)[:, ::2],
    lambda dtype: torch.randn(5, 6, dtype=dtype),
    lambda dtype: torch.randn(6, 8, dtype=dtype)[:, 1:7:2],
    lambda dtype: torch.randn(3, 4, 5, 6, dtype=dtype).to(memory_format=torch.channels_last),
    lambda dtype: torch.randn((), dtype=dtype),
    lambda dtype: torch.randn(0, 3, dtype=dtype),
    lambda dtype: torch.randn(7, dtype=dtype),
]


def mixed(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.nn.Parameter(make(dtype)) for make in MIXED]


def two_groups(params):
    return [{"params": params[::2]}, {"params": params[1::2], "rho": 0.8, "weight_decay": 0.125}]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_trains_any_mix_of_parameters_as_eager_does(dtype):
    ours, theirs = mixed(dtype), mixed(dtype)
    a = Adadelta(two_groups(ours), lr=0.5, fused=True)
    b = torch.optim.Adadelta(two_groups(theirs), lr=0.5)
    for steps, absent in ((range(2), [4, 5]), (range(2, 4), [0])):
        close(train(a, ours, steps, absent), train(b, theirs, steps, absent))
    for mine, want in zip(ours, theirs, strict=True):
        assert mine.stride() == want.stride()
        assert a.state[mine].keys() == b.state[want].keys()
        assert a.state[mine]["step"] == b.state[want]["step"]
        close(
            [a.state[mine][k] for k in ("square_avg", "acc_delta")],
            [b.state[want][k] for k in ("square_avg", "acc_delta")],
        )


@pytest.mark.usefixtures("kernels")
def test_fused_trains_half_precision_with_fp32_arithmetic():
    ours, single = mixed(torch.bfloat16), mixed(torch.bfloat16)
    single = [torch.nn.Parameter(p.detach().float()) for p in single]
    a, b = Adadelta(ours, fused=True), torch.optim.Adadelta(single)
    for index, (p, q) in enumerate(zip(ours, single, strict=True)):
        p.grad = gradient(p, 0, index)
        q.grad = p.grad.float()
    a.step()
    b.step()
    for p, q in zip(ours, single, strict=True):
        torch.testing.assert_close(p, q.to(torch.bfloat16), rtol=2**-7, atol=0)  # one ulp


@pytest.mark.usefixtures("kernels")
def test_fused_copes_with_gradients_of_another_memory_order():
    ours, theirs = mixed(), mixed()
    a, b = Adadelta(ours, fused=True), torch.optim.Adadelta(theirs)
    for optimizer, params in ((a, ours), (b, theirs)):
        for index, p in enumerate(params):
            p.grad = gradient(p, 0, index).contiguous()
        ours[7].grad = theirs[7].grad = torch.tensor(0.5)
        params[9].grad = torch.tensor([2.0]).expand(7)
        optimizer.step()
    close(ours, theirs)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("reload", [False, True])
def test_packing_copies_state_only_where_it_is_not_adjacent(reload, monkeypatch):
    copied = []
    foreach_copy = torch._foreach_copy_
    monkeypatch.setattr(
        torch, "_foreach_copy_", lambda to, new: (copied.append(list(to)), foreach_copy(to, new))
    )
    params, wanted = parameters(), parameters()
    optimizer, control = Adadelta(params, fused=True), torch.optim.Adadelta(wanted)
    train(optimizer, params, range(2))
    close(params, train(control, wanted, range(2)))
    if reload:
        loaded = optimizer.state_dict()
        for index, entry in loaded["state"].items():
            loaded["state"][index] = {key: value.clone() for key, value in entry.items()}
        optimizer.load_state_dict(loaded)
    copied.clear()
    close(train(optimizer, params, range(2, 4)), train(control, wanted, range(2, 4)))
    state = {id(t) for p in params for t in optimizer.state[p].values()}
    assert any(id(t) in state for tensors in copied for t in tensors) == reload


@pytest.mark.usefixtures("kernels")
def test_packs_are_cut_where_they_would_exceed_the_scratch_memory(monkeypatch):
    monkeypatch.setattr(module, "_PACK_NUMEL", 20)
    ours, theirs = parameters([*SHAPES] * 3), parameters([*SHAPES] * 3)
    a, b = Adadelta(ours, fused=True), torch.optim.Adadelta(theirs)
    close(train(a, ours), train(b, theirs))


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"lr": torch.ones(2)},
        {"rho": 1.5},
        {"rho": -0.1},
        {"eps": -1e-9},
        {"weight_decay": -1.0},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_in_torchs_words(options):
    (p, q) = parameters([(2,), (2,)])
    wanted = message_of(ValueError, lambda: torch.optim.Adadelta([p], **options))
    assert message_of(ValueError, lambda: Adadelta([p], **options)) == wanted
    optimizer = Adadelta([p])
    group = {"params": [q], **options}
    assert message_of(ValueError, lambda: optimizer.add_param_group(group)) == wanted
    assert [g["params"] for g in optimizer.param_groups] == [[p]]


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        (ValueError, []),
        (TypeError, torch.zeros(2)),
        (TypeError, ["a string"]),
        (ValueError, [torch.zeros(2, requires_grad=True) * 2]),
        (TypeError, [{"params": {torch.zeros(1)}}]),
    ],
    ids=["empty", "tensor", "no tensor", "no leaf", "set"],
)
def test_invalid_parameters_are_refused_in_torchs_words(kind, params):
    wanted = message_of(kind, lambda: torch.optim.Adadelta(params))
    assert message_of(kind, lambda: Adadelta(params)) == wanted


@pytest.mark.parametrize("conflict", [{"foreach": True}, {"differentiable": True}])
def test_a_group_that_conflicts_with_fused_is_refused_and_not_kept(conflict):
    p, q = parameters([(2,), (2,)])
    optimizer = Adadelta([p], fused=True)
    with pytest.raises(RuntimeError, match="`fused`"):
        optimizer.add_param_group({"params": [q], **conflict})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", [Adadelta, ShardedAdadelta])
def test_every_hook_is_called_once_whatever_was_built_before(kind):
    for before in (torch.optim.Adadelta, Adadelta, ShardedAdadelta, kind):
        optimizer = before(parameters())
    calls = []

    def note(name):
        return lambda *_: calls.append(name)

    globally = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    optimizer.register_step_pre_hook(note("pre"))
    optimizer.register_step_post_hook(note("post"))
    optimizer.register_state_dict_pre_hook(note("state pre"))
    optimizer.register_state_dict_post_hook(note("state post"))
    optimizer.register_load_state_dict_pre_hook(note("load pre"))
    optimizer.register_load_state_dict_post_hook(note("load post"))
    try:
        optimizer.step()
        assert calls == ["global pre", "pre", "post", "global post"]
    finally:
        for handle in globally:
            handle.remove()
    calls.clear()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["state pre", "state post", "load pre", "load post"]


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_goes_on_as_the_original(copier):
    params, wanted = parameters(), parameters()
    optimizer, control = Adadelta(params, lr=0.5, fused=False), torch.optim.Adadelta(wanted, lr=0.5)
    train(optimizer, params, range(2))
    train(control, wanted, range(2))
    twin = copier(optimizer)
    copies = twin.param_groups[0]["params"]
    assert_equal(train(twin, copies, range(2, 5)), train(control, wanted, range(2, 5)))
    assert twin.param_groups[0]["fused"] is twin.defaults["fused"] is False


def test_a_state_dict_without_fused_keeps_what_was_asked_for():
    (p,) = parameters([(2,)])
    optimizer = Adadelta([p], fused=False)
    optimizer.load_state_dict(torch.optim.Adadelta([p]).state_dict())
    assert optimizer.param_groups[0]["fused"] is False


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.usefixtures("kernels")
def test_dtensor_parameters_step_on_their_local_shards(fused, mesh):
    ours, theirs = parameters([(4, 6), (5,)]), parameters([(4, 6), (5,)])
    sharded = [torch.nn.Parameter(distribute_tensor(p.detach(), mesh)) for p in ours]
    a, b = Adadelta(sharded, fused=fused), Adadelta(theirs, fused=fused)
    for step in range(3):
        for index, (p, q) in enumerate(zip(sharded, theirs, strict=True)):
            q.grad = gradient(q, step, index)
            p.grad = distribute_tensor(q.grad.clone(), mesh)
        a.step()
        b.step()
    assert_equal([p.detach().to_local() for p in sharded], [p.detach() for p in theirs])
    assert isinstance(a.state[sharded[0]]["square_avg"], type(sharded[0].data))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_fused_capturable_step_counts_on_the_device():
    (p,) = [torch.nn.Parameter(torch.ones(8, device="cuda"))]
    optimizer = Adadelta([p], fused=True, capturable=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["step"].is_cuda

"""The calls that ShardedAdadelta adds to torch's, or must answer as torch does."""

import copy
import pickle

import pytest
import torch
from torch import nn
from trajectory import (
    SHAPES,
    assert_equal,
    assert_same_state,
    gradient,
    message_of,
    parameters,
    train,
)

from adadelta_dist import Adadelta, ShardedAdadelta, ShardPolicy


@pytest.mark.parametrize("norm_type", [1, 2, 3, float("inf")])
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
@pytest.mark.parametrize("gradients", ["local", "averaged"])
def test_clipping_equals_torchs(norm_type, max_norm, gradients):
    ours, theirs = parameters(), parameters()
    a = ShardedAdadelta(ours, policy=ShardPolicy(gradients=gradients))
    b = torch.optim.Adadelta(theirs)
    for step in range(3):
        for params in (ours, theirs):
            for index, p in enumerate(params[:-1]):
                p.grad = gradient(p, step, index)
        norm = a.clip_grad_norm_(max_norm, norm_type)
        want = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
        assert torch.equal(norm, want)
        a.step()
        b.step()
    assert_equal(ours, theirs)


def test_clipping_refuses_what_torch_refuses():
    params = parameters([(2,)])
    params[0].grad = torch.tensor([1.0, torch.nan])
    optimizer = ShardedAdadelta(params)
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    with pytest.raises(ValueError, match="norm_type must be positive or infinity, got 0"):
        optimizer.clip_grad_norm_(1.0, 0)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("policy", [ShardPolicy(), ShardPolicy(bucket_mb=1e-6)])
def test_a_copy_goes_on_bit_by_bit_and_apart_from_the_original(copier, policy):
    params, wanted = parameters(), parameters()
    optimizer = ShardedAdadelta(params, lr=0.5, policy=policy)
    control = torch.optim.Adadelta(wanted, lr=0.5)
    train(optimizer, params, range(2))
    train(control, wanted, range(2))
    twin = copier(optimizer)
    assert twin._policy == policy
    train(optimizer, params, range(2))  # the original moves on; the copy does not follow
    copies = twin.param_groups[0]["params"]
    assert_equal(train(twin, copies, range(2, 5)), train(control, wanted, range(2, 5)))
    assert_same_state(twin.state_dict(), control.state_dict())


def differentiated(kind, options):
    """The gradients of a loss after a step with respect to all that went into it."""
    inputs = [p.requires_grad_() for p in torch.rand(4, 3, dtype=torch.float64).add(0.1)]
    inputs = [t.detach().requires_grad_() for t in inputs]
    param, grad, square_avg, acc_delta = (t.clone() for t in inputs)
    param.grad = grad
    optimizer = kind([param], differentiable=True, **options)
    optimizer.state[param].update(
        step=torch.tensor(2.0), square_avg=square_avg, acc_delta=acc_delta
    )
    optimizer.step()
    loss = param.square().sum() + optimizer.state[param]["square_avg"].sum()
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("kind", [Adadelta, ShardedAdadelta])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "maximize": True}])
def test_a_differentiable_step_has_torchs_gradients(kind, options):
    torch.manual_seed(0)
    got = differentiated(kind, options)
    torch.manual_seed(0)
    want = differentiated(torch.optim.Adadelta, options)
    assert_equal(got, want)
    assert all(g.any() for g in got)


def test_a_group_added_in_mid_training_is_trained_as_by_torch():
    results = []
    for kind in (ShardedAdadelta, torch.optim.Adadelta):
        params = parameters()
        optimizer = kind(params[:2], lr=0.5)
        train(optimizer, params[:2], range(2))
        optimizer.add_param_group({"params": params[2:], "rho": 0.8})
        train(optimizer, params, range(2, 5))
        results.append((params, optimizer.state_dict()))
    (ours, state), (theirs, wanted) = results
    assert_equal(ours, theirs)
    assert_same_state(state, wanted)


@pytest.mark.parametrize(
    "options",
    [{"lr": -1.0}, {"rho": 2.0}, {"eps": -1.0}, {"weight_decay": -1.0}],
    ids=str,
)
def test_a_group_that_is_refused_leaves_everything_as_it_was(options):
    p, q = parameters([(3,), (4,)])
    optimizer = ShardedAdadelta([p])
    home = q.data_ptr()
    wanted = message_of(ValueError, lambda: torch.optim.Adadelta([q], **options))
    group = {"params": [q], **options}
    assert message_of(ValueError, lambda: optimizer.add_param_group(group)) == wanted
    assert len(optimizer.param_groups) == 1
    assert q not in optimizer.state
    assert q.data_ptr() == home
    train(optimizer, [p])


def test_a_group_that_shares_memory_is_refused():
    (p,) = parameters([(3,)])
    optimizer = ShardedAdadelta([p])
    with pytest.raises(ValueError, match="share memory"):
        optimizer.add_param_group({"params": [nn.Parameter(p.detach()[1:])]})
    assert len(optimizer.param_groups) == 1


def test_duplicates_in_a_group_warn_as_torch():
    (p,) = parameters([(3,)])
    messages = []
    for kind in (torch.optim.Adadelta, ShardedAdadelta):
        with pytest.warns(UserWarning, match="duplicate parameters") as caught:
            kind([p, p])
        messages.append([str(w.message) for w in caught])
    assert messages[0] == messages[1]


def test_empty_groups_and_empty_parameters_are_fine():
    results = []
    for kind in (ShardedAdadelta, torch.optim.Adadelta):
        params = parameters([(0,), (2, 0), (3,)])
        optimizer = kind([{"params": []}, {"params": params}, {"params": []}])
        results.append((train(optimizer, params), optimizer.state_dict()))
    assert_equal(results[0][0], results[1][0])
    assert_same_state(results[0][1], results[1][1])


def test_named_parameters_keep_their_names():
    model = nn.Linear(2, 3)
    optimizer = ShardedAdadelta(model.named_parameters())
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize("direction", ["to torch", "from torch"])
def test_state_dicts_are_interchangeable_with_torch(direction):
    kinds = [ShardedAdadelta, torch.optim.Adadelta]
    first, second = kinds if direction == "to torch" else kinds[::-1]
    params, wanted = parameters(), parameters()
    optimizer, control = first(params, lr=0.5), torch.optim.Adadelta(wanted, lr=0.5)
    train(optimizer, params, range(3))
    train(control, wanted, range(3))
    saved = optimizer.state_dict()
    optimizer = second(params)
    optimizer.load_state_dict(saved)
    assert_equal(train(optimizer, params, range(3, 6)), train(control, wanted, range(3, 6)))
    assert_same_state(optimizer.state_dict(), control.state_dict())


def test_hooks_may_replace_the_state_dict_as_with_torch():
    results = []
    for kind in (ShardedAdadelta, torch.optim.Adadelta):
        params = parameters()
        optimizer = kind(params)
        train(optimizer, params)

        def slower(_, state_dict):
            groups = [group | {"lr": 0.25} for group in state_dict["param_groups"]]
            return state_dict | {"param_groups": groups}

        optimizer.register_load_state_dict_pre_hook(slower)
        optimizer.load_state_dict(optimizer.state_dict())
        results.append((train(optimizer, params), optimizer.state_dict()))
    assert results[0][1]["param_groups"][0]["lr"] == 0.25
    assert_equal(results[0][0], results[1][0])


@pytest.mark.parametrize("to", [-1, 1])
def test_consolidating_refuses_a_rank_that_is_not_there(to):
    optimizer = ShardedAdadelta(parameters())
    optimizer.consolidate_state_dict(0)
    with pytest.raises(ValueError, match=f"to must be a rank below 1, got {to}"):
        optimizer.consolidate_state_dict(to)


def test_capturable_on_the_cpu_is_torchs_error_and_changes_nothing():
    messages = []
    for kind in (ShardedAdadelta, torch.optim.Adadelta):
        params = parameters()
        optimizer = kind(params, capturable=True)
        messages.append(message_of(AssertionError, lambda o=optimizer, p=params: train(o, p)))
        assert_equal(params, parameters())
    assert messages[0] == messages[1]


@pytest.mark.usefixtures("kernels")
def test_fused_trains_as_eager_within_a_few_roundings():
    ours, theirs = parameters([*SHAPES, (300, 40)]), parameters([*SHAPES, (300, 40)])
    a, b = ShardedAdadelta(ours, fused=True, lr=0.5), torch.optim.Adadelta(theirs, lr=0.5)
    for steps, absent in ((range(2), []), (range(2, 4), [0, 2])):
        train(a, ours, steps, absent)
        train(b, theirs, steps, absent)
        for p, q in zip(ours, theirs, strict=True):
            # A few roundings a step, of terms of size one.
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_each_parameter_is_announced_to_autograd_as_changed():
    p = nn.Parameter(torch.ones(3))
    optimizer = ShardedAdadelta([p])
    loss = p.square().sum()
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

"""With one process ShardedAdadelta is torch.optim.Adadelta, over flat memory."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from trajectory import assert_equal, assert_same_state, parameters, train

from adadelta_dist import ShardedAdadelta, ShardPolicy, kernels, shard_step

POLICIES = {
    "default": ShardPolicy(),
    "small buckets": ShardPolicy(bucket_mb=1e-6),
    "no overlap": ShardPolicy(overlap=False),
    "averaged": ShardPolicy(gradients="averaged"),
}
OPTIONS = [
    {},
    {"lr": 0.3, "rho": 0.95, "eps": 1e-7, "weight_decay": 0.1, "maximize": True},
    {"foreach": True},
    {"lr": torch.tensor([0.3])},
]
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def model(seed=0):
    torch.manual_seed(seed)
    convolution = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
    return nn.Sequential(convolution, nn.Flatten(), nn.Linear(16, 3), nn.PReLU())


def loss_of(module, step=0):
    inputs = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(step))
    return module(inputs).square().sum()


def values(module):
    return [p.detach().clone() for p in module.parameters()]


def pair(**options):
    """A model with ours and its twin with torch's."""
    ours, theirs = model(), model()
    policy = options.pop("policy", ShardPolicy())
    sharded = ShardedAdadelta(ours.parameters(), **options, policy=policy)
    return ours, sharded, theirs, torch.optim.Adadelta(theirs.parameters(), **options)


def fit(module, optimizer, steps=range(4)):
    for step in steps:
        optimizer.zero_grad()
        loss_of(module, step).backward()
        optimizer.step()
    return values(module)


@every_policy
@pytest.mark.parametrize("options", OPTIONS)
def test_training_equals_torchs_bit_by_bit_and_so_does_the_state_dict(options, policy):
    ours, sharded, theirs, plain = pair(**options, policy=policy)
    assert_equal(fit(ours, sharded), fit(theirs, plain))
    assert_same_state(sharded.state_dict(), plain.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128])
def test_other_dtypes_equal_torchs_bit_by_bit(dtype):
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    a, b = ShardedAdadelta(ours), torch.optim.Adadelta(theirs)
    assert_equal(train(a, ours, without_grad=[1]), train(b, theirs, without_grad=[1]))
    for p, q in zip(ours, theirs, strict=True):
        if b.state[q]:
            assert_equal(list(a.state[p].values()), list(b.state[q].values()))


@every_policy
def test_parameters_without_a_gradient_are_skipped(policy):
    ours, theirs = parameters(), parameters()
    a, b = ShardedAdadelta(ours, weight_decay=0.1, policy=policy), None
    b = torch.optim.Adadelta(theirs, weight_decay=0.1)
    for steps, absent in ((range(2), [0]), (range(2, 4), [1, 3]), (range(4, 6), range(4))):
        assert_equal(train(a, ours, steps, absent), train(b, theirs, steps, absent))
    assert_same_state(a.state_dict(), b.state_dict())


def test_state_exists_from_construction_on_and_its_entries_are_views():
    ours, theirs = parameters(), parameters()
    a, b = ShardedAdadelta(ours), torch.optim.Adadelta(theirs)
    assert [list(a.state[p]) for p in ours] == [["step", "square_avg", "acc_delta"]] * len(ours)
    train(a, ours, range(2))
    train(b, theirs, range(2))
    for optimizer, params in ((a, ours), (b, theirs)):
        for p in params:
            optimizer.state[p]["acc_delta"].mul_(4)
            optimizer.state[p]["step"].add_(10)
    assert_equal(train(a, ours, range(2, 4)), train(b, theirs, range(2, 4)))
    assert_same_state(a.state_dict(), b.state_dict())


@pytest.mark.parametrize("whole", [False, True])
def test_state_that_the_user_replaced_is_adopted(whole):
    ours, theirs = parameters(), parameters()
    a, b = ShardedAdadelta(ours), torch.optim.Adadelta(theirs)
    train(a, ours, range(2))
    train(b, theirs, range(2))
    for optimizer, params in ((a, ours), (b, theirs)):
        new = torch.full_like(params[0], 0.5)
        if whole:
            optimizer.state[params[0]] = {
                "step": torch.tensor(7.0),
                "square_avg": new,
                "acc_delta": new.clone(),
            }
        else:
            optimizer.state[params[0]]["square_avg"] = new
    assert_equal(train(a, ours, range(2, 4)), train(b, theirs, range(2, 4)))
    assert_same_state(a.state_dict(), b.state_dict())


def test_state_that_the_user_cleared_begins_anew():
    ours, theirs = parameters(), parameters()
    a, b = ShardedAdadelta(ours), torch.optim.Adadelta(theirs)
    for optimizer, params in ((a, ours), (b, theirs)):
        train(optimizer, params, range(2))
        optimizer.state.clear()
    assert_equal(train(a, ours, range(2, 4)), train(b, theirs, range(2, 4)))
    assert_same_state(a.state_dict(), b.state_dict())


@every_policy
def test_a_gradient_that_the_user_holds_is_the_same_after_the_step(policy):
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=policy)
    loss_of(module).backward()
    held = [p.grad for p in module.parameters()]
    before = [g.clone() for g in held]
    optimizer.step()
    assert all(p.grad is g for p, g in zip(module.parameters(), held, strict=True))
    assert_equal(held, before)


@every_policy
def test_edits_between_backward_and_step_count(policy):
    results = []
    for kind in (lambda p: ShardedAdadelta(p, policy=policy), torch.optim.Adadelta):
        module = model()
        optimizer = kind(module.parameters())
        for step in range(4):
            optimizer.zero_grad()
            loss_of(module, step).backward()
            first, second, *rest = module.parameters()
            first.grad.mul_(3)
            second.grad = torch.ones_like(second)
            rest[0].grad = None
            optimizer.step()
        results.append(values(module))
    assert_equal(*results)


@every_policy
@pytest.mark.parametrize("quiet", [False, True])
def test_gradients_accumulate_over_backwards_with_and_without_no_sync(quiet, policy):
    ours, sharded, theirs, plain = pair(policy=policy)
    for module, optimizer in ((ours, sharded), (theirs, plain)):
        for step in range(3):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            with sharded.no_sync() if quiet and optimizer is sharded else nullcontext():
                loss_of(module, step).backward()
            loss_of(module, step + 10).backward()
            optimizer.step()
    assert_equal(values(ours), values(theirs))


def test_gradient_hooks_die_with_the_optimizer():
    module = model()
    optimizer = ShardedAdadelta(module.parameters())
    (p, *_) = module.parameters()
    assert p._post_accumulate_grad_hooks
    died = weakref.ref(optimizer), weakref.ref(optimizer._shards[0].bucket)
    del optimizer
    gc.collect()
    assert [ref() for ref in died] == [None, None]
    assert not p._post_accumulate_grad_hooks
    fit(module, torch.optim.Adadelta(module.parameters()))


@every_policy
def test_parameters_that_thaw_are_trained_from_then_on(policy):
    ours, sharded, theirs, plain = pair(policy=policy)
    for module, optimizer in ((ours, sharded), (theirs, plain)):
        module[0].requires_grad_(False)
        fit(module, optimizer, range(2))
        optimizer.zero_grad()
        module[0].requires_grad_(True)
        fit(module, optimizer, range(2, 5))
    assert_equal(values(ours), values(theirs))


def test_parameters_with_a_new_storage_go_on_from_their_new_values():
    ours, sharded, theirs, plain = pair()
    for module, optimizer in ((ours, sharded), (theirs, plain)):
        fit(module, optimizer, range(2))
        for p in module.parameters():
            p.data = p.data * 0.5
        fit(module, optimizer, range(2, 4))
        module.load_state_dict(model(seed=1).state_dict())
        fit(module, optimizer, range(4, 6))
    assert_equal(values(ours), values(theirs))


@pytest.mark.parametrize("change", [nn.Module.double, nn.Module.half])
def test_a_model_cast_after_construction_is_refused_with_the_remedy(change):
    module = model()
    optimizer = ShardedAdadelta(module.parameters())
    change(module)
    with pytest.raises(RuntimeError, match="Build the optimizer last"):
        optimizer.step()


@pytest.mark.parametrize("fused", [None, True])
def test_a_model_made_real_after_construction_is_refused_with_the_remedy(fused):
    with torch.device("meta"):
        module = nn.Linear(2, 3)
    optimizer = ShardedAdadelta(module.parameters(), fused=fused)
    module.to_empty(device="cpu")
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"on meta when .* Build the optimizer last, after"):
        optimizer.step()


def test_a_parameter_cut_in_place_is_refused_with_the_remedy():
    p = nn.Parameter(torch.ones(4, 2))
    optimizer = ShardedAdadelta([p])
    p.data = p.data[:1]
    p.grad = torch.ones(1, 2)
    with pytest.raises(RuntimeError, match="Build the optimizer last"):
        optimizer.step()


def test_a_closure_runs_once_with_gradients_enabled_and_gives_its_result():
    ours, sharded, theirs, plain = pair()
    calls = []
    for module, optimizer in ((ours, sharded), (theirs, plain)):

        def closure(module=module, optimizer=optimizer):
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = loss_of(module)
            loss.backward()
            return loss

        with torch.no_grad():
            assert optimizer.step(closure).item() > 0
    assert calls == [True, True]
    assert_equal(values(ours), values(theirs))


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: StepLR(optimizer, 2, gamma=0.5),
        lambda optimizer: ReduceLROnPlateau(optimizer, patience=0, factor=0.5),
    ],
    ids=["StepLR", "ReduceLROnPlateau"],
)
def test_schedulers_change_the_step_as_with_torch(schedule):
    ours, sharded, theirs, plain = pair()
    for module, optimizer in ((ours, sharded), (theirs, plain)):
        scheduler = schedule(optimizer)
        for step in range(5):
            fit(module, optimizer, [step])
            scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
    assert sharded.param_groups[0]["lr"] == plain.param_groups[0]["lr"] < 1
    assert_equal(values(ours), values(theirs))


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize("foreach", [False, True])
def test_the_default_dtype_does_not_matter(foreach):
    ours, theirs = parameters(), parameters()
    sharded = ShardedAdadelta(ours, foreach=foreach)
    plain = torch.optim.Adadelta(theirs, foreach=foreach)
    assert_equal(train(sharded, ours), train(plain, theirs))
    assert_same_state(sharded.state_dict(), plain.state_dict())


@pytest.mark.usefixtures("default_dtype")
def test_a_scaler_takes_a_step_without_gradients_at_any_default_dtype():
    optimizer = ShardedAdadelta(parameters(), policy=ShardPolicy(stage=2))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones((), dtype=torch.float32))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0


def test_a_differentiable_step_cannot_be_skipped():
    with pytest.raises(ValueError, match="differentiable=True with skip_nonfinite=True"):
        ShardedAdadelta(
            model().parameters(), differentiable=True, policy=ShardPolicy(skip_nonfinite=True)
        )


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("one_kernel", [True, False])
def test_masters_take_the_fused_step_of_fp32(monkeypatch, one_kernel, dtype):
    used = {True: "fused_rounded_", False: "_step_rounded_"}
    monkeypatch.delattr(shard_step, used[not one_kernel])
    if not one_kernel:
        missing = kernels.missing
        reasons = {kernels.master_kernel: "as if the compiler left out the rounding"}
        monkeypatch.setattr(kernels, "missing", lambda *of: reasons.get(of[0]) or missing(*of))
    ours, exact = model().to(dtype), model().to(dtype).float()
    sharded = ShardedAdadelta(ours.parameters(), fused=True)
    single = ShardedAdadelta(exact.parameters(), fused=True)
    for step in range(3):
        for i, (p, x) in enumerate(zip(ours.parameters(), exact.parameters(), strict=True)):
            grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            p.grad, x.grad = grad.to(dtype), grad.to(dtype).float()
        sharded.step()
        single.step()
    assert_equal(values(ours), [x.to(dtype) for x in values(exact)])
    masters = [sharded.state[p]["master"] for p in ours.parameters()]
    assert_equal(masters, values(exact))

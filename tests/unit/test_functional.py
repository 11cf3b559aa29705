"""The step is Zeiler's: eager bit by bit as torch, fused within 2 ulp of it."""

import numpy as np
import pytest
import torch
from torch._dynamo.exc import RecompileError

from adadelta_dist import functional

DEFAULTS = {
    "lr": 1.0,
    "rho": 0.9,
    "eps": 1e-6,
    "weight_decay": 0.0,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}
OPTIONS = [
    {},
    {"lr": 0.3},
    {"rho": 0.95, "eps": 1e-8},
    {"weight_decay": 0.1, "maximize": True},
    {"rho": 0.0, "lr": 0.1, "weight_decay": 1e-3},
]
NAMES = ("param", "square_avg", "acc_delta")
STEPS = [functional.eager_flat_, lambda entry, group: functional.fused_([entry], group)]


def entry(numel, dtype=torch.float32, scale=1e-3):
    """A parameter, a gradient and accumulators as in mid-training."""
    generator = torch.Generator().manual_seed(numel)
    param, grad, v, u = torch.randn(4, numel, dtype=torch.float64, generator=generator)
    return tuple(t.to(dtype) for t in (param, grad, v.square(), scale * u.square()))


def copied(tensors):
    return tuple(t.clone() for t in tensors)


def stepped(step, tensors, options):
    """What the parameter and the accumulators are after a step."""
    param, grad, square_avg, acc_delta = copied(tensors)
    before = grad.clone()
    with torch.no_grad():
        step((param, grad, square_avg, acc_delta), DEFAULTS | options)
    assert torch.equal(grad, before), "the gradient was written"
    return param, square_avg, acc_delta


def torchs_step(tensors, options):
    """The same by torch.optim.Adadelta, whole."""
    param, grad, square_avg, acc_delta = copied(tensors)
    param = torch.nn.Parameter(param)
    param.grad = grad
    optimizer = torch.optim.Adadelta([param], **options)
    state = {"step": torch.tensor(1.0), "square_avg": square_avg, "acc_delta": acc_delta}
    optimizer.state[param] = state
    optimizer.step()
    return param.detach(), state["square_avg"], state["acc_delta"]


def zeilers_step(x, g, v, u, *, lr=1.0, rho=0.9, eps=1e-6, weight_decay=0.0, maximize=False):
    """Algorithm 1 of arXiv:1212.5701, line by line; lr and the rest are torch's additions."""
    if maximize:
        g = -g
    g = g + weight_decay * x
    v = rho * v + (1 - rho) * g**2  # 4: accumulate gradient
    dx = -np.sqrt(u + eps) / np.sqrt(v + eps) * g  # 5: compute update
    u = rho * u + (1 - rho) * dx**2  # 6: accumulate updates
    return x + lr * dx, v, u  # 7: apply update


def ulps(got, want, *operands):
    """The largest distance, in ulp of `want` or of the largest operand of its last sum."""
    got, want, *operands = (t.numpy() for t in (got, want, *operands))
    scale = np.max(np.abs([want, *operands]), axis=0)
    return (np.abs(got - want) / np.spacing(scale)).max()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("step", STEPS, ids=["eager", "fused"])
@pytest.mark.parametrize("options", OPTIONS)
def test_five_steps_follow_the_paper(step, options):
    tensors = entry(301, torch.float64)
    x, _, v, u = (t.numpy() for t in tensors)
    param, square_avg, acc_delta = (tensors[i] for i in (0, 2, 3))
    for seed in range(5):
        grad = entry(301 + seed, torch.float64)[1][:301]
        x, v, u = zeilers_step(x, grad.numpy(), v, u, **options)
        param, square_avg, acc_delta = stepped(step, (param, grad, square_avg, acc_delta), options)
    # A few roundings a step in fp64, and numpy orders them otherwise.
    for name, got, want in zip(NAMES, (param, square_avg, acc_delta), (x, v, u), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [*OPTIONS, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("numel", [0, 1, 1000])
def test_eager_is_torchs_bit_by_bit(numel, options, dtype):
    tensors = entry(numel, dtype)
    got, want = stepped(functional.eager_flat_, tensors, options), torchs_step(tensors, options)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("numel", [2**17 - 1, 2**17, 2**17 + 1, 3 * 2**17 + 5])
def test_eager_is_torchs_bit_by_bit_across_its_pieces(numel):
    assert numel in range(functional.EAGER_PIECE_NUMEL - 1, 4 * functional.EAGER_PIECE_NUMEL)
    tensors = entry(numel)
    got, want = stepped(functional.eager_flat_, tensors, {}), torchs_step(tensors, {})
    assert all(map(torch.equal, got, want))


# lr is exact in both precisions; weight decay is left out, for g + weight_decay x cancels.
EXACT = [{}, {"lr": 0.25, "maximize": True}, {"rho": 0.95, "eps": 1e-8}]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", EXACT)
def test_fused_differs_from_torch_by_a_few_roundings(options, dtype):
    tensors = entry(20011, dtype)
    (x, v, u), (want_x, want_v, want_u) = (stepped(s, tensors, options) for s in STEPS[::-1])
    # v: two roundings either way. d: half of v's, a sum, a root, a quotient and a product;
    # squared it counts twice in u. x = x - lr d cancels: in ulp of the larger of the three.
    assert ulps(v, want_v) <= 2
    assert ulps(u, want_u) <= 8
    assert ulps(x, want_x, tensors[0], want_x - tensors[0]) <= 6


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_fused_half_precision_is_the_fp32_step_rounded_once(dtype, digits):
    tensors = entry(20011, dtype, scale=1.0)
    fused = stepped(STEPS[1], tensors, {"lr": 0.3})
    single = torchs_step([t.float() for t in tensors], {"lr": 0.3})
    for got, want in zip(fused, single, strict=True):
        assert got.dtype == dtype
        rounded = want.to(dtype).double()
        # The fp32 results may fall on different sides of a tie, no more: one ulp, 2**-digits.
        _, exponent = torch.frexp(rounded.abs().clamp_min(torch.finfo(dtype).tiny))
        ulp = torch.ldexp(torch.ones_like(rounded), exponent - digits)
        assert bool(((got.double() - rounded).abs() <= ulp).all())
        assert (got.double() == rounded).double().mean() > 0.99


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("step", STEPS, ids=["eager", "fused"])
@pytest.mark.parametrize("lr", [torch.tensor(0.3), torch.tensor([0.3])], ids=["0-dim", "1-dim"])
def test_a_tensor_lr_counts_as_its_number(step, lr):
    tensors = entry(50)
    got, want = stepped(step, tensors, {"lr": lr}), stepped(step, tensors, {"lr": lr.item()})
    assert all(map(torch.equal, got, want))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_lr_that_single_precision_cannot_hold_keeps_its_digits(dtype):
    lr = 0.1 + 1e-12
    tensors = entry(50, dtype)
    got, want = (stepped(step, tensors, {"lr": lr})[0] for step in STEPS)
    moved = (tensors[0] - want).abs().max().item()
    assert (got - want).abs().max() <= 8 * torch.finfo(dtype).eps * max(1.0, moved)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("step", STEPS, ids=["eager", "fused"])
def test_an_infinite_parameter_without_weight_decay_leaves_the_accumulators_alone(step):
    param, grad, square_avg, acc_delta = entry(50)
    param[7] = torch.inf
    got = stepped(step, (param, grad, square_avg, acc_delta), {})
    assert got[0][7] == torch.inf
    assert all(t.isfinite().all() for t in got[1:])


@pytest.mark.usefixtures("kernels")
def test_fused_takes_many_entries_of_several_dtypes_and_skips_empty_ones():
    entries = [entry(n, d) for n in (0, 7, 50) for d in (torch.float32, torch.float64)]
    alone = [stepped(STEPS[1], e, {"lr": 0.5}) for e in entries]
    with torch.no_grad():
        functional.fused_(entries, DEFAULTS | {"lr": 0.5})
    for (param, _, square_avg, acc_delta), want in zip(entries, alone, strict=True):
        assert all(map(torch.equal, (param, square_avg, acc_delta), want))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "step", [functional.eager_flat_, lambda e, *rest: functional.fused_([e], *rest)]
)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "maximize": True}])
def test_a_step_of_scaled_gradients(step, options):
    param, grad, *rest = entry(50)
    scaled, plain = copied((param, 1024 * grad, *rest)), copied((param, grad, *rest))
    with torch.no_grad():
        step(scaled, DEFAULTS | options, 1 / 1024)
        step(plain, DEFAULTS | options)
    assert all(torch.equal(scaled[i], plain[i]) for i in (0, 2, 3))


CHANGES = [{"lr": 0.5}, {"lr": 1}, {"lr": torch.tensor(0.5)}, {"lr": torch.tensor([0.5])}]
CHANGES += [{"rho": 0.8}, {"eps": 1e-8}, {"weight_decay": 0.1}, {"maximize": True}]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("options", "numel"), [*((c, 1000) for c in CHANGES), *(({}, n) for n in (1, 2, 3, 2**17 + 3))]
)
def test_nothing_recompiles_when_a_hyperparameter_or_the_length_changes(options, numel):
    tensors = entry(numel)
    with torch._dynamo.config.patch(error_on_recompile=True):
        stepped(STEPS[1], tensors, options)


@pytest.mark.usefixtures("kernels")
def test_a_recompilation_would_be_noticed():
    """Negative control: with a Python number that changes, the formula does recompile."""
    compiled = torch.compile(lambda x, lr: x - lr * x, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(torch.ones(3), 0.5)
        with pytest.raises(RecompileError):
            compiled(torch.ones(3), 0.25)

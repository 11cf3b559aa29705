"""Kernels that the compiler makes, in particular where they round."""

import functools

import pytest
import torch

from adadelta_dist import functional, kernels

GROUP = {"lr": 0.3, "rho": 0.9, "eps": 1e-6, "weight_decay": 0.01, "maximize": True}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROUNDINGS = [
    (BF16, BF16, FP32),
    (FP16, FP16, FP16),
    (FP32, BF16, FP32),
    (torch.float64, FP32, FP32),
]
"""Dtypes of parameters, of the values that they take, and of gradients."""


def tensors(dtype, rounded_to, grad_dtype, numel=20011):
    """Parameters of which some were written since they were rounded, and what belongs to them."""
    compute = kernels.compute_dtype(dtype)
    generator = torch.Generator().manual_seed(3)
    random = functools.partial(torch.randn, generator=generator, dtype=compute)
    master, written, grad, v, u = random(5, numel)
    param = master.to(rounded_to).to(dtype)
    param[::7] = written[::7].to(rounded_to).to(dtype)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    param[:4] = special.to(dtype)
    master[1:3] = special[1:3].to(compute)
    return param, master, grad.to(grad_dtype), v.square(), 1e-3 * u.square()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("dtype", "rounded_to", "grad_dtype"), ROUNDINGS)
def test_masters_take_what_was_written_and_parameters_are_rounded_from_them(
    dtype, rounded_to, grad_dtype
):
    param, master, grad, *accumulators = tensors(dtype, rounded_to, grad_dtype)
    kept = param == master.to(rounded_to).to(dtype)
    assert 0.8 < kept.double().mean() < 0.9
    wanted = torch.where(kept, master, param.to(master.dtype))
    entry = wanted, grad.to(master.dtype), *(flat.clone() for flat in accumulators)
    functional.fused_([entry], GROUP)
    functional.fused_rounded_(param, rounded_to, (master, grad, *accumulators), GROUP)
    for got, want in zip((master, *accumulators), (entry[0], *entry[2:]), strict=True):
        assert torch.equal(got.nan_to_num(-9), want.nan_to_num(-9)), "not the plain step's bits"
    assert torch.equal(param.nan_to_num(-9), master.to(rounded_to).to(dtype).nan_to_num(-9))


def test_a_compiler_that_leaves_out_the_rounding_is_noticed(monkeypatch, caplog):
    """The real one does, unless it is told not to."""
    monkeypatch.setattr(kernels, "_OPTIONS", {})
    uncached = functools.cache(kernels.master_kernel.__wrapped__)
    reason = kernels.missing.__wrapped__(uncached, "cpu", FP32, BF16, FP32)
    assert reason is not None
    assert "leaves out the rounding to torch.bfloat16" in reason
    assert reason in caplog.text


def test_hyperparameters_stay_with_the_host_whatever_the_default_device_is():
    group = {"lr": 1.0, "rho": 0.9, "eps": 1e-6, "weight_decay": 0.0, "maximize": False}
    with torch.device("meta"):
        scalars = kernels.scalars_of(group, torch.float32)
    assert {scalar.device.type for scalar in scalars} == {"cpu"}

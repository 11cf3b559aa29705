"""Stochastic rounding: one of two neighbours, right on average, and nothing else."""

import pytest
import torch

from adadelta_dist.rounding import round_stochastically_


def rounded(values, seed=0):
    out = torch.empty_like(values, dtype=torch.bfloat16)
    round_stochastically_(out, values, torch.Generator().manual_seed(seed))
    return out


@pytest.mark.parametrize("exponent", [-130, -120, -20, 0, 60, 120])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_mean_is_exact_and_every_value_is_a_neighbour(exponent, sign):
    unit = 2.0 ** max(exponent - 7, -133)
    for part in (0.01, 0.25, 0.5, 0.9):
        value = torch.tensor(sign * (2.0**exponent + part * unit))
        got = rounded(value.repeat(100_000)).double()
        down, up = sign * 2.0**exponent, sign * (2.0**exponent + unit)
        assert set(got.unique().tolist()) == {down, up}
        share = (got == up).double().mean().item()
        assert abs(share - part) < 5 * (part * (1 - part) / 100_000) ** 0.5 + 2**-16


def test_what_bfloat16_holds_stays_as_it_is():
    values = torch.randn(10_000).bfloat16().float()
    values[:2] = torch.tensor([0.0, -0.0])
    assert torch.equal(rounded(values).float(), values)
    assert torch.equal(rounded(values).signbit(), values.signbit())


def test_what_is_not_finite_stays():
    values = torch.tensor([float("inf"), float("-inf"), float("nan")]).repeat(1000)
    values.view(torch.int32)[2] = 0x7F800001  # a NaN whose upper half is that of infinity
    got = rounded(values)
    assert torch.equal(got.isnan(), values.isnan())
    assert torch.equal(got.isinf(), values.isinf())
    assert torch.equal(got.signbit()[:2], values.signbit()[:2])


def test_the_same_seed_rounds_in_the_same_way_and_another_does_not():
    values = torch.randn(1000)
    assert torch.equal(rounded(values), rounded(values))
    assert not torch.equal(rounded(values), rounded(values, seed=1))


def test_values_are_not_written():
    values = torch.randn(1000)
    before = values.clone()
    rounded(values)
    assert torch.equal(values, before)

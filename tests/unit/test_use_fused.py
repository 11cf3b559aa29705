"""When a step is fused, and what is said where it cannot be."""

import functools
import logging

import pytest
import torch
from trajectory import message_of

from adadelta_dist import functional, kernels

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
FLOATS = torch.empty(functional.FUSED_MIN_NUMEL)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("options", "params", "wanted"),
    [
        ({}, [FLOATS], True),
        ({}, [FLOATS[:1], FLOATS[1:]], True),
        ({}, [FLOATS[1:]], False),
        ({}, [], False),
        ({"foreach": True}, [FLOATS], False),
        ({"foreach": False}, [FLOATS], False),
        ({"differentiable": True}, [FLOATS], False),
        ({}, [FLOATS, torch.empty(2, dtype=torch.complex64)], False),
        ({}, [FLOATS, torch.empty(2, device="meta")], False),
        ({"fused": False}, [FLOATS], False),
        ({"fused": True}, [FLOATS[:3]], True),
        ({"fused": True, "foreach": False}, [FLOATS[:3]], True),
        ({"fused": True}, [], False),
    ],
)
def test_when_a_step_is_fused(options, params, wanted):
    assert functional.use_fused(DEFAULTS | options, params) is wanted


@pytest.fixture
def no_compiler(monkeypatch):
    """As on a machine without g++; the caches of the session's kernels stay untouched."""

    def broken(*_, **__):
        raise FileNotFoundError("g++ is not here\nand more lines of it")

    for name in ("step_kernel", "missing"):
        uncached = getattr(kernels, name).__wrapped__
        monkeypatch.setattr(kernels, name, functools.cache(uncached))
    monkeypatch.setattr(torch, "compile", broken)


@pytest.mark.usefixtures("no_compiler")
def test_fused_true_without_a_compiler_raises_with_the_remedy():
    with pytest.raises(RuntimeError, match=r"FileNotFoundError: g\+\+ is not here .*Install a C"):
        functional.use_fused(DEFAULTS | {"fused": True}, [FLOATS[:3]])


@pytest.mark.usefixtures("no_compiler")
def test_fused_none_without_a_compiler_says_so_once_and_stays_eager(caplog):
    with caplog.at_level(logging.DEBUG, logger="adadelta_dist"):
        answers = [functional.use_fused(DEFAULTS, [FLOATS]) for _ in range(3)]
    assert answers == [False] * 3
    (record,) = caplog.records
    assert "torch.float32 on cpu: FileNotFoundError: g++ is not here" in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize("conflict", ["foreach", "differentiable"])
def test_conflicts_with_fused_are_refused_in_the_words_of_adam(conflict):
    p = torch.nn.Parameter(torch.zeros(2))
    options = {"fused": True, conflict: True}
    wanted = message_of(RuntimeError, lambda: torch.optim.Adam([p], **options))
    assert (
        message_of(RuntimeError, lambda: functional.check_fused(DEFAULTS | options, [p])) == wanted
    )


@pytest.mark.parametrize(
    "p", [torch.empty(2, dtype=torch.complex64), torch.empty(2, device="meta")]
)
def test_a_fused_step_refuses_parameters_that_it_cannot_update(p):
    with pytest.raises(RuntimeError, match="requires all the params to be floating point"):
        functional.use_fused(DEFAULTS | {"fused": True}, [FLOATS, p])


def test_complex_parameters_are_refused_at_once_and_meta_ones_may_yet_be_made_real():
    fused = DEFAULTS | {"fused": True}
    with pytest.raises(RuntimeError, match="requires all the params to be floating point"):
        functional.check_fused(fused, [torch.empty(2, dtype=torch.complex64)])
    functional.check_fused(fused, [torch.empty(2, device="meta")])


def test_without_fused_nothing_is_refused():
    group = {"foreach": True, "differentiable": True}
    for fused in (None, False):
        functional.check_fused(DEFAULTS | group | {"fused": fused}, [torch.empty(2)])


def test_capturable_on_the_cpu_is_torchs_error():
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    wanted = message_of(AssertionError, torch.optim.Adadelta([p], capturable=True).step)
    group = DEFAULTS | {"capturable": True}
    assert message_of(AssertionError, lambda: functional.check_capturable(group, [p])) == wanted
    functional.check_capturable(DEFAULTS, [p])

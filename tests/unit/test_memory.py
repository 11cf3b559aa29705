"""Flat memory, in huge pages where they pay."""

import sys
from pathlib import Path

import pytest
import torch

from adadelta_dist import Adadelta, memory

CPU = torch.device("cpu")
PAGE = 2**21


def has_huge_pages(tensor):
    """Whether the kernel has been asked for them where the tensor lies."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, stop = (int(word, 16) for word in first.split("-"))
            inside = start <= tensor.data_ptr() < stop
        elif inside and first == "VmFlags:":
            return "hg" in line.split()
    raise AssertionError("no such memory")


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are Linux's")
@pytest.mark.parametrize(("pages", "huge"), [(64, True), (0.9, False), (0, False)])
def test_what_is_long_lies_in_huge_pages(pages, huge):
    numel = int(pages * PAGE / 2)
    zeros = memory.zeros(numel, torch.bfloat16, CPU)
    assert (zeros.shape, zeros.dtype) == ((numel,), torch.bfloat16)
    assert not zeros.any()
    middle = zeros[numel // 2 :]
    assert numel == 0 or has_huge_pages(middle) is huge


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are Linux's")
def test_so_do_the_accumulators_of_a_fused_step():
    param = torch.nn.Parameter(torch.zeros(4 * PAGE))
    param.grad = torch.ones(4 * PAGE)
    optimizer = Adadelta([param], fused=True)
    optimizer.step()
    for name in ("square_avg", "acc_delta"):
        assert has_huge_pages(optimizer.state[param][name][2 * PAGE :])


def test_a_system_that_refuses_huge_pages_gives_others(monkeypatch):
    monkeypatch.setattr(memory, "_MADV_HUGEPAGE", 12345)  # which it does not know
    zeros = memory.zeros(8 * PAGE, torch.float64, CPU)
    assert (zeros.shape, zeros.dtype, zeros.any().item()) == ((8 * PAGE,), torch.float64, False)


def test_other_devices_are_left_alone(monkeypatch):
    monkeypatch.delattr(memory, "_madvise")
    assert memory.zeros(8 * PAGE, torch.float32, torch.device("meta")).is_meta


EDITS = {
    "half": lambda flat: flat.mul_(0.5),
    "negative": lambda flat: flat.neg_(),
    "one bit": lambda flat: flat.view(torch.int16)[:1].bitwise_xor_(1),
    "no longer inf": lambda flat: flat.nan_to_num_(),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("numel", [4, 8, 1000, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_checksum_changes_with_every_edit(dtype, numel, edit):
    generator = torch.Generator().manual_seed(numel)
    missed = 0
    for _ in range(400):  # among them many with as many positive values as negative
        flat = torch.randn(numel, generator=generator).to(dtype)
        flat[-1] = float("inf") if edit == "no longer inf" else flat[-1]
        before = memory.checksum(flat)
        assert torch.equal(before, memory.checksum(flat.clone()))
        EDITS[edit](flat)
        missed += torch.equal(before, memory.checksum(flat))
    assert missed == 0

"""Flat memory, in huge pages where they pay."""

import mmap
from pathlib import Path

import pytest
import torch

from adadelta_dist import memory

CPU = torch.device("cpu")
MANY = memory._HUGE_PAGES_FROM // 2


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


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages")
@pytest.mark.parametrize(("numel", "huge"), [(MANY, True), (MANY - 1, False), (0, False)])
def test_what_is_long_lies_in_huge_pages(numel, huge):
    zeros = memory.zeros(numel, torch.bfloat16, CPU)
    assert (zeros.shape, zeros.dtype) == ((numel,), torch.bfloat16)
    assert not zeros.any()
    assert numel == 0 or has_huge_pages(zeros) is huge


def test_a_system_that_refuses_huge_pages_gives_others(monkeypatch):
    def refused(*_):
        raise OSError("Invalid argument")

    monkeypatch.setattr(mmap, "mmap", refused)
    zeros = memory.zeros(MANY, torch.float64, CPU)
    assert (zeros.shape, zeros.dtype, zeros.any().item()) == ((MANY,), torch.float64, False)


def test_on_other_devices_it_is_torchs_memory():
    assert memory.zeros(MANY, torch.float32, torch.device("meta")).is_meta

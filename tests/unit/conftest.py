"""Fixtures that are costly or that leave something to undo."""

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from adadelta_dist.kernels import step_kernel


@pytest.fixture(scope="session")
def kernels() -> None:
    """Compile the fused step of every dtype once; importing the compiler warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            step_kernel("cpu", dtype)


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Another default dtype than float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone, over gloo."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()

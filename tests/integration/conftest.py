"""Pools of ranks that live as long as the test session."""

from collections.abc import Callable, Iterator

import pytest
from lightning_jobs import import_lightning
from ranks import Ranks


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Ranks]]:
    """`pool(n)` gives the session's n processes."""
    pools: dict[int, Ranks] = {}

    def get(world_size: int) -> Ranks:
        if world_size not in pools:
            # Ranks that import Lightning one after the other wait for each other meanwhile.
            pools[world_size] = Ranks(world_size, timeout=120.0)
            pools[world_size].run(import_lightning, deadline=240.0)
        return pools[world_size]

    yield get
    for ranks in pools.values():
        ranks.close()


@pytest.fixture(scope="session")
def deepspeed_pool() -> Iterator[Callable[[int], Ranks]]:
    """The same for DeepSpeed, which reads the environment and changes the filters of warnings."""
    pools: dict[int, Ranks] = {}
    yield lambda world_size: pools.setdefault(world_size, Ranks(world_size, timeout=120.0))
    for ranks in pools.values():
        ranks.close()

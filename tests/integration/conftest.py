"""Pools of ranks that live as long as the test session."""

from collections.abc import Callable, Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Ranks]]:
    """`pool(n)` gives the session's n processes."""
    pools: dict[int, Ranks] = {}

    def get(world_size: int) -> Ranks:
        return pools.setdefault(world_size, Ranks(world_size))

    yield get
    for ranks in pools.values():
        ranks.close()

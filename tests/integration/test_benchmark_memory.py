"""Memory of both stages, at its peak and between iterations, is as planned."""

from functools import partial

import pytest

from adadelta_dist import ShardPolicy
from benchmarks import memory, ranks
from benchmarks.peers import Peer, sharded
from benchmarks.tasks import Perceptron, numel

LARGE = Perceptron((1000,) * 61, batch=2)


@pytest.fixture(scope="module")
def used():
    """By stage, each rank's bytes with 60 M parameters."""
    stages = {
        stage: Peer("eager", partial(sharded, ShardPolicy(stage=stage), fused=False))
        for stage in (1, 2)
    }
    return {stage: ranks.run(2, memory.usage, peer, LARGE) for stage, peer in stages.items()}


def test_peak_memory_is_as_planned(used):
    for stage in (1, 2):
        wanted = memory.planned(LARGE, stage, 2)
        for rank in used[stage]:
            assert rank.resident == pytest.approx(wanted, rel=0.05)
    assert max(rank.resident for rank in used[2]) < 0.85 * min(r.resident for r in used[1])


def test_tensors_between_iterations_are_parameters_gradients_and_shards(used):
    params = 4 * numel(LARGE)
    for rank in used[1]:
        assert rank.between == pytest.approx(2 * params + 3 * params / 2, rel=0.02)
    for rank in used[2]:
        assert rank.between == pytest.approx(params + 3 * params / 2, rel=0.02)

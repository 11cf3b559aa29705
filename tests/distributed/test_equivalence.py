"""ShardedAdadelta is torch.optim.Adadelta, bit by bit, at any world size and bucket size."""

import pytest
import torch
from equivalence import Case, Group, assert_same, experiment
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adadelta_dist import ShardPolicy

WORLDS = [1, 2, 3, 4]

shapes = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=5).map(
    tuple
)
options = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.floats(0, 2),
        "rho": st.floats(0, 1),
        "eps": st.floats(1e-8, 1e-2),
        "weight_decay": st.sampled_from([0, 0.1]),
        "maximize": st.booleans(),
    },
)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.complex64])
groups = st.builds(Group, shapes=shapes, options=options, dtype=dtypes, transposed=st.booleans())


@st.composite
def cases(draw: st.DrawFn, world_size: int) -> Case:
    drawn = tuple(draw(st.lists(groups, min_size=1, max_size=3)))
    count = sum(len(group.shapes) for group in drawn)
    flags = st.tuples(*[st.booleans()] * count)
    present = st.lists(st.tuples(*[flags] * world_size), min_size=1, max_size=4).map(tuple)
    stage = draw(st.sampled_from([1, 2]))
    return Case(
        drawn,
        draw(present),
        draw(options) | {"foreach": draw(st.sampled_from([None, False, True])), "fused": False},
        ShardPolicy(
            bucket_mb=draw(st.sampled_from([1e-6, 1e-4, 25.0])),
            overlap=stage == 2 or draw(st.booleans()),
            stage=stage,
        ),
        by_hand=draw(st.booleans()),
    )


@pytest.mark.parametrize("world_size", WORLDS)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_generated_cases(world_size, pool, data):
    case = data.draw(cases(world_size))
    assert_same(case, pool(world_size).run(experiment, case))


def _all_present(steps: int, world_size: int, count: int):
    return (((True,) * count,) * world_size,) * steps


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_of_a_real_model(world_size, dtype, pool):
    group = Group(((300, 50), (50,), (64, 3, 3, 3), (64,), (10, 64), (10,), ()), {}, dtype, True)
    case = Case((group,), _all_present(5, world_size, 7), {"rho": 0.95, "weight_decay": 1e-3})
    assert_same(case, pool(world_size).run(experiment, case))

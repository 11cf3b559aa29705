"""Plans: arithmetic that holds for every model, peers by their formulas, and the inverse."""

import re
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adadelta_dist import ShardPolicy
from adadelta_dist.planning.model_plan import ModelPlan, Parameter, from_count, from_module
from adadelta_dist.planning.peers import PEERS, ddp, deepspeed, fsdp2, zero_redundancy
from adadelta_dist.planning.planner import (
    Cluster,
    exchange,
    layout_of,
    replicate,
    sharded,
    smallest_world_size,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float64)

models = st.builds(
    lambda shapes: ModelPlan(
        tuple(Parameter(f"layers.{i}.p", shape, dtype) for i, (shape, dtype) in enumerate(shapes))
    ),
    st.lists(
        st.tuples(st.lists(st.integers(1, 40), max_size=3).map(tuple), st.sampled_from(DTYPES)),
        min_size=1,
        max_size=8,
    ),
)
clusters = st.builds(
    lambda shards, replicas, per_host, backend: Cluster(
        shards * replicas, replicas, per_host, backend
    ),
    st.integers(2, 40),
    st.integers(1, 4),
    st.integers(1, 16),
    st.sampled_from(["nccl", "gloo"]),
)
every = settings(max_examples=150, derandomize=True, deadline=None)


def mlp(dtype=torch.float32, layers=4, width=1000):
    shapes = [(f"{i}.weight", (width, width)) for i in range(layers)]
    return ModelPlan(tuple(Parameter(name, shape, dtype) for name, shape in shapes))


@every
@given(model=models, cluster=clusters, stage=st.sampled_from([1, 2]))
def test_shards_of_all_ranks_hold_everything_and_little_more(model, cluster, stage):
    cost = sharded(model, cluster, ShardPolicy(stage=stage))
    padding = 16 * (len(model.parameters) + len(DTYPES) * cluster.shards)
    assert model.nbytes <= cost.memory["parameters"] <= model.nbytes + padding
    exact = sum(p.numel * max(4, p.dtype.itemsize) for p in model.parameters)  # of fp32, fp64
    for kind, copies in (("averaged gradients", 1), ("accumulators", 2)):
        held = cost.memory[kind] * cluster.shards
        assert copies * exact <= held <= copies * (exact + 2 * padding)
    assert 1 <= cost.balance == cost.memory["parameters"] / model.nbytes


@every
@given(model=models, cluster=clusters)
def test_what_one_host_sends_is_what_its_ranks_send_to_others(model, cluster):
    hosts = -(-cluster.world_size // cluster.ranks_per_host)
    for cost in (sharded(model, cluster), *(peer(model, cluster) for peer in PEERS)):
        traffic = cost.traffic
        assert 0 <= traffic.crossing <= cluster.ranks_per_host * traffic.sent * 1.000001
        assert bool(traffic.crossing) <= (hosts > 1)
        slowest = max(traffic.sent / cluster.within_gbit, traffic.crossing / cluster.between_gbit)
        assert 8e-9 * slowest <= traffic.seconds * 1.000001


def test_stages_of_ours_are_those_of_the_design():
    """docs/design.md, "Memory per rank": 100 M parameters in 100 layers on 4 gloo ranks, MB."""
    model, cluster = mlp(layers=100), Cluster(4, backend="gloo")
    assert round(sharded(model, cluster).peak / 1e6) == 1110
    assert round(sharded(model, cluster, ShardPolicy(stage=2)).peak / 1e6) == 769


def test_ours_sends_what_ddp_sends_and_zero_redundancy_half_as_much_again():
    model, cluster = mlp(), Cluster(4)
    P = model.nbytes
    assert sharded(model, cluster).traffic.sent == ddp(model, cluster).traffic.sent == 1.5 * P
    assert zero_redundancy(model, cluster).traffic.sent == 2.25 * P
    assert fsdp2(model, cluster).traffic.sent == deepspeed(3)(model, cluster).traffic.sent
    assert fsdp2(model, cluster).traffic.sent == 2.25 * P


def test_half_of_ours_crosses_between_two_hosts_with_replicas_on_gloo():
    """docs/design.md, "Hybrid sharding": 2 x 2 ranks send half of what flat sharding sends."""
    model = mlp()
    flat = sharded(model, Cluster(4, 1, ranks_per_host=2, backend="gloo"))
    hybrid = sharded(model, Cluster(4, 2, ranks_per_host=2, backend="gloo"))
    assert flat.traffic.crossing == 2 * model.nbytes
    assert hybrid.traffic.crossing == flat.traffic.crossing / 2


def test_a_ring_crosses_each_border_once_and_pairs_every_time():
    cluster = Cluster(16, ranks_per_host=8)
    assert exchange(cluster, 1600).crossing == 1500
    assert exchange(cluster, 1600, pairwise=True).crossing == 8 * 1600 * 8 / 16
    assert exchange(Cluster(8), 800) == exchange(Cluster(8), 800, pairwise=True)
    assert exchange(Cluster(8), 800).crossing == 0


def test_replicas_of_a_shard_are_averaged_between_hosts():
    cluster = Cluster(32, replicas=4, ranks_per_host=8)
    traffic = replicate(cluster, 100)
    assert traffic.sent == 2 * 100 * 3 / 4
    assert traffic.crossing == 8 * traffic.sent  # each of the host's shards
    assert replicate(Cluster(8), 100).sent == 0


def test_time_is_that_of_the_slower_link():
    fast, slow = (Cluster(16, within_gbit=800, between_gbit=gbit) for gbit in (10**6, 8))
    assert exchange(fast, 16e9).seconds == pytest.approx(15e9 * 8 / 800e9)
    assert exchange(slow, 16e9).seconds == pytest.approx(15e9 * 8 / 8e9)


def test_masters_and_dtypes_of_the_policy_are_in_the_plan():
    model, cluster = mlp(torch.bfloat16), Cluster(4, backend="gloo")
    n = model.numel
    cost = sharded(model, cluster)
    assert [cost.memory[k] for k in ("parameters", "masters", "accumulators")] == [2 * n, n, 2 * n]
    rounded = ShardPolicy(stochastic_rounding=True, state_dtype=torch.bfloat16)
    cost = sharded(model, cluster, rounded)
    assert [cost.memory[k] for k in ("masters", "accumulators")] == [0, n]
    narrow = ShardPolicy(reduce_dtype=torch.bfloat16, gather_dtype=torch.bfloat16)
    cost, wide = sharded(mlp(), cluster, narrow), sharded(mlp(), cluster)
    assert cost.traffic.sent == wide.traffic.sent / 2
    assert cost.memory["masters"] == n
    # Of the larger bucket, which has three of the four layers: a copy of what is sent, and three
    # quarters of it received; of fp32, sent as it is, one of the three is received in the shard.
    largest, larger = 4 * 10**6, 3 * n // 4
    assert cost.memory["in flight"] == 2 * larger * 1.75 + largest
    assert wide.memory["in flight"] == 4 * larger * 0.5 + largest


def test_pairs_exchange_a_large_bucket_in_pieces_and_native_collectives_at_once():
    model, pieces = mlp(layers=5, width=2000), 3 * 2**20
    layer, bucket = 4 * 10**6, 8 * 10**6  # elements; the first bucket has one layer, the others two
    narrow = ShardPolicy(reduce_dtype=torch.bfloat16)
    by_pairs, at_once = (
        [
            sharded(model, Cluster(4, backend=backend), policy).memory["in flight"] - 4 * layer
            for policy in (ShardPolicy(), narrow, ShardPolicy(stage=2), replace(narrow, stage=2))
        ]
        for backend in ("gloo", "nccl")
    )
    # What is received, copied, received; at stage 2 what is freed, and averages before they are
    # added, where one row of fp32 arrives.
    assert by_pairs == [
        4 * pieces / 2,
        2 * pieces * 1.75,
        4 * bucket + 4 * pieces * 0.75,
        4 * bucket + 2 * pieces * 1.75 + 4 * pieces / 4,
    ]
    assert at_once == [
        0,
        2 * (layer + 2 * bucket) * 1.25,
        4 * bucket + 4 * bucket / 4,
        4 * bucket + 2 * bucket * 1.25 + 4 * bucket / 4,
    ]


def test_one_rank_sends_nothing_and_keeps_one_set_of_gradients():
    model = mlp()
    cost = sharded(model, Cluster(1))
    assert cost.traffic.sent == cost.memory["averaged gradients"] == 0
    assert cost.balance is None
    assert cost.peak == 4 * model.nbytes + 4 * 10**6


def test_under_ddp_its_gradients_count_and_its_all_reduce():
    model, cluster = mlp(), Cluster(4)
    cost = sharded(model, cluster, ShardPolicy(gradients="averaged"))
    assert cost.traffic.sent == 2.25 * model.nbytes
    assert cost.memory["gradients"] == model.nbytes
    assert cost.memory["in flight"] == 4 * 10**6


def test_whole_parameters_are_shared_greedily_and_rows_by_rank():
    """The sizes that DESIGN's first section has: 1000 / 30 on two ranks."""
    shapes = [(1000,), (10,), (10,), (10,)]
    model = ModelPlan(tuple(Parameter(f"{s}", s, torch.float32) for s in shapes))
    cluster = Cluster(2)
    assert zero_redundancy(model, cluster).memory["accumulators"] == 2 * 4 * 1000
    assert zero_redundancy(model, cluster).balance == pytest.approx(2000 / 1030)
    assert sharded(model, cluster).balance == pytest.approx(1, abs=0.02)
    three_rows = ModelPlan((Parameter("w", (3, 5), torch.float32),))
    assert fsdp2(three_rows, cluster).memory["parameters"] == 4 * 2 * 5


def test_zero_is_that_of_its_paper():
    """Figure 1 of Rajbhandari et al. 2020: 7.5 B parameters, 64 ranks, K = 12; GB."""
    model = ModelPlan((Parameter("layers.0.w", (7_500, 10**6), torch.bfloat16),))
    for stage, of_paper in ((1, 31.4), (2, 16.6), (3, 1.9)):
        memory = dict(deepspeed(stage)(model, Cluster(64)).memory)
        memory.pop("in flight")
        memory.pop("averaged gradients")  # fp32, which the paper has no word for
        assert sum(memory.values()) / 1e9 == pytest.approx(of_paper, abs=0.05)


@every
@given(model=models, limit=st.floats(0.2, 8), backend=st.sampled_from(["nccl", "gloo"]))
def test_the_smallest_world_size_fits_and_one_less_does_not(model, limit, backend):
    for peer in (sharded, *PEERS):
        cost = partial(peer, model)
        cluster = Cluster(1, backend=backend)
        size = smallest_world_size(cost, cluster, limit * model.nbytes, most=1024)
        if size is None:
            assert cost(Cluster(1024, backend=backend)).peak > limit * model.nbytes
        else:
            assert cost(Cluster(size, backend=backend)).peak <= limit * model.nbytes
            smaller = Cluster(size - 1, backend=backend) if size > 1 else None
            assert smaller is None or cost(smaller).peak > limit * model.nbytes


def test_replicas_multiply_the_smallest_world_size():
    model = from_count(10**9, torch.bfloat16)
    cost = partial(sharded, model, policy=ShardPolicy(stage=2))
    one = smallest_world_size(cost, Cluster(1), 5e9)
    assert smallest_world_size(cost, Cluster(4, 2), 5e9) == 2 * one
    assert smallest_world_size(cost, Cluster(1), 1e9) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"world_size": 0}, "world_size must be positive and finite, got 0"),
        ({"world_size": 8, "between_gbit": 0}, "between_gbit must be positive and finite, got 0"),
        ({"world_size": 8, "replicas": 3}, "replicas=3 of world_size=8: wanted a divisor"),
        ({"world_size": 8, "replicas": 8}, "leaves at least 2 ranks"),
        ({"world_size": 8, "backend": "mpi"}, "backend must be 'nccl' or 'gloo', got 'mpi'"),
    ],
)
def test_clusters_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Cluster(**arguments)


@pytest.mark.parametrize("numel", [1, 11, 12, 13, 25_000_000, 7 * 10**9, 70 * 10**9 + 1])
def test_a_count_is_kept_exactly(numel):
    assert from_count(numel).numel == numel


def test_a_module_is_its_parameters_and_what_is_frozen():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    plan = from_module(model)
    names = ["0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]
    assert [p.name for p in plan.parameters] == names
    assert plan.frozen_bytes == 4 * 12 + 4 * 4 * 2 + 8
    assert plan.block_bytes == 4 * 10


def test_blocks_end_at_the_first_number():
    names = ["embed.weight", "layers.0.q.weight", "layers.0.mlp.0.weight", "layers.1.q", "norm"]
    model = ModelPlan(tuple(Parameter(n, (i + 1,), torch.float32) for i, n in enumerate(names)))
    assert model.block_bytes == 4 * (1 + 5)  # the rest; layers.0 has 5 elements
    assert ModelPlan(model.parameters[1:4]).block_bytes == 4 * (2 + 3)


def test_70_billion_parameters_are_laid_out_on_4096_ranks_in_2_s():
    model = from_count(70 * 10**9, torch.bfloat16)
    start = time.perf_counter()
    buckets = layout_of(model, 4096, ShardPolicy())
    assert time.perf_counter() - start < 2
    assert sum(len(bucket.slots) for bucket in buckets) == len(model.parameters) > 700
    assert sharded(model, Cluster(4096)).balance <= 1.001

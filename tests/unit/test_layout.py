"""The arithmetic of slots, shards and runs holds for every set of parameters."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adadelta_dist.layout import (
    ALIGN_BYTES,
    FIRST_BUCKET_BYTES,
    Box,
    Bucket,
    Interval,
    ParamSpec,
    Slot,
    boxes,
    bucket_limit,
    plan_layout,
    storage_order,
)

ITEMSIZES = {"half": 2, "single": 4, "double": 8}

kinds = st.sampled_from(sorted(ITEMSIZES))
specs = st.lists(
    st.builds(lambda n, kind: ParamSpec(n, ITEMSIZES[kind], (kind,)), st.integers(0, 70), kinds),
    max_size=12,
)
worlds = st.integers(1, 5)
limits = st.sampled_from([0, 1, 64, 200, 1000, 10**9])
flags = st.lists(st.booleans(), min_size=12, max_size=12)
exhaustive = settings(max_examples=200, derandomize=True, deadline=None)


def every_layout(test):
    return exhaustive(given(specs=specs, world=worlds, limit=limits)(test))


def itemsize(bucket: Bucket) -> int:
    return ITEMSIZES[bucket.kind[0]]


def elements(interval: Interval) -> set[int]:
    return set(range(interval.start, interval.stop))


@every_layout
def test_every_parameter_has_exactly_one_slot_of_its_size_and_kind(specs, world, limit):
    buckets = plan_layout(specs, world, limit)
    slots = [(slot.param, slot.numel, b.kind) for b in buckets for slot in b.slots]
    assert sorted(slots) == [(i, spec.numel, spec.kind) for i, spec in enumerate(specs)]
    assert all(b.world_size == world for b in buckets)


@every_layout
def test_slots_are_aligned_ordered_and_do_not_overlap(specs, world, limit):
    for bucket in plan_layout(specs, world, limit):
        assert all(slot.start * itemsize(bucket) % ALIGN_BYTES == 0 for slot in bucket.slots)
        for a, b in pairwise(bucket.slots):
            assert a.interval.stop <= b.start
            assert a.param > b.param
        assert bucket.slots[0].start == 0
        assert bucket.slots[-1].interval.stop <= bucket.numel


@every_layout
def test_shards_are_aligned_equal_and_tile_the_bucket(specs, world, limit):
    for bucket in plan_layout(specs, world, limit):
        shards = [bucket.shard(rank) for rank in range(world)]
        assert shards[0].start == 0
        assert shards[-1].stop == bucket.numel
        assert all(a.stop == b.start for a, b in pairwise(shards))
        assert {shard.numel for shard in shards} == {bucket.shard_numel}
        assert bucket.shard_numel * itemsize(bucket) % ALIGN_BYTES == 0


@every_layout
def test_slices_tile_every_slot_and_agree_with_places(specs, world, limit):
    for bucket in plan_layout(specs, world, limit):
        for slot in bucket.slots:
            covered = []
            for rank in range(world):
                part, place = bucket.slice(slot, rank), bucket.place(slot, rank)
                assert part.numel == place.numel
                assert 0 <= part.start <= part.stop <= slot.numel
                assert 0 <= place.start <= place.stop <= bucket.shard_numel
                if part.numel:
                    assert slot.start + part.start == bucket.shard(rank).start + place.start
                covered += range(part.start, part.stop)
            assert covered == list(range(slot.numel))


@exhaustive
@given(specs=specs, world=worlds, limit=limits, flags=flags)
def test_runs_hold_the_present_slots_and_nothing_of_the_absent(specs, world, limit, flags):
    for bucket in plan_layout(specs, world, limit):
        present = [flags[slot.param] for slot in bucket.slots]
        for rank in range(world):
            runs = bucket.runs(present, rank)
            covered = [element for run in runs for element in range(run.start, run.stop)]
            assert len(covered) == len(set(covered))
            owned = [elements(bucket.place(slot, rank)) for slot in bucket.slots]
            wanted = set().union(*(e for e, here in zip(owned, present, strict=True) if here))
            refused = set().union(*(e for e, here in zip(owned, present, strict=True) if not here))
            assert wanted <= set(covered)
            assert not refused & set(covered)
            # What else is in a run is padding: it belongs to nobody.
            assert not (set(covered) - wanted) & set().union(*owned)
            if all(present):
                assert len(runs) <= 1


@every_layout
def test_a_bucket_takes_no_parameter_once_it_holds_the_limit(specs, world, limit):
    for bucket in plan_layout(specs, world, limit):
        for slot in bucket.slots[:-1]:
            assert slot.interval.stop * itemsize(bucket) < limit


@every_layout
def test_a_bucket_closes_only_where_it_holds_the_limit(specs, world, limit):
    by_kind: dict[tuple[str, ...], list[Bucket]] = {}
    for bucket in plan_layout(specs, world, limit):
        by_kind.setdefault(bucket.kind, []).append(bucket)
    for *closed, _ in by_kind.values():
        for bucket in closed:
            assert bucket.slots[-1].interval.stop * itemsize(bucket) >= limit


@every_layout
def test_buckets_come_in_the_order_in_which_backward_completes_them(specs, world, limit):
    firsts = [min(slot.param for slot in b.slots) for b in plan_layout(specs, world, limit)]
    assert firsts == sorted(firsts, reverse=True)


@every_layout
def test_a_rank_stores_its_share_and_little_padding(specs, world, limit):
    for bucket in plan_layout(specs, world, limit):
        align = ALIGN_BYTES // itemsize(bucket)
        padded = sum(slot.numel for slot in bucket.slots) + (align - 1) * (len(bucket.slots) - 1)
        # 1 for the division by the ranks, align - 1 for the end of the shard.
        assert bucket.shard_numel <= padded / world + 1 + (align - 1)


def test_buckets_are_limited_where_there_is_someone_to_send_to():
    assert bucket_limit(1.5, 2) == 3 * 2**19
    (bucket,) = plan_layout([ParamSpec(2**30, 4, ())] * 9, 1, bucket_limit(1.5, 1))
    assert len(bucket.slots) == 9


@pytest.mark.parametrize(
    ("world", "limit", "wanted"), [(2, 4, [2, 4, 3]), (2, 1, [1] * 9), (1, 9, [9])]
)
def test_the_first_bucket_is_full_early_where_there_is_someone_to_send_to(world, limit, wanted):
    half = ParamSpec(FIRST_BUCKET_BYTES // 8, 4, ())
    buckets = plan_layout([half] * 9, world, limit * FIRST_BUCKET_BYTES // 2)
    assert [len(bucket.slots) for bucket in buckets] == wanted


def test_one_large_parameter_is_cut_evenly():
    """The sizes that ZeroRedundancyOptimizer shards as 1000 / 30 (DESIGN, section 1)."""
    sizes = [1000, 10, 10, 10]
    (bucket,) = plan_layout([ParamSpec(n, 4, ()) for n in sizes], 2, 10**9)
    owned = [sum(bucket.slice(s, rank).numel for s in bucket.slots) for rank in range(2)]
    assert sum(owned) == 1030
    assert max(owned) - min(owned) <= 8


def test_a_bucket_whose_slots_are_all_present_is_one_run_across_padding():
    (bucket,) = plan_layout([ParamSpec(n, 4, ()) for n in (5, 5, 5)], 1, 10**9)
    assert bucket.runs([True, True, True], 0) == [Interval(0, 21)]
    assert bucket.runs([True, False, True], 0) == [Interval(0, 5), Interval(16, 21)]


def test_runs_wants_one_flag_a_slot():
    bucket = Bucket((), (Slot(0, 0, 4),), 4, 1)
    with pytest.raises(ValueError, match="zip"):
        bucket.runs([True, False], 0)


@exhaustive
@given(
    shape=st.lists(st.integers(0, 4), max_size=5),
    permutation=st.randoms(use_true_random=False),
)
def test_storage_order_makes_any_dense_tensor_contiguous(shape, permutation):
    order = list(range(len(shape)))
    permutation.shuffle(order)
    tensor = torch.empty(shape).permute(order)
    found = storage_order(tensor.shape, tensor.stride())
    assert sorted(found) == sorted(order)
    assert tensor.permute(found).is_contiguous()


def test_storage_order_of_channels_last():
    tensor = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert storage_order(tensor.shape, tensor.stride()) == (0, 2, 3, 1)


def test_storage_order_puts_dimensions_of_size_one_last_among_equal_strides():
    assert storage_order((1, 3), (1, 1)) == (1, 0)
    assert storage_order((3, 1), (1, 1)) == (0, 1)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(4, 6)[:, ::2],
        torch.empty(6, 4).t()[:, ::2],
        torch.empty(4, 6)[:, :5].t(),
        torch.empty(1, 4).expand(3, 4),
        torch.empty(10).as_strided((3, 4), (1, 2)),
    ],
    ids=["holes", "transposed holes", "transposed cut", "expanded", "overlapping"],
)
def test_storage_order_of_holes_and_overlaps_is_row_major(tensor):
    assert storage_order(tensor.shape, tensor.stride()) == tuple(range(tensor.dim()))


@settings(exhaustive, max_examples=500)
@given(data=st.data(), shape=st.lists(st.integers(0, 4), max_size=5))
def test_boxes_tile_the_slice_as_it_lies_in_memory(data, shape):
    order = data.draw(st.permutations(range(len(shape))))
    numel = torch.Size(shape).numel()
    stop = data.draw(st.integers(0, numel))
    part = Interval(data.draw(st.integers(0, stop)), stop)
    whole = torch.arange(numel).view([shape[dim] for dim in order])
    whole = whole.permute([order.index(dim) for dim in range(len(shape))])
    found = boxes(shape, order, part)
    covered = []
    for box in found:
        assert box.start == len(covered)
        assert all(box.sizes)
        spans = zip(box.offsets, box.sizes, strict=True)
        piece = whole[tuple(slice(offset, offset + size) for offset, size in spans)]
        assert piece.shape == box.sizes
        covered += piece.permute(order).reshape(-1).tolist()
    assert covered == list(range(part.start, part.stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)


def test_boxes_of_a_slice_that_begins_and_ends_amid_rows():
    assert boxes((3, 4), (0, 1), Interval(2, 9)) == [
        Box((0, 2), (1, 2), 0),
        Box((1, 0), (1, 4), 2),
        Box((2, 0), (1, 1), 6),
    ]
    assert boxes((3, 4), (1, 0), Interval(2, 9)) == [
        Box((2, 0), (1, 1), 0),
        Box((0, 1), (3, 2), 1),
    ]


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_the_worst_slice_of_n_dimensions_is_2n_minus_1_boxes(dims):
    shape = (3,) * dims
    found = boxes(shape, range(dims), Interval(1, 3**dims - 1))
    assert len(found) == 2 * dims - 1


def test_boxes_of_scalars_and_of_nothing():
    assert boxes((), (), Interval(0, 1)) == [Box((), (), 0)]
    assert boxes((), (), Interval(0, 0)) == boxes((), (), Interval(1, 1)) == []
    assert boxes((0, 3), (0, 1), Interval(0, 0)) == []
    assert boxes((2, 3), (0, 1), Interval(6, 6)) == []

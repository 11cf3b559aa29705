"""A FlatSlice acts on its own elements, and refuses to pass for the whole."""

import copy
import io
import pickle

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.staging import (
    BlockingAsyncStager,
    DefaultStager,
    StagingOptions,
)

from adadelta_dist import FlatSlice
from adadelta_dist.layout import Interval

REMEDY = "gather_state_dict"


def a_slice(start=2, stop=5, shape=(2, 4), order=(0, 1), dtype=torch.float32):
    return FlatSlice(torch.arange(start, stop).to(dtype), shape, Interval(start, stop), order)


def assert_like(got, want, values):
    assert isinstance(got, FlatSlice)
    assert (got.shape, got.interval, got.order) == (want.shape, want.interval, want.order)
    assert got.local.tolist() == values


def test_it_has_the_shape_of_the_whole_and_the_dtype_and_device_of_its_piece():
    piece = a_slice(dtype=torch.float64)
    assert piece.shape == (2, 4)
    assert piece.numel() == 8
    assert piece.dtype == torch.float64
    assert piece.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("call", "values"),
    [
        (torch.clone, [2, 3, 4]),
        (torch.Tensor.detach, [2, 3, 4]),
        (copy.deepcopy, [2, 3, 4]),
        (torch.zeros_like, [0, 0, 0]),
        (lambda s: s.to(torch.float64), [2, 3, 4]),
        (lambda s: s.cpu(), [2, 3, 4]),
        (lambda s: s.zero_(), [0, 0, 0]),
        (lambda s: s.fill_(7.0), [7, 7, 7]),
        (lambda s: s.fill_(torch.tensor(7.0)), [7, 7, 7]),
        (lambda s: s.copy_(a_slice().fill_(9)), [9, 9, 9]),
    ],
    ids=["clone", "detach", "deepcopy", "zeros", "to", "cpu", "zero_", "fill", "fill_t", "copy_"],
)
def test_copying_and_filling_act_on_the_piece(call, values):
    assert_like(call(a_slice()), a_slice(), values)


@pytest.mark.parametrize("call", [torch.clone, copy.deepcopy, torch.zeros_like, torch.empty_like])
def test_a_copy_has_memory_of_its_own(call):
    piece = a_slice()
    call(piece).local.fill_(-1)
    assert piece.local.tolist() == [2, 3, 4]


def test_detach_and_in_place_calls_share_memory():
    piece = a_slice()
    assert piece.zero_() is piece
    piece.detach().fill_(1)
    assert piece.local.tolist() == [1, 1, 1]


def test_moving_casts_the_piece():
    moved = a_slice().to(torch.float64)
    assert moved.dtype == moved.local.dtype == torch.float64


def test_deepcopy_keeps_identity_within_one_copy():
    piece = a_slice()
    first, second = copy.deepcopy([piece, piece])
    assert first is second
    assert first is not piece


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s + 1,
        lambda s: s.mul_(2),
        lambda s: s.sum(),
        lambda s: s[0],
        lambda s: s.view(-1),
        lambda s: torch.zeros(2, 4).copy_(s),
        lambda s: torch.zeros(2, 4).add_(s),
        lambda s: torch.equal(s, s),
        lambda s: s.new_empty(3),
        lambda s: torch.stack([s, s]),
    ],
    ids=["add", "mul_", "sum", "index", "view", "copy whole", "add whole", "equal", "new", "stack"],
)
def test_what_needs_the_whole_is_refused_with_the_remedy(call):
    with pytest.raises(NotImplementedError, match=rf"FlatSlice(?s:.*){REMEDY}"):
        call(a_slice())


@pytest.mark.parametrize(
    "other",
    [a_slice(1, 4), a_slice(shape=(8,), order=(0,)), a_slice(order=(1, 0))],
    ids=["interval", "shape", "order"],
)
def test_copying_from_other_elements_is_refused(other):
    piece = a_slice()
    with pytest.raises(NotImplementedError, match=REMEDY):
        piece.copy_(other)
    assert piece.local.tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    "save",
    [pickle.dumps, lambda s: torch.save({"state": s}, io.BytesIO()), copy.copy],
    ids=["pickle", "torch.save", "copy"],
)
def test_saving_is_refused_with_the_remedy(save):
    with pytest.raises(TypeError, match=REMEDY):
        save(a_slice())


def test_it_prints_what_it_holds():
    text = repr(a_slice())
    assert text == "FlatSlice(shape=(2, 4), elements [2, 5), local=tensor([2., 3., 4.]))"


def test_an_empty_slice_is_as_good_as_any():
    assert_like(a_slice(3, 3).clone().fill_(1), a_slice(3, 3), [])


SLICES = {
    "two rows": (a_slice(), 2),
    "transposed": (a_slice(1, 7, (2, 4), (1, 0)), 3),
    "three dimensions": (a_slice(1, 23, (2, 3, 4), (2, 0, 1)), 5),
    "complex": (a_slice(1, 7, (2, 4), (1, 0), torch.complex64), 3),
    "scalar": (a_slice(0, 1, (), ()), 1),
    "none of it": (a_slice(3, 3), 0),
    "none of a scalar": (a_slice(0, 0, (), ()), 0),
    "no elements": (a_slice(0, 0, (0, 3)), 1),
}


@pytest.mark.parametrize(("piece", "count"), SLICES.values(), ids=SLICES)
def test_its_chunks_are_views_of_its_own_elements_in_the_shape_of_the_whole(piece, count):
    numel = piece.numel()
    whole = torch.arange(numel).view([piece.shape[dim] for dim in piece.order])
    whole = whole.permute([piece.order.index(dim) for dim in range(piece.dim())])
    chunks = piece.__create_chunk_list__()
    assert len(chunks) == count
    for chunk in chunks:
        got = piece.__get_tensor_shard__(MetadataIndex("w", chunk.offsets))
        spans = zip(chunk.offsets, chunk.sizes, strict=True)
        want = whole[tuple(slice(offset, offset + size) for offset, size in spans)]
        assert got.shape == chunk.sizes
        assert torch.equal(got, want.to(piece.dtype))
        assert got.untyped_storage().data_ptr() == piece.local.untyped_storage().data_ptr()
    assert sum(chunk.sizes.numel() for chunk in chunks) == piece.local.numel()


def test_its_write_items_are_shards_of_the_whole():
    first, second = a_slice().__create_write_items__("w", None)
    assert first.index == MetadataIndex("w", torch.Size((0, 2)))
    assert second.index == MetadataIndex("w", torch.Size((1, 0)))
    for item, sizes in ((first, (1, 2)), (second, (1, 1))):
        assert item.type == WriteItemType.SHARD
        assert item.tensor_data.size == (2, 4)
        assert item.tensor_data.chunk.sizes == sizes
        assert item.tensor_data.properties.dtype == torch.float32


def test_a_chunk_of_another_rank_is_refused():
    with pytest.raises(
        ValueError, match=r"w has no chunk at torch.Size\(\[0, 0\]\).*elements \[2,"
    ):
        a_slice().__get_tensor_shard__(MetadataIndex("w", torch.Size((0, 0)), 0))


@pytest.mark.parametrize(("piece", "_"), SLICES.values(), ids=SLICES)
def test_the_stager_of_async_save_copies_it(piece, _):
    stager = DefaultStager(StagingOptions(False, False, False, False))
    staged = stager.stage({"w": piece})["w"]
    assert_like(staged, piece, piece.local.tolist())
    if staged.local.numel():
        assert staged.local.data_ptr() != piece.local.data_ptr()


def test_the_older_stager_copies_all_but_scalars_which_it_would_make_whole():
    piece = a_slice()
    assert_like(BlockingAsyncStager().stage({"w": piece})["w"], piece, [2, 3, 4])
    with pytest.raises(NotImplementedError, match=REMEDY):
        BlockingAsyncStager().stage({"w": SLICES["scalar"][0]})

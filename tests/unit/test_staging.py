"""Copies for asynchronous saves: apart from training, in memory that is used again."""

import pytest
import torch
from checkpoints import build, train

from adadelta_dist import async_save_checkpoint, load_checkpoint
from adadelta_dist.checkpoints import staging
from adadelta_dist.flat_slice import FlatSlice
from adadelta_dist.layout import Interval


@pytest.fixture(autouse=True)
def _no_spare_memory():
    staging._spare.clear()
    yield
    staging._spare.clear()


def state_of(value, numel=6):
    """A transposed parameter, a slice, and what is no tensor."""
    p = torch.nn.Parameter(torch.full((2, numel // 2), value).t())
    piece = FlatSlice(torch.full((numel,), value), (4, numel), Interval(1, 1 + numel), (0, 1))
    return {"model": {"p": p}, "optimizer": {"state": {"p": {"a": piece}}, "lr": 1.0}}


def tensors_of(state):
    return state["model"]["p"], state["optimizer"]["state"]["p"]["a"]


def test_copies_have_memory_of_their_own():
    state = state_of(1.0)
    copies = staging.copied(state)
    p, piece = tensors_of(state)
    p_copy, piece_copy = tensors_of(copies)
    with torch.no_grad():
        p.zero_()
        piece.zero_()
    assert torch.equal(p_copy, torch.ones(3, 2))
    assert p_copy.stride() == p.stride()
    assert not p_copy.requires_grad
    assert torch.equal(piece_copy.local, torch.ones(6))
    assert (piece_copy.shape, piece_copy.interval) == (piece.shape, piece.interval)
    assert copies["optimizer"]["lr"] == 1.0


def test_the_next_copies_take_the_memory_that_was_given_back():
    first = staging.copied(state_of(1.0))
    waiting = staging.copied(state_of(2.0))  # the first is still being written
    staging.give_back(first)
    places = {p.data_ptr() for p in (first["model"]["p"], tensors_of(first)[1].local)}
    again = staging.copied(state_of(3.0))
    p, piece = tensors_of(again)
    assert {p.data_ptr(), piece.local.data_ptr()} == places
    assert torch.equal(p, torch.full((3, 2), 3.0))
    assert torch.equal(piece.local, torch.full((6,), 3.0))
    assert torch.equal(tensors_of(waiting)[0], torch.full((3, 2), 2.0))


def test_memory_that_does_not_fit_is_not_kept():
    staging.give_back(staging.copied(state_of(1.0)))
    staging.copied(state_of(1.0, numel=8))
    assert not staging._spare


def test_a_save_in_the_memory_of_the_one_before_leaves_its_checkpoint_alone(tmp_path):
    modules = []
    module, optimizer = build()
    for step, name in enumerate(("a", "b")):
        train(module, optimizer, [2 * step])
        saving = async_save_checkpoint(tmp_path / name, module, optimizer)
        modules.append([p.detach().clone() for p in module.parameters()])
        train(module, optimizer, [2 * step + 1])
        saving.result()
    for name, expected in zip(("a", "b"), modules, strict=True):
        module, optimizer = build()
        load_checkpoint(tmp_path / name, module, optimizer)
        for p, value in zip(module.parameters(), expected, strict=True):
            assert torch.equal(p, value)

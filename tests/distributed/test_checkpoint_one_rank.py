"""What goes wrong on one rank alone is an error on all of them, and none waits."""

import os
from pathlib import Path

import pytest
import torch
from test_checkpoint_errors import no_space
from test_dcp import assert_equal, build

from adadelta_dist import RankError, ShardedAdadelta, load_checkpoint, save_checkpoint


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_that_cannot_write_its_extra_leaves_none_waiting(pool, tmp_path, asynchronous):
    extra = torch.zeros(5000)
    for message in pool(2).run(no_space, tmp_path / "b", asynchronous, extra):
        assert "b could not be written: [Errno 27] File too large" in message
    assert list(tmp_path.iterdir()) == []


def from_own_folder(rank, path):
    """The same words, but another place."""
    module, optimizer = build(25, [0])
    before = Path.cwd()
    (path / str(rank)).mkdir()
    os.chdir(path / str(rank))
    try:
        save_checkpoint("a", module, optimizer)
    except RankError as error:
        return str(error)
    finally:
        os.chdir(before)


def test_relative_paths_are_compared_as_the_places_they_are(pool, tmp_path):
    for message in pool(2).run(from_own_folder, tmp_path):
        assert f"Rank 0 has path={tmp_path}/0/a; rank 1 has path={tmp_path}/1/a" in message
    assert not list(tmp_path.glob("*/*"))


class Refusing(torch.nn.Linear):
    refuses = False

    def get_extra_state(self):
        return 1

    def set_extra_state(self, state):
        if self.refuses:
            raise RuntimeError("of another version")


def load_into_refusing(rank, path):
    module = Refusing(2, 2)
    optimizer = ShardedAdadelta(module.parameters())
    save_checkpoint(path, module, optimizer)
    module.weight.grad = torch.ones(2, 2)
    optimizer.step()
    before = optimizer.gather_state_dict()
    module.refuses = rank == 1
    try:
        load_checkpoint(path, module, optimizer)
    except RuntimeError as error:
        for i, entry in optimizer.gather_state_dict().get("state", {}).items():
            assert_equal(entry, before["state"][i])
        return f"{type(error).__name__}: {error}"


def test_a_model_that_refuses_its_state_on_one_rank_is_an_error_on_all(pool, tmp_path):
    first, second = pool(2).run(load_into_refusing, tmp_path / "a")
    assert first.startswith("RankError: load_checkpoint: rank 1 failed with RuntimeError")
    assert second == "RuntimeError: of another version"

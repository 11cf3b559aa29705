"""What goes wrong on one rank alone is an error on all of them, and none waits."""

import os
from pathlib import Path

import pytest
import torch
from test_checkpoint_errors import no_space
from test_dcp import build

from adadelta_dist import RankError, save_checkpoint


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

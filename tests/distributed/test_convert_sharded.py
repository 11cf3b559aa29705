"""Folders that several ranks saved become one file, and one file feeds several ranks."""

import torch
from test_dcp import (
    FROZEN,
    assert_equal,
    build,
    controls,
    flattened,
    load,
    names,
    save,
    train,
    whole,
)

from adadelta_dist.convert import convert
from adadelta_dist.folder import verify


@flattened
def test_slices_of_three_ranks_become_one_file(pool, tmp_path, options):
    pool(3).run(save, tmp_path / "dcp", 1e-4, options)
    convert(tmp_path / "dcp", tmp_path / "file.pt", "torch")
    file = torch.load(tmp_path / "file.pt", weights_only=True)
    module, optimizer = build(None, [])
    module.load_state_dict(file["model"])
    optimizer.load_state_dict(file["optimizer"])
    assert_equal(whole(module, optimizer), controls()[0], but=FROZEN)


def resume_converted(rank, path):
    module, optimizer = build(25, [])
    model, optim = names.get_state_dict(module, optimizer)
    load({"model": model, "optimizer": optim}, path, partial=True)
    names.set_state_dict(module, optimizer, model_state_dict=model, optim_state_dict=optim)
    before = whole(module, optimizer)
    train(module, optimizer, [2])
    return before, whole(module, optimizer)


def test_one_file_feeds_three_ranks(pool, tmp_path):
    model, optimizer = names.get_state_dict(*build(None, [0, 1]))
    torch.save({"model": model, "optimizer": optimizer}, tmp_path / "file.pt")
    convert(tmp_path / "file.pt", tmp_path / "dcp", "dcp")
    assert verify(tmp_path / "dcp") == []
    for result in pool(3).run(resume_converted, tmp_path / "dcp"):
        for got, want in zip(result, controls(), strict=True):
            assert_equal(got, want, but=FROZEN)

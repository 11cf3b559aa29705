"""Folders that several ranks saved become one file, and one file feeds several ranks."""

import torch
import torch.distributed.checkpoint as dcp
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
from torch import nn

from adadelta_dist import ShardedAdadelta
from adadelta_dist.checkpoints.convert import convert
from adadelta_dist.checkpoints.folder import verify


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


def save_many(rank, path, options):
    """Parameters that differ in their values alone, in groups of the same hyperparameters."""
    module = nn.ParameterDict({f"p{i}": torch.full((3,), 1.0 * i) for i in range(12)})
    params = [module[f"p{7 * i % 12}"] for i in range(12)]
    optimizer = ShardedAdadelta([{"params": params[:5]}, {"params": params[5:], "lr": 0.5}])
    for p in params:
        p.grad = p.detach().clone()
    optimizer.step()
    _, optim = names.get_state_dict(module, optimizer, options=options)
    dcp.save({"optimizer": optim}, checkpoint_id=path)


@flattened
def test_the_order_of_the_optimizer_is_kept(pool, tmp_path, options):
    """What is equal on all ranks is written by any of them, in any order."""
    pool(3).run(save_many, tmp_path / "dcp", options)
    convert(tmp_path / "dcp", tmp_path / "file.pt", "torch")
    optimizer = torch.load(tmp_path / "file.pt", weights_only=True)["optimizer"]
    order = [f"p{7 * i % 12}" for i in range(12)]
    assert [group["param_names"] for group in optimizer["param_groups"]] == [order[:5], order[5:]]
    for i, name in enumerate(order):
        grad = torch.full((3,), float(name[1:]))
        assert torch.equal(optimizer["state"][i]["square_avg"], (0.1 * grad) * grad), name

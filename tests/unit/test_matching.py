"""What of a checkpoint fits, found from its metadata alone."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import FLAT, build, save_dcp
from torch import nn

from adadelta_dist import ShardedAdadelta
from adadelta_dist.checkpoints.matching import match
from adadelta_dist.checkpoints.named_state import named_state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def current(*args, **kwargs):
    return named_state(*build(*args, **kwargs))


def save(path, named):
    dcp.save(named, checkpoint_id=path, no_dist=True)
    return path


def test_all_fits_and_nothing_is_read_yet(tmp_path):
    source = save(tmp_path / "a", current())
    (data,) = source.glob("__*")
    here = current(seed=1, steps=1)
    data.rename(tmp_path / "away")  # values of groups are read, tensors are not
    with pytest.raises(FileNotFoundError):
        match(source, here)
    (tmp_path / "away").rename(data)
    found = match(source, here)
    assert found.skipped == ()
    assert found.target["model"].keys() == here["model"].keys()
    assert found.target["optimizer"]["state"].keys() == here["optimizer"]["state"].keys()
    for name, tensor in found.target["model"].items():
        assert tensor.shape == here["model"][name].shape
        assert tensor.data_ptr() != here["model"][name].data_ptr() or not tensor.numel()
        assert not tensor.any()


def test_hyperparameters_come_by_the_parameters_and_not_by_the_number(tmp_path):
    source = save(tmp_path / "a", current())
    here = current(seed=1)
    here["optimizer"]["param_groups"].reverse()
    here["optimizer"]["param_groups"][0]["own"] = "kept"
    found = match(source, here)
    assert found.skipped == ()
    first, second = found.optimizer["param_groups"]
    assert (first["lr"], first["weight_decay"], first["own"]) == (0.5, 0.1, "kept")
    assert (second["lr"], second["rho"]) == (torch.tensor(0.7), 0.8)
    assert first["params"] == here["optimizer"]["param_groups"][0]["params"]


def test_groups_flattened_by_torch_fit_as_well(tmp_path):
    save_dcp(tmp_path / "a", *build(), FLAT)
    found = match(tmp_path / "a", current(seed=1))
    assert found.skipped == ()
    assert [group["lr"] for group in found.optimizer["param_groups"]] == [torch.tensor(0.7), 0.5]


def drop_model(named):
    del named["model"]["count"]


def drop_state(named):
    del named["optimizer"]["state"]["matrix"]


def more_state(named):
    named["optimizer"]["state"]["matrix"]["more"] = torch.ones(1)


def shape_of_state(named):
    named["optimizer"]["state"]["matrix"]["acc_delta"] = torch.ones(7, 5)


def text_for_tensor(named):
    named["model"]["count"] = "many"


def regroup(named):
    first, second = named["optimizer"]["param_groups"]
    for key in ("params", "param_names"):
        second[key] = [*second[key], first[key].pop()]


@pytest.mark.parametrize(
    ("edit", "lines"),
    [
        (drop_model, ["count is not in the checkpoint"]),
        (drop_state, []),  # it begins anew
        (more_state, ["more of matrix is in the checkpoint alone"]),
        (shape_of_state, ["acc_delta of matrix has shape (7, 5) in the checkpoint, (5, 7) here"]),
        (text_for_tensor, ["count is a tensor on one side only"]),
        (
            regroup,
            [
                "no group of the checkpoint has the parameters of group 0",
                "no group of the checkpoint has the parameters of group 1",
            ],
        ),
    ],
)
def test_what_does_not_fit_is_listed_and_left_out(tmp_path, edit, lines):
    named = current()
    edit(named)
    source, here = save(tmp_path / "a", named), current(seed=1)
    found = match(source, here)
    assert list(found.skipped) == lines
    state = found.optimizer["state"]
    assert ("count" in found.target["model"]) == (edit not in (drop_model, text_for_tensor))
    if edit is drop_state:
        assert "matrix" not in state
    elif edit is shape_of_state:  # what is there stays, all of it
        assert state["matrix"] is here["optimizer"]["state"]["matrix"]
        assert "matrix" not in found.target["optimizer"]["state"]
    else:
        assert state["matrix"] is found.target["optimizer"]["state"]["matrix"]
        assert "more" not in state["matrix"]
    if edit is regroup:
        assert [g["rho"] for g in found.optimizer["param_groups"]] == [0.8, 0.9]


def test_a_fresh_optimizer_reads_state_into_memory_like_the_parameters(tmp_path):
    source = save(tmp_path / "a", current())
    found = match(source, current(seed=1, steps=0))
    entry = found.target["optimizer"]["state"]["brain"]
    assert (entry["acc_delta"].dtype, entry["acc_delta"].shape) == (torch.bfloat16, (6, 5))
    assert entry["step"].shape == ()
    assert "frozen" not in found.target["optimizer"]["state"]


def test_model_alone_holds_no_adadelta(tmp_path):
    module = nn.Linear(2, 2)
    source = save(tmp_path / "a", {"model": module.state_dict()})
    with pytest.raises(ValueError, match=r"has no optimizer\.param_groups: save"):
        match(source, named_state(module, ShardedAdadelta(module.parameters())))

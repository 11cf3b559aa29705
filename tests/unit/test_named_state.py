"""State by name: whatever wraps the model, and without touching anything."""

import pytest
import torch
from checkpoints import assert_equal, build
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from adadelta_dist import Adadelta, ShardedAdadelta
from adadelta_dist.checkpoints.named_state import (
    group_of,
    named_groups,
    named_state,
    optimizer_state_dict,
)

CLASSES = [torch.optim.Adadelta, Adadelta, ShardedAdadelta]


class Namesake(nn.Module):
    """Names that wrappers and checkpoints use as well."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 2, bias=False)
        self.model = nn.ModuleDict({"optimizer": nn.Linear(2, 2, bias=False)})
        self.step = nn.Parameter(torch.ones(2))
        self.list = nn.ParameterList([torch.ones(2), torch.ones(3)])


NAMES = ["step", "module.weight", "model.optimizer.weight", "list.0", "list.1"]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("outer", [False, True])
def test_names_are_those_of_the_bare_model(mesh, cls, inner, outer):
    module = Namesake()
    optimizer = cls(module.parameters())
    if inner:
        module.module = torch.compile(module.module, backend="eager")
    if outer:
        module = nn.parallel.DistributedDataParallel(torch.compile(module, backend="eager"))
    named = named_state(module, optimizer)
    assert sorted(named["model"]) == sorted(NAMES)
    assert sorted(named["optimizer"]["param_groups"][0]["params"]) == sorted(NAMES)
    for name, p in zip(named["optimizer"]["param_groups"][0]["params"],
                       optimizer.param_groups[0]["params"], strict=True):  # fmt: skip
        assert named["model"][name].data_ptr() == p.data_ptr()


class Prefixed(nn.Module):
    """What DistributedDataParallel calls its own child, beside a parameter of the same name."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(3, 3)
        self.bias = nn.Parameter(torch.zeros(3))


WRAPPED = {
    "a name within a wrapper's prefix": lambda: nn.parallel.DistributedDataParallel(Prefixed()),
    "recomputed children": lambda: nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2))),
    "a wrapped child": lambda: nn.ModuleDict(
        {"g": nn.parallel.DistributedDataParallel(nn.Linear(2, 2)), "d": nn.Linear(2, 2)}
    ),
}


@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
def test_every_parameter_has_its_own_name_however_it_is_wrapped(mesh, wrapped):
    module = wrapped()
    optimizer = Adadelta(module.parameters())
    named = named_state(module, optimizer)
    names = named["optimizer"]["param_groups"][0]["params"]
    assert len(set(names)) == len(names)
    for name, p in zip(names, optimizer.param_groups[0]["params"], strict=True):
        assert named["model"][name].data_ptr() == p.data_ptr()


@pytest.mark.parametrize("cls", CLASSES)
def test_tensors_are_the_optimizers_own_and_nothing_steps(cls):
    module, optimizer = build(steps=1, cls=cls)
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("stepped"))
    named = named_state(module, optimizer)
    for name, p in module.named_parameters():
        held = named["optimizer"]["state"].get(name, {})
        assert held.keys() == optimizer.state.get(p, {}).keys()
        assert all(value is optimizer.state[p][key] for key, value in held.items())
    lrs = [group["lr"] for group in named["optimizer"]["param_groups"]]
    assert lrs == [torch.tensor(0.7), 0.5]


@pytest.mark.parametrize("cls", CLASSES)
def test_names_and_numbers_are_two_forms_of_one_state(cls):
    module, optimizer = build(cls=cls)
    back = optimizer_state_dict(named_state(module, optimizer)["optimizer"])
    want = optimizer.state_dict()
    assert [group["params"] for group in back["param_groups"]] == [
        group["params"] for group in want["param_groups"]
    ]
    assert not any("param_names" in group for group in back["param_groups"])
    assert back["state"].keys() == want["state"].keys()
    for i, entry in want["state"].items():
        assert_equal(back["state"][i], entry)


def test_tied_weights_have_the_name_of_the_first():
    module = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    module["b"].weight = module["a"].weight
    named = named_state(module, Adadelta(module.parameters()))
    assert sorted(named["model"]) == ["a.weight", "b.weight"]
    assert named["optimizer"]["param_groups"][0]["params"] == ["a.weight"]


def test_parameters_that_the_optimizer_lacks_are_of_the_model_alone():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module[1].register_buffer("passing", torch.ones(1), persistent=False)
    named = named_state(module, Adadelta([module[1].bias]))
    assert named["optimizer"]["param_groups"][0]["params"] == ["1.bias"]
    assert named["model"].keys() == module.state_dict().keys()


def test_parameters_that_the_model_lacks_are_refused():
    module, stranger = nn.Linear(2, 2), nn.Parameter(torch.ones(3, 4))
    optimizer = Adadelta([{"params": module.parameters()}, {"params": [module.bias.clone().detach().requires_grad_(), stranger]}])  # fmt: skip  # noqa: E501
    with pytest.raises(ValueError, match=r"parameter 0 of group 1, of shape \(2,\), is in the opt"):
        named_groups(module, optimizer, module.state_dict().keys())


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_other_optimizers_are_refused(cls):
    with pytest.raises(TypeError, match=rf"{cls.__name__}, wanted ShardedAdadelta, Adadelta"):
        group_of(cls(nn.Linear(2, 2).parameters(), lr=0.1))


def test_the_ranks_are_those_of_the_optimizer(mesh):
    module = nn.Linear(2, 2)
    assert group_of(Adadelta(module.parameters())).process_group is torch.distributed.group.WORLD
    sharded = ShardedAdadelta(module.parameters(), process_group=mesh.get_group())
    assert group_of(sharded) is sharded._group

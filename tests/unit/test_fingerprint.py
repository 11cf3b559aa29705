"""The facts that ranks compare name every difference that matters, and no other."""

import pytest
import torch
from trajectory import parameters

from adadelta_dist import Adadelta, fingerprint


def facts_of(params, **options):
    return fingerprint.facts(Adadelta(params, **options).param_groups)


def test_each_parameter_and_hyperparameter_has_a_line():
    assert facts_of(parameters([(2, 3), ()])) == [
        "parameter 0 of group 0: (2, 3), torch.float32, cpu, memory order (0, 1)",
        "parameter 1 of group 0: (), torch.float32, cpu, memory order ()",
        "group 0: lr=1.0",
        "group 0: rho=0.9",
        "group 0: eps=1e-06",
        "group 0: weight_decay=0.0",
        "group 0: maximize=0.0",
    ]


def test_names_are_used_where_they_are_given():
    model = torch.nn.Linear(2, 3)
    assert facts_of(model.named_parameters())[0].startswith("weight: (3, 2)")


def test_a_second_group_is_told_from_the_first():
    first, second = parameters([(2,), (2,)])
    lines = facts_of([{"params": [first]}, {"params": [second], "lr": 0.5}])
    assert lines[1].startswith("parameter 0 of group 1: ")
    assert "group 1: lr=0.5" in lines


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(3, 2),
        torch.zeros(2, 3, dtype=torch.float64),
        torch.zeros(3, 2).t(),
        torch.zeros(2, 3, device="meta"),
    ],
    ids=["shape", "dtype", "memory order", "device"],
)
def test_facts_of_another_parameter_differ(other):
    assert facts_of([torch.nn.Parameter(other)]) != facts_of(
        [torch.nn.Parameter(torch.zeros(2, 3))]
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 0.5), ("rho", 0.8), ("eps", 1e-7), ("weight_decay", 0.1), ("maximize", True)],
)
def test_facts_of_another_hyperparameter_differ(name, value):
    plain, other = facts_of(parameters()), facts_of(parameters(), **{name: value})
    assert sum(a != b for a, b in zip(plain, other, strict=True)) == 1


@pytest.mark.parametrize("lr", [1, 1.0, torch.tensor(1.0), torch.tensor([1.0])])
def test_facts_do_not_tell_the_ways_to_write_a_number_apart(lr):
    assert facts_of(parameters(), lr=lr) == facts_of(parameters(), lr=1.0)


def test_values_do_not_matter_for_they_are_broadcast():
    assert facts_of([torch.zeros(2)]) == facts_of([torch.ones(2)])


def test_a_tensor_on_an_accelerator_is_not_waited_for():
    assert fingerprint.plain(torch.ones((), device="meta")) == "a tensor"


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_duplicate_has_one_name():
    (p,) = parameters([(2,)])
    ((name, only),) = fingerprint.named(0, Adadelta([p, p]).param_groups[0])
    assert name == "parameter 0 of group 0"
    assert only is p


def test_parameters_of_one_name_are_all_there():
    both = parameters([(2,), (3,)])
    group = Adadelta([("twin", p) for p in both]).param_groups[0]
    assert [p for _, p in fingerprint.named(0, group)] == both

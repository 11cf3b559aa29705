"""State dicts of every shape are taken apart by name."""

import pytest
import torch

from adadelta_dist.checkpoints.content import (
    Content,
    Value,
    flatten,
    foreign_state,
    optimizer_root,
    parse_optimizer,
    take_model,
    take_optimizer,
)


def held(value):
    if isinstance(value, torch.Tensor):
        return Value(lambda: value, tuple(value.shape), value.dtype)
    return Value(lambda: value)


def parse(state_dict):
    return parse_optimizer({path: held(value) for path, value in flatten(state_dict).items()})


def keys(state):
    return {name: set(entry) for name, entry in state.items()}


HYPER = {"lr": 1.0, "rho": 0.9}
GROUPS = [{**HYPER, "params": ["a.b", "c"]}, {**HYPER, "lr": 0.5, "params": ["d"]}]


@pytest.mark.parametrize(
    "state_dict",
    [
        {"state": {"a.b": {"step": 1}}, "param_groups": GROUPS},
        {
            "state": {0: {"step": 1}},
            "param_groups": [
                {**HYPER, "params": [0, 1], "param_names": ["a.b", "c"]},
                {**HYPER, "lr": 0.5, "params": [2], "param_names": ["d"]},
            ],
        },
        {"state.a.b.step": 1}
        | {f"param_groups.{n}.lr": lr for n, lr in (("a.b", 1.0), ("c", 1.0), ("d", 0.5))}
        | {f"param_groups.{n}.rho": 0.9 for n in ("a.b", "c", "d")},
    ],
    ids=["named", "numbered", "flattened"],
)
def test_each_form_tells_the_same(state_dict):
    state, groups, named = parse(state_dict)
    assert keys(state) == {"a.b": {"step"}}
    got = [{key: value for key, value in g.items() if key != "param_names"} for g in groups]
    assert got == GROUPS
    assert named


def test_numbers_without_names_are_said_to_be_numbers():
    groups = [{**HYPER, "params": [0, 1]}]
    state, groups, named = parse({"state": {1: {"step": 1}}, "param_groups": groups})
    assert (keys(state), groups[0]["params"], named) == ({"1": {"step"}}, ["0", "1"], False)


def test_flattened_groups_of_equal_values_are_told_apart_by_their_names():
    flat = {}
    for group in (["a", "b"], ["c"]):
        for name in group:
            flat |= {f"param_groups.{name}.lr": 1.0, f"param_groups.{name}.param_names": group}
    assert [group["params"] for group in parse(flat)[1]] == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        ({"state": {"x": {"step": 1}}, "param_groups": GROUPS}, "state of 'x', .* in no group"),
        ({"param_groups": [{"params": [0], "param_names": []}]}, "1 parameters, but 0 param_names"),
    ],
)
def test_contradictions_are_refused(state_dict, message):
    with pytest.raises(ValueError, match=message):
        parse(state_dict)


def test_the_optimizer_and_the_model_are_found_where_they_lie():
    t = held(torch.zeros(2))
    values = {
        ("net", "a"): t,
        ("net", "buffer"): t,
        ("ema", "z"): t,
        ("optim", "state", "a", "step"): t,
        ("optim", "param_groups", 0, "params"): held(["a"]),
        ("optim", "note"): held("x"),
    }
    root = optimizer_root(values)
    assert root == ("optim",)
    optimizer, rest = take_optimizer(values, root)
    assert set(optimizer) == {("state", "a", "step"), ("param_groups", 0, "params")}
    model, others = take_model(rest, ["a"])
    assert (set(model), set(others)) == ({"a", "buffer"}, {("ema", "z"), ("optim", "note")})
    assert optimizer_root(rest) is None


def test_without_an_optimizer_the_model_is_model_or_the_tensors_at_the_top():
    t = held(torch.zeros(2))
    model, others = take_model({("model", "a"): t, ("ema", "a"): t}, [])
    assert (set(model), set(others)) == ({"a"}, {("ema", "a")})
    model, others = take_model({("a",): t, ("epoch",): held(3)}, [])
    assert (set(model), set(others)) == ({"a"}, {("epoch",)})


def test_a_foreign_optimizer_is_told_by_its_state_or_its_groups():
    def content(*state_keys, **hyper):
        return Content(state={"a": dict.fromkeys(state_keys, held(1))}, groups=[hyper])

    fine = {"lr": 1.0, "rho": 0.9, "eps": 1e-6, "params": ["a"]}
    assert foreign_state(content("step", "square_avg", "acc_delta", "more", **fine)) is None
    assert foreign_state(content(**fine)) is None
    assert foreign_state(Content()) is None
    adam = foreign_state(content("step", "exp_avg", "exp_avg_sq", **fine))
    assert adam == "Adam state: exp_avg, exp_avg_sq"
    assert foreign_state(content("step", "z", **fine)) == "unknown state: z"
    assert foreign_state(content("step", **fine)) == "unknown state: step alone"
    assert foreign_state(content(lr=1.0, params=["a"])) == "groups of another optimizer: lr"


def test_bytes_are_those_of_tensors():
    assert held(torch.zeros(3, 2, dtype=torch.bfloat16)).nbytes == 12
    assert held(torch.zeros(())).nbytes == 4
    assert held(3).nbytes == held(torch.zeros(0)).nbytes == 0

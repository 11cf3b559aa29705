"""One process loads: all that was saved comes back, and what fails changes nothing."""

import copy
import functools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import assert_same, train
from checkpoints import build as build_with_half
from test_saving import Noted, noted
from torch import nn
from torch.optim.lr_scheduler import StepLR

from adadelta_dist import (
    Adadelta,
    CheckpointError,
    ShardedAdadelta,
    load_checkpoint,
    save_checkpoint,
)
from adadelta_dist.checkpoints.named_state import named_state

CLASSES = [torch.optim.Adadelta, Adadelta, ShardedAdadelta]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def build(*args, **kwargs):
    """Without half precision, which has masters in one class and not in the others."""
    return build_with_half(*args, brain=torch.float64, **kwargs)


def save_plainly(path, module, optimizer, edit=lambda named: None):
    named = named_state(module, optimizer)
    edit(named)
    dcp.save(named, checkpoint_id=path, no_dist=True)
    return path


@pytest.mark.parametrize("target", CLASSES)
@pytest.mark.parametrize("source", CLASSES)
def test_all_comes_back_from_any_class_in_any_class(tmp_path, source, target):
    saved = build(cls=source)
    save_checkpoint(tmp_path / "a", *saved)
    got = build(seed=1, steps=3, cls=target)
    assert load_checkpoint(tmp_path / "a", *got).skipped == ()
    assert_same(got, build(), but=["frozen"])  # torch's optimizer has no state of it
    for one in (saved, got):
        train(*one, [5])
    assert_same(got, saved, but=["frozen"])


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize("cls", CLASSES)
def test_many_steps_are_counted_right_at_any_default_dtype(tmp_path, cls):
    module, optimizer = build(cls=cls)
    for entry in optimizer.state.values():
        entry["step"].fill_(4097)  # in half precision there is no such number
    save_checkpoint(tmp_path / "a", module, optimizer)
    module, optimizer = build(steps=0, cls=cls)
    load_checkpoint(tmp_path / "a", module, optimizer)
    assert {entry["step"].item() for entry in optimizer.state.values()} == {4097}


@pytest.mark.parametrize("cls", CLASSES)
def test_a_schedule_goes_on(tmp_path, cls):
    def job(lr):
        torch.manual_seed(0)
        module = nn.Linear(2, 2)
        optimizer = cls(module.parameters(), lr=lr)
        return module, optimizer, StepLR(optimizer, 1, 0.5)

    module, optimizer, schedule = job(torch.tensor(0.5, dtype=torch.float64))
    optimizer.step()
    schedule.step()
    save_checkpoint(tmp_path / "a", module, optimizer)
    module, optimizer, schedule = job(1.0)
    load_checkpoint(tmp_path / "a", module, optimizer)
    group = optimizer.param_groups[0]
    assert (group["lr"].dtype, group["lr"].item()) == (torch.float64, 0.25)
    assert group["initial_lr"].item() == 0.5


def test_what_the_other_class_has_no_word_for_stays(tmp_path):
    torch.manual_seed(0)
    module = nn.Linear(2, 2)
    optimizer = torch.optim.Adadelta(module.parameters(), rho=0.7, maximize=True)
    save_checkpoint(tmp_path / "a", module, optimizer)
    optimizer = Adadelta(module.parameters(), fused=False)
    load_checkpoint(tmp_path / "a", module, optimizer)
    group = optimizer.param_groups[0]
    assert (group["fused"], group["rho"], group["maximize"]) == (False, 0.7, True)


@pytest.mark.parametrize("cls", CLASSES)
def test_parameters_without_state_begin_anew(tmp_path, cls):
    module, optimizer = build(steps=0)
    save_checkpoint(tmp_path / "a", module, optimizer)
    module, optimizer = build(cls=cls)
    load_checkpoint(tmp_path / "a", module, optimizer)
    for entry in optimizer.state.values():
        assert not any(value.any() for value in entry.values())


@pytest.mark.parametrize(
    "note",
    [
        None,
        3,
        b"bytes",
        {},
        {"a": [1, 2], "b": {"c": "d", "e": {}}},
        {"t": torch.ones(2), "n": [1]},
    ],
    ids=str,
)
def test_the_extra_state_of_modules_comes_back(tmp_path, note):
    save_checkpoint(tmp_path / "a", *noted(note))
    module, optimizer = noted(copy.deepcopy(note))
    load_checkpoint(tmp_path / "a", module, optimizer)
    if isinstance(note, dict) and "t" in note:
        assert torch.equal(module.note.pop("t"), note.pop("t"))
    assert module.note == note


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("fresh", [0, {}, {"a": [], "b": {"f": 1}, "t": 0, "z": 5}], ids=str)
@pytest.mark.parametrize(
    "note", [3, [], {"a": [1, 2], "b": {"c": "d"}}, {"t": torch.ones(2), "a": [1, torch.ones(3)]}]
)
def test_also_where_it_has_another_structure_by_now(tmp_path, note, fresh, strict):
    save_checkpoint(tmp_path / "a", *noted(note))
    module, optimizer = noted(copy.deepcopy(fresh))
    assert load_checkpoint(tmp_path / "a", module, optimizer, strict=strict).skipped == ()
    assert str(module.note) == str(note)


@pytest.mark.parametrize("cls", CLASSES)
def test_state_of_ones_own_comes_back_with_the_rest(tmp_path, cls):
    def job(number):
        module, optimizer = build(steps=1, cls=cls)
        optimizer.state[module.matrix] |= {"number": number, "mean": torch.full((2,), number)}
        return module, optimizer

    save_checkpoint(tmp_path / "a", *job(3.0))
    module, optimizer = job(4.0)
    load_checkpoint(tmp_path / "a", module, optimizer)
    entry = optimizer.state[module.matrix]
    assert entry["number"] == 3.0
    assert entry["mean"].tolist() == [3.0, 3.0]
    with pytest.raises(CheckpointError, match="mean of matrix is in the checkpoint alone"):
        load_checkpoint(tmp_path / "a", *build(steps=1, cls=cls))


def test_masters_are_dropped_only_on_demand(tmp_path):
    save_checkpoint(tmp_path / "a", *build_with_half(cls=ShardedAdadelta))
    target = build_with_half(seed=1)
    line = "master of brain is in the checkpoint alone"
    with pytest.raises(CheckpointError, match=line):
        load_checkpoint(tmp_path / "a", *target)
    assert load_checkpoint(tmp_path / "a", *target, strict=False).skipped == (line,)


class Failing(Noted):
    def set_extra_state(self, state):
        raise RuntimeError("an extra state of another version")


@pytest.mark.parametrize("cls", CLASSES)
def test_a_model_that_refuses_its_state_leaves_the_optimizer_as_it_was(tmp_path, cls):
    module = Failing(3, 2)
    optimizer = cls(module.parameters())
    save_checkpoint(tmp_path / "a", module, optimizer)
    module.weight.grad = torch.ones(2, 3)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="an extra state of another version"):
        load_checkpoint(tmp_path / "a", module, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1
    for i, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            assert torch.equal(value, before["state"][i][key])


def bad_rate(named):
    named["optimizer"]["param_groups"][1]["lr"] = -1.0


def complex_values(named):
    named["model"]["matrix"] = torch.ones(5, 7, dtype=torch.complex64)


def real_values(named):
    named["optimizer"]["state"]["complex"]["acc_delta"] = torch.ones(5, 4)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (bad_rate, "Invalid learning rate: -1.0"),
        (complex_values, "matrix is complex in the checkpoint, real here"),
        (real_values, "acc_delta of complex is real in the checkpoint, complex here"),
    ],
)
def test_values_that_do_not_fit_change_nothing(tmp_path, cls, edit, words):
    save_plainly(tmp_path / "a", *build(), edit)
    got = build(seed=1, steps=1, cls=cls)
    with pytest.raises((CheckpointError, ValueError), match=words):
        load_checkpoint(tmp_path / "a", *got)
    assert_same(got, build(seed=1, steps=1, cls=cls))


def test_a_model_without_memory_is_refused(tmp_path):
    module = nn.Linear(2, 2)
    save_checkpoint(tmp_path / "a", module, torch.optim.Adadelta(module.parameters()))
    module.to("meta")
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    optimizer = torch.optim.Adadelta(module.parameters())
    for call in (
        lambda: load_checkpoint(tmp_path / "a", module, optimizer),
        lambda: save_checkpoint(tmp_path / "b", module, optimizer),
    ):
        with pytest.raises(ValueError, match=r"weight is on the meta device.*to_empty"):
            call()
    assert not (tmp_path / "b").exists()


def test_a_run_of_damaged_checkpoints_names_none_to_load(tmp_path):
    path = save_checkpoint(tmp_path / "a", *noted(1))
    (path / "manifest.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="is no complete checkpoint, and holds none"):
        load_checkpoint(tmp_path, *noted(1))
    with pytest.raises(CheckpointError, match=r"manifest\.json has changed[^.]*\.$"):
        load_checkpoint(path, *noted(1))


def test_extra_is_that_of_rank_0_where_this_rank_saved_none(tmp_path):
    path = save_plainly(tmp_path / "a", *noted(1))
    assert load_checkpoint(path, *noted(1)).extra is None
    torch.save("of rank 1", path / "extra-1.pt")
    assert load_checkpoint(path, *noted(1)).extra is None
    torch.save("of rank 0", path / "extra-0.pt")
    assert load_checkpoint(path, *noted(1)).extra == "of rank 0"


def test_loading_what_matches_leaves_the_rest(tmp_path):
    def rename(named):
        named["model"]["other"] = named["model"].pop("matrix")

    save_plainly(tmp_path / "a", *build(), rename)
    got, before = build(seed=1, steps=1), build(seed=1, steps=1)
    loaded = load_checkpoint(tmp_path / "a", *got, strict=False)
    assert loaded.skipped == (
        "matrix is not in the checkpoint",
        "other is in the checkpoint alone",
    )
    assert torch.equal(got[0].matrix, before[0].matrix)
    assert torch.equal(got[0].image, build()[0].image)


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.again = self.first

    def forward(self, x):
        return self.again(self.first(x))


WRAPPERS = {
    "bare": lambda module: module,
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "DDP": nn.parallel.DistributedDataParallel,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_module_with_two_names_comes_back(mesh, tmp_path, wrap):
    module = wrap(Twice())
    optimizer = Adadelta(module.parameters())
    save_checkpoint(tmp_path / "a", module, optimizer)
    wanted = [p.detach().clone() for p in module.parameters()]
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    assert load_checkpoint(tmp_path / "a", module, optimizer).skipped == ()
    assert all(map(torch.equal, module.parameters(), wanted))


def test_a_learning_rate_that_is_learned_still_is(tmp_path):
    module = nn.Linear(2, 2)
    saved, current = (torch.tensor(lr, requires_grad=True) for lr in (0.25, 1.0))
    make = functools.partial(Adadelta, list(module.parameters()), differentiable=True)
    save_checkpoint(tmp_path / "a", module, make(lr=saved))
    optimizer = make(lr=current)
    load_checkpoint(tmp_path / "a", module, optimizer)
    lr = optimizer.param_groups[0]["lr"]
    assert (lr.item(), lr.requires_grad) == (0.25, True)


class Inner(nn.Linear):
    """Holds another optimizer's state, and has a child of a state dict's name."""

    def __init__(self):
        super().__init__(2, 2)
        self.param_groups = nn.Linear(2, 2)

    def get_extra_state(self):
        return torch.optim.SGD([self.weight], lr=0.1).state_dict()

    def set_extra_state(self, state):
        self.extra = state


def test_what_a_model_calls_like_an_optimizers_state_is_the_models(tmp_path):
    module = Inner()
    optimizer = Adadelta(module.parameters())
    save_checkpoint(tmp_path / "a", module, optimizer)
    assert load_checkpoint(tmp_path / "a", module, optimizer).skipped == ()
    assert module.extra == module.get_extra_state()


class Grouped(nn.Module):
    """Its parameters' names begin as an optimizer's state dict does."""

    def __init__(self):
        super().__init__()
        self.param_groups = nn.ModuleList([nn.Linear(2, 2)])
        self.state = nn.Linear(2, 1)


def test_parameters_may_have_names_of_a_state_dict(tmp_path):
    module = Grouped()
    optimizer = Adadelta(module.parameters())
    module.state(module.param_groups[0](torch.ones(2))).backward()
    optimizer.step()
    save_checkpoint(tmp_path / "a", module, optimizer)
    twin = Grouped()
    other = Adadelta(twin.parameters())
    assert load_checkpoint(tmp_path / "a", twin, other).skipped == ()
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["acc_delta"], other.state[q]["acc_delta"])


def test_an_expanded_buffer_is_refused_before_anything_changes(tmp_path):
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.ones(1).expand(5))
    optimizer = Adadelta(module.parameters())
    save_checkpoint(tmp_path / "a", module, optimizer)
    before = module.weight.detach().clone().add_(1)
    module.weight.data.add_(1)
    with pytest.raises(CheckpointError, match="mask is expanded here, so that its elements share"):
        load_checkpoint(tmp_path / "a", module, optimizer)
    assert torch.equal(module.weight, before)


def test_options_of_groups_come_back_as_they_were(tmp_path):
    module, options = nn.Linear(2, 2), {"schedule": {"kind": "cos", "at": {"first": 10}}}
    group = {"params": list(module.parameters())}
    save_checkpoint(tmp_path / "a", module, Adadelta([group | options]))
    optimizer = Adadelta([group | {"schedule": None}])
    load_checkpoint(tmp_path / "a", module, optimizer)
    assert {key: optimizer.param_groups[0][key] for key in options} == options


def test_nested_state_is_refused_before_anything_is_written(tmp_path):
    module, optimizer = build()
    optimizer.state[module.matrix]["mine"] = {"a": torch.ones(2)}
    with pytest.raises(TypeError, match=r"state 'mine' of matrix cannot be saved: it is a mapping"):
        save_checkpoint(tmp_path / "a", module, optimizer)
    assert list(tmp_path.iterdir()) == []

"""DeepSpeed's checkpoints resumed at other world sizes, and exchanged with torch's form."""

import re
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import deepspeed_jobs as jobs
import pytest
import torch

BEFORE, AFTER = range(3), range(3, 6)
DEADLINE = 240.0  # the first run ever compiles DeepSpeed's communication for CPUs


def settings(stage, kind="FusedAdadelta", *, half=False, universal=False, **more):
    zero = more.pop("zero", {})
    made = jobs.config(stage, kind=kind, params={"weight_decay": 0.01}, **more)
    made["zero_optimization"] |= zero
    made |= {"bf16": {"enabled": half}, "checkpoint": {"load_universal": universal}}
    return made | {"zero_allow_untested_optimizer": kind == "Adadelta"}


SUBGROUPS = {"zero": {"sub_group_size": 200}}  # stage 3 then has several flat tensors a group
CASES = {
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3},
    "stage 1, torch's": {"stage": 1, "kind": "Adadelta"},
    "stage 2, torch's": {"stage": 2, "kind": "Adadelta"},
    "stage 3, torch's": {"stage": 3, "kind": "Adadelta"},
    "stage 1, bf16": {"stage": 1, "half": True},
    "stage 2, offload": {"stage": 2, "offload": True},
    "stage 3, bf16": {"stage": 3, "half": True},
    "stage 1, bf16, gradients in fp32": {
        "stage": 1,
        "half": True,
        "data_types": {"grad_accum_dtype": "fp32"},  # DeepSpeed has another wrapper for this
    },
    "stage 0": {"stage": 0, "kind": "ShardedAdadelta"},
    "stage 0, torch's": {"stage": 0, "kind": "Adadelta"},
    "stage 0, bf16, two groups": {"stage": 0, "half": True, "kind": "ShardedAdadelta"},
    "stage 2, two groups": {"stage": 2},
    "stage 3, two groups, subgroups": {"stage": 3} | SUBGROUPS,
    "stage 3, one group, subgroups": {"stage": 3} | SUBGROUPS,
}


def run_case(engine, rank, world_size, name, steps):
    dtype = torch.bfloat16 if CASES[name].get("half") else torch.float32
    return jobs.run_steps(engine, rank, world_size, steps, dtype)


def save(rank, world_size, root, names):
    """Train, save, and train on; the losses of what came after."""
    jobs.prepare(rank, world_size)
    losses = {}
    for name in names:
        engine = jobs.build(settings(**CASES[name]), several="two groups" in name)[0]
        run_case(engine, rank, world_size, name, BEFORE)
        engine.save_checkpoint(f"{root}/{name}", client_state={"note": name})
        losses[name] = run_case(engine, rank, world_size, name, AFTER)
    return losses


def convert(rank, root, names):
    """Each to a universal checkpoint; torch's form of both must be the same."""
    jobs.prepare(rank, 1)
    from adadelta_dist.strategies.deepspeed_checkpoint import to_torch
    from adadelta_dist.strategies.deepspeed_reading import read_deepspeed
    from adadelta_dist.strategies.deepspeed_universal import read_universal, write_universal

    forms = {}
    for name in names:
        checkpoint = read_deepspeed(Path(root, name))
        write_universal(checkpoint, Path(root, name, "universal"))
        forms[name] = to_torch(checkpoint)
        assert same(forms[name], to_torch(read_universal(Path(root, name, "universal"))))
    return forms


def resume(rank, world_size, root, cases, out):
    """Load each (name, stage), save at once as `out`, and train on."""
    jobs.prepare(rank, world_size)
    results = {}
    for name, stage in cases:
        with_ours = CASES[name] | {"kind": "FusedAdadelta", "stage": stage}
        engine = jobs.build(settings(**with_ours, universal=True), several="two groups" in name)[0]
        _, client = engine.load_checkpoint(f"{root}/{name}")
        engine.save_checkpoint(f"{root}/{out}/{name}, as {stage}")
        losses = run_case(engine, rank, world_size, name, AFTER)
        steps = {float(entry["step"]) for entry in engine.basic_optimizer.state.values()}
        results[name, stage] = losses, client["note"], engine.global_steps, steps
    return results


def read(rank, root, names):
    jobs.prepare(rank, 1)
    from adadelta_dist.strategies.deepspeed_checkpoint import to_torch
    from adadelta_dist.strategies.deepspeed_reading import read_deepspeed

    return {name: to_torch(read_deepspeed(Path(root, name))) for name in names}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def mean(outcomes, key):
    return [sum(step) / len(step) for step in zip(*(o[key] for o in outcomes), strict=True)]


def stage_of(name):
    """At which stage it goes on: DeepSpeed's stage 0 does not load universal checkpoints."""
    return CASES[name]["stage"] or 1


FROM_4 = ["stage 1", "stage 2", "stage 3", "stage 3, two groups, subgroups"]
TARGETS = {  # saved by, resumed by, (case, stage)
    (2, 1): [(name, stage_of(name)) for name in CASES],
    (2, 4): [(name, stage_of(name)) for name in CASES]
    + [("stage 2", 3), ("stage 3", 1), ("stage 2, two groups", 3)],
    (4, 2): [(name, stage_of(name)) for name in FROM_4],
}


@pytest.fixture(scope="module")
def resumed(deepspeed_pool, tmp_path_factory):
    """By (saved by, resumed by, case, stage): all that the tests compare."""
    results = {}
    for saved_by, names in {2: list(CASES), 4: FROM_4}.items():
        root = str(tmp_path_factory.mktemp(f"saved_by_{saved_by}"))
        after = deepspeed_pool(saved_by).run(save, saved_by, root, names, deadline=DEADLINE)
        forms = deepspeed_pool(1).run(convert, root, names, deadline=DEADLINE)[0]
        for (ours, by), cases in TARGETS.items():
            if ours != saved_by:
                continue
            out = f"by {by}"
            outcomes = deepspeed_pool(by).run(resume, by, root, cases, out, deadline=DEADLINE)
            again = [f"{out}/{name}, as {stage}" for name, stage in cases]
            reread = deepspeed_pool(1).run(read, root, again, deadline=DEADLINE)[0]
            for (name, stage), folder in zip(cases, again, strict=True):
                losses = [{name: o[name, stage][0]} for o in outcomes]
                results[saved_by, by, name, stage] = {
                    "saved": forms[name],
                    "loaded": reread[folder],
                    "uninterrupted": mean(after, name),
                    "resumed": mean(losses, name),
                    "rest": outcomes[0][name, stage][1:],
                }
    return results


ALL = [(a, b, name, stage) for (a, b), cases in TARGETS.items() for name, stage in cases]


@pytest.mark.parametrize("which", ALL, ids=lambda w: f"{w[0]} to {w[1]}, {w[2]}, as {w[3]}")
def test_another_world_size_has_the_same_accumulators_and_goes_on(resumed, which):
    result = resumed[which]
    saved, loaded = result["saved"]["optimizer"], result["loaded"]["optimizer"]
    by_name = [
        {n: form["state"][i] for g in form["param_groups"] for i, n in names_of(g)}
        for form in (saved, loaded)
    ]
    assert same(*by_name)
    assert {float(entry["step"]) for entry in by_name[0].values()} == {3.0}
    assert all(entry["square_avg"].any() for entry in by_name[0].values())
    assert same(result["saved"]["model"], result["loaded"]["model"])
    for before, after in zip(saved["param_groups"], loaded["param_groups"], strict=True):
        assert set(before["param_names"]) == set(after["param_names"])
        for key in ("lr", "rho", "eps", "weight_decay", "maximize"):
            assert before[key] == after[key]
    # bf16 gradients of a batch cut otherwise differ by their rounding.
    rel = 2e-3 if "bf16" in which[2] else 1e-5
    assert result["resumed"] == pytest.approx(result["uninterrupted"], rel=rel)
    assert result["rest"] == (which[2], 6, {6.0})


def names_of(group):
    return zip(group["params"], group["param_names"], strict=True)


@pytest.mark.parametrize("name", list(CASES))
def test_canonical_state_is_that_of_one_process(resumed, name):
    """What the conversion says is compared with torch's own optimizer, parameter by parameter."""
    form = resumed[2, 1, name, stage_of(name)]["saved"]
    model = jobs.network()
    several = "two groups" in name
    options = jobs.HYPERPARAMETERS | {"weight_decay": 0.01}
    optimizer = torch.optim.Adadelta(jobs.parameter_groups(model, several), **options)
    for step in BEFORE:
        inputs, targets = jobs.global_batch(step)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    tolerance = {"rtol": 0.05, "atol": 0.02} if "bf16" in name else {"rtol": 1e-4, "atol": 1e-6}
    named = dict(model.named_parameters())
    assert form["model"].keys() == named.keys()
    for group in form["optimizer"]["param_groups"]:
        for i, parameter in names_of(group):
            p = named[parameter]
            torch.testing.assert_close(form["model"][parameter], p.detach(), **tolerance)
            for key in ("square_avg", "acc_delta"):
                ours = form["optimizer"]["state"][i][key]
                torch.testing.assert_close(ours, optimizer.state[p][key], **tolerance)


def train_sharded(rank, world_size, steps, loaded=None):
    """ShardedAdadelta as under torchrun; returns losses, and torch's form on rank 0."""
    from adadelta_dist import ShardedAdadelta

    model = jobs.network()
    optimizer = ShardedAdadelta(model.named_parameters(), **jobs.HYPERPARAMETERS)
    if loaded is not None:
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
    losses = []
    for step in steps:
        ((inputs, targets),) = jobs.shares(step, rank, world_size, 1)
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    optimizer.consolidate_state_dict(to=0)
    if rank:
        return losses, None
    state = {name: p.detach().clone() for name, p in model.state_dict().items()}
    return losses, {"model": state, "optimizer": optimizer.state_dict()}


def from_torch_to_universal(rank, form, folder):
    jobs.prepare(rank, 1)
    from adadelta_dist.strategies.deepspeed_checkpoint import from_torch
    from adadelta_dist.strategies.deepspeed_universal import write_universal

    write_universal(from_torch(form["model"], form["optimizer"]), Path(folder))


def continue_with_deepspeed(rank, world_size, root, tag, stage, steps):
    jobs.prepare(rank, world_size)
    made = jobs.config(stage, checkpoint={"load_universal": True})
    engine = jobs.build(made, model=jobs.network(seed=9))[0]
    engine.load_checkpoint(root, tag)
    losses = jobs.run_steps(engine, rank, world_size, steps)
    engine.save_checkpoint(root, "by_deepspeed")
    return losses


@pytest.mark.parametrize("stage", [2, 3])
def test_torchrun_then_deepspeed_then_torchrun(deepspeed_pool, tmp_path, stage):
    """2 ranks, 4 ranks, 1 rank: as one process that never stopped."""
    root = str(tmp_path)
    first = deepspeed_pool(2).run(train_sharded, 2, range(2))
    deepspeed_pool(1).run(from_torch_to_universal, first[0][1], f"{root}/start", deadline=DEADLINE)
    assert (tmp_path / "latest_universal").read_text() == "start"
    second = deepspeed_pool(4).run(
        continue_with_deepspeed, 4, root, "start", stage, range(2, 4), deadline=DEADLINE
    )
    form = deepspeed_pool(1).run(read, root, ["by_deepspeed"])[0]["by_deepspeed"]
    third = deepspeed_pool(1).run(train_sharded, 1, range(4, 6), form)
    losses = [sum(step) / 2 for step in zip(*(ls for ls, _ in first), strict=True)]
    losses += [sum(step) / 4 for step in zip(*second, strict=True)]
    losses += third[0][0]
    assert losses == pytest.approx(jobs.train_alone(6), rel=1e-5)


class Odd(torch.nn.Module):
    """A frozen layer, a buffer, and a tied weight."""

    def __init__(self):
        super().__init__()
        self.frozen = torch.nn.Linear(jobs.FEATURES, jobs.FEATURES)
        self.frozen.requires_grad_(False)
        self.inner = torch.nn.Linear(jobs.FEATURES, jobs.FEATURES)
        self.tied = torch.nn.Linear(jobs.FEATURES, jobs.FEATURES)
        self.tied.weight = self.inner.weight
        self.out = torch.nn.Linear(jobs.FEATURES, jobs.TARGETS)
        self.register_buffer("scale", torch.tensor([2.0]))

    def forward(self, inputs):
        return self.out(self.tied(self.inner(self.frozen(inputs)))) * self.scale


def odd_models(rank, root):
    jobs.prepare(rank, 2)
    for stage in range(4):
        torch.manual_seed(0)
        engine = jobs.build(jobs.config(stage), model=Odd())[0]
        jobs.run_steps(engine, rank, 2, range(2))
        engine.save_checkpoint(f"{root}/{stage}")


def test_frozen_parameters_buffers_and_tied_weights_come_along(deepspeed_pool, tmp_path):
    deepspeed_pool(2).run(odd_models, str(tmp_path), deadline=DEADLINE)
    forms = deepspeed_pool(1).run(read, str(tmp_path), ["0", "1", "2", "3"])[0]
    torch.manual_seed(0)
    fresh = Odd().state_dict()
    for form in forms.values():
        assert form["model"].keys() == fresh.keys()
        assert torch.equal(form["model"]["frozen.weight"], fresh["frozen.weight"])
        assert torch.equal(form["model"]["scale"], fresh["scale"])
        assert torch.equal(form["model"]["tied.weight"], form["model"]["inner.weight"])
        assert not torch.equal(form["model"]["out.weight"], fresh["out.weight"])
        for name, tensor in forms["2"]["model"].items():
            torch.testing.assert_close(form["model"][name], tensor)
        for name, wanted in state_by_name(forms["2"]).items():
            torch.testing.assert_close(state_by_name(form)[name], wanted)


def state_by_name(form):
    """Frozen parameters, which some stages leave out, have no state to speak of."""
    groups, state = form["optimizer"]["param_groups"], form["optimizer"]["state"]
    named = {name: state[i] for group in groups for i, name in names_of(group)}
    return {name: entry for name, entry in named.items() if not name.startswith("frozen")}


def stage_zero(rank, world_size, root, steps, half, save):
    jobs.prepare(rank, world_size)
    engine = jobs.build(jobs.config(0, bf16={"enabled": half}), several=True)[0]
    if not save:
        engine.load_checkpoint(root)
    dtype = torch.bfloat16 if half else torch.float32
    losses = jobs.run_steps(engine, rank, world_size, steps, dtype)
    if save:
        engine.save_checkpoint(root)
        losses += jobs.run_steps(engine, rank, world_size, AFTER, dtype)
    return losses


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("saved_by", "resumed_by"), [(2, 1), (2, 4), (4, 2)])
def test_stage_0_saves_for_any_world_size_by_itself(
    deepspeed_pool, tmp_path, saved_by, resumed_by, half
):
    """DeepSpeed's own file then holds torch's form."""
    root = str(tmp_path)
    whole = deepspeed_pool(saved_by).run(
        stage_zero, saved_by, root, BEFORE, half, True, deadline=DEADLINE
    )
    resumed = deepspeed_pool(resumed_by).run(
        stage_zero, resumed_by, root, AFTER, half, False, deadline=DEADLINE
    )
    wanted = [sum(step) / saved_by for step in zip(*whole, strict=True)][len(BEFORE) :]
    got = [sum(step) / resumed_by for step in zip(*resumed, strict=True)]
    assert got == pytest.approx(wanted, rel=2e-3 if half else 1e-5)


class Stranger:
    """What no checkpoint should hold."""


def damage(rank, root):
    """Checkpoints that must not be converted; two saved at once, for shards to be mixed."""
    jobs.prepare(rank, 2)
    adam = settings(2)
    adam["optimizer"] = {"type": "Adam", "params": {"torch_adam": True, "lr": 0.1}}
    engine = jobs.build(adam)[0]
    jobs.run_steps(engine, rank, 2, range(1))
    engine.save_checkpoint(f"{root}/adam", tag="one")
    engine = jobs.build(settings(2))[0]
    for step in range(2):
        jobs.run_steps(engine, rank, 2, range(1))
        engine.save_checkpoint(root, tag=f"step {step + 1}")
    engine.save_checkpoint(root, tag="stranger", client_state={"it": Stranger()})
    elastic = settings(2, zero={"elastic_checkpoint": True})
    for tag, made in {
        "frozen": (settings(3), Odd()),
        "elastic": (elastic, None),
        "no names": (settings(0, "Adadelta"), None),
    }.items():
        engine = jobs.build(made[0], model=made[1], several=tag == "no names")[0]
        jobs.run_steps(engine, rank, 2, range(1))
        engine.save_checkpoint(root, tag=tag)


def shard(folder, rank):
    return folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def refusals(rank, root):
    """What each conversion raises, and the folders that are left."""
    jobs.prepare(rank, 1)
    from adadelta_dist.strategies.deepspeed_checkpoint import from_torch
    from adadelta_dist.strategies.deepspeed_reading import read_deepspeed
    from adadelta_dist.strategies.deepspeed_universal import read_universal, write_universal

    root = Path(root)
    entry = {"step": torch.tensor(1.0), "square_avg": torch.ones(2), "acc_delta": torch.ones(2)}
    later = entry | {"step": torch.tensor(2.0)}
    groups = [{"params": [0, 1], "param_names": ["a", "b"], "rho": 0.9}]
    weights = {"a": torch.ones(2), "b": torch.ones(2)}

    def torchs(state, groups=groups, weights=weights):
        return lambda: from_torch(weights, {"state": state, "param_groups": groups})

    def interrupted():
        checkpoint = read_deepspeed(root / "step 1")
        write_universal(replace(checkpoint, read=lambda name, key: 1 / 0), root / "half")

    def existing():
        write_universal(read_deepspeed(root / "step 1"), root / "step 2")

    attempts = {
        "Adam": lambda: read_deepspeed(root / "adam"),
        "no checkpoint": lambda: read_deepspeed(root / "nowhere"),
        "no universal": lambda: read_universal(root / "step 1"),
        "missing": lambda: read_deepspeed(root / "missing"),
        "mixed": lambda: read_deepspeed(root / "mixed"),
        "parallel": lambda: read_deepspeed(root / "parallel"),
        "cut": lambda: read_deepspeed(root / "cut"),
        "stranger": lambda: read_deepspeed(root / "stranger"),
        "frozen": lambda: read_deepspeed(root / "frozen"),
        "elastic": lambda: read_deepspeed(root / "elastic"),
        "no names": lambda: read_deepspeed(root / "no names"),
        "interrupted": interrupted,
        "exists": existing,
        "mixed torch": torchs({0: entry, 1: later}),
        "unnamed": torchs({0: entry}, [{"params": [0, 1], "rho": 0.9}]),
        "unknown": torchs({0: entry}, weights={"a": weights["a"]}),
        "another shape": torchs({0: entry}, weights={"a": torch.ones(3), "b": torch.ones(2)}),
        "Adam's entries": torchs({0: {"step": 1, "exp_avg": entry, "max_exp_avg_sq": entry}}),
    }
    before = sorted(root.rglob("*"))
    errors = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    return errors, sorted(root.rglob("*")) == before


BAD = {
    "Adam": r"ValueError: the checkpoint holds the state of another optimizer.*betas",
    "no checkpoint": r"FileNotFoundError: .*nowhere holds no DeepSpeed checkpoint",
    "no universal": r"FileNotFoundError: .*step 1 is no universal checkpoint",
    "missing": r"FileNotFoundError: .*saved by 2 ranks.*those of \[1\] are missing",
    "mixed": r"ValueError: mixed steps: .*rank 0 is at step 1, .*rank 1 at 2",
    "parallel": r"ValueError: .*parallel was saved with tensor or pipeline parallelism",
    "cut": r"ValueError: .*zero_pp_rank_1_mp_rank_00_optim_states.pt is damaged",
    "stranger": r"ValueError: .*holds test_deepspeed_checkpoints.Stranger.*client_state",
    "frozen": r"FileNotFoundError: .*saved by 2 ranks.*those of \[1\] are missing",
    "elastic": r"ValueError: .*saved with elastic_checkpoint",
    "no names": r"ValueError: .*does not say which state is whose: .*had 2 parameter groups",
    "interrupted": r"ZeroDivisionError",
    "exists": r"FileExistsError: .*step 2 exists",
    "mixed torch": r"ValueError: mixed steps: a is at step 1, b at 2",
    "unnamed": r"ValueError: .*does not name its parameters.*named_parameters\(\)",
    "unknown": r"ValueError: the optimizer has 'b', which the model lacks",
    "another shape": r"ValueError: square_avg of 'a' has another shape",
    "Adam's entries": r"ValueError: the state of 'a' holds .*not Adadelta's",
}


@pytest.fixture(scope="module")
def refused(deepspeed_pool, tmp_path_factory):
    root = tmp_path_factory.mktemp("refused")
    deepspeed_pool(2).run(damage, str(root), deadline=DEADLINE)
    for name in ("missing", "mixed", "parallel", "cut"):
        shutil.copytree(root / "step 1", root / name)
    shard(root / "missing", 1).unlink()
    (root / "frozen" / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    shutil.copy(shard(root / "step 2", 1), shard(root / "mixed", 1))
    model = root / "parallel" / "mp_rank_00_model_states.pt"
    shutil.copy(model, model.with_name("mp_rank_01_model_states.pt"))
    whole = shard(root / "cut", 1).read_bytes()
    shard(root / "cut", 1).write_bytes(whole[: len(whole) // 2])
    return deepspeed_pool(1).run(refusals, str(root), deadline=DEADLINE)[0]


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_converted_is_refused(refused, name):
    errors, _ = refused
    assert re.search(BAD[name], errors[name]), errors[name]


def test_a_conversion_that_failed_leaves_nothing(refused):
    assert refused[1]


def adams_universal(rank, root):
    """Adam's state, made universal by DeepSpeed's own tool, under FusedAdadelta."""
    jobs.prepare(rank, 1)
    from deepspeed.checkpoint.ds_to_universal import main

    from adadelta_dist.strategies.deepspeed_universal import read_universal

    adam = settings(2)
    adam["optimizer"] = {"type": "Adam", "params": {"torch_adam": True, "lr": 0.1}}
    engine = jobs.build(adam)[0]
    jobs.run_steps(engine, rank, 1, range(1))
    engine.save_checkpoint(root, tag="adam")
    inputs = {"input_folder": f"{root}/adam", "output_folder": f"{root}/universal"}
    counts = {"num_extract_workers": 1, "num_merge_workers": 1}
    flags = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    main(Namespace(**inputs, **counts, **flags))
    errors = []
    try:
        read_universal(Path(root, "universal"))
    except ValueError as error:
        errors.append(str(error))
    engine = jobs.build(settings(2, universal=True))[0]
    engine.load_checkpoint(root)
    try:
        jobs.run_steps(engine, rank, 1, range(1))
    except ValueError as error:
        errors.append(str(error))
    return errors


def test_adams_universal_checkpoint_is_refused(deepspeed_pool, tmp_path):
    (read, stepped) = deepspeed_pool(1).run(adams_universal, str(tmp_path), deadline=DEADLINE)[0]
    assert "another optimizer than Adadelta" in read
    assert "holds Adam's state" in stepped

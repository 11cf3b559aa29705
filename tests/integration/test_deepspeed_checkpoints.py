"""DeepSpeed's checkpoints resumed at other world sizes."""

from pathlib import Path

import deepspeed_jobs as jobs
import pytest
import torch
from deepspeed_jobs import names_of, read_forms, same, settings

BEFORE, AFTER = range(3), range(3, 6)
DEADLINE = 240.0  # the first run ever compiles DeepSpeed's communication for CPUs


SUBGROUPS = {"zero": {"sub_group_size": 200}}  # stage 3 then has several flat tensors a group
IN_BF16 = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
DOUBLING = {  # the rate of step 4 on; a schedule that begins anew would stay at 1
    "type": "LRRangeTest",
    "params": {
        "lr_range_test_min_lr": 1.0,
        "lr_range_test_step_size": 4,
        "lr_range_test_step_rate": 1.0,
        "lr_range_test_staircase": True,
    },
}
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
    "stage 1, bf16, state in bf16": {"stage": 1, "half": True, "bf16": IN_BF16},
    "stage 3, bf16, state in bf16": {"stage": 3, "half": True, "bf16": IN_BF16},
    "stage 0": {"stage": 0, "kind": "ShardedAdadelta"},
    "stage 0, torch's": {"stage": 0, "kind": "Adadelta"},
    "stage 0, bf16, two groups": {"stage": 0, "half": True, "kind": "ShardedAdadelta"},
    "stage 2, scheduler": {"stage": 2, "scheduler": DOUBLING},
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
        again = read_universal(Path(root, name, "universal"))
        assert same(forms[name], to_torch(again))
        assert scale(again) == scale(checkpoint)
        assert "stage 2" not in name or scale(again)["cur_scale"] == 1.0
    return forms


def scale(checkpoint):
    """What a scaler of the loss keeps; none at stage 0, nor in the wrapper of BF16."""
    scaler = checkpoint.scaler.get("loss_scaler")
    return scaler and vars(scaler)


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
            reread = deepspeed_pool(1).run(read_forms, root, again, deadline=DEADLINE)[0]
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
    tensors = [*result["saved"]["model"].values(), *(e["acc_delta"] for e in by_name[0].values())]
    assert {t.dtype for t in tensors} == {torch.float32}, "whatever DeepSpeed's masters are"
    assert same(result["saved"]["model"], result["loaded"]["model"])
    for before, after in zip(saved["param_groups"], loaded["param_groups"], strict=True):
        assert set(before["param_names"]) == set(after["param_names"])
        for key in ("lr", "rho", "eps", "weight_decay", "maximize"):
            assert before[key] == after[key]
    # bf16 gradients of a batch cut otherwise differ by their rounding.
    rel = 2e-3 if "bf16" in which[2] else 1e-5
    assert result["resumed"] == pytest.approx(result["uninterrupted"], rel=rel)
    assert result["rest"] == (which[2], 6, {6.0})


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
    if "bf16" in name:  # what is read are the masters, not the model's rounded parameters
        rounded = all(torch.equal(t, t.bfloat16().float()) for t in form["model"].values())
        assert rounded == ("state in bf16" in name)
    for group in form["optimizer"]["param_groups"]:
        for i, parameter in names_of(group):
            p = named[parameter]
            torch.testing.assert_close(form["model"][parameter], p.detach(), **tolerance)
            for key in ("square_avg", "acc_delta"):
                ours = form["optimizer"]["state"][i][key]
                torch.testing.assert_close(ours, optimizer.state[p][key], **tolerance)


def stage_zero(rank, world_size, root, steps, half, save):
    jobs.prepare(rank, world_size)
    engine = jobs.build(jobs.config(0, bf16={"enabled": half}), several=True)[0]
    if not save:
        engine.load_checkpoint(root)
    dtype = torch.bfloat16 if half else torch.float32
    losses = jobs.run_steps(engine, rank, world_size, steps, dtype)
    if save:
        engine.save_checkpoint(root)
        entries = engine.basic_optimizer.state_dict()["state"].values()
        kinds = {type(entry["square_avg"]).__name__ for entry in entries}
        assert kinds == {"FlatSlice"}, "rank 0 holds on to the whole state"
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

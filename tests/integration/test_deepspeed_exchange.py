"""The state between DeepSpeed and torch's form, in both directions."""

from pathlib import Path

import deepspeed_jobs as jobs
import pytest
import torch
from deepspeed_jobs import Odd, names_of, read_forms, same

DEADLINE = 240.0  # the first run ever compiles DeepSpeed's communication for CPUs


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
    form = deepspeed_pool(1).run(read_forms, root, ["by_deepspeed"])[0]["by_deepspeed"]
    third = deepspeed_pool(1).run(train_sharded, 1, range(4, 6), form)
    losses = [sum(step) / 2 for step in zip(*(ls for ls, _ in first), strict=True)]
    losses += [sum(step) / 4 for step in zip(*second, strict=True)]
    losses += third[0][0]
    assert losses == pytest.approx(jobs.train_alone(6), rel=1e-5)


def odd_models(rank, root):
    jobs.prepare(rank, 2)
    for stage in range(4):
        torch.manual_seed(0)
        engine = jobs.build(jobs.config(stage), model=Odd())[0]
        jobs.run_steps(engine, rank, 2, range(2))
        engine.save_checkpoint(f"{root}/{stage}")


def test_frozen_parameters_buffers_and_tied_weights_come_along(deepspeed_pool, tmp_path):
    deepspeed_pool(2).run(odd_models, str(tmp_path), deadline=DEADLINE)
    forms = deepspeed_pool(1).run(read_forms, str(tmp_path), ["0", "1", "2", "3"])[0]
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


def reversing(rank, root):
    """From files of torch to universal folders, and what each is found to hold or raises."""
    jobs.prepare(rank, 1)
    from adadelta_dist.strategies.deepspeed_checkpoint import from_torch, to_torch
    from adadelta_dist.strategies.deepspeed_convert import convert
    from adadelta_dist.strategies.deepspeed_universal import read_universal, write_universal

    entry = {"step": torch.tensor(2.0), "square_avg": torch.rand(3), "acc_delta": torch.rand(3)}
    master = torch.tensor([1.0, 1.001, 1.002])
    group = {"params": [0, 1], "param_names": ["a", "b"], "lr": 1.0, "rho": 0.9, "eps": 1e-6}
    long = torch.rand(100_000)
    model = {"a": master.bfloat16(), "b": long[:3], "buffer": torch.tensor([7.0])}
    half = {"acc_delta": entry["acc_delta"].bfloat16()}  # as torch's own keeps it
    state = {0: entry | half | {"master": master}, 1: entry}
    optimizer = {"state": state, "param_groups": [group]}
    broken = {
        "shape": {"state": state | {1: entry | {"square_avg": torch.rand(4)}}},
        "mixed": {"state": state | {1: entry | {"step": torch.tensor(3.0)}}},
    }
    whole, unused = {"model": model, "optimizer": optimizer}, {0: state[0]}
    files = {name: whole | {"optimizer": optimizer | how} for name, how in broken.items()}
    files |= {"whole": whole, "unused": whole | {"optimizer": optimizer | {"state": unused}}}
    files |= {"lacking": whole | {"model": {"a": model["a"]}}}
    forms, errors, progress = {}, {}, {name: [] for name in files}
    for name, held in files.items():
        torch.save(held, f"{root}/{name}.pt")
        try:
            convert(
                Path(root, f"{name}.pt"),
                Path(root, name),
                "universal",
                lambda *at, name=name: progress[name].append(at),
            )
            forms[name] = to_torch(read_universal(Path(root, name)))
        except ValueError as error:
            errors[name] = str(error)
    write_universal(from_torch(model, optimizer), Path(root, "python"))
    forms["python"] = to_torch(read_universal(Path(root, "python")))
    return whole, forms, errors, progress


@pytest.fixture(scope="module")
def reversed_(deepspeed_pool, tmp_path_factory):
    root = tmp_path_factory.mktemp("reverse")
    return root, *deepspeed_pool(1).run(reversing, str(root), deadline=DEADLINE)[0]


@pytest.mark.parametrize("way", ["whole", "python"])
def test_masters_accumulators_and_buffers_of_torchs_form_become_universal(reversed_, way):
    root, whole, forms, _, progress = reversed_
    form, state = forms[way], whole["optimizer"]["state"]
    wanted = {key: value.float() for key, value in state[0].items() if key != "master"}
    assert same(form["optimizer"]["state"][0], wanted)
    assert form["optimizer"]["state"][0]["acc_delta"].dtype == torch.float32
    assert same(form["optimizer"]["state"][1], state[1])
    assert torch.equal(form["model"]["a"], state[0]["master"]), "rounded to the model's bfloat16"
    assert torch.equal(form["model"]["b"], whole["model"]["b"])
    assert torch.equal(form["model"]["buffer"], whole["model"]["buffer"])
    folder = root / way / "zero" / "b"
    saved = torch.load(folder / "exp_avg_sq.pt", weights_only=True)["param"]
    assert torch.equal(saved, state[1]["square_avg"]), "as documented: folders outlive versions"
    assert all(file.stat().st_size < 5000 for file in folder.iterdir()), "not what a view views"
    assert progress["whole"] == [(done, 72) for done in range(12, 73, 12)], "of three floats each"


def test_parameters_without_state_become_universal_with_zeros(reversed_):
    _, whole, forms, *_ = reversed_
    unused = forms["unused"]["optimizer"]["state"][1]
    assert not unused["square_avg"].any()
    assert not unused["acc_delta"].any()
    assert torch.equal(forms["unused"]["model"]["b"], whole["model"]["b"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("shape", "square_avg of 'b' has another shape than the parameter"),
        ("mixed", "mixed steps: a is at step 2, b at 3"),
        ("lacking", "has 'b', but the model has no parameter of that name"),
    ],
)
def test_files_that_do_not_fit_together_do_not_become_universal(reversed_, name, reason):
    root, _, _, errors, _ = reversed_
    assert reason in errors[name]
    assert not (root / name).exists()

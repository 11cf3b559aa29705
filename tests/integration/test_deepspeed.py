"""Adadelta in DeepSpeed's JSON, on the real DeepSpeed with gloo ranks."""

import inspect
import json
import re
from functools import partial

import deepspeed_jobs as jobs
import pytest
import torch

from adadelta_dist import collectives

STEPS = 5
DEADLINE = 240.0  # the first run ever compiles DeepSpeed's communication for CPUs


DECAY = {"weight_decay": 0.01}
WARMUP = {"warmup_min_lr": 0.1, "warmup_max_lr": 1.0, "warmup_num_steps": 8}


def warmup(step):
    """The rate of DeepSpeed's WarmupLR, whose first two steps have the lowest."""
    return 0.1 + 0.9 * max(0, step - 1) / 8


CASES = (
    {
        f"stage {stage}{', offload' * offload}{', ' * bool(name)}{name}": {
            "settings": jobs.config(stage, offload=offload, **more),
            "several": several,
            "alone": alone | {"several": several},
        }
        for stage in range(4)
        for offload in ([False, True] if stage else [False])
        for name, several, more, alone in [
            ("", False, {"params": DECAY}, DECAY),
            (
                "two groups, accumulation and clipping",
                True,
                {"accumulation": 2, "gradient_clipping": 0.5},
                {"clip": 0.5},
            ),
        ]
    }
    | {
        f"stage {stage}, scheduler": {
            "settings": jobs.config(
                stage,
                scheduler={"type": "WarmupLR", "params": WARMUP | {"warmup_type": "linear"}},
            ),
            "alone": {"rate": warmup},
        }
        for stage in range(4)
    }
    | {
        f"stage {stage}, bf16": {
            "settings": jobs.config(stage, params=DECAY, bf16={"enabled": True}),
        }
        for stage in range(4)
    }
)


@pytest.fixture(scope="module")
def trained(deepspeed_pool):
    """By case: the losses over all ranks, and the learning rate at the end."""
    outcomes = deepspeed_pool(2).run(jobs.train, 2, list(CASES.values()), STEPS, deadline=DEADLINE)
    merged = {}
    for name, both in zip(CASES, zip(*outcomes, strict=True), strict=True):
        losses = [sum(of_step) / 2 for of_step in zip(*(r["losses"] for r in both), strict=True)]
        merged[name] = losses, both[0]["lr"]
    return merged


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "alone" in case])
def test_losses_are_those_of_one_process_with_torch(trained, name):
    alone = jobs.train_alone(STEPS, **CASES[name]["alone"])
    assert trained[name][0] == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("wrong", [{"rho": 0.95}, {"clip": 0.5}, {"eps": 1.1e-3}, {}])
def test_the_losses_would_show_a_difference(trained, wrong):
    """Negative control for the test above; the last lacks the weight decay."""
    alone = jobs.train_alone(STEPS, **((DECAY if wrong else {}) | wrong))
    assert trained["stage 2"][0] != pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("stage", range(4))
def test_bf16_is_the_same_at_every_stage(trained, stage):
    losses, _ = trained[f"stage {stage}, bf16"]
    assert losses == pytest.approx(trained["stage 2, bf16"][0], rel=1e-5)
    assert losses == pytest.approx(trained["stage 2"][0], rel=1e-2)  # eight bits of mantissa


@pytest.mark.parametrize("stage", range(4))
def test_schedulers_of_the_json_set_the_learning_rate(trained, stage):
    """Their losses are compared above; with a rate of 1 they would be others."""
    losses, lr = trained[f"stage {stage}, scheduler"]
    assert lr == pytest.approx(warmup(STEPS))
    assert losses != pytest.approx(jobs.train_alone(STEPS), rel=1e-5)


def phantom(rank, kinds):
    """What an engine at stage 0 with bf16 holds before its first step."""
    jobs.prepare(rank, 2)
    found = {}
    for kind in kinds:
        settings = jobs.config(0, kind=kind, params={"weight_decay": 0.1}, bf16={"enabled": True})
        engine = jobs.build(settings)[0]
        wrapper = engine.optimizer
        masters = [p for group in wrapper.fp32_groups for p in group]
        states = wrapper.optimizer.state
        found[kind] = {
            "master dtypes": {p.dtype for p in masters},
            "moved": any(
                not torch.equal(master.bfloat16(), p)
                for master, p in zip(masters, jobs.network().bfloat16().parameters(), strict=True)
            ),
            "steps": {float(entry["step"]) for entry in states.values()},
            "accumulated": any(_local(e["square_avg"]).any().item() for e in states.values()),
        }
        jobs.run_steps(engine, rank, 2, range(1), torch.bfloat16)
        found[kind]["after one step"] = {float(entry["step"]) for entry in states.values()}
    return found


def _local(tensor):
    return getattr(tensor, "local", tensor)


def test_the_step_that_deepspeed_takes_before_training_leaves_nothing(deepspeed_pool):
    for found in deepspeed_pool(2).run(phantom, ["ShardedAdadelta", "FusedAdadelta", "Adadelta"]):
        for kind in ("ShardedAdadelta", "FusedAdadelta"):
            assert found[kind]["master dtypes"] == {torch.float32}
            assert not found[kind]["moved"]
            assert not found[kind]["accumulated"]
            assert found[kind]["steps"] <= {0.0}
            assert found[kind]["after one step"] == {1.0}
        # Negative control: torch's own class takes that step.
        assert found["Adadelta"]["accumulated"]
        assert found["Adadelta"]["after one step"] == {2.0}


def clients(rank):
    """What optimizers that the user builds hold before and after their first step at stage 0."""
    jobs.prepare(rank, 2)
    from adadelta_dist import ShardedAdadelta
    from adadelta_dist.strategies.deepspeed import FusedAdadelta, initialize

    def fused(params):
        return FusedAdadelta(params, weight_decay=0.1)

    def build(way, make, stage, **more):
        settings, model = jobs.config(stage, **more), jobs.network()
        del settings["optimizer"]
        given = make(model.parameters()) if way == "instance" else make
        return initialize(model=model, optimizer=given, config=settings)[0]

    def steps(engine):
        return {float(entry["step"]) for entry in engine.basic_optimizer.state.values()}

    found = {}
    for way in ("instance", "callable"):
        engine = build(way, fused, 0, bf16={"enabled": True})
        before = steps(engine)
        jobs.run_steps(engine, rank, 2, range(1), torch.bfloat16)
        found[way] = before, steps(engine)
        try:
            build(way, ShardedAdadelta, 2)
        except ValueError as error:
            found[f"{way}, sharded twice"] = str(error)
    return found


def test_optimizers_that_the_user_builds_are_treated_alike(deepspeed_pool):
    for found in deepspeed_pool(2).run(clients):
        for way in ("instance", "callable"):
            before, after = found[way]
            assert before <= {0.0}, "the step before training left something"
            assert after == {1.0}
            assert "it would be sharded twice" in found[f"{way}, sharded twice"]


def with_experts(rank):
    """The error for a model with a layer of experts at stage 0."""
    jobs.prepare(rank, 2)
    from deepspeed.moe.layer import MoE

    width = jobs.FEATURES
    model = torch.nn.Sequential(MoE(width, torch.nn.Linear(width, width), num_experts=2))
    try:
        jobs.build(jobs.config(0), model)
    except ValueError as error:
        return str(error)


def test_sharding_a_model_with_experts_is_refused(deepspeed_pool):
    for error in deepspeed_pool(2).run(with_experts):
        assert error is not None
        assert re.search(r'ShardedAdadelta with experts: .*"type": "FusedAdadelta"', error)


def ways_to_configure(rank, path):
    deepspeed = jobs.prepare(rank, 2)
    from argparse import ArgumentParser

    from adadelta_dist.strategies.deepspeed import initialize

    arguments = ["--deepspeed", "--deepspeed_config", path]
    parser = deepspeed.add_config_arguments(ArgumentParser())
    settings = jobs.config(2)
    built = {}
    for way, how in {
        "dict": {"config": settings},
        "path": {"config": path},
        "config_params": {"config_params": settings},
        "argument parser": {"args": parser.parse_args(arguments)},
    }.items():
        engine, optimizer, loader, scheduler = initialize(model=jobs.network(), **how)
        built[way] = type(optimizer.optimizer).__name__, loader, scheduler, engine.get_lr()
    return built, inspect.signature(initialize) == inspect.signature(deepspeed.initialize)


def test_initialize_is_called_as_deepspeeds_own(deepspeed_pool, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(jobs.config(2)))
    for built, same_signature in deepspeed_pool(2).run(ways_to_configure, str(path)):
        assert same_signature
        assert built == dict.fromkeys(built, ("FusedAdadelta", None, None, [1.0]))
        assert len(built) == 4


def registering(rank):
    deepspeed = jobs.prepare(rank, 2)
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    from adadelta_dist.strategies import deepspeed as ours

    def patched():
        return {**vars(DeepSpeedEngine)}, {**vars(torch.optim)}, list(ZERO_SUPPORTED_OPTIMIZERS)

    untested = ("Adadelta", "SGD")  # by DeepSpeed

    def stock(kind):
        settings = jobs.config(1, kind=kind, zero_allow_untested_optimizer=kind in untested)
        settings["optimizer"]["params"] = {"lr": 0.1}
        engine = deepspeed.initialize(model=jobs.network(), config=settings)[0]
        return type(engine.basic_optimizer)

    before = patched()
    for _ in range(2):
        ours.register()
    registered = patched()
    kinds = [stock(kind) for kind in ("FusedAdadelta", "Adadelta", "SGD", "Adagrad")]
    jobs.build(jobs.config(2))  # which leaves what is registered as it was
    still = patched()
    ours.unregister()
    ours.unregister()
    refused = None
    try:
        stock("FusedAdadelta")
    except AssertionError as error:
        refused = str(error)
    others = [stock(kind) for kind in ("Adadelta", "SGD", "Adagrad")]
    return {
        "undone": patched() == before,
        "idempotent": registered == still,
        "changed": registered != before,
        "kinds": [f"{kind.__module__}.{kind.__name__}" for kind in kinds],
        "others stay": kinds[1:] == others,
        "refused": refused,
    }


def test_registering_is_idempotent_and_reversible(deepspeed_pool):
    for found in deepspeed_pool(2).run(registering, deadline=DEADLINE):
        assert found["changed"]
        assert found["idempotent"]
        assert found["undone"]
        assert found["others stay"]
        assert found["kinds"][0] == "adadelta_dist.strategies.deepspeed.FusedAdadelta"
        assert found["kinds"][1] == "torch.optim.adadelta.Adadelta"
        assert "FusedAdadelta is not a supported DeepSpeed Optimizer" in found["refused"]


def failing(rank, cases):
    """The error of each (config of rank 0, config of rank 1), and whether anything is left."""
    jobs.prepare(rank, 2)
    from adadelta_dist.strategies import deepspeed as ours

    errors = []
    for case in cases:
        try:
            jobs.build(case[rank])
            errors.append(None)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors, bool(ours._theirs)


def misconfigured(stage=1, kind=None, **params):
    return jobs.config(stage, kind=kind, params=params)


WRONG = {
    "sharded twice": (
        misconfigured(2, "ShardedAdadelta"),
        r'ValueError: ShardedAdadelta with ZeRO stage 2.*"type": "FusedAdadelta"',
    ),
    "misspelt type": (
        misconfigured(1, "FusdAdadelta"),
        r"'FusdAdadelta', which nobody knows\. Did you mean 'FusedAdadelta'\? .*ShardedAdadelta;.* "
        r"adam.*torch\.optim has .*Adadelta",
    ),
    "another case": (misconfigured(1, "fusedadadelta"), r"Did you mean 'FusedAdadelta'\?"),
    "unknown type": (misconfigured(1, "Quux"), r"'Quux', which nobody knows\. Here are"),
    "misspelt parameter": (
        misconfigured(weight_decy=0.1),
        r"'weight_decy' is not a parameter of FusedAdadelta\. Did you mean 'weight_decay'\? It has "
        r"lr, rho, eps, weight_decay, maximize",
    ),
    "Adam's parameter": (
        misconfigured(0, torch_adam=True),
        r"'torch_adam' is not a parameter of ShardedAdadelta \(it is for Adam\)",
    ),
    "clipping as a parameter": (misconfigured(max_grad_norm=1.0), r'"gradient_clipping" beside'),
    "negative": (misconfigured(lr=-1.0), r"ValueError: Invalid learning rate: -1\.0"),
    "out of range": (misconfigured(rho=1.5), r"ValueError: Invalid rho value: 1\.5"),
    "left at auto": (misconfigured(lr="auto"), r"'lr' must be a number, got 'auto'"),
    "a number for a switch": (misconfigured(maximize=1), r"'maximize' must be true or false"),
    "both": (misconfigured(fused=True, foreach=True), r"`fused` and `foreach` cannot be"),
}


@pytest.fixture(scope="module")
def refusals(deepspeed_pool):
    cases = [(config, config) for config, _ in WRONG.values()]
    cases += [(jobs.config(2), misconfigured(2, lr=0.5)), (jobs.config(2), misconfigured(2, rh=1))]
    cases += [(jobs.config(2), misconfigured(2, "FusdAdadelta"))]
    cases += [(jobs.config(2), misconfigured(2, rho=1.5))]
    cases += [(jobs.config(2), jobs.config(2))]  # and nothing hangs on
    return deepspeed_pool(2).run(failing, cases, deadline=DEADLINE)


@pytest.mark.parametrize("name", WRONG)
def test_bad_settings_are_explained_on_every_rank(refusals, name):
    for errors, registered in refusals:
        assert not registered
        error = errors[list(WRONG).index(name)]
        assert error is not None
        assert re.search(WRONG[name][1], error), error


def test_ranks_with_other_settings_all_fail(refusals):
    (first, _), (second, _) = refusals
    differing, broken, misspelt, beyond, well = range(len(WRONG), len(WRONG) + 5)
    assert "RankError: deepspeed.initialize: the ranks disagree" in first[differing]
    assert "RankError: deepspeed.initialize: the ranks disagree" in second[differing]
    assert "RankError: deepspeed.initialize: rank 1 failed with ValueError" in first[broken]
    assert "'rh' is not a parameter" in second[broken]
    assert "RankError: deepspeed.initialize: rank 1 failed with ValueError" in first[misspelt]
    assert "'FusdAdadelta', which nobody knows" in second[misspelt]
    assert "RankError: deepspeed.initialize: rank 1 failed with ValueError" in first[beyond]
    assert "Invalid rho value: 1.5" in second[beyond]
    assert first[well] is second[well] is None


def order_of_initialize(rank):
    """What happens while the engine is built: devices are chosen, ranks talk."""
    jobs.prepare(rank, 2)
    from deepspeed.accelerator import get_accelerator

    seen, monkeypatch = [], pytest.MonkeyPatch()
    for at, name in ((get_accelerator(), "set_device"), (collectives, "all_gather_object")):
        monkeypatch.setattr(at, name, partial(noted, seen, name, getattr(at, name)))
    try:
        jobs.build(jobs.config(2))
    finally:
        monkeypatch.undo()
    return seen


def noted(seen, name, function, *args):
    seen.append(name)
    return function(*args)


def test_ranks_talk_when_each_has_its_device(deepspeed_pool):
    """With NCCL they would all do so over the first one."""
    for seen in deepspeed_pool(2).run(order_of_initialize, deadline=DEADLINE):
        assert "all_gather_object" in seen
        assert seen[0] == "set_device"

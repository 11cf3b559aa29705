"""Callbacks see the same with a sharded optimizer as with torch's, and leave nothing behind."""

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning_jobs import Job, run, run_alone
from ranks import RankFailure

EVERY = 2


class Capture(pl.loggers.logger.DummyLogger):
    """A logger that keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


def watched(rank, world_size, job, names):
    """Run a job with callbacks; returns what they logged, and what is left of their hooks."""
    from adadelta_dist.strategies import callbacks

    logger = Capture()
    made = [getattr(callbacks, name)(**arguments) for name, arguments in names.items()]
    seen = {}

    class Last(pl.Callback):
        def on_train_end(self, trainer, module):
            optimizers = [getattr(o, "_optimizer", o) for o in trainer.optimizers]
            seen["groups"] = [
                {key: group[key] for key in ("lr", "eps", "rho")}
                for optimizer in optimizers
                for group in optimizer.param_groups
            ]
            seen["optimizers"] = optimizers

    arguments = {"logger": logger, "callbacks": [*made, Last()]}
    arguments["log_every_n_steps"] = 1
    job = Job(**{**vars(job), "trainer": job.trainer | arguments})
    result = run_alone(job) if rank is None else run(rank, world_size, job)
    left = sum(
        len(hooks)
        for optimizer in seen.pop("optimizers")
        for hooks in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    )
    rows = [row for row in logger.rows if any(k.startswith(("adadelta", "step/")) for k in row[1])]
    states = {type(c).__name__: c.state_dict() for c in made}
    kept = {
        type(c).__name__: {
            name: value
            for name, value in vars(c).items()
            if not name.startswith("_") and not callable(value)
        }
        for c in made
    }
    return seen | {"rows": rows, "left": left, "states": states, "kept": kept, **result}


MONITOR = {"AdadeltaMonitor": {"every_n_steps": EVERY, "layers": True, "progress_bar": True}}
CASES = {
    "plain": {},
    "clipped": {"trainer": {"gradient_clip_val": 0.05}},
    "two optimizers": {"module": "manual"},
    "accumulated": {"trainer": {"accumulate_grad_batches": 4}},
}


@pytest.mark.parametrize("case", CASES)
def test_the_monitor_sees_what_it_sees_in_one_process(pool, case):
    job = Job(**CASES[case])
    alone = watched(None, 1, job, MONITOR)
    zero, one = pool(2).run(watched, 2, job, MONITOR)
    steps = 16 if case != "accumulated" else 4
    assert [step for step, _ in alone["rows"]] == list(range(0, steps, EVERY))
    for (step, theirs), (our_step, ours) in zip(alone["rows"], zero["rows"], strict=True):
        assert our_step == step
        assert ours == pytest.approx(theirs, rel=1e-4)
        assert ours["adadelta/gradient_norm"] > 0
        assert {"adadelta/group_1/effective_lr", "adadelta/body.0/update_rms"} <= ours.keys()
    assert zero["kept"]["AdadeltaMonitor"]["latest"] == one["kept"]["AdadeltaMonitor"]["latest"]
    assert (zero["left"], one["left"], alone["left"]) == (0, 0, 0)


@pytest.mark.parametrize(("optimizer", "strategy"), [("Adadelta", {}), ("torch", "ddp")])
def test_other_optimizers_are_seen_alike(pool, optimizer, strategy):
    alone = watched(None, 1, Job(), MONITOR)
    zero, _ = pool(2).run(watched, 2, Job(optimizer=optimizer, strategy=strategy), MONITOR)
    for (_, theirs), (_, ours) in zip(alone["rows"], zero["rows"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_the_monitor_knows_what_adadelta_did():
    """Against the formula: RMS of what the first step adds, by hand."""
    rows = watched(None, 1, Job(), MONITOR)["rows"]
    first = rows[0][1]
    norm = sum(
        first[f"adadelta/group_{g}/gradient_rms"] ** 2 * numel
        for g, numel in enumerate((20 * 16 + 16, 16 * 5 + 5 + 20 * 5))
    )
    assert first["adadelta/gradient_norm"] == pytest.approx(math.sqrt(norm), rel=1e-6)
    for key in ("group_0", "group_1", "head"):
        ratio = first[f"adadelta/{key}/update_rms"] / first[f"adadelta/{key}/gradient_rms"]
        assert first[f"adadelta/{key}/effective_lr"] == pytest.approx(ratio)


@pytest.mark.parametrize("strategy", [{}, "ddp"])
def test_the_timer_splits_a_step(pool, strategy):
    zero, _ = pool(2).run(watched, 2, Job(strategy=strategy), {"StepTimer": {"every_n_steps": 8}})
    assert len(zero["rows"]) == 2
    for _, row in zero["rows"]:
        assert row["step/update_ms"] > 0
        if strategy == {}:
            # Two groups of 336 and 185 floats, in shards whose padding is at most 16 bytes a
            # slot: each rank sends the other's half of the gradients, and its own half.
            assert 4 * (336 + 185) <= row["step/bytes_sent"] < 4 * (336 + 185) + 200
            assert row["step/reduce_wait_ms"] > 0
            assert row["step/gather_wait_ms"] > 0
        else:
            assert row["step/bytes_sent"] == row["step/reduce_wait_ms"] == 0
    assert zero["left"] == 0


def test_the_monitor_leaves_out_what_was_no_number_before():
    """Such as DeepSpeed's padding, which is memory as it was found."""
    from adadelta_dist.strategies.callbacks import AdadeltaMonitor

    param = torch.nn.Parameter(torch.tensor([1.0, math.nan, math.inf]))
    optimizer, monitor = torch.optim.Adadelta([param]), AdadeltaMonitor(every_n_steps=1)
    monitor._rows, monitor._row_of = {"group_0": 0}, {id(optimizer.param_groups[0]): 0}
    monitor._sums = torch.zeros(1, 3, dtype=torch.float64)
    param.grad = torch.tensor([2.0, 0.0, 0.0])
    monitor._before_step(optimizer)
    optimizer.step()
    monitor._after_step(optimizer)
    squared_gradients, squared_updates, numel = monitor._sums[0].tolist()
    assert (squared_gradients, numel) == (4.0, 3.0)
    assert squared_updates == pytest.approx((param[0].item() - 1.0) ** 2)


def test_the_monitor_refuses_gradients_that_are_gone(pool):
    job = Job(strategy="sharded_adadelta_zero2")
    with pytest.raises(RankFailure, match="AdadeltaMonitor with ShardPolicy"):
        pool(2).run(watched, 2, job, MONITOR)


def test_the_timer_splits_a_step_of_stage_2_too(pool):
    job = Job(strategy="sharded_adadelta_zero2")
    for rank in pool(2).run(watched, 2, job, {"StepTimer": {"every_n_steps": EVERY}}):
        for _, row in rank["rows"]:
            assert row["step/update_ms"] > 0
            assert row["step/bytes_sent"] > 0
        assert rank["left"] == 0


ALL = {
    "AdadeltaMonitor": {"every_n_steps": EVERY},
    "StepTimer": {"every_n_steps": EVERY},
    "EpsDecay": {"monitor": "validation_loss", "min_delta": 100.0},
    "ShardReport": {},
}


@pytest.mark.parametrize("optimizer", ["torch", "Adadelta", "Sharded averaged"])
def test_all_of_them_under_stock_ddp(pool, optimizer):
    alone = watched(None, 1, Job(), ALL)
    zero, one = pool(2).run(watched, 2, Job(optimizer=optimizer, strategy="ddp"), ALL)
    assert zero["groups"] == one["groups"] == alone["groups"]
    assert zero["groups"][0]["eps"] == pytest.approx(1e-8), "decayed after the second validation"
    assert zero["left"] == one["left"] == 0
    replicated = alone["kept"]["ShardReport"]["replicated_bytes"]
    for rank in (zero, one):
        assert sum("step/update_ms" in row for _, row in rank["rows"]) == 8
        sizes = rank["kept"]["ShardReport"]["bytes_by_rank"]
        shares = 1 if optimizer == "Sharded averaged" else 2
        assert sum(sizes) == pytest.approx(shares * replicated, abs=200)
    monitored = [
        [row for _, row in r["rows"] if "adadelta/gradient_norm" in row] for r in (alone, zero)
    ]
    for theirs, ours in zip(*monitored, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def rates(rank, world_size, job):
    logger = Capture()
    watch = pl.callbacks.LearningRateMonitor("step", log_weight_decay=True)
    arguments = {"logger": logger, "callbacks": [watch], "log_every_n_steps": 1}
    job = Job(**{**vars(job), "trainer": arguments})
    result = run_alone(job) if rank is None else run(rank, world_size, job)
    assert result["step"] == 16
    return [row for row in logger.rows if any(key.startswith("lr-") for key in row[1])]


def test_lightnings_own_monitor_of_learning_rates(pool):
    job = Job(scheduler="step")
    alone = rates(None, 1, job)
    assert len({row["lr-Adadelta/pg1"] for _, row in alone}) > 3, "the schedule moves"
    for rows in pool(2).run(rates, 2, job):
        named = [
            (step, {key.replace("ShardedAdadelta", "Adadelta"): v for key, v in row.items()})
            for step, row in rows
        ]
        assert named == alone


def test_the_report_adds_up(pool):
    zero, one = pool(2).run(watched, 2, Job(), {"ShardReport": {}})
    report = zero["kept"]["ShardReport"]
    assert report == one["kept"]["ShardReport"]
    replicated = 2 * 4 * (336 + 185) + 5 * 4
    assert report["replicated_bytes"] == replicated
    assert replicated <= sum(report["bytes_by_rank"]) <= replicated + 200
    alone = watched(None, 1, Job(), {"ShardReport": {}})["kept"]["ShardReport"]
    assert alone == {"bytes_by_rank": [replicated], "replicated_bytes": replicated}


DECAY = {
    # No validation improves on itself by so much, after the first.
    "EpsDecay": {"monitor": "validation_loss", "patience": 1, "min_delta": 100.0},
    "RhoDecay": {"monitor": "validation_loss", "factor": 0.5, "min_rho": 0.4, "min_delta": 100.0},
}


def test_decays_follow_validation_on_all_ranks(pool):
    job = Job(trainer={"max_epochs": 6})
    alone = watched(None, 1, job, DECAY)
    ranks = pool(2).run(watched, 2, job, DECAY)
    # Six validations, of which the first is the best: bad ones 2 and 3 decay eps, 4 and 5 do.
    assert alone["groups"][0]["eps"] == pytest.approx(1e-6 * 0.01**2)
    assert alone["groups"][0]["rho"] == pytest.approx(0.4), "and not below its minimum"
    for rank in ranks:
        assert rank["groups"] == alone["groups"]
        assert rank["states"] == ranks[0]["states"]


def test_a_decay_waits_while_validation_improves(pool):
    names = {"EpsDecay": {"monitor": "validation_loss"}}
    zero, _ = pool(2).run(watched, 2, Job(trainer={"max_epochs": 3}), names)
    assert zero["groups"][0]["eps"] == 1e-6


def test_a_decay_goes_on_from_a_checkpoint(pool, tmp_path):
    """Saved after validation 2 of 6, with one bad one, and eps as it was then."""
    whole = watched(None, 1, Job(trainer={"max_epochs": 6}), DECAY)
    save = {"dirpath": str(tmp_path), "filename": "last"}
    strategy = {"strategy": {"checkpoint": "sharded"}}

    job = Job(**strategy, trainer={"max_epochs": 2, "enable_checkpointing": True})
    pool(2).run(saved_by, 2, job, DECAY, save)
    resumed = Job(resume=str(tmp_path / "last.ckpt"), trainer={"max_epochs": 6})
    zero, _ = pool(2).run(watched, 2, resumed, DECAY)
    assert zero["groups"] == whole["groups"]
    for name, state in whole["states"].items():
        assert zero["states"][name] == pytest.approx(state)


def saved_by(rank, world_size, job, names, save):
    from adadelta_dist.strategies import callbacks

    made = [getattr(callbacks, name)(**arguments) for name, arguments in names.items()]
    saver = pl.callbacks.ModelCheckpoint(**save)
    return run(
        rank,
        world_size,
        Job(**{**vars(job), "trainer": job.trainer | {"callbacks": [*made, saver]}}),
    )["losses"]


def test_bad_arguments_are_refused():
    from adadelta_dist.strategies import callbacks

    for make, message in [
        (lambda: callbacks.EpsDecay("x", factor=1.0), "factor must be between 0 and 1"),
        (lambda: callbacks.EpsDecay("x", mode="most"), "mode must be"),
        (lambda: callbacks.EpsDecay("x", patience=-1), "patience must not be negative"),
        (lambda: callbacks.AdadeltaMonitor(0), "every_n_steps must be at least 1"),
        (lambda: callbacks.StepTimer(0), "every_n_steps must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match="no metric 'nothing'"):
        watched(None, 1, Job(), {"EpsDecay": {"monitor": "nothing"}})

"""Callbacks see the same with a sharded optimizer as with torch's, and leave nothing behind."""

import math
import time
from itertools import islice
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning_jobs import Job, loader, make_module, run, run_alone
from ranks import RankFailure

from adadelta_dist import Adadelta, ShardedAdadelta, ShardPolicy

EVERY = 2


class Capture(pl.loggers.logger.DummyLogger):
    """A logger that keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


def watched(rank, world_size, job, names, more=()):
    """Run a job with callbacks; returns what they logged, and what is left of their hooks.

    Args:
        names: arguments of ours, by name.
        more: callbacks of the test, which come first.
    """
    from adadelta_dist.strategies import callbacks

    logger = Capture()
    made = [getattr(callbacks, name)(**arguments) for name, arguments in names.items()]
    seen = {}

    class Last(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen["bar"] = dict(trainer.progress_bar_metrics)

        def on_train_end(self, trainer, module):
            optimizers = [getattr(o, "_optimizer", o) for o in trainer.optimizers]
            seen["groups"] = [
                {key: group[key] for key in ("lr", "eps", "rho")}
                for optimizer in optimizers
                for group in optimizer.param_groups
            ]
            seen["optimizers"] = optimizers

    arguments = {"logger": logger, "callbacks": [*more, *made, Last()]}
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
        for c in [*more, *made]
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
    for rank in (zero, one):
        latest = rank["kept"]["AdadeltaMonitor"]["latest"]
        shown = {"adadelta/gradient_norm", "adadelta/group_1/effective_lr"}
        assert {key: rank["bar"][key] for key in shown} == pytest.approx(
            {key: latest[key] for key in shown}
        )
    assert (zero["left"], one["left"], alone["left"]) == (0, 0, 0)


@pytest.mark.parametrize(("optimizer", "strategy"), [("Adadelta", {}), ("torch", "ddp")])
def test_other_optimizers_are_seen_alike(pool, optimizer, strategy):
    alone = watched(None, 1, Job(), MONITOR)
    zero, _ = pool(2).run(watched, 2, Job(optimizer=optimizer, strategy=strategy), MONITOR)
    for (_, theirs), (_, ours) in zip(alone["rows"], zero["rows"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def by_hand(steps):
    """What the monitor is to log at each step: the paper's equations, and root mean squares."""
    module = make_module(Job(), 1)
    rate_of = dict.fromkeys(module.parameters(), 1.0) | dict.fromkeys(module.body.parameters(), 0.7)
    parts = {"group_0": module.body, "group_1": torch.nn.ModuleList([module.head, module.extra])}
    parts |= {"body.0": module.body[0], "head": module.head, "extra": module.extra}
    trained = [p for p in module.parameters() if p.requires_grad]
    square_avg, acc_delta = ({p: torch.zeros_like(p) for p in trained} for _ in range(2))
    for batch in islice(2 * list(loader(1)), steps):
        found = torch.autograd.grad(module.loss(batch), trained)
        gradients = dict(zip(trained, found, strict=True))
        updates = {}
        for p, gradient in gradients.items():
            decayed = gradient + 1e-3 * p.detach()
            square_avg[p] = 0.95 * square_avg[p] + 0.05 * decayed**2
            delta = ((acc_delta[p] + 1e-6) / (square_avg[p] + 1e-6)).sqrt() * decayed
            acc_delta[p] = 0.95 * acc_delta[p] + 0.05 * delta**2
            updates[p] = rate_of[p] * delta
            p.data -= updates[p]
        row = {"adadelta/skipped_steps": 0.0}
        row["adadelta/gradient_norm"] = sum(g.square().sum() for g in gradients.values()).sqrt()
        for name, part in parts.items():
            gradient, update = (
                torch.cat([of[p].flatten() for p in part.parameters()]).square().mean().sqrt()
                for of in (gradients, updates)
            )
            row[f"adadelta/{name}/gradient_rms"] = gradient
            row[f"adadelta/{name}/update_rms"] = update
            row[f"adadelta/{name}/effective_lr"] = update / gradient
        yield {key: float(value) for key, value in row.items()}


def test_the_monitor_knows_what_adadelta_did(pool):
    wanted = list(by_hand(16))[::EVERY]
    for rank in pool(2).run(watched, 2, Job(), MONITOR):
        rows = [row for _, row in rank["rows"]]
        assert rows == [pytest.approx(row, rel=1e-4) for row in wanted]


class Reductions(pl.Callback):
    """How often the strategy reduces anything during fit, whoever asks for it."""

    count = 0

    def on_train_start(self, trainer, module):
        reduce, self.count = trainer.strategy.reduce, 0

        def counted(*args, **kwargs):
            self.count += 1
            return reduce(*args, **kwargs)

        trainer.strategy.reduce = counted


def test_one_reduction_carries_all_that_the_monitor_logs(pool):
    counts = [
        pool(2).run(watched, 2, Job(), names, [Reductions()])[0]["kept"]["Reductions"]["count"]
        for names in ({}, MONITOR)
    ]
    assert counts[1] - counts[0] == 16 // EVERY


def test_the_monitor_leaves_out_steps_that_a_scaler_skips(pool):
    """The first scale is so large that gradients overflow. Those of two ranks, on half of a
    batch each, do at other steps than one process's.
    """
    job = Job(trainer={"precision": "16-mixed", "gradient_clip_val": 0.05})
    alone = watched(None, 1, job, MONITOR)
    for watcher in (alone, *pool(2).run(watched, 2, job, MONITOR)):
        rows = [row for _, row in watcher["rows"]]
        assert rows[0]["adadelta/skipped_steps"] > 1
        for row in rows:
            assert row["adadelta/gradient_norm"] == pytest.approx(0.05, rel=1e-3)
            assert row["adadelta/group_0/update_rms"] > 0
        skipped = watcher["states"]["AdadeltaMonitor"]["skipped"]
        assert len({step for step, _ in watcher["rows"]}) == len(rows)
        assert rows[-1]["adadelta/skipped_steps"] <= skipped < 16


def scaled(rank, fused):
    """The gradients that a hook after a step sees, and what was skipped before it."""
    from adadelta_dist.strategies.pieces import pieces

    p = torch.nn.Parameter(torch.ones(64))
    optimizer, seen = ShardedAdadelta([p], fused=fused), []
    optimizer.register_step_post_hook(lambda *_: seen.extend(g.grad for g in pieces(optimizer)))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((p * (1.0 + rank)).sum()).backward()
    scaler.step(optimizer)
    return torch.cat(seen)


@pytest.mark.parametrize("fused", [False, True])
def test_hooks_see_gradients_that_are_unscaled(pool, fused):
    for gradients in pool(2).run(scaled, fused, deadline=240):
        assert torch.equal(gradients, torch.full((32,), 1.5))


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


class Late(pl.Callback):
    """Rank 1 comes late to its step, or to what it sends of the new parameters."""

    SECONDS = 0.4

    def __init__(self, where):
        self.where = where

    def on_train_start(self, trainer, module):
        (optimizer,) = (o._optimizer for o in trainer.strategy._lightning_optimizers)
        start = optimizer._gathers.start

        def late(bucket):
            if trainer.global_rank == 1 and self.where == "gather":
                time.sleep(self.SECONDS / len(optimizer._shards))
            start(bucket)

        optimizer._gathers.start = late

    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_rank == 1 and self.where == "reduce":
            time.sleep(self.SECONDS)


@pytest.mark.parametrize("where", ["reduce", "gather"])
def test_the_timer_tells_waits_apart(pool, where):
    job = Job(trainer={"max_epochs": 1, "limit_train_batches": 2})
    timer = {"StepTimer": {"every_n_steps": 2}}
    zero, _ = pool(2).run(watched, 2, job, timer, [Late(where)])
    ((_, row),) = zero["rows"]
    waited = row.pop(f"step/{where}_wait_ms")
    assert waited > 0.9 * 1000 * Late.SECONDS
    assert all(row[key] < waited / 2 for key in row if key.endswith("_ms")), "the rest is quick"


def test_the_timer_counts_what_travels(pool):
    """Half as much in half the precision; nothing of gradients that DDP has averaged."""
    timer = {"StepTimer": {"every_n_steps": 8}}
    half = ShardPolicy(reduce_dtype=torch.bfloat16, gather_dtype=torch.bfloat16)

    def sent(job):
        return pool(2).run(watched, 2, job, timer)[0]["rows"][0][1]["step/bytes_sent"]

    whole = sent(Job())
    assert sent(Job(strategy={"policy": half})) == whole / 2
    assert sent(Job(strategy="ddp", optimizer="Sharded averaged")) == whole / 2


def test_the_monitor_leaves_out_what_was_no_number_before():
    """Such as DeepSpeed's padding, which is memory as it was found."""
    from adadelta_dist.strategies.callbacks import AdadeltaMonitor

    param = torch.nn.Parameter(torch.tensor([1.0, math.nan, math.inf]))
    optimizer, monitor = torch.optim.Adadelta([param]), AdadeltaMonitor(every_n_steps=1)
    monitor._rows, monitor._row_of = {"group_0": 0}, {id(optimizer.param_groups[0]): 0}
    for gradient in (5.0, 2.0):  # of two steps in a batch the last one counts
        before = param[0].item()
        param.grad = torch.tensor([gradient, 0.0, 0.0])
        monitor._before_step(optimizer)
        optimizer.step()
        monitor._after_step(optimizer)
    ((squared_gradients, squared_updates, numel),) = monitor._sums[optimizer].tolist()
    assert (squared_gradients, numel) == (4.0, 3.0)
    assert squared_updates == pytest.approx((param[0].item() - before) ** 2)


def test_the_monitor_begins_anew_after_an_exception():
    """Of which Lightning tells no callback: hooks and rows of the run before are still there."""
    from adadelta_dist.strategies.callbacks import AdadeltaMonitor

    optimizers = [torch.optim.Adadelta([torch.nn.Parameter(torch.ones(1))]) for _ in range(2)]
    monitor = AdadeltaMonitor(every_n_steps=1)
    for optimizer in optimizers:
        monitor.on_train_start(SimpleNamespace(optimizers=[optimizer]), None)
        monitor._rows, monitor._attempted = {"group_0": 0}, True
    monitor.on_train_start(SimpleNamespace(optimizers=[optimizer]), None)
    assert (monitor._rows, monitor._attempted, len(monitor._handles)) == (None, False, 2)
    assert not optimizers[0]._optimizer_step_pre_hooks


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


class LogsApart(pl.Callback):
    """A metric that improves on rank 0 and gets worse on rank 1, by more; nobody reduces it."""

    def on_validation_epoch_end(self, trainer, module):
        module.log("apart", (-1.0, 2.0)[trainer.global_rank] * trainer.current_epoch)


def test_ranks_decay_alike_whatever_each_has_seen(pool):
    job = Job(trainer={"max_epochs": 2})
    names = {"EpsDecay": {"monitor": "apart"}}
    for rank in pool(2).run(watched, 2, job, names, [LogsApart()]):
        assert [group["eps"] for group in rank["groups"]] == pytest.approx([1e-8, 1e-8])
        assert rank["kept"]["EpsDecay"]["best"] == 0.0


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


def test_the_monitor_takes_no_micro_batch_for_a_step_that_was_skipped():
    """DeepSpeed's engine accumulates by itself, and is asked to step each time."""
    from adadelta_dist.strategies.callbacks import AdadeltaMonitor

    monitor, optimizer = AdadeltaMonitor(), Adadelta(torch.nn.Linear(2, 2).parameters())
    boundary = iter([False, False, True] * 2)
    engine = SimpleNamespace(is_gradient_accumulation_boundary=lambda: next(boundary))
    strategy = SimpleNamespace(handles_gradient_accumulation=True)
    trainer = SimpleNamespace(model=engine, strategy=strategy)
    for micro_batch in range(6):
        monitor.on_before_optimizer_step(trainer, None, optimizer)
        if micro_batch % 3 == 2:
            monitor._after_step(optimizer, (), {})
    assert monitor._skipped == 0

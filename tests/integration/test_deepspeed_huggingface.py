"""Accelerate and Transformers with our JSON, after `register()`: the examples, on ranks of gloo."""

import sys
from pathlib import Path

import deepspeed_jobs as jobs
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[2]
CONFIGS = ["zero0", "zero2", "zero3"]
DEADLINE = 240.0


def path(name):
    return ROOT / "configs" / f"deepspeed_{name}.json"


def example(name):
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return __import__(name)
    finally:
        sys.path.pop(0)


def forget():
    """A process has one job, says Accelerate; here it has several, some of them of other tests."""
    from accelerate.state import AcceleratorState

    from adadelta_dist.strategies.deepspeed import unregister

    AcceleratorState._reset_state(reset_partial_state=True)
    unregister()


def accelerate(rank, world_size, names):
    """By configuration: the mean loss of each epoch, and the optimizer."""
    jobs.prepare(rank, world_size)
    module, results = example("train_accelerate"), {}
    for name in names:
        accelerator = module.start(path(name))
        losses = module.train(accelerator)
        engine = accelerator.deepspeed_engine_wrapped.engine
        results[name] = losses, type(engine.basic_optimizer).__name__
        forget()
    return results


def transformers(rank, world_size, names, folder):
    """By configuration: the loss of each step of an epoch, and the optimizer."""
    jobs.prepare(rank, world_size)
    module, results = example("train_transformers"), {}
    for name in names:
        module.start()
        more = {"train_sampling_strategy": "sequential", "disable_tqdm": True}
        if name == "bf16":
            more |= {"bf16": True, "use_cpu": True}
        trainer = module.trainer(path(name), Path(folder), 1, **more)
        trainer.args.logging_strategy, trainer.args.logging_steps = "steps", 1
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        results[name] = losses, type(trainer.model_wrapped.basic_optimizer).__name__
        forget()
    return results


def alone(parameters, loss_of, batches):
    """The loss of each step in one process with torch's own optimizer."""
    optimizer = torch.optim.Adadelta(parameters, lr=1.0, rho=0.95, eps=1e-6)
    losses = []
    for batch in batches:
        loss = loss_of(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check(results, wanted, rel):
    for of_rank in results:
        for name, (losses, kind) in of_rank.items():
            assert kind == ("StageZeroAdadelta" if name == "zero0" else "FusedAdadelta")
            assert losses == pytest.approx(wanted, rel=rel)


def test_accelerate_takes_the_steps_of_one_process(deepspeed_pool):
    results = deepspeed_pool(2).run(accelerate, 2, CONFIGS, deadline=DEADLINE)
    module = example("train_accelerate")
    data = TensorDataset(*module.load(None).train)
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(data, 100, shuffle=True, drop_last=True, generator=generator)
    net = module.perceptron([64, *module.HIDDEN, 10], seed=0)
    losses = alone(
        net.parameters(),
        lambda inputs, labels: cross_entropy(net(inputs), labels),
        (batch for _ in range(2) for batch in loader),
    )
    first, second = sum(losses[: len(loader)]), sum(losses[len(loader) :])
    assert second < first / 2
    # Sums over ranks round otherwise than sums over a batch; it grows over 28 steps.
    check(results, [first / len(loader), second / len(loader)], rel=1e-4)


def test_transformers_takes_the_steps_of_one_process(deepspeed_pool, tmp_path):
    names = [*CONFIGS, "bf16"]
    results = deepspeed_pool(2).run(transformers, 2, names, str(tmp_path), deadline=DEADLINE)
    module = example("train_transformers")
    data, net = module.Digits(), module.model()
    batches = list(zip(data.images.split(100), data.labels.split(100), strict=True))[:-1]
    wanted = alone(net.parameters(), lambda x, y: net(x, labels=y).loss, batches)
    assert len(wanted) == 17
    half = [{"bf16": of_rank.pop("bf16")} for of_rank in results]
    check(results, wanted, rel=1e-5)
    check(half, wanted, rel=1e-2)  # eight bits of mantissa, in the loss as well

"""A loop of one's own with Fabric takes the steps of one process with torch's optimizer."""

import numpy as np
import pytest
import torch
from lightning_jobs import CLASSES, INPUTS, become_rank, counted, loader, rows
from torch import nn

CASES = {
    "plain": {},
    "accumulate": {"accumulate": 4},
    "clip norm": {"clip": {"max_norm": 0.05}},
    "clip value": {"clip": {"clip_val": 0.005}},
    "scheduler": {"scheduler": True},
    "set up apart": {"apart": True},
    "stage 2, accumulate, clip": {"stage": 2, "accumulate": 4, "clip": {"max_norm": 0.05}},
}


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(INPUTS, 16), nn.Tanh(), nn.Linear(16, CLASSES))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs):
        return self.layers(inputs)


def prepare(seed, scheduler=False):
    model = Net(seed)
    optimizer = torch.optim.Adadelta(model.parameters(), rho=0.95)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5) if scheduler else None
    return model, optimizer, schedule


def train_alone(accumulate=1, clip=None, scheduler=False, apart=False, epochs=2, stage=1):
    """The same loop in one process, with torch alone."""
    model, optimizer, schedule = prepare(0, scheduler)
    losses = []
    for index, (inputs, labels) in enumerate(epochs * list(loader(1))):
        loss = nn.functional.cross_entropy(model(inputs), labels)
        losses.append(loss.item())
        (loss / accumulate).backward()
        if (index + 1) % accumulate:
            continue
        if clip and "max_norm" in clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip["max_norm"])
        elif clip:
            nn.utils.clip_grad_value_(model.parameters(), clip["clip_val"])
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    return losses


def train(
    rank,
    world_size,
    accumulate=1,
    clip=None,
    scheduler=False,
    apart=False,
    epochs=2,
    stage=1,
    precision=None,
    **paths,
):
    become_rank(rank, world_size)
    from lightning.fabric import Fabric
    from lightning.fabric.plugins import MixedPrecision

    import adadelta_dist.strategies.fabric  # noqa: F401 (registers the name)

    strategy = {1: "sharded_adadelta", 2: "sharded_adadelta_zero2"}[stage]
    chosen = {"precision": precision}
    if precision == "16-mixed":  # of CPUs Fabric makes bfloat16, if it chooses
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=16)
        chosen = {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}
    fabric = Fabric(accelerator="cpu", devices=world_size, strategy=strategy, **chosen)
    fabric.launch()
    model, optimizer, schedule = prepare(rank, scheduler)
    kept = optimizer
    if apart:
        model = fabric.setup_module(model)
        optimizer = fabric.setup_optimizers(optimizer)
    else:
        model, optimizer = fabric.setup(model, optimizer)
    assert type(kept).__name__ == "ShardedAdadelta"
    state = {"model": model, "optimizer": optimizer, "epoch": 0}
    if "load" in paths:
        fabric.load(paths["load"], state)
    losses = []
    for index, (inputs, labels) in enumerate(epochs * list(loader(world_size))):
        model.seen += 1 + rank
        ready = (index + 1) % accumulate == 0
        with fabric.no_backward_sync(model, enabled=not ready):
            loss = nn.functional.cross_entropy(model(inputs), labels)
            fabric.backward(loss / accumulate)
        losses.append(loss.item())
        if not ready:
            continue
        if clip:
            norm = fabric.clip_gradients(model, optimizer, **clip)
            assert norm is None or norm > 0
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    model(torch.zeros(1, INPUTS))
    if "save" in paths:
        fabric.save(paths["save"], state | {"epoch": epochs})
    return losses, model.seen.item(), state["epoch"]


@pytest.mark.parametrize("case", CASES)
def test_the_loss_curve_is_that_of_one_process(pool, case):
    zero, one = pool(2).run(train_case, 2, CASES[case])
    losses = np.mean([zero[0], one[0]], axis=0)
    np.testing.assert_allclose(losses, train_alone(**CASES[case]), rtol=1e-6)
    assert zero[1] == one[1], "buffers are rank 0's"


def train_case(rank, world_size, arguments):
    return train(rank, world_size, **arguments)


@pytest.mark.parametrize(
    ("precision", "rtol"),
    [("64-true", 1e-4), ("bf16-mixed", 0.1), ("bf16-true", 0.1), ("16-mixed", 0.1)],
)
def test_it_trains_in_other_precisions(pool, precision, rtol):
    """Near to the run in single precision, clipped alike though a scaler multiplies gradients."""
    case = {"clip": {"max_norm": 0.05}, "epochs": 4}
    ranks = pool(2).run(train_case, 2, case | {"precision": precision})
    losses = np.mean([rank[0] for rank in ranks], axis=0)
    np.testing.assert_allclose(losses, train_alone(**case), rtol=rtol)


def test_the_cases_are_not_all_the_same():
    """Negative control: clipping that does nothing would pass above."""
    assert len({tuple(train_alone(**CASES[case])) for case in list(CASES)[:5]}) == 5


@pytest.mark.parametrize("world_size", [1, 3])
def test_it_goes_on_at_another_world_size(pool, tmp_path, world_size):
    whole, file = train_alone(epochs=4), str(tmp_path / "fabric.ckpt")
    pool(2).run(train_case, 2, {"save": file})
    resumed = pool(world_size).run(train_case, world_size, {"load": file})
    np.testing.assert_allclose(np.mean([r[0] for r in resumed], axis=0), whole[16:], rtol=1e-6)
    assert resumed[0][2] == 2
    # And it is torch's own state dict.
    model, optimizer, _ = prepare(0)
    saved = torch.load(file, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    loss = nn.functional.cross_entropy(model(rows()[0:12][0]), rows()[0:12][1])
    assert loss.item() == pytest.approx(whole[16], rel=1e-6)


def refused(rank, world_size):
    become_rank(rank, world_size)
    from lightning.fabric import Fabric

    from adadelta_dist.strategies.fabric import ShardedAdadeltaFabricStrategy

    fabric = Fabric(accelerator="cpu", devices=2, strategy=ShardedAdadeltaFabricStrategy())
    fabric.launch()
    model = Net(0)
    with pytest.raises(TypeError, match=r"fabric.setup: torch\.optim\.sgd\.SGD"):
        fabric.setup(model, torch.optim.SGD(model.parameters()))


def test_another_optimizer_is_refused(pool):
    pool(2).run(refused, 2)


def on_nccl(rank, world_size):
    become_rank(rank, world_size)
    from lightning.fabric import Fabric

    from adadelta_dist.strategies.fabric import ShardedAdadeltaFabricStrategy

    strategy = ShardedAdadeltaFabricStrategy(process_group_backend="nccl")
    with pytest.raises(ValueError, match="this job uses CPUs"):
        Fabric(accelerator="cpu", devices=2, strategy=strategy).launch()


def test_nccl_on_cpus_is_refused(pool):
    pool(2).run(on_nccl, 2)


def sent(rank, world_size, arguments):
    """How many bytes of gradients and parameters leave this rank."""
    with counted() as found:
        train(rank, world_size, **arguments)
    return sum(found)


def test_what_is_accumulated_is_sent_once(pool):
    plain = pool(2).run(sent, 2, {})
    assert pool(2).run(sent, 2, {"accumulate": 4}) == [n / 4 for n in plain]

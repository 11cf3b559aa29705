"""What ranks run in the DeepSpeed tests: several trainings a call, for it starts slowly."""

import os
import warnings
from pathlib import Path

import torch
from torch.nn.functional import mse_loss

FEATURES, TARGETS, BATCH = 7, 5, 8
HYPERPARAMETERS = {"lr": 1.0, "rho": 0.9, "eps": 1e-3}

NOT_OURS = (
    # importing torch's compiler, which DeepSpeed does for its Muon optimizer
    "`torch.jit.script_method` is deprecated",
    # torch 2.13 gave these two other names, DeepSpeed still calls them by the old ones
    "`torch.distributed.all_gather_into_tensor` is deprecated",
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
)


def prepare(rank, world_size, accelerator="cpu"):
    """What DeepSpeed reads from the environment, in a process that has its process group."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"DS_ACCELERATOR": accelerator}
    for message in NOT_OURS:
        warnings.filterwarnings("ignore", message=message)
    import deepspeed

    # Without its optional all-reduce by shared memory, which it would compile for a minute, and
    # which a process that is killed meanwhile leaves locked for all others.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    return deepspeed


def network(seed=0):
    """Odd sizes, so that shards end within tensors and need padding."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Linear(FEATURES, 33), torch.nn.Tanh(), torch.nn.Linear(33, TARGETS)
        )


def global_batch(step):
    generator = torch.Generator().manual_seed(1000 + step)
    inputs = torch.randn(BATCH, FEATURES, generator=generator)
    return inputs, 3 * torch.randn(BATCH, TARGETS, generator=generator)


def parameter_groups(model, several):
    if not several:
        return list(model.parameters())
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": weights}, {"params": biases, "lr": 0.5, "weight_decay": 0.0}]


def shares(step, rank, world_size, accumulation):
    """This rank's micro-batches of a global batch."""
    inputs, targets = global_batch(step)
    size = BATCH // (world_size * accumulation)
    for micro in range(accumulation):
        start = (micro * world_size + rank) * size
        yield inputs[start : start + size], targets[start : start + size]


def run_steps(engine, rank, world_size, steps, dtype=torch.float32):
    """Train; the mean loss of this rank's micro-batches, step by step."""
    accumulation = engine.gradient_accumulation_steps()
    losses = []
    for step in steps:
        total = 0.0
        for inputs, targets in shares(step, rank, world_size, accumulation):
            outputs = engine(inputs.to(engine.device, dtype)).float()
            loss = mse_loss(outputs, targets.to(engine.device))
            engine.backward(loss)
            engine.step()
            total += loss.item() / accumulation
        losses.append(total)
    return losses


def config(stage=1, *, kind=None, params=None, offload=False, accumulation=1, **more):
    kind = kind or ("FusedAdadelta" if stage else "ShardedAdadelta")
    zero = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_batch_size": BATCH,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "optimizer": {
            "type": kind,
            "params": {"lr": 1.0, "rho": 0.9, "eps": 1e-3, **(params or {})},
        },
        "zero_optimization": zero,
    } | more


def build(settings, model=None, several=False, **more):
    from adadelta_dist.strategies.deepspeed import initialize

    model = model or network()
    return initialize(
        model=model, model_parameters=parameter_groups(model, several), config=settings, **more
    )


def train(rank, world_size, cases, steps):
    """The losses of each case {"settings": ..., "several": ...}, and its first group's lr."""
    prepare(rank, world_size)
    results = []
    for case in cases:
        settings = case["settings"]
        half = settings.get("bf16", {}).get("enabled", False)
        engine = build(settings, several=case.get("several", False))[0]
        dtype = torch.bfloat16 if half else torch.float32
        losses = run_steps(engine, rank, world_size, range(steps), dtype)
        results.append({"losses": losses, "lr": engine.get_lr()[0]})
    return results


def train_alone(steps, *, several=False, clip=0.0, rate=lambda step: 1.0, **params):
    """The losses in this process with `torch.optim.Adadelta`; lr times `rate(step)`."""
    model = network()
    options = HYPERPARAMETERS | params
    optimizer = torch.optim.Adadelta(parameter_groups(model, several), **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses = []
    for step in range(steps):
        inputs, targets = global_batch(step)
        optimizer.zero_grad()
        loss = mse_loss(model(inputs), targets)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def settings(stage, kind="FusedAdadelta", *, half=False, bf16=None, universal=False, **more):
    zero = more.pop("zero", {})
    made = config(stage, kind=kind, params={"weight_decay": 0.01}, **more)
    made["zero_optimization"] |= zero
    made |= {"bf16": {"enabled": half} | (bf16 or {})}
    made |= {"checkpoint": {"load_universal": universal}}
    return made | {"zero_allow_untested_optimizer": kind == "Adadelta"}


def read_forms(rank, root, names):
    prepare(rank, 1)
    from adadelta_dist.strategies.deepspeed_checkpoint import to_torch
    from adadelta_dist.strategies.deepspeed_reading import read_deepspeed

    return {name: to_torch(read_deepspeed(Path(root, name))) for name in names}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def names_of(group):
    return zip(group["params"], group["param_names"], strict=True)


class Odd(torch.nn.Module):
    """A frozen layer, a buffer, and a tied weight."""

    def __init__(self):
        super().__init__()
        self.frozen = torch.nn.Linear(FEATURES, FEATURES)
        self.frozen.requires_grad_(False)
        self.inner = torch.nn.Linear(FEATURES, FEATURES)
        self.tied = torch.nn.Linear(FEATURES, FEATURES)
        self.tied.weight = self.inner.weight
        self.out = torch.nn.Linear(FEATURES, TARGETS)
        self.register_buffer("scale", torch.tensor([2.0]))

    def forward(self, inputs):
        return self.out(self.tied(self.inner(self.frozen(inputs)))) * self.scale

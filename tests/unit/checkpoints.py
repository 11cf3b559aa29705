"""A module with each kind of parameter, its optimizer, and checkpoints of both."""

import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as names
from torch import nn

NESTED = names.StateDictOptions()
FLAT = names.StateDictOptions(flatten_optimizer_state_dict=True)


class Zoo(nn.Module):
    """One of each kind of parameter, and a buffer."""

    def __init__(self, seed=0, brain=torch.bfloat16):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def param(*shape, dtype=torch.float32):
            return nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator))

        self.matrix = param(5, 7)
        self.transposed = nn.Parameter(param(4, 3, 5).detach().permute(2, 0, 1))
        self.image = nn.Parameter(param(2, 3, 4, 5).detach().to(memory_format=torch.channels_last))
        self.scalar, self.none = param(), param(0, 3)
        self.brain = param(6, 5, dtype=brain)
        self.complex = nn.Parameter(param(4, 5, dtype=torch.complex64).detach().t())
        self.frozen = param(3, 3).requires_grad_(False)
        self.register_buffer("count", torch.randint(9, (), generator=generator))

    def groups(self, *, named):
        items = list(self.named_parameters())
        first, second = ([i if named else i[1] for i in items[k::2]] for k in (0, 1))
        return [
            {"params": first, "rho": 0.8, "lr": torch.tensor(0.7)},
            {"params": second, "lr": 0.5, "weight_decay": 0.1},
        ]


def build(
    seed=0, steps=2, cls=torch.optim.Adadelta, *, named=True, brain=torch.bfloat16, **options
):
    module = Zoo(seed, brain)
    optimizer = cls(module.groups(named=named), **options)
    train(module, optimizer, range(steps))
    return module, optimizer


def train(module, optimizer, steps):
    for step in steps:
        for i, p in enumerate(module.parameters()):
            if p.requires_grad:
                generator = torch.Generator().manual_seed(100 * step + i)
                p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
        optimizer.step()


def save_dcp(path, module, optimizer, options=NESTED, *, keys=("model", "optimizer"), **others):
    """As plain torch saves a folder; keys None: model and optimizer side by side at the top."""
    model, optim = names.get_state_dict(module, optimizer, options=options)
    state = {**model, **optim} if keys is None else dict(zip(keys, (model, optim), strict=True))
    dcp.save(state | others, checkpoint_id=path, no_dist=True)


def save_torch(path, module, optimizer, **others):
    state = {"model": module.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | others, path)


def load_torch(path):
    """A fresh module and `torch.optim.Adadelta`, loaded from a file as anybody would."""
    whole = torch.load(path, weights_only=True)
    module, optimizer = build(seed=1, steps=0, named=False)
    module.load_state_dict(whole["model"])
    optimizer.load_state_dict(whole["optimizer"])
    return module, optimizer


def load_dcp(path, cls=torch.optim.Adadelta):
    """A fresh module and optimizer, loaded from a folder by torch's own functions."""
    module, optimizer = build(seed=1, steps=0, cls=cls)
    model, optim = names.get_state_dict(module, optimizer)
    state = {"model": model, "optimizer": optim}
    # Only what has a gradient has state, other than in ours, whose state is complete.
    planner = dcp.DefaultLoadPlanner(allow_partial_load=cls is not torch.optim.Adadelta)
    dcp.load(state, checkpoint_id=path, planner=planner, no_dist=True)
    names.set_state_dict(module, optimizer, model_state_dict=model, optim_state_dict=optim)
    return module, optimizer


def assert_same(got, want, *, but=()):
    """Equal bit by bit: module, hyperparameters and state, apart from state of the names `but`.

    "brain" among them: it has masters on one side, and other values too.
    """
    (module, optimizer), (other, control) = got, want
    tensors, others = module.state_dict(), other.state_dict()
    if "brain" in but:
        del tensors["brain"], others["brain"]
    assert_equal(tensors, others)
    for group, theirs in zip(optimizer.param_groups, control.param_groups, strict=True):
        options = (group.keys() | theirs.keys()) - {"params", "param_names"}
        assert all(bool(group[key] == theirs[key]) for key in options)
    pairs = zip(module.named_parameters(), other.parameters(), strict=True)
    for (name, p), q in pairs:
        if name not in but:
            assert_equal(optimizer.state.get(p, {}), control.state.get(q, {}))


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert (got[key].dtype, got[key].shape) == (value.dtype, value.shape), key
        assert torch.equal(got[key], value), key

"""Parameters that arrive behind the next forward, and what waits for them."""

import copy
import gc
import pickle
import time
import warnings
import weakref

import pytest
import torch
from test_gradients import assert_close, batch, loss_of, model, reference, values
from torch import nn

from adadelta_dist import RankError, ShardedAdadelta, ShardPolicy

POLICIES = [
    ShardPolicy(1e-4, overlap_gather=True),
    ShardPolicy(1e-4, overlap_gather=True, stage=2),
]


def delay_gathers(optimizer, seconds):
    """So that parameters arrive late on the other ranks."""
    start = optimizer._gathers.start

    def start_late(bucket):
        time.sleep(seconds)
        start(bucket)

    optimizer._gathers.start = start_late


def train(rank, policy):
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=policy)
    optimizer.attach(module)
    in_flight = []
    for step in range(3):
        optimizer.zero_grad()
        loss_of(module, batch(rank, 10 * step)).backward()
        if step == 2:
            optimizer.clip_grad_norm_(1e9)
        optimizer.step()
        in_flight.append([bucket.names[0] for bucket in optimizer._gathers._pending])
    optimizer.wait()
    return values(module), in_flight, [shard.bucket.names[0] for shard in optimizer._shards]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_is_the_same(pool, policy, world_size):
    for got, in_flight, buckets in pool(world_size).run(train, policy):
        assert_close(got, reference(world_size, 3))
        # Backward fills the last layers' buckets first; the next forward wants the first layers'.
        assert in_flight == [buckets[::-1]] * 3


def late(rank, way):
    """Rank 1 comes late to its step: rank 0 has stepped, and its parameters are not there."""
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=POLICIES[0])
    optimizer.attach(module)
    loss_of(module, batch(rank, 0)).backward()
    optimizer._reduce("step of gradients times 1.0", None, final=True)
    if rank == 1:  # all have agreed; then it is late
        time.sleep(0.5)
    optimizer._step_shards([False], 1.0)
    inputs = batch(0, 5)
    if way == "forward":
        got = module(inputs).detach()
    elif way == "eval":
        with torch.no_grad():
            got = module.eval()(inputs)
    elif way == "state_dict":
        twin = model()
        twin.load_state_dict(module.state_dict())
        got = twin(inputs).detach()
    elif way == "submodule":
        state = copy.deepcopy(module[0].state_dict())
        optimizer.wait()
        module[0].load_state_dict(state)
        got = module(inputs).detach()
    elif way == "optimizer.state_dict":
        optimizer.state_dict()
        got = model()
        got.load_state_dict(dict(zip(got.state_dict(), values(module), strict=True)))
        got = got(inputs).detach()
    else:
        twin = copy.deepcopy(optimizer)
        got = model()
        for p, q in zip(got.parameters(), twin.param_groups[0]["params"], strict=True):
            p.data.copy_(q)
        got = got(inputs).detach()
    optimizer.wait()
    return got


WAYS = ["forward", "eval", "state_dict", "submodule", "optimizer.state_dict", "deepcopy"]


@pytest.mark.parametrize("way", WAYS)
def test_whoever_reads_parameters_in_a_documented_way_waits(pool, way):
    module = model()
    for p, value in zip(module.parameters(), reference(2, 1), strict=True):
        p.data.copy_(value)
    for got in pool(2).run(late, way):
        assert_close([got], [module(batch(0, 5)).detach()])


def not_attached(rank):
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=POLICIES[0])
    loss_of(module, batch(rank, 0)).backward()
    optimizer.step()
    return len(optimizer._gathers._pending)


def test_without_a_model_step_waits(pool):
    assert pool(2).run(not_attached) == [0, 0]


def stranger(rank):
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=POLICIES[0])
    larger = nn.Sequential(module, nn.Linear(3, 3).double()) if rank == 1 else module
    with pytest.raises((ValueError, RankError), match=r"\['1.weight', '1.bias'\] \(of 2\) are not"):
        optimizer.attach(larger)


def test_a_model_with_other_parameters_is_an_error_on_every_rank(pool):
    pool(2).run(stranger)


def load_while_others_arrive(rank):
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=POLICIES[0])
    optimizer.attach(module)
    wanted = {name: torch.full_like(value, 3.0) for name, value in module.state_dict().items()}
    loss_of(module, batch(rank, 0)).backward()
    delay_gathers(optimizer, 0.2 * rank)
    optimizer.step()
    module.load_state_dict(wanted)
    optimizer.wait()
    return all(torch.equal(value, wanted[name]) for name, value in module.state_dict().items())


def test_what_is_loaded_is_not_overwritten_by_what_arrives_late(pool):
    assert pool(2).run(load_while_others_arrive) == [True, True]


def attend(rank, training):
    """An encoder layer, each of whose parameters has a bucket of its own, after a late step."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    policy = ShardPolicy(1e-6, overlap_gather=True, gather_dtype=torch.bfloat16)
    optimizer = ShardedAdadelta(layer.parameters(), policy=policy)
    optimizer.attach(layer)
    layer(torch.ones(1, 3, 4)).square().sum().backward()
    delay_gathers(optimizer, 0.05 * rank)
    optimizer.step()
    inputs = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(training):
        got = layer.train(training)(inputs)
    optimizer.wait()
    with torch.set_grad_enabled(training):
        return torch.equal(got, layer(inputs))


@pytest.mark.parametrize("training", [False, True])
def test_attention_waits_for_what_it_takes_from_its_children(pool, training):
    assert pool(2).run(attend, training) == [True, True]


def with_parameters_that_nobody_waits_for(rank, how):
    """(whether the forward after a step is right at once, the buckets left open)."""
    module = model()
    head = copy.deepcopy(module)
    if how == "another model's":
        params = [*module.parameters(), *head.parameters()]
    else:
        module.requires_grad_(False)
        head, params = module, list(module[-1].requires_grad_(True).parameters())
    optimizer = ShardedAdadelta(params, policy=POLICIES[0])
    optimizer.attach(module)
    if how == "added later":
        module.requires_grad_(True)
        optimizer.add_param_group({"params": list(module[0].parameters())})
    delay_gathers(optimizer, 0.2 * rank)
    loss_of(head, batch(rank, 0)).backward()
    optimizer.step()
    left_open = len(optimizer._gathers._pending)
    early = head(batch(0, 5)).detach()
    optimizer.wait()
    return torch.equal(early, head(batch(0, 5)).detach()), left_open


@pytest.mark.parametrize("how", ["another model's", "added later"])
def test_step_waits_for_what_no_module_waits_for(pool, how):
    found = pool(2).run(with_parameters_that_nobody_waits_for, how)
    assert [right for right, _ in found] == [True, True]
    assert (found[0][1] > 0) == (how == "added later")  # whose other buckets are still open


def hooks(module):
    return sum(
        len(m._forward_pre_hooks) + len(m._state_dict_pre_hooks) + len(m._load_state_dict_pre_hooks)
        for m in module.modules()
    )


def attached_twice_and_dropped(rank):
    """Hooks of the model while there is an optimizer, and what is left when it is gone."""
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=POLICIES[0])
    optimizer.attach(module)
    once = hooks(module)
    optimizer.attach(module)
    twice = hooks(module)
    bucket = weakref.ref(optimizer._shards[0].bucket)
    del optimizer
    gc.collect()
    return once > 0, once == twice, hooks(module), bucket()


def test_hooks_go_with_the_optimizer(pool):
    assert pool(2).run(attached_twice_and_dropped) == [(True, True, 0, None)] * 2


def copied(rank, how):
    """Whether a copy of an attached model, made in mid-training, works on its own."""
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=POLICIES[0])
    optimizer.attach(module)
    loss_of(module, batch(rank, 0)).backward()
    optimizer.step()
    optimizer.wait()
    twin = pickle.loads(pickle.dumps(module)) if how == "saved" else copy.deepcopy(module)
    same = torch.equal(twin(batch(0, 5)), module(batch(0, 5)))
    loss_of(module, batch(rank, 1)).backward()
    optimizer.step()
    pending = len(optimizer._gathers._pending)
    twin(batch(0, 5)), twin.load_state_dict(twin.state_dict())
    return same, pending > 0, len(optimizer._gathers._pending) == pending


@pytest.mark.parametrize("how", ["saved", "deepcopied"])
def test_a_copy_of_the_model_waits_for_nothing(pool, how):
    assert pool(2).run(copied, how) == [(True, True, True)] * 2


class Containers(nn.Module):
    """Uses parameters of children that have no forward, nested too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.several = nn.ParameterList([torch.randn(12) for _ in range(3)])
        self.named = nn.ModuleDict({"a": nn.ParameterDict({"b": torch.randn(12)})})

    def forward(self):
        return sum((p * p).sum() for p in self.parameters())


def of_containers(rank, whole):
    """(whether the first forward after a late step is right, how many buckets were open)."""
    module = Containers()
    attached = module if whole else module.several
    policy = ShardPolicy(1e-6, overlap_gather=True)
    optimizer = ShardedAdadelta(attached.parameters(), policy=policy)
    optimizer.attach(attached)
    module().backward()
    delay_gathers(optimizer, 0.1 * rank)
    optimizer.step()
    left_open = len(optimizer._gathers._pending)
    early = module().item()
    optimizer.wait()
    return early == module().item(), left_open


@pytest.mark.parametrize("whole", [True, False])
def test_containers_without_a_forward_are_waited_for_by_their_parents_or_by_step(pool, whole):
    assert pool(2).run(of_containers, whole) == [(True, 4 if whole else 0)] * 2


def backward_again(rank, policy):
    """Through a graph from before the step, whose parameters are no longer what they were."""
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=policy)
    optimizer.attach(module)
    loss = loss_of(module, batch(rank, 0))
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    optimizer.wait()


@pytest.mark.parametrize("policy", [ShardPolicy(1e-4), POLICIES[0]], ids=["at once", "overlap"])
def test_a_graph_from_before_the_step_is_stale_as_in_torch(pool, policy):
    pool(2).run(backward_again, policy)


def compiled(rank):
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=POLICIES[0])
    optimizer.attach(module)
    fast = torch.compile(module, backend="eager")
    delay_gathers(optimizer, 0.05 * rank)
    with warnings.catch_warnings():  # torch.compile looks at .grad of what is no leaf
        warnings.simplefilter("ignore")
        for step in range(2):
            optimizer.zero_grad()
            loss_of(fast, batch(rank, 10 * step)).backward()
            optimizer.step()
    optimizer.wait()
    return values(module)


def test_a_compiled_model_waits_as_well(pool):
    for got in pool(2).run(compiled):
        assert_close(got, reference(2, 2))

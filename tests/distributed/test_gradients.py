"""What happens to gradients between backward and step: DESIGN's contract, on real ranks."""

import warnings
from contextlib import nullcontext
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adadelta_dist import ShardedAdadelta, ShardPolicy

SMALL_BUCKETS = ShardPolicy(bucket_mb=1e-4)
STAGE_2 = ShardPolicy(bucket_mb=1e-4, stage=2)
stages = pytest.mark.parametrize("policy", [SMALL_BUCKETS, STAGE_2], ids=["stage 1", "stage 2"])


def model(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def batch(rank, step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 6, generator=generator, dtype=torch.float64).to(dtype)


def loss_of(module, inputs):
    return module(inputs).square().mean()


def values(module):
    return [p.detach().clone() for p in module.parameters()]


def reference(world_size, steps, micro_batches=1, edit=lambda params: None):
    """torch.optim.Adadelta on the mean of all ranks' losses."""
    module = model()
    optimizer = torch.optim.Adadelta(module.parameters())
    for step in range(steps):
        optimizer.zero_grad()
        for rank, micro in product(range(world_size), range(micro_batches)):
            (loss_of(module, batch(rank, 10 * step + micro)) / world_size).backward()
        edit(list(module.parameters()))
        optimizer.step()
    return values(module)


def assert_close(got, want):
    # The sums over ranks are taken in another order than autograd's: a few ulp of fp64.
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def accumulate(rank, sync_each, policy):
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=policy)
    for step in range(3):
        optimizer.zero_grad()
        for micro in range(3):
            quiet = nullcontext() if sync_each or micro == 2 else optimizer.no_sync()
            with quiet:
                loss_of(module, batch(rank, 10 * step + micro)).backward()
        optimizer.step()
    return values(module)


@pytest.mark.parametrize(
    "policy", [SMALL_BUCKETS, ShardPolicy(), ShardPolicy(overlap=False), STAGE_2]
)
@pytest.mark.parametrize("sync_each", [False, True])
def test_accumulation_with_and_without_no_sync(pool, sync_each, policy):
    for got in pool(2).run(accumulate, sync_each, policy):
        assert_close(got, reference(2, 3, micro_batches=3))


def no_sync_sends_nothing(rank):
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=SMALL_BUCKETS)
    with optimizer.no_sync():
        loss_of(module, batch(rank, 0)).backward()
    quiet = [bucket.launched for bucket in optimizer._reducer.buckets]
    loss_of(module, batch(rank, 1)).backward()
    return any(quiet), all(bucket.launched for bucket in optimizer._reducer.buckets)


def test_no_sync_launches_nothing_and_overlap_launches_in_backward(pool):
    assert pool(2).run(no_sync_sends_nothing) == [(False, True)] * 2


def halve_gradients(rank, on_rank):
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=SMALL_BUCKETS)
    caught = []
    for step in range(3):
        optimizer.zero_grad()
        loss_of(module, batch(rank, 10 * step)).backward()
        if on_rank in (None, rank):
            for p in module.parameters():
                p.grad.mul_(0.5)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            optimizer.step()
        caught += [str(w.message) for w in seen]
    return values(module), caught


def test_gradients_edited_after_their_reduction_count_and_warn_once(pool):
    def halve(params):
        for p in params:
            p.grad.mul_(0.5)

    for got, caught in pool(2).run(halve_gradients, None):
        assert_close(got, reference(2, 3, edit=halve))
        assert len(caught) == 1
        assert "clip_grad_norm_" in caught[0]


def test_an_edit_on_one_rank_is_reduced_again_on_all(pool):
    (first, _), (second, _) = pool(2).run(halve_gradients, 1)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    plain = pool(2).run(accumulate, True, SMALL_BUCKETS)[0]
    assert not torch.equal(first[0], plain[0])


def replace_in_pre_hook(rank):
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=SMALL_BUCKETS)

    def double(opt, args, kwargs):
        for p in module.parameters():
            p.grad = p.grad * 2

    optimizer.register_step_pre_hook(double)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(2):
            optimizer.zero_grad()
            loss_of(module, batch(rank, 10 * step)).backward()
            optimizer.step()
    return values(module)


def test_gradients_replaced_by_a_step_pre_hook_count(pool):
    def double(params):
        for p in params:
            p.grad = p.grad * 2

    for got in pool(2).run(replace_in_pre_hook):
        assert_close(got, reference(2, 2, edit=double))


def drop_a_gradient(rank):
    """Rank 1 removes a gradient after backward: it counts as zero there, present elsewhere."""
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=SMALL_BUCKETS)
    loss_of(module, batch(rank, 0)).backward()
    if rank == 1:
        module[0].bias.grad = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    return values(module), [optimizer.state[p]["step"].item() for p in module.parameters()]


def test_a_removed_gradient_counts_as_zero(pool):
    module = model()
    optimizer = torch.optim.Adadelta(module.parameters())
    (loss_of(module, batch(0, 0)) / 2).backward()
    of_rank_0 = module[0].bias.grad.clone()
    (loss_of(module, batch(1, 0)) / 2).backward()
    module[0].bias.grad = of_rank_0
    optimizer.step()
    for got, steps in pool(2).run(drop_a_gradient):
        assert_close(got, values(module))
        assert steps == [1.0] * 4


def held_gradient(rank):
    module = model()
    optimizer = ShardedAdadelta(module.parameters())
    loss_of(module, batch(rank, 0)).backward()
    held = [p.grad for p in module.parameters()]
    before = [g.clone() for g in held]
    optimizer.step()
    same = all(g is p.grad for g, p in zip(held, module.parameters(), strict=True))
    return same, all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


def test_gradients_are_the_same_local_objects_after_the_step(pool):
    assert pool(2).run(held_gradient) == [(True, True)] * 2


def under_ddp(rank, gradients, bucket_view):
    module = model()
    wrapped = DistributedDataParallel(module, gradient_as_bucket_view=bucket_view)
    policy = ShardPolicy(gradients=gradients, bucket_mb=1e-4)
    optimizer = ShardedAdadelta(wrapped.parameters(), policy=policy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(3):
            optimizer.zero_grad()
            loss_of(wrapped, batch(rank, 10 * step)).backward()
            optimizer.step()
    return values(module)


@pytest.mark.parametrize("gradients", ["local", "averaged"])
@pytest.mark.parametrize("bucket_view", [False, True])
def test_under_distributed_data_parallel(pool, gradients, bucket_view):
    for got in pool(2).run(under_ddp, gradients, bucket_view):
        assert_close(got, reference(2, 3))


def nan_on_one_rank(rank):
    module = model()
    optimizer = ShardedAdadelta(module.parameters())
    loss_of(module, batch(rank, 0)).backward()
    if rank == 1:
        module[2].weight.grad = torch.full_like(module[2].weight, float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    return [bool(p.isnan().all()) for p in module.parameters()]


def test_nan_propagates_as_in_torch(pool):
    assert pool(2).run(nan_on_one_rank) == [[False, False, True, False]] * 2


def clip(rank, norm_type, policy):
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=policy)
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        loss_of(module, batch(rank, 10 * step)).backward()
        norms.append(optimizer.clip_grad_norm_(0.05, norm_type).item())
        optimizer.step()
    return values(module), norms


@stages
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, float("inf")])
def test_clipping_by_the_global_norm(pool, norm_type, policy):
    norms = []

    def clip_all(params):
        norms.append(nn.utils.clip_grad_norm_(params, 0.05, norm_type).item())

    want = reference(3, 3, edit=clip_all)
    assert max(norms) > 0.05
    for got, got_norms in pool(3).run(clip, norm_type, policy):
        assert got_norms == pytest.approx(norms, rel=1e-12)
        assert_close(got, want)


def nonfinite_clip(rank, bad_rank, value, norm_type):
    module = model()
    optimizer = ShardedAdadelta(module.parameters(), policy=ShardPolicy(overlap=False))
    loss_of(module, batch(rank, 0)).backward()
    if rank == bad_rank:  # in the last shard
        module[0].weight.grad = torch.full_like(module[0].weight, value)
    try:
        optimizer.clip_grad_norm_(1.0, norm_type, error_if_nonfinite=True)
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_nonfinite_norm_is_an_error_on_every_rank(pool, value, norm_type):
    for bad_rank in range(3):
        for message in pool(3).run(nonfinite_clip, bad_rank, value, norm_type):
            assert message is not None
            assert "non-finite" in message


def thaw(rank):
    module = model()
    module[0].requires_grad_(False)
    optimizer = ShardedAdadelta(module.parameters(), policy=SMALL_BUCKETS)
    launched = []
    for step in range(4):
        if step == 1:
            module[0].requires_grad_(True)
        optimizer.zero_grad()
        loss_of(module, batch(rank, 10 * step)).backward()
        launched.append(all(bucket.launched for bucket in optimizer._reducer.buckets))
        optimizer.step()
    return values(module), launched


def test_frozen_parameters_thaw(pool):
    module = model()
    module[0].requires_grad_(False)
    optimizer = torch.optim.Adadelta(module.parameters())
    for step in range(4):
        if step == 1:
            module[0].requires_grad_(True)
        optimizer.zero_grad()
        for rank in range(2):
            (loss_of(module, batch(rank, 10 * step)) / 2).backward()
        optimizer.step()
    for got, launched in pool(2).run(thaw):
        assert_close(got, values(module))
        assert launched[0]
        assert launched[2:] == [True, True]  # hooked, so overlapped, from the second step on


def train_with_unused_layers(rank, policy):
    """Each rank uses another subset: hooks fire for other buckets on each rank."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6)).double()
    optimizer = ShardedAdadelta(layers.parameters(), policy=policy)
    for step in range(6):
        optimizer.zero_grad()
        inputs = batch(rank, step)[:, :4]
        for i in (step + rank, 2 * step + 3 * rank):
            inputs = layers[i % 6](inputs)
        inputs.square().sum().backward()
        optimizer.step()
    return values(layers)


@stages
def test_ranks_that_use_other_layers_neither_hang_nor_diverge(pool, policy):
    results = pool(4).run(train_with_unused_layers, policy)
    alike = pool(4).run(train_with_unused_layers, ShardPolicy(overlap=False))
    assert all(map(torch.equal, results[0], alike[0]))
    for got in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True))


def sparse_gradient(rank, policy):
    embedding = nn.Embedding(5, 3, sparse=rank == 1)
    optimizer = ShardedAdadelta(embedding.parameters(), policy=policy)
    before = values(embedding)
    embedding(torch.tensor([1, 2])).sum().backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error), torch.equal(before[0], embedding.weight)


@stages
def test_a_sparse_gradient_is_an_error_on_every_rank(pool, policy):
    other, own = pool(2).run(sparse_gradient, policy)
    assert own == ("Adadelta does not support sparse gradients", True)
    assert "rank 1 failed with RuntimeError: Adadelta does not support sparse" in other[0]
    assert other[1]


def dropped_in_flight(rank, policy):
    """An optimizer that vanishes with reductions in flight must not disturb the next."""
    module = model()
    for seed in range(3):
        optimizer = ShardedAdadelta(module.parameters(), policy=policy)
        inputs = batch(rank, seed)
        if rank == 0:  # rank 1 launches less
            loss_of(module, inputs).backward()
        else:
            module[2].bias.sum().backward()
        del optimizer
        module.zero_grad()
    dist.barrier()
    module.load_state_dict(model().state_dict())
    optimizer = ShardedAdadelta(module.parameters(), policy=policy)
    loss_of(module, batch(rank, 0)).backward()
    optimizer.step()
    return values(module)


@stages
def test_an_optimizer_may_vanish_in_mid_iteration(pool, policy):
    for got in pool(2).run(dropped_in_flight, policy):
        assert_close(got, reference(2, 1))

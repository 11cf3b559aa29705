"""A bucket holds parameters and gradients as they are, and notices what others do to them."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import distribute_tensor

from adadelta_dist import ShardPolicy
from adadelta_dist.buckets import FlatBucket
from adadelta_dist.collectives import Group
from adadelta_dist.layout import ParamSpec, plan_layout, storage_order
from adadelta_dist.memory import check_memory, flatten, unflatten

TENSORS = {
    "contiguous": lambda: torch.randn(3, 4),
    "transposed": lambda: torch.randn(3, 4).t(),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "column as row": lambda: torch.randn(3, 1).t(),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 3),
    "complex": lambda: torch.randn(3, 4, dtype=torch.complex64),
    "transposed complex": lambda: torch.randn(3, 4, dtype=torch.complex128).t(),
    "holes": lambda: torch.randn(4, 6)[:, ::2],
}


def bucket_of(*tensors, averaged=False):
    params = [nn.Parameter(t) for t in tensors]
    real = params[0].dtype.to_real()
    specs = [ParamSpec(p.numel() * (1 + p.is_complex()), real.itemsize, (0,)) for p in params]
    (plan,) = plan_layout(specs, 1, 2**30)
    ordered = [params[slot.param] for slot in plan.slots]
    names = [f"p{slot.param}" for slot in plan.slots]
    bucket = FlatBucket(
        plan, Group(), ordered, names, ShardPolicy(gradients="averaged" if averaged else "local")
    )
    bucket.reset()
    return bucket, params


def launch(bucket):
    bucket.check_grads()
    bucket.launch()


def is_current(bucket):
    bucket.check_grads()
    return bucket.is_current()


@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_flattening_follows_memory_and_unflattening_is_its_inverse(make):
    tensor = make()
    order = storage_order(tensor.shape, tensor.stride())
    flat = flatten(tensor, order)
    assert flat.dim() == 1
    assert not flat.is_complex()
    back = unflatten(flat, tensor, order)
    assert torch.equal(back, tensor)
    if tensor.permute(order).is_contiguous():
        assert back.stride() == tensor.stride()
        assert flat.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
@pytest.mark.parametrize("averaged", [False, True])
def test_parameters_move_in_with_their_values_shapes_and_strides(make, averaged):
    tensor = make()
    before = tensor.clone()
    bucket, (p, _) = bucket_of(tensor, make(), averaged=averaged)
    assert torch.equal(p, before)
    assert p.stride() == before.stride()  # of a clone: it keeps the order and drops the holes
    bucket.flat_param.zero_()
    assert not p.detach().any()


def test_padding_is_zero():
    bucket, _ = bucket_of(torch.ones(3), torch.ones(5))
    assert bucket.flat_param.tolist() == [1] * 5 + [0] * 3 + [1] * 3 + [0]


def test_a_replaced_storage_is_adopted():
    bucket, (p,) = bucket_of(torch.zeros(2, 3))
    home = p.data_ptr()
    p.data = torch.full((3, 2), 7.0).t()
    bucket.reclaim_params()
    assert p.data_ptr() == home
    assert p.stride() == (3, 1)
    assert bucket.flat_param[:6].tolist() == [7] * 6


def test_a_replaced_vector_is_adopted():
    bucket, (p,) = bucket_of(torch.zeros(5))
    home, p.data = p.data_ptr(), torch.ones(5)
    bucket.reclaim_params()
    assert p.data_ptr() == home
    assert p.tolist() == [1] * 5


def test_a_parameter_that_sees_its_own_memory_otherwise_is_adopted():
    bucket, (p, _) = bucket_of(torch.arange(4.0).view(2, 2), torch.zeros(3))
    p.data = p.data.t()  # begins where it did
    bucket.reclaim_params()
    assert p.stride() == (2, 1)
    assert p.tolist() == [[0, 2], [1, 3]]
    assert bucket.flat_param[4:].tolist() == [0, 2, 1, 3]


def test_a_vector_that_was_pruned_in_place_is_refused():
    bucket, (p,) = bucket_of(torch.zeros(5))
    p.data = p.data[:3]
    with pytest.raises(RuntimeError, match=r"p0 was \(5,\).* is \(3,\)"):
        bucket.reclaim_params()


def test_values_written_in_place_are_kept():
    bucket, (p,) = bucket_of(torch.zeros(4))
    with torch.no_grad():
        p.fill_(3)
    bucket.reclaim_params()
    assert bucket.flat_param.tolist() == [3] * 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.double(), r"\(4, 2\), torch.float64, on cpu now"),
        (lambda p: p.half(), r"\(4, 2\), torch.float16, on cpu now"),
        (lambda p: torch.zeros(2, 4), r"\(2, 4\), torch.float32, on cpu now"),
        (lambda p: p[:3], r"\(3, 2\), torch.float32, on cpu now"),
        (lambda p: p.t(), r"\(2, 4\), torch.float32, on cpu now"),
    ],
    ids=["double", "half", "shape", "pruned in place", "transposed in place"],
)
def test_a_parameter_of_another_kind_is_refused_with_the_remedy(change, words):
    bucket, (p,) = bucket_of(torch.zeros(4, 2))
    p.data = change(p.data)
    with pytest.raises(RuntimeError, match=f"p0 was .*{words}. Build the optimizer last"):
        bucket.reclaim_params()


def test_take_moves_a_gradient_into_flat_memory():
    bucket, (p,) = bucket_of(torch.zeros(2, 3).t())
    p.grad = torch.arange(6.0).view(3, 2)
    assert bucket.take(0)
    assert torch.equal(p.grad, torch.arange(6.0).view(3, 2))
    assert p.grad.data_ptr() == bucket.flat_grad.data_ptr()
    assert p.grad.stride() == p.stride()
    bucket.flat_grad.fill_(5)
    assert bucket.take(0)
    assert bool((p.grad == 5).all())


def lent_again(use):
    """The gradient that a bucket lends after one that was used so and set to None, and that."""
    bucket, (p,) = bucket_of(torch.zeros(2, 2))
    p.grad = torch.arange(4.0).view(2, 2)
    bucket.take(0)
    used = use(p)
    p.grad = torch.full((2, 2), 7.0)
    bucket.take(0)
    assert p.grad.tolist() == [[7, 7], [7, 7]]
    assert p.grad.untyped_storage().data_ptr() == bucket.flat_grad.data_ptr()
    bucket.flat_grad.zero_()
    assert not p.grad.any()
    assert not p.grad.requires_grad
    return p.grad, used


def test_a_gradient_that_nobody_holds_is_lent_again():
    grad, used = lent_again(lambda p: id(p.grad))
    assert id(grad) == used


def test_a_gradient_that_somebody_holds_keeps_its_values():
    grad, held = lent_again(lambda p: p.grad)
    assert held.tolist() == [[0, 1], [2, 3]]
    assert held is not grad


def transpose(p):
    p.grad.data = p.grad.data.t()


def replace(p):
    p.grad.data = torch.ones(2, 2)


def multiply(p):
    p.grad.mul_(torch.ones((), requires_grad=True))


@pytest.mark.parametrize("use", [transpose, replace, multiply])
def test_a_gradient_that_was_changed_beyond_its_values_is_not_lent_again(use):
    lent_again(use)


@pytest.mark.parametrize(
    "grad",
    [
        None,
        torch.ones(3, requires_grad=True),
        torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True),
    ],
    ids=["none", "with a graph", "sparse"],
)
def test_take_leaves_what_must_stay(grad):
    bucket, (p,) = bucket_of(torch.zeros(3))
    p.grad = grad
    assert not bucket.take(0)
    assert p.grad is grad


@pytest.mark.parametrize("averaged", [False, True])
def test_a_sparse_gradient_is_torchs_error(averaged):
    bucket, (p,) = bucket_of(torch.zeros(3), averaged=averaged)
    bucket.check_grads()
    p.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True)
    with pytest.raises(RuntimeError, match="Adadelta does not support sparse gradients"):
        bucket.check_grads()


@pytest.mark.parametrize("averaged", [False, True])
def test_launch_collects_gradients_and_zeros_for_those_that_are_gone(averaged):
    bucket, (p, q) = bucket_of(torch.zeros(4), torch.zeros(4), averaged=averaged)
    p.grad, q.grad = torch.full((4,), 1.0), torch.full((4,), 2.0)
    launch(bucket)
    bucket.wait()
    assert bucket.grad_shard.tolist() == [2.0] * 4 + [1.0] * 4
    bucket.reset()
    p.grad = None
    launch(bucket)
    assert bucket.grad_shard.tolist() == [2.0] * 4 + [0.0] * 4


@pytest.mark.parametrize("averaged", [False, True])
def test_gradients_are_collected_in_memory_order(averaged):
    bucket, (p,) = bucket_of(torch.zeros(2, 4).t(), averaged=averaged)
    p.grad = torch.arange(8.0).view(4, 2)
    launch(bucket)
    assert bucket.grad_shard.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


EDITS = {
    "in place": lambda p: p.grad.mul_(2),
    "replaced": lambda p: setattr(p, "grad", torch.ones_like(p)),
    "removed": lambda p: setattr(p, "grad", None),
}


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("edit", [None, *EDITS.values()], ids=["not", *EDITS])
def test_edits_after_the_launch_are_noticed(edit, taken, averaged):
    bucket, (p, q) = bucket_of(torch.zeros(3), torch.zeros(5), averaged=averaged)
    p.grad, q.grad = torch.ones(3), torch.ones(5)
    if taken and not averaged:
        for i in range(2):
            bucket.take(i)
    launch(bucket)
    assert is_current(bucket)
    if edit is not None:
        edit(p)
    assert is_current(bucket) == (edit is None)


@pytest.mark.parametrize("shape", [(2, 2), (4,)], ids=["matrix", "vector"])
@pytest.mark.parametrize("change", [lambda grad: grad + 1, torch.t], ids=["replaced", "transposed"])
def test_a_gradient_of_other_data_is_noticed(change, shape):
    bucket, (p, q) = bucket_of(torch.zeros(shape), torch.zeros(5))
    p.grad, q.grad = torch.arange(4.0).view(shape), torch.ones(5)
    bucket.take(0), bucket.take(1)
    launch(bucket)
    assert is_current(bucket)
    before = p.grad.tolist()
    p.grad.data = change(p.grad.data)  # its identity and version stay
    assert is_current(bucket) == (p.grad.tolist() == before)  # a vector is its own transpose
    launch(bucket)
    assert bucket.grad_shard[8:].tolist() == p.grad.flatten().tolist()


@pytest.mark.parametrize("averaged", [False, True])
def test_a_gradient_that_appears_after_the_launch_is_noticed(averaged):
    bucket, (p, q) = bucket_of(torch.zeros(3), torch.zeros(5), averaged=averaged)
    q.grad = torch.ones(5)
    launch(bucket)
    p.grad = torch.ones(3)
    assert not is_current(bucket)


def test_a_bucket_is_full_when_every_trainable_parameter_is_ready():
    bucket, (p, _) = bucket_of(torch.zeros(3), torch.zeros(5))
    p.requires_grad_(False)
    bucket.expect()
    assert not bucket.is_full()
    bucket.ready.add(0)
    assert bucket.is_full()


def test_tied_weights_as_one_parameter_are_fine_and_neighbours_too():
    flat = torch.zeros(8)
    p = nn.Parameter(flat[:4])
    check_memory([p, nn.Parameter(flat[4:]), p, nn.Parameter(torch.zeros(0))])


@pytest.mark.parametrize("cut", [lambda f: f[3:], lambda f: f.view(2, 4).t(), lambda f: f[2:3]])
def test_parameters_that_share_memory_are_refused_with_the_remedy(cut):
    flat = torch.zeros(8)
    with pytest.raises(ValueError, match=r"share memory\. Tie weights by using one Parameter"):
        check_memory([nn.Parameter(flat[:4]), nn.Parameter(cut(flat))])


def test_a_sparse_parameter_is_refused():
    sparse = nn.Parameter(torch.eye(2).to_sparse())
    with pytest.raises(TypeError, match=r"needs dense parameters, got one of layout torch.sparse"):
        check_memory([sparse])


def test_a_dtensor_is_refused_with_the_remedy(mesh):
    with pytest.raises(TypeError, match="DTensor, which is sharded already: use Adadelta"):
        check_memory([nn.Parameter(distribute_tensor(torch.zeros(4), mesh))])

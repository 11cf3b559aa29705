"""Which dtypes a policy means for which parameters, and what it means nothing for."""

import pytest
import torch

from adadelta_dist import ShardPolicy
from adadelta_dist.precision import Precision, check_precision, precision_of

F64, F32, B16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("dtype", "options", "wanted"),
    [
        (F32, {}, Precision(F32, F32, F32, F32, False, False)),
        (F64, {}, Precision(F64, F64, F64, F64, False, False)),
        (torch.complex64, {}, Precision(F32, F32, F32, F32, False, False)),
        (F32, {"master_weights": True}, Precision(F32, F32, F32, F32, False, False)),
        (B16, {}, Precision(F32, F32, B16, B16, True, False)),
        (F16, {}, Precision(F32, F32, F16, F16, True, False)),
        (B16, {"master_weights": False}, Precision(F32, F32, B16, B16, False, False)),
        (B16, {"stochastic_rounding": True}, Precision(F32, F32, B16, B16, False, True)),
        (F32, {"stochastic_rounding": True}, Precision(F32, F32, F32, F32, False, False)),
        (B16, {"state_dtype": B16}, Precision(F32, B16, B16, B16, True, False)),
        (F64, {"state_dtype": F32}, Precision(F64, F32, F64, F64, False, False)),
        (F32, {"reduce_dtype": B16}, Precision(F32, F32, B16, F32, False, False)),
        (F32, {"gather_dtype": B16}, Precision(F32, F32, F32, B16, True, False)),
        (F64, {"gather_dtype": F32}, Precision(F64, F64, F64, F32, True, False)),
        (B16, {"gather_dtype": B16}, Precision(F32, F32, B16, B16, True, False)),
    ],
)
def test_what_a_policy_means(dtype, options, wanted):
    assert precision_of(ShardPolicy(**options), dtype) == wanted


@pytest.mark.parametrize(
    ("dtype", "options", "words"),
    [
        (B16, {"gather_dtype": F32}, "gather_dtype=torch.float32 for parameters of torch.bfloat16"),
        (B16, {"gather_dtype": F16}, "gather_dtype=torch.float16 for parameters of torch.bfloat16"),
        (F32, {"gather_dtype": F64}, "wanted a narrower one"),
        (torch.complex64, {"state_dtype": B16}, "for real parameters, got torch.complex64"),
        (torch.complex64, {"gather_dtype": B16}, "for real parameters, got torch.complex64"),
        (F16, {"stochastic_rounding": True}, "got float16 parameters: keep their masters"),
    ],
)
def test_what_it_means_nothing_for(dtype, options, words):
    params = [torch.zeros(1), torch.zeros(1, dtype=dtype)]
    with pytest.raises(ValueError, match=words):
        check_precision(ShardPolicy(**options), params)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch has no grad_dtype")
def test_gradients_of_another_dtype_than_their_parameter_are_refused():
    p = torch.nn.Parameter(torch.ones(2, dtype=B16))
    p.grad_dtype = F32
    with pytest.raises(TypeError, match=r"bfloat16 has grad_dtype=torch.float32.*Leave grad_dtype"):
        check_precision(ShardPolicy(), [p])
    p.requires_grad_(False)
    check_precision(ShardPolicy(), [p])

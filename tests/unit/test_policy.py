"""ShardPolicy refuses what it cannot do, and never changes."""

import dataclasses
import math

import pytest
import torch

from adadelta_dist import ShardPolicy


def test_the_defaults_are_those_of_the_documentation():
    assert dataclasses.asdict(ShardPolicy()) == {
        "bucket_mb": 25.0,
        "overlap": True,
        "gradients": "local",
        "stage": 1,
        "overlap_gather": False,
        "skip_nonfinite": False,
        "master_weights": None,
        "stochastic_rounding": False,
        "state_dtype": None,
        "reduce_dtype": None,
        "gather_dtype": None,
    }


@pytest.mark.parametrize("bucket_mb", [0, -1, math.nan, math.inf])
def test_a_bucket_size_that_is_not_positive_is_refused_with_its_value(bucket_mb):
    with pytest.raises(ValueError, match=f"bucket_mb must be positive and finite, got {bucket_mb}"):
        ShardPolicy(bucket_mb=bucket_mb)


def test_an_unknown_kind_of_gradients_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="must be 'local' or 'averaged', got 'mean'"):
        ShardPolicy(gradients="mean")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("state_dtype", torch.float16),  # which cannot hold the squares of small gradients
        ("state_dtype", torch.float64),
        ("reduce_dtype", torch.int8),
        ("gather_dtype", "bfloat16"),
    ],
)
def test_a_dtype_that_does_not_serve_is_refused_with_the_choices(name, dtype):
    with pytest.raises(ValueError, match=f"{name} must be one of None, .*torch.bfloat16.*, got "):
        ShardPolicy(**{name: dtype})


def test_an_unknown_stage_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="stage must be 1 or 2, got 3"):
        ShardPolicy(stage=3)


@pytest.mark.parametrize("options", [{"gradients": "averaged"}, {"overlap": False}])
def test_stage_2_reduces_gradients_itself_during_backward(options):
    with pytest.raises(ValueError, match=r"stage=2 with .* or stage=1"):
        ShardPolicy(stage=2, **options)


def test_masters_and_stochastic_rounding_exclude_each_other():
    with pytest.raises(ValueError, match="Choose one"):
        ShardPolicy(master_weights=True, stochastic_rounding=True)


def test_a_policy_is_frozen_and_compares_by_value():
    policy = ShardPolicy(bucket_mb=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.bucket_mb = 2
    assert policy == ShardPolicy(bucket_mb=1.0)
    assert str(policy) == str(ShardPolicy(bucket_mb=1))

"""Domains: what is not a number or not a domain is refused with an error of the package."""

from __future__ import annotations

import math

import pytest
import torch

import lipguard as lg
from lipguard.errors import InvalidDomain


@pytest.mark.parametrize(
    "end", ["a", None, 1j, ["0"], [[0], [1, 2]], torch.zeros(3, dtype=torch.complex64), torch.eye(3).to_sparse()]
)
def test_an_end_that_holds_no_numbers(end):
    with pytest.raises(InvalidDomain, match="give a"):
        lg.Box(end, 1.0).bounds(3)


@pytest.mark.parametrize("fields", [{"radius": "wide"}, {"radius": None}, {"norm": "l2"}, {"norm": None}, {"box": (0, 1)}])
def test_a_ball_with_a_field_of_another_type(fields):
    with pytest.raises(InvalidDomain, match=r"must be a number|give lipguard"):
        lg.Ball(**({"center": 0.0, "radius": 1.0} | fields))


def test_the_norm_of_a_ball_may_be_text():
    assert lg.Ball(0.0, 1, norm="inf").norm == math.inf
    assert lg.Ball(0.0, torch.tensor(0.5)).radius == 0.5


@pytest.mark.parametrize(
    ("option", "value"),
    [("tol", "x"), ("largest", "x"), ("largest", -1.0), ("time_limit", "10"), ("time_limit", -1)],
)
def test_certify_refuses_options_out_of_range(option, value):
    model = torch.nn.Linear(3, 2)
    with pytest.raises(lg.errors.LipguardError, match=option):
        lg.certify(model, torch.zeros(2, 3), torch.tensor([0, 1]), 0.1, **{option: value})


@pytest.mark.parametrize("labels", [["a", "b"], None, [0.0, 1.0], [True, False], [0, 5], [0]])
def test_certify_refuses_labels_that_are_none(labels):
    with pytest.raises(lg.errors.InvalidExample, match="labels"):
        lg.certify(torch.nn.Linear(3, 2), torch.zeros(2, 3), labels, 0.1)


@pytest.mark.parametrize(
    "example", ["x", 3, (1, 3), torch.zeros(1, 3).to_sparse(), torch.zeros(1, 3, device="meta"), torch.zeros(1, 3).numpy()]
)
def test_an_example_that_is_no_batch(example):
    with pytest.raises(lg.errors.InvalidExample, match="example"):
        lg.capture(torch.nn.Linear(3, 2), example)

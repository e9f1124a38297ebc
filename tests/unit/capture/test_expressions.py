"""Expressions that are settled as a whole: masks, quotients, exponentials; what jumps or has no bound is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import lipguard as lg
from lipguard import errors
from lipguard.network.activations import PiecewiseLinear


class Of(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def in_place(x: Tensor) -> Tensor:
    y = x * 1.0
    y[y < 0] = 0.0
    return y


def householder(x: Tensor) -> Tensor:
    """The reflection of Singla et al. 2022 by masks, with angles that float32 rounds."""
    angle = torch.full((1, 2), 0.7).to(x)
    a, b = x.split(2, 1)
    side = a * torch.sin(0.5 * angle) - b * torch.cos(0.5 * angle)
    flipped = a * torch.cos(angle) + b * torch.sin(angle), a * torch.sin(angle) - b * torch.cos(angle)
    return torch.cat([a * (side <= 0) + flipped[0] * (side > 0), b * (side <= 0) + flipped[1] * (side > 0)], 1)


C = torch.tensor([0.5, 1.0, 2.0, 3.0])
PIECEWISE: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "ReLU by a mask": (lambda x: x * (x > 0), 1),
    "by a cast mask": (lambda x: x * (x > 0).to(x.dtype), 1),
    "by its complement": (lambda x: x * ~(x <= 0), 1),
    "by two masks": (lambda x: x * ((x > 0) & (x >= 0)), 1),
    "by a sum of masks": (lambda x: x * ((x > 0) + (x > 0)), 1),
    "by a sum of numbers": (lambda x: x * ((x > 0).to(x.dtype) + (x > 0).to(x.dtype)), 2),
    "by masked_fill": (lambda x: x.masked_fill(x < 0, 0.0), 1),
    "by a written mask": (in_place, 1),
    "by heaviside": (lambda x: x * torch.heaviside(x, torch.ones(()).to(x)), 1),
    "by threshold": (lambda x: F.threshold(x, 0.0, 0.0), 1),
    "leaky by where": (lambda x: torch.where(x > 0, x, 0.1 * x), 1),
    "PReLU by where": (lambda x: torch.where(x > 0, x, x * C.to(x)), 3),
    "modulus by sign": (lambda x: x * torch.sign(x), 1),
    "modulus by a root": (lambda x: (x**2).sqrt(), 1),
    "clipped by where": (lambda x: torch.where(x > 1, 1.0, torch.where(x < -1, -1.0, x)), 1),
    "shrunk by where": (
        lambda x: torch.where(x > C.to(x), x - C.to(x), torch.where(x < -C.to(x), x + C.to(x), torch.zeros_like(x))), 1,
    ),
    "a point that agrees": (lambda x: torch.where(x == 0, 0.0, 2 * x), 2),
    "nested": (lambda x: torch.where((x - 1) * (x > 1) > 1, 2 * x - 2, torch.where(x > 2, 2 * x - 2, x)), 2),
    "larger of two": (lambda x: torch.where(x[:, :2] > x[:, 2:], x[:, :2], x[:, 2:]), 1),
    "Householder": (householder, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", PIECEWISE)
def test_masks_make_piecewise_linear_neurons(name: str) -> None:
    f, constant = PIECEWISE[name]
    network = lg.capture(Of(f), torch.zeros(1, 4).double())
    assert all(isinstance(node.elementwise, PiecewiseLinear) for node in network.nodes if node.elementwise is not None)
    x = torch.cat([torch.randn(50, 4).double() * 2, torch.zeros(1, 4).double()])
    torch.testing.assert_close(network(x), f(x), rtol=1e-12, atol=1e-12)
    assert constant * (1 - 1e-9) <= lg.bound(network).value <= constant * (1 + 1e-6)


SMOOTH: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "sigmoid": (lambda x: 1 / (1 + torch.exp(-x)), 0.25),
    "softsign": (lambda x: x / (1 + x.abs()), 1),
    "softsign of its own width": (lambda x: x / (C.to(x) + x.abs()), 2),
    "softplus": (lambda x: torch.log(1 + torch.exp(x)), 1),
    "stable softplus": (lambda x: torch.log1p(torch.exp(-x.abs())) + torch.relu(x), 1),
    "swish": (lambda x: x * torch.sigmoid(C.to(x) * x), 1.099839320129),
    "mish": (lambda x: x * torch.tanh(F.softplus(x)), 1.088498161252),
    "tanh": (lambda x: (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x)), 1),
    "gelu": (lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), 1.128904145186),
    "gelu by tanh": (
        lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))), 1.128993068659,
    ),
    "elu": (lambda x: torch.where(x > 0, x, torch.exp(x) - 1), 1),
    "snake": (lambda x: x + torch.sin(C.to(x) * x) ** 2 / C.to(x), 2),
    "soft Huber": (lambda x: 0.05 * (torch.sqrt(1 + (x / 0.05) ** 2) - 1), 1),
    "residual": (lambda x: torch.sqrt(0.5 * x**2 + 0.5 * torch.relu(x) ** 2 + 1e-6), 1),
    "length with a constant": (lambda x: torch.hypot(x, torch.ones_like(x)), 1),
    "logaddexp": (lambda x: torch.logaddexp(x, torch.zeros_like(x)), 1),
    "Gaussian": (lambda x: torch.exp(-(x**2) / 2), math.exp(-0.5)),
    "bounded exponent": (lambda x: torch.exp(x.clamp(-1, 1)), math.e),
    "bounded square": (lambda x: x.clamp(-1, 1) ** 2, 2),
    "bounded divisor": (lambda x: 1 / x.clamp(min=0.5), 4),
    "outside a formula": (lambda x: torch.relu(1 - torch.exp(-(x**2))), math.sqrt(2 / math.e)),
    "hardswish": (lambda x: x * F.relu6(x + 3) / 6, 1.5),
    "powers of a base": (lambda x: 2.0 ** (-torch.relu(x)), math.log(2)),
}  # fmt: skip


@pytest.mark.parametrize("name", SMOOTH)
def test_functions_written_by_hand_have_their_constants(name: str) -> None:
    f, constant = SMOOTH[name]
    for dtype, close in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        network = lg.capture(Of(f), torch.zeros(1, 4, dtype=dtype))
        x = torch.randn(50, 4, generator=torch.Generator().manual_seed(3), dtype=dtype) * 2
        torch.testing.assert_close(network(x.double()), f(x).double(), rtol=close, atol=close)
        assert constant * (1 - 1e-9) <= lg.bound(network).value <= constant * (1 + 1e-5)


def test_a_sum_is_settled_term_by_term() -> None:
    w = 0.5 * torch.eye(4).double()
    value = lg.bound(Of(lambda x: x @ w + x * torch.sigmoid(x)), torch.zeros(1, 4).double()).value
    assert 1.5998 <= value <= 1.599839320129 * (1 + 1e-6)


def test_an_expression_that_two_calls_read_is_one_node() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x * torch.sigmoid(x)
        return torch.relu(y @ torch.ones(4, 4).double()) + y @ torch.eye(4).double()

    network = lg.capture(Of(forward), torch.zeros(1, 4).double())
    assert sum(node.elementwise is not None and node.elementwise.name.startswith("formula") for node in network.nodes) == 1


JUMP = "the result jumps unless both choices agree"
REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "step": (lambda x: (x > 0).to(x.dtype) * 2.0, JUMP),
    "jump": (lambda x: torch.where(x > 0, x + 1, x), rf"torch\.where chooses by torch\.gt .*{JUMP}"),
    "small jump": (lambda x: torch.where(x > 0, x + 1e-12, x), JUMP),
    "jump beside 1": (lambda x: x * (x > 1), rf"torch\.mul chooses by torch\.gt .*{JUMP}"),
    "jump at a point": (lambda x: torch.where(x == 0, 1.0, x), JUMP),
    "filled": (lambda x: x.masked_fill(x < 0, 1.0), JUMP),
    "band": (lambda x: x * ((x > -1) & (x < 1)), JUMP),
    "threshold": (lambda x: F.threshold(x, 0.1, 0.0), "jumps at its threshold"),
    "larger of two with a jump": (lambda x: torch.where(x[:, :2] > x[:, 2:], x[:, :2] + 1e-5, x[:, 2:]), JUMP),
    "by another value": (lambda x: torch.where(x[:, :2] > 0, x[:, 2:], x[:, :2]), JUMP),
    "wrong elu": (lambda x: torch.where(x > 0, x, torch.exp(x) - 1.0001), JUMP),
    "by a curved boundary": (lambda x: torch.where(torch.sin(x) > 0, x, 0.5 * x), JUMP),
    "square": (lambda x: x * x, "quadratic"),
    "power": (lambda x: x**2, "is a power"),
    "square of a rectifier": (lambda x: torch.relu(x) ** 2, "is a power"),
    "exponential": (torch.exp, r"torch\.exp has a slope that is not bounded on all of R"),
    "root": (lambda x: x.abs().sqrt(), "not bounded near zero"),
    "logarithm": (lambda x: x.log(), "not bounded near zero"),
    "quotient": (lambda x: x / (1 + x), "divides by a value"),
    "normalised": (lambda x: x / x.norm(dim=1, keepdim=True), "divides by the sample's own length"),
    "gate": (lambda x: x[:, :2] * torch.sigmoid(x[:, 2:]), "quadratic"),
    "wave of growing size": (lambda x: x * torch.sin(x), "quadratic"),
    "whole numbers": (lambda x: x * (x > 0).to(torch.uint8), "casts to torch.uint8: a step function"),
    "entries by a mask": (lambda x: x[x > 0], JUMP),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_jumps_or_has_no_bound_is_refused_with_its_first_reason(name: str) -> None:
    f, message = REFUSED[name]
    with pytest.raises(errors.UnsupportedLayer, match=message):
        lg.capture(Of(f), torch.zeros(1, 4).double())


def test_python_branches_on_masks_stay_refused() -> None:
    with pytest.raises(errors.UnsupportedLayer, match="lets Python read"):
        lg.capture(Of(lambda x: x if bool((x > 0).any()) else 2 * x), torch.ones(1, 4))
    # What is only looked at is no part of the function.
    assert lg.bound(Of(lambda x: (x.isnan().any(), (x > 0).float().mean(), 2 * x)[-1]), torch.ones(1, 4)).value == pytest.approx(
        2
    )


slopes = st.sampled_from([-2.0, -1.0, 0.0, 0.25, 1.0, 3.0])


@settings(max_examples=25, deadline=None)
@given(
    cut=st.sampled_from([-1.5, 0.0, 0.1, 1 / 3, 2.0]),
    left=slopes,
    right=slopes,
    jump=st.sampled_from([0.0, 0.0, 1e-9, 0.5]),
    strict=st.booleans(),
)
def test_two_pieces_are_read_if_and_only_if_they_meet(cut: float, left: float, right: float, jump: float, strict: bool) -> None:
    def f(x: Tensor) -> Tensor:
        side = x > cut if strict else x >= cut
        return torch.where(side, right * (x - cut) + jump, left * (x - cut))

    example = torch.zeros(1, 1).double()
    if jump:
        with pytest.raises(errors.UnsupportedLayer, match=JUMP):
            lg.capture(Of(f), example)
        return
    network = lg.capture(Of(f), example)
    x = torch.linspace(-4, 4, 81, dtype=torch.float64)[:, None]
    torch.testing.assert_close(network(x), f(x), rtol=1e-12, atol=1e-12)
    expected = max(abs(left), abs(right))
    assert expected * (1 - 1e-9) <= lg.bound(network, method="spectral").value <= expected * (1 + 1e-9) + 1e-12


def test_live_weights_stay_in_the_graph() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.beta = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
            self.slope = nn.Parameter(torch.tensor([0.5, 0.25], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0, x, self.slope * x) + x * torch.sigmoid(self.beta * x)

    module = Learned()
    network = lg.capture(module, torch.zeros(1, 2).double(), live=True)
    network(torch.tensor([[-1.0, 2.0]]).double()).sum().backward()
    assert module.slope.grad is not None and module.beta.grad is not None
    assert module.slope.grad.tolist() == [-1.0, 0.0] and bool((module.beta.grad != 0).all())

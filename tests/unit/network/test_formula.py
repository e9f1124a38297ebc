"""Functions written by hand: identities, enclosures of values and slopes, breaks that meet, records."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lipguard.errors import InvalidModel
from lipguard.network import activations
from lipguard.network.activations import Formula, from_record
from lipguard.network.activations import canonical as c
from lipguard.network.activations.interval import Interval
from lipguard.network.activations.terms import Factor, Total

Z = c.variable(torch.zeros(()))
NONE = torch.zeros(0, 1, dtype=torch.float64)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def times(*parts: Total) -> Total:
    product = c.constant(1.0)
    for part in parts:
        product = c.times(product, part)
    return product


def add(*parts: Total | float) -> Total:
    total = Total(())
    for part in parts:
        total = c.plus(total, c.constant(part) if isinstance(part, float) else part)
    return total


def of(name: str, inner: Total) -> Total:
    return c.applied(name, inner)


NEGATIVE = c.scaled(Z, -1.0)
TWICE = c.scaled(Z, 2.0)
LORENTZ = 3 * math.sqrt(3) / 8
CUBIC = add(Z, c.scaled(times(Z, Z, Z), 0.044715))
SLOPE_GELU_TANH = 1.1289930686587710

# name: the total, the same function by torch, its smallest and largest slope (of formulas, or of the function that it is)
CASES: dict[str, tuple[Total, Callable[[Tensor], Tensor], tuple[float, float]]] = {
    "sigmoid": (of("inverse", add(1.0, of("exp", NEGATIVE))), torch.sigmoid, (0, 0.25)),
    "sigmoid of exp": (times(of("exp", Z), of("inverse", add(1.0, of("exp", Z)))), torch.sigmoid, (0, 0.25)),
    "softplus": (of("log", add(1.0, of("exp", Z))), lambda z: F.softplus(z, threshold=100), (0, 1)),
    "log of two": (of("log", add(of("exp", TWICE), of("exp", Z))), lambda z: z + F.softplus(z, threshold=100), (1, 2)),
    "silu": (times(Z, of("sigmoid", TWICE)), lambda z: z * torch.sigmoid(2 * z), (-0.099839320129, 1.099839320129)),
    "shifted silu": (
        times(Z, of("sigmoid", add(Z, 1.0))), lambda z: (z + 1) * torch.sigmoid(z + 1) - torch.sigmoid(z + 1), (math.nan,) * 2,
    ),
    "tanh": (
        times(add(of("exp", Z), c.scaled(of("exp", NEGATIVE), -1.0)), of("inverse", add(of("exp", Z), of("exp", NEGATIVE)))),
        torch.tanh, (0, 1),
    ),
    "mish": (times(Z, of("tanh", of("log", add(1.0, of("exp", Z))))), F.mish, (-0.112526122390, 1.088498161252)),
    "gelu": (of("gelu", Z), F.gelu, (-0.128904145186, 1.128904145186)),
    "gelu-tanh": (
        c.scaled(times(Z, add(1.0, of("tanh", c.scaled(CUBIC, math.sqrt(2 / math.pi))))), 0.5),
        lambda z: F.gelu(z, approximate="tanh"), (1 - SLOPE_GELU_TANH, SLOPE_GELU_TANH),
    ),
    "z + sin^2": (add(Z, of("square", of("sin", Z))), lambda z: z + torch.sin(z) ** 2, (0, 2)),
    "sin cos": (times(of("sin", Z), of("cos", Z)), lambda z: torch.sin(2 * z) / 2, (-1, 1)),
    "huber": (
        c.scaled(add(of("sqrt", add(1.0, of("square", c.scaled(Z, 20.0)))), -1.0), 0.05),
        lambda z: 0.05 * ((1 + (20 * z) ** 2).sqrt() - 1), (-1, 1),
    ),
    "z / root": (times(Z, of("rsqrt", add(1.0, times(Z, Z)))), lambda z: z / torch.hypot(z, torch.ones_like(z)), (0, 1)),
    "gauss": (of("exp", c.scaled(times(Z, Z), -0.5)), lambda z: torch.exp(-(z**2) / 2), (-math.exp(-0.5), math.exp(-0.5))),
    "moved gauss": (
        of("exp", add(c.scaled(times(Z, Z), -1.0), Z)), lambda z: torch.exp(z - z**2),
        (-math.exp(0.25) * math.sqrt(2 / math.e), math.exp(0.25) * math.sqrt(2 / math.e)),
    ),
    "z / (1 + z^2)": (times(Z, of("inverse", add(1.0, times(Z, Z)))), lambda z: z / (1 + z**2), (-0.125, 1)),
    "z^2 / (1 + z^2)": (
        times(Z, Z, of("inverse", add(1.0, times(Z, Z)))), lambda z: z**2 / (1 + z**2), (-LORENTZ, LORENTZ),
    ),
    "log(1 + z^2)": (of("log", add(1.0, times(Z, Z))), lambda z: torch.log1p(z**2), (-1, 1)),
    "log cosh": (of("log", of("cosh", Z)), lambda z: torch.log(torch.cosh(z)), (-1, 1)),
    "tanh^2": (of("square", of("tanh", Z)), lambda z: torch.tanh(z) ** 2, (-4 / math.sqrt(27), 4 / math.sqrt(27))),
    "sin sigmoid": (times(of("sin", Z), of("sigmoid", Z)), lambda z: torch.sin(z) * torch.sigmoid(z), (math.nan, math.nan)),
    "one for each": (
        c.scaled(of("sigmoid", c.scaled(Z, torch.tensor([1.0, 4.0]).double())), torch.tensor([4.0, -1.0]).double()),
        lambda z: torch.sigmoid(z * torch.tensor([1.0, 4.0])) * torch.tensor([4.0, -1.0]), (-1, 1),
    ),
}  # fmt: skip
MADE = {name: Formula(NONE, [case[0]]) for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_canonical_form_is_the_function(name: str) -> None:
    z = torch.linspace(-12, 12, 2401, dtype=torch.float64)[:, None].expand(-1, 2)
    expected = CASES[name][1](z)
    torch.testing.assert_close(MADE[name](z), expected, rtol=1e-13, atol=1e-13)
    assert bool(((MADE[name](z) - expected).abs() <= MADE[name].rounding(z) + 1e-14 * (1 + z.abs())).all())


@pytest.mark.parametrize("name", CASES)
def test_the_slopes_are_those_of_the_function(name: str) -> None:
    low, high = (float(end.amin() if k == 0 else end.amax()) for k, end in enumerate(MADE[name].slopes))
    expected = CASES[name][2]
    if not math.isnan(expected[0]):
        assert expected[0] - 1e-6 <= low <= expected[0] + 1e-11
        assert expected[1] - 1e-11 <= high <= expected[1] + 1e-6


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=8, deadline=None)
@given(ends=st.tuples(st.floats(-30, 30), st.floats(-30, 30)), share=st.floats(0, 1))
def test_slopes_on_intervals_hold_the_derivative(name: str, ends: tuple[float, float], share: float) -> None:
    function = MADE[name]
    lower, upper = (torch.full((1, 2), end, dtype=torch.float64) for end in sorted(ends))
    inner = (lower + share * (upper - lower)).clamp(lower, upper).requires_grad_()
    slope = torch.autograd.grad(CASES[name][1](inner).sum(), inner)[0]
    low, high = function.slope_range(lower, upper)
    assert bool((low - 1e-12 <= slope).all()) and bool((slope <= high + 1e-12).all())
    assert bool((low >= function.slopes[0]).all()) and bool((high <= function.slopes[1]).all())
    infinity = torch.full_like(lower, math.inf)
    low, high = function.slope_range(lower, infinity)
    assert bool((low - 1e-12 <= slope).all()) and bool((slope <= high + 1e-12).all())


UNBOUNDED: dict[str, Total] = {
    "z^2": times(Z, Z),
    "exp": of("exp", Z),
    "log": of("log", Z),
    "1 / z": of("inverse", Z),
    "z / (z + 1)": times(Z, of("inverse", add(1.0, Z))),
    "z sin z": times(Z, of("sin", Z)),
    "root of |z|^2 - 1": of("sqrt", add(-1.0, times(Z, Z))),
    "almost cancelled": add(c.scaled(of("exp", Z), 0.1 + 0.2), c.scaled(of("exp", Z), -0.3)),
    "nan": c.scaled(Z, math.nan),
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_a_function_without_bound_is_refused(name: str) -> None:
    with pytest.raises(InvalidModel, match="no bound is known"):
        Formula(NONE, [UNBOUNDED[name]])


def test_both_sides_of_a_break_must_meet() -> None:
    exponential = add(of("exp", Z), -1.0)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    elu = Formula(zero, [exponential, Z])
    z = torch.linspace(-3, 3, 601, dtype=torch.float64)
    torch.testing.assert_close(elu(z), F.elu(z), rtol=1e-14, atol=1e-15)
    assert [float(s) for s in elu.slopes] == pytest.approx([0, 1], abs=1e-9)
    assert [float(s) for s in elu.slope_range(z[:1] * 0 - 1, z[:1] * 0 + 1)] == pytest.approx([math.exp(-1), 1], abs=1e-9)
    for jump in (1e-12, -1e-12, 1.0):
        with pytest.raises(InvalidModel, match="jumps"):
            Formula(zero, [exponential, add(Z, jump)])
    with pytest.raises(InvalidModel, match="ascend"):
        Formula(torch.tensor([[1.0], [0.0]]).double(), [Z, Z, Z])


@pytest.mark.parametrize("name", ["gelu-tanh", "one for each", "moved gauss"])
def test_a_formula_is_rebuilt_from_its_record(name: str) -> None:
    record = MADE[name].to_record()
    again = from_record("Formula", {key: value for key, value in record.items() if key != "kind"})
    assert again.name == MADE[name].name
    assert all(torch.equal(a, b) for a, b in zip(again.tensors(), MADE[name].tensors(), strict=True))
    with pytest.raises(ValueError, match="another formula"):
        from_record("Formula", {**record, "name": "formula z"})
    with pytest.raises(ValueError, match="no function 'sinh'"):
        from_record("Formula", {**record, "totals": [[[number(1.0), [["sinh", []]]]]]})
    with pytest.raises(InvalidModel, match="no bound is known"):  # a forged function is as steep as it is
        from_record("Formula", {**record, "totals": [[[number(1.0), [[], []]]]], "name": "formula #*z*z"})


numbers = st.floats(-1e3, 1e3)


@given(ends=st.lists(numbers, min_size=4, max_size=4), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_interval_arithmetic_encloses(ends: list[float], shares: tuple[float, float]) -> None:
    (a, b), (p, q) = sorted(ends[:2]), sorted(ends[2:])
    x, y = (min(max(low + s * (high - low), low), high) for (low, high), s in zip(((a, b), (p, q)), shares, strict=True))
    first, second = Interval(number(a), number(b)), Interval(number(p), number(q))

    def holds(interval: Interval, value: float) -> bool:
        return bool(interval.low <= value <= interval.high)

    assert holds(first + second, x + y) and holds(first * second, x * y)
    assert holds(first.power(2), x * x) and holds(first.power(3), x * x * x) and bool(first.power(2).low >= 0)
    if a > 0 or b < 0:
        assert holds(first.inverse(), 1 / x)
    if a > 0:
        assert holds(first.log(), math.log(x)) and holds(first.sqrt(), math.sqrt(x))
    if b < 700:
        assert holds(first.exp(), math.exp(x)) and bool(first.exp().low >= 0)


def test_intervals_without_an_end() -> None:
    infinite = Interval(number(1.0), number(math.inf))
    zero = Interval(number(0.0), number(0.0))
    assert [float(e) for e in infinite * zero] == [0, 0]
    assert float((infinite * infinite).high) == math.inf and float(infinite.exp().low) <= math.e
    huge = Interval(number(1e3), number(math.inf)).exp()
    assert math.isfinite(float(huge.low)) and float(huge.high) == math.inf
    assert [float(e) for e in Interval(number(-1.0), number(1.0)).inverse()] == [-math.inf, math.inf]


def test_factors_of_one_name_are_told_apart() -> None:
    assert Factor("sin", Z).key != Factor("sin", TWICE).key
    assert activations.KINDS.count("Formula") == 1

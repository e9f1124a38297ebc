"""Elementwise functions: equal to torch's, extremal slopes proven in interval arithmetic, ranges that enclose."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lipguard.network import activations, smooth
from lipguard.network.activations import Elementwise, bells, error_function, roots
from lipguard.network.smooth import Smooth


def _celu(z: Tensor) -> Tensor:
    # torch's celu in float64 for values; its autograd divides by alpha in float32, so the derivative is written out.
    value = F.celu(z, 0.7).detach()
    return torch.where(z > 0, z, 0.7 * torch.exp(z / 0.7).where(z <= 0, 0.0)) if z.requires_grad else value


GRID = torch.cat([torch.linspace(-30, 30, 6001, dtype=torch.float64), torch.tensor([-3.0, 0.0, 3.0, 6.0]).double()])

CASES: dict[str, tuple[Elementwise, Callable[[Tensor], Tensor]]] = {
    "relu": (activations.relu(), F.relu),
    "leaky": (activations.leaky_relu(0.01), F.leaky_relu),
    "leaky-steep": (activations.leaky_relu(2.5), lambda z: F.leaky_relu(z, 2.5)),
    "leaky-negative": (activations.leaky_relu(-0.5), lambda z: F.leaky_relu(z, -0.5)),
    "hardtanh": (activations.clip(-1.0, 1.0), F.hardtanh),
    "relu6": (activations.clip(0.0, 6.0), F.relu6),
    "clamp-crossed": (activations.clip(1.0, -1.0), lambda z: z.clamp(1.0, -1.0)),
    "clamp-max": (activations.clip(None, 2.0), lambda z: z.clamp(max=2.0)),
    "abs": (activations.absolute(), torch.abs),
    "hardsigmoid": (activations.hardsigmoid(), F.hardsigmoid),
    "softshrink": (activations.softshrink(0.5), F.softshrink),
    "elu": (smooth.elu(), F.elu),
    "elu-2": (smooth.elu(2.0), lambda z: F.elu(z, 2.0)),
    "elu-negative": (smooth.elu(-0.5), lambda z: F.elu(z, -0.5)),
    "selu": (smooth.selu(), F.selu),
    "celu": (smooth.celu(0.7), _celu),
    "tanh": (smooth.tanh(), torch.tanh),
    "sigmoid": (smooth.sigmoid(), torch.sigmoid),
    "logsigmoid": (smooth.logsigmoid(), F.logsigmoid),
    "softsign": (smooth.softsign(), F.softsign),
    "softplus": (smooth.softplus(), lambda z: F.softplus(z, threshold=40)),
    "softplus-3": (smooth.softplus(3.0), lambda z: F.softplus(z, 3.0, threshold=100)),
    "gelu": (smooth.gelu(), F.gelu),
    "gelu-tanh": (smooth.gelu_tanh(), lambda z: F.gelu(z, approximate="tanh")),
    "silu": (smooth.silu(), F.silu),
    "mish": (smooth.mish(), F.mish),
    "hardswish": (smooth.hardswish(), F.hardswish),
    "sin": (smooth.sin(), torch.sin),
    "cos": (smooth.cos(), torch.cos),
    "erf": (error_function.erf(), torch.erf),
    "z-erf": (error_function.z_erf(), lambda z: z * torch.erf(z)),
    "gauss": (bells.gauss(), lambda z: torch.exp(-(z**2))),
    "z-gauss": (bells.z_gauss(), lambda z: z * torch.exp(-(z**2))),
    "lorentz": (bells.lorentz(), lambda z: 1 / (1 + z**2)),
    "z-lorentz": (bells.z_lorentz(), lambda z: z / (1 + z**2)),
    "log-lorentz": (bells.log_lorentz(), lambda z: torch.log(1 + z**2)),
    "root": (roots.root(), lambda z: torch.sqrt(1 + z**2)),
    "z-root": (roots.z_root(), lambda z: z / torch.sqrt(1 + z**2)),
    "atan": (roots.atan(), torch.atan),
    "asinh": (roots.asinh(), torch.asinh),
}
SMOOTH = {name: case[0] for name, case in CASES.items() if isinstance(case[0], Smooth)}


@pytest.mark.parametrize("name", CASES)
def test_equals_torch(name: str) -> None:
    function, reference = CASES[name]
    # A few units in the last place of the larger of value and argument: both sides round a handful of operations.
    torch.testing.assert_close(function(GRID), reference(GRID), rtol=2e-15, atol=2e-14)


def test_softplus_differs_from_torch_by_the_documented_jump() -> None:
    z = torch.tensor([20.0, math.nextafter(20.0, 21.0), 19.0], dtype=torch.float64)
    difference = (smooth.softplus()(z) - F.softplus(z)).abs().max()
    assert 1e-9 < difference < 2.1e-9


@pytest.mark.parametrize("name", CASES)
def test_every_chord_lies_in_the_slope_interval(name: str) -> None:
    function, _ = CASES[name]
    z = torch.linspace(-30, 30, 6001, dtype=torch.float64)
    chords = function(z).diff() / z.diff()
    low, high = function.slopes
    # Two values with errors of 1e-15 (1 + |z|) over a step of 0.01.
    slack = 1e-11
    assert bool((chords >= low - slack).all()) and bool((chords <= high + slack).all())


@pytest.mark.parametrize("name", CASES)
@given(ends=st.tuples(st.floats(-12, 12), st.floats(-12, 12)), share=st.floats(0, 1))
def test_slope_range_encloses_the_derivative_inside(name: str, ends: tuple[float, float], share: float) -> None:
    function, reference = CASES[name]
    lower, upper = (torch.tensor([end], dtype=torch.float64) for end in sorted(ends))
    inner = (lower + share * (upper - lower)).clamp(lower, upper).requires_grad_()
    low, high = function.slope_range(lower, upper)
    slope = torch.autograd.grad(reference(inner).sum(), inner)[0]
    # autograd's own evaluation of the derivative; torch's hardsigmoid takes the sixth in float32
    slack = 6e-9 if name == "hardsigmoid" else 1e-14
    assert bool((low - slack <= slope).all()) and bool((slope <= high + slack).all())
    assert bool((low >= function.slopes[0]).all()) and bool((high <= function.slopes[1]).all())


@pytest.mark.parametrize("name", CASES)
def test_infinite_and_degenerate_intervals(name: str) -> None:
    function, _ = CASES[name]
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    low, high = function.slope_range(-infinity, infinity)
    assert bool(low.isfinite().all()) and bool(high.isfinite().all())
    # Over all of R the range is the slope interval, apart from suprema that are approached at infinity.
    torch.testing.assert_close(low[0], function.slopes[0].reshape(()), rtol=0, atol=3e-12)
    torch.testing.assert_close(high[0], function.slopes[1].reshape(()), rtol=0, atol=3e-12)
    for end in (0.0, 3.0, -3.0, 1.25):
        point = torch.tensor([end], dtype=torch.float64)
        low, high = function.slope_range(point, point)
        assert bool((low <= high).all())
        upper = function.slope_range(point, infinity)
        assert bool((upper[0] <= low).all()) and bool((upper[1] >= high).all())


def test_relu_kink_counts_both_sides() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    assert [float(s) for s in activations.relu().slope_range(zero, zero)] == [0.0, 1.0]
    for function in (activations.leaky_relu(0.1), activations.absolute(), smooth.elu(2.0), smooth.softplus()):
        point = zero.clone().requires_grad_()
        slope = torch.autograd.grad(function(point).sum(), point)[0]
        low, high = function.slope_range(zero, zero)
        assert low <= slope <= high, "autograd of the network must stay inside its own slope intervals at a kink"
    assert [float(s) for s in smooth.elu(2.0).slope_range(zero, zero)] == [1.0, 2.0]
    low, high = smooth.hardswish().slope_range(zero + 3, zero + 3)
    assert 1 - 4 * smooth.ERROR <= low <= 1 and high == 1.5


def test_hardsigmoid_slope_is_rounded_up() -> None:
    assert Fraction(float(activations.hardsigmoid().slopes[1])) * 6 > 1
    assert float(activations.hardsigmoid().slopes[0]) == 0.0


def test_one_slope_per_entry() -> None:
    slope = torch.tensor([-0.5, 0.25, 3.0], dtype=torch.float64)
    function = activations.leaky_relu(slope)
    z = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(function(z), F.prelu(z, slope))
    assert function.slopes[0].tolist() == [-0.5, 0.25, 1.0] and function.slopes[1].tolist() == [1.0, 1.0, 3.0]


# Interval arithmetic: mpmath.iv rounds outward at the precision below.
iv = mpmath.iv


def _sigmoid(z: object) -> object:
    return 1 / (1 + iv.exp(-z))


def _tanh(z: object) -> object:
    return 1 - 2 / (iv.exp(2 * z) + 1)


def _gelu_tanh_parts(z: object) -> tuple[object, object, object, object]:
    k, c = iv.sqrt(2 / iv.pi), iv.mpf("0.044715")
    return _tanh(k * (z + c * z**3)), k * (1 + 3 * c * z**2), 6 * k * c * z, z


def _gelu_tanh_slope(z: object) -> object:
    t, u1, _, z = _gelu_tanh_parts(z)
    return (1 + t) / 2 + z * (1 - t**2) * u1 / 2


def _gelu_tanh_curve(z: object) -> object:
    t, u1, u2, z = _gelu_tanh_parts(z)
    return (1 - t**2) / 2 * (2 * u1 + z * u2 - 2 * z * t * u1**2)


def _silu_slope(z: object) -> object:
    s = _sigmoid(z)
    return s + z * s * (1 - s)


def _silu_curve(z: object) -> object:
    s = _sigmoid(z)
    return s * (1 - s) * (2 + z * (1 - 2 * s))


def _mish_slope(z: object) -> object:
    s, w = _sigmoid(z), 1 - 2 / ((1 + iv.exp(z)) ** 2 + 1)
    return w + z * (1 - w**2) * s


def _mish_curve(z: object) -> object:
    s, w = _sigmoid(z), 1 - 2 / ((1 + iv.exp(z)) ** 2 + 1)
    return (1 - w**2) * s * (2 - z * (2 * w * s + s - 1))


@pytest.mark.parametrize(
    ("name", "slope", "curve"),
    [
        ("gelu-tanh", _gelu_tanh_slope, _gelu_tanh_curve),
        ("silu", _silu_slope, _silu_curve),
        ("mish", _mish_slope, _mish_curve),
    ],
)
def test_extrema_are_proven(name: str, slope: Callable[[object], object], curve: Callable[[object], object]) -> None:
    iv.dps = 40
    function = SMOOTH[name]
    for point in function.critical:
        # phi'' has opposite signs at the ends of a bracket, so the (only) zero is inside; there
        # phi' lies in phi'(a) + phi''([a, b]) [0, b - a].
        a, b = iv.mpf(point.place) - iv.mpf(10) ** -13, iv.mpf(point.place) + iv.mpf(10) ** -13
        signs = curve(a), curve(b)
        assert (signs[0].b < 0 < signs[1].a) or (signs[1].b < 0 < signs[0].a)
        between = iv.mpf([a.a, b.b])
        extremum = slope(a) + curve(between) * iv.mpf([0, (b - a).b])
        assert mpmath.mpf(point.low) <= mpmath.mpf(extremum.a) and mpmath.mpf(extremum.b) <= mpmath.mpf(point.high)
    assert function.bounds == (min(p.low for p in function.critical), max(p.high for p in function.critical))


def test_gelu_extremum_is_proven() -> None:
    with mpmath.workdps(40):
        root = mpmath.sqrt(2)
        peak = mpmath.ncdf(root) + root * mpmath.npdf(root)
        low, high = SMOOTH["gelu"].critical
        assert high.low < peak < high.high and low.low < 1 - peak < low.high
        assert abs(mpmath.mpf(high.place) - root) < 1e-12


@pytest.mark.parametrize(
    ("name", "place", "extreme"),
    [
        ("erf", lambda: mpmath.mpf(0), lambda z: 2 / mpmath.sqrt(mpmath.pi)),
        ("z-erf", lambda: mpmath.mpf(1), lambda z: mpmath.erf(z) + 2 / mpmath.sqrt(mpmath.pi) / mpmath.e),
        ("gauss", lambda: -mpmath.sqrt(0.5), lambda z: -2 * z * mpmath.exp(-(z**2))),
        ("z-gauss", lambda: mpmath.sqrt(1.5), lambda z: (1 - 2 * z**2) * mpmath.exp(-(z**2))),
        ("lorentz", lambda: -1 / mpmath.sqrt(3), lambda z: -2 * z / (1 + z**2) ** 2),
        ("z-lorentz", lambda: mpmath.sqrt(3), lambda z: (1 - z**2) / (1 + z**2) ** 2),
        ("log-lorentz", lambda: mpmath.mpf(1), lambda z: 2 * z / (1 + z**2)),
    ],
)
def test_extremes_in_closed_form(name: str, place: Callable[[], Any], extreme: Callable[[Any], Any]) -> None:
    with mpmath.workdps(40):
        z = place()
        point = min(SMOOTH[name].critical, key=lambda point: abs(point.place - z))
        assert abs(mpmath.mpf(point.place) - z) < 1e-12
        # of the closed form, whose exact values are integers' quotients where the enclosure is one number
        assert point.low - mpmath.mpf(10) ** -38 <= extreme(z) <= point.high + mpmath.mpf(10) ** -38


@pytest.mark.parametrize("name", SMOOTH)
def test_derivative_within_its_stated_error(name: str) -> None:
    function, reference = CASES[name]
    assert isinstance(function, Smooth)
    # Central differences in 40 digits would need every function twice; autograd's derivative is independent of ours.
    z = GRID[(GRID != 0) & (GRID.abs() != 3)].clone().requires_grad_()
    slope = torch.autograd.grad(reference(z).sum(), z)[0]
    assert bool(((function.derivative(z.detach()) - slope).abs() <= smooth.ERROR * (1 + slope.abs())).all())


def test_waves_reach_their_extremes_every_turn() -> None:
    # phi' of sin is cos: 1 where a multiple of 2 pi is inside, -1 where an odd multiple of pi is, else the ends decide.
    sine, cosine = smooth.sin(), smooth.cos()
    expected = [(math.cos(0.5), math.cos(1.0), -1.0), (1.0, math.cos(0.5), math.cos(2.0))]
    for turns in (-1000, -1, 0, 3, 10**6):
        start = 2 * math.pi * turns
        ends = [torch.tensor([start + a for a in places], dtype=torch.float64) for places in ((-0.5, 0.5, 2.0), (0.25, 1.0, 4.0))]
        shifted = [end - math.pi / 2 for end in ends]  # -sin(z - pi / 2) = cos(z)
        for ranges in (sine.slope_range(*ends), cosine.slope_range(*shifted)):
            for ours, theirs in zip(ranges, expected, strict=True):
                # a million turns are known to 1e-9
                torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), atol=1e-8, rtol=0)
    infinite = torch.tensor([math.inf], dtype=torch.float64)
    assert [float(s) for s in sine.slope_range(-infinite, infinite)] == [-1.0, 1.0]
    assert [float(s) for s in cosine.slope_range(-infinite, torch.zeros_like(infinite))] == [-1.0, 1.0]

"""Smooth elementwise functions: each slope interval follows from the zeros of the second derivative.

Between two neighbouring zeros of phi'' the derivative phi' is monotone; its range on an interval is therefore spanned
by its values at the two ends and at the zeros inside. Each function below states the zeros and proves that there are
no others. Where a zero has no closed form, the extremum is given as an enclosure; the tests prove it anew in interval
arithmetic.

Rounding: phi' at an end is evaluated in float64 by formulas whose error is below ERROR (1 + |phi'|); the enclosure is
widened by that much, and cut to the global slope interval, which is exact or rounded outward by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lipguard.network.activations import Elementwise

ERROR = 2.0**-40
"""Allowance for the evaluation of a derivative, absolute and relative: some thousand times what the formulas need."""

NEAR = 1e-9
"""A critical point this close to an interval counts as inside: its place is rounded, its value is not."""


@dataclass(frozen=True)
class Critical:
    """A zero of phi'', or a kink: place (to within 1e-12), and an enclosure of phi' there (of both sides at a kink)."""

    place: float
    low: float
    high: float


class Smooth(Elementwise):
    """phi with derivative phi', which is monotone between critical points.

    Args:
        name: for messages and the digest.
        phi, derivative: called with the entries and the parameters.
        critical: all zeros of phi'' and kinks of phi.
        bounds: slopes on all of R, rounded outward.
        parameters: numbers passed on to phi and derivative.
        reach: beyond it, phi' differs from its limit by less than 2**-50.
    """

    def __init__(
        self,
        name: str,
        phi: Callable[..., Tensor],
        derivative: Callable[..., Tensor],
        critical: tuple[Critical, ...],
        bounds: tuple[float, float],
        parameters: tuple[float, ...] = (),
        reach: float = math.inf,
    ) -> None:
        self.name = name
        self.critical = critical
        self.bounds = bounds
        self.parameters = parameters
        self.reach = reach
        self._phi = phi
        self._derivative = derivative

    def __call__(self, z: Tensor) -> Tensor:
        """phi(z), entry by entry."""
        return self._phi(z, *self.parameters)

    def derivative(self, z: Tensor) -> Tensor:
        """phi'(z) with an error below ERROR (1 + |phi'(z)|); z may be infinite. At a kink, the slope of one side."""
        return self._derivative(z.clamp(-self.reach, self.reach), *self.parameters)

    @property
    def slopes(self) -> tuple[Tensor, Tensor]:
        """(alpha, beta) on all of R, 0-d, rounded outward."""
        return tuple(torch.tensor(end, dtype=torch.float64, device="cpu") for end in self.bounds)  # type: ignore[return-value]

    def slope_range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Range of phi' on [lower, upper]: both ends, and the critical points inside."""
        left, right = self.derivative(lower), self.derivative(upper)
        low, high = torch.minimum(left, right), torch.maximum(left, right)
        low, high = low - ERROR * (1 + low.abs()), high + ERROR * (1 + high.abs())
        for point in self.critical:
            inside = (lower <= point.place + NEAR) & (upper >= point.place - NEAR)
            low = torch.where(inside, low.clamp(max=point.low), low)
            high = torch.where(inside, high.clamp(min=point.high), high)
        return low.clamp(min=self.bounds[0]), high.clamp(max=self.bounds[1])

    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters."""
        return (torch.tensor(self.parameters, dtype=torch.float64, device="cpu"),)


def tanh() -> Smooth:
    """Slopes (0, 1]."""
    # phi' = 1 - tanh^2, phi'' = -2 tanh (1 - tanh^2): zero at 0 only, where phi' = 1; limits 0.
    return Smooth("tanh", torch.tanh, _tanh_slope, (Critical(0.0, 1.0, 1.0),), (0.0, 1.0), reach=100.0)


def _tanh_slope(z: Tensor) -> Tensor:
    return 1 / torch.cosh(z).square()


def sigmoid() -> Smooth:
    """Slopes (0, 1/4]."""
    # phi' = s (1 - s), phi'' = s (1 - s) (1 - 2 s): zero where s = 1/2, at 0 only; phi'(0) = 1/4; limits 0.
    return Smooth("sigmoid", torch.sigmoid, _sigmoid_slope, (Critical(0.0, 0.25, 0.25),), (0.0, 0.25))


def _sigmoid_slope(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z)


def logsigmoid() -> Smooth:
    """log(1 / (1 + e^-z)): slopes (0, 1)."""
    # phi' = s(-z), phi'' = -s(z) s(-z) < 0: no critical point; limits 1 and 0.
    return Smooth("logsigmoid", functional.logsigmoid, _logsigmoid_slope, (), (0.0, 1.0))


def _logsigmoid_slope(z: Tensor) -> Tensor:
    return torch.sigmoid(-z)


def softplus(beta: float = 1.0) -> Smooth:
    """log(1 + e^(beta z)) / beta, beta > 0: slopes (0, 1).

    torch replaces it by z where beta z > threshold, a jump of log(1 + e^-threshold) / beta < 2.1e-9 / beta at the
    default threshold of 20. That step is a device of evaluation; this is the function without it.
    """
    # phi' = s(beta z), phi'' = beta s (1 - s) > 0: no critical point; limits 0 and 1.
    return Smooth("softplus", _softplus, _softplus_slope, (), (0.0, 1.0), (beta,))


def _softplus(z: Tensor, beta: float) -> Tensor:
    t = z * beta
    return torch.logaddexp(t, torch.zeros_like(t)) / beta


def _softplus_slope(z: Tensor, beta: float) -> Tensor:
    return torch.sigmoid(z * beta)


def softsign() -> Smooth:
    """z / (1 + |z|): slopes (0, 1]."""
    # phi' = 1 / (1 + |z|)^2 rises up to 0, falls after it; phi'(0) = 1; limits 0.
    return Smooth("softsign", functional.softsign, _softsign_slope, (Critical(0.0, 1.0, 1.0),), (0.0, 1.0))


def _softsign_slope(z: Tensor) -> Tensor:
    return 1 / (1 + z.abs()).square()


def elu(alpha: float = 1.0) -> Smooth:
    """z for z > 0, alpha (e^z - 1) below: slopes between 0, 1 and alpha."""
    # Left of 0, phi' = alpha e^z is monotone between 0 and alpha; right of 0 it is 1. At 0: alpha on the left, 1 on the right.
    kink = Critical(0.0, min(alpha, 1.0), max(alpha, 1.0))
    return Smooth("elu", functional.elu, _elu_slope, (kink,), (min(alpha, 0.0), max(alpha, 1.0)), (alpha,))


def _elu_slope(z: Tensor, alpha: float) -> Tensor:
    return torch.where(z > 0, torch.ones_like(z), alpha * torch.exp(z.clamp(max=0)))


def selu() -> Smooth:
    """scale elu(z, alpha) with torch's constants: slopes between 0 and scale alpha = 1.7580993408473768..."""
    # Left of 0, phi' = scale alpha e^z in (0, scale alpha); right of 0 it is scale; alpha, scale are torch's float64 constants.
    scale = 1.0507009873554804934193349852946
    left = math.nextafter(_SELU * scale, math.inf)
    return Smooth("selu", torch.selu, _selu_slope, (Critical(0.0, scale, left),), (0.0, left), (), reach=100.0)


_SELU = 1.6732632423543772848170429916717


def _selu_slope(z: Tensor) -> Tensor:
    return 1.0507009873554804934193349852946 * _elu_slope(z, _SELU)


def celu(alpha: float = 1.0) -> Smooth:
    """z for z > 0, alpha (e^(z / alpha) - 1) below, alpha > 0: slopes (0, 1]."""
    # Left of 0, phi' = e^(z / alpha) rises from 0 to 1; right of 0 it is 1.
    return Smooth("celu", _celu, _celu_slope, (Critical(0.0, 1.0, 1.0),), (0.0, 1.0), (alpha,))


def _celu(z: Tensor, alpha: float) -> Tensor:
    # Not functional.celu: its autograd derivative is off by 2e-8, which would show as a slope above 1.
    return torch.where(z > 0, z, alpha * torch.expm1(z.clamp(max=0) / alpha))


def _celu_slope(z: Tensor, alpha: float) -> Tensor:
    return torch.exp(z.clamp(max=0) / alpha)


def gelu() -> Smooth:
    """z Phi(z), Phi the standard normal distribution: slopes about [-0.1289, 1.1289]."""
    # With the density p = Phi', p' = -z p: phi' = Phi + z p and phi'' = (2 - z^2) p, zero at -sqrt 2 and sqrt 2 only.
    # phi'(sqrt 2) = Phi(sqrt 2) + sqrt 2 p(sqrt 2) = 1.12890414518515..., and phi'(-z) = 1 - phi'(z). Limits 0 and 1.
    low, high = 1.128904145185, 1.128904145186
    points = (Critical(-math.sqrt(2), 1 - high - 1e-15, 1 - low + 1e-15), Critical(math.sqrt(2), low, high))
    return Smooth("gelu", functional.gelu, _gelu_slope, points, (points[0].low, high), reach=40.0)


def _gelu_slope(z: Tensor) -> Tensor:
    return torch.special.ndtr(z) + z * torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)


def gelu_tanh() -> Smooth:
    """z (1 + tanh u) / 2, u = k (z + c z^3), k = sqrt(2 / pi), c = 0.044715: slopes about [-0.1290, 1.1290]."""
    # With t = tanh u, t' = (1 - t^2) u': phi'' = (1 - t^2) / 2 [2 u' + z u'' - 2 z t u'^2]. phi'' is even. For z > 0 and
    # q = c z^2 the bracket is zero iff (2 + 12 q) / (z k (1 + 3 q)^2) = 2 tanh u. The left side falls from infinity to 0,
    # as the derivative of (2 + 12 q) / (1 + 3 q)^2 in q is -36 q / (1 + 3 q)^3; the right side rises: exactly one zero,
    # z = 1.41850400879..., phi' = 1.12899306865877..., and phi'(-z) = 1 - phi'(z). Limits 0 and 1.
    low, high = 1.128993068658, 1.128993068659
    z = 1.4185040087908284
    points = (Critical(-z, 1 - high - 1e-15, 1 - low + 1e-15), Critical(z, low, high))
    return Smooth("gelu-tanh", _gelu_tanh, _gelu_tanh_slope, points, (points[0].low, high), reach=12.0)


def _gelu_tanh(z: Tensor) -> Tensor:
    return functional.gelu(z, approximate="tanh")


def _gelu_tanh_slope(z: Tensor) -> Tensor:
    k, c = math.sqrt(2 / math.pi), 0.044715
    u = k * (z + c * z**3)
    return 0.5 * (1 + torch.tanh(u)) + 0.5 * z * k * (1 + 3 * c * z.square()) / torch.cosh(u).square()


def silu() -> Smooth:
    """z s(z), s the sigmoid: slopes about [-0.0998, 1.0998]."""
    # phi' = s + z s (1 - s), phi'' = s (1 - s) [2 + z (1 - 2 s)] = s (1 - s) [2 - z tanh(z / 2)]. z tanh(z / 2) is even and
    # rises for z > 0, so there are two zeros, +-z with z = 2.39935728051546..., phi' = 1.09983932012886..., and
    # phi'(-z) = 1 - phi'(z). Limits 0 and 1.
    low, high = 1.099839320128, 1.099839320129
    z = 2.3993572805154677
    points = (Critical(-z, 1 - high - 1e-15, 1 - low + 1e-15), Critical(z, low, high))
    return Smooth("silu", functional.silu, _silu_slope, points, (points[0].low, high), reach=1000.0)


def _silu_slope(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * torch.sigmoid(-z))


def mish() -> Smooth:
    """z tanh(log(1 + e^z)): slopes about [-0.1125, 1.0885]."""
    # With w = tanh(log(1 + e^z)), s the sigmoid, w' = (1 - w^2) s: phi' = w + z (1 - w^2) s and
    # phi'' = (1 - w^2) s [2 - z r], r = 2 w s + s - 1. r rises (w and s do) through zero at one point z0 = -0.116...
    # z > 0: r > 0 there, z r rises from 0 without bound: one zero. z0 <= z <= 0: z r <= 0, none. z < z0: |z| and -r > 0
    # both rise as z falls, so z r does, from 0: one zero. They are z = 1.49057..., phi' = 1.08849816125172..., and
    # z = -2.25637..., phi' = -0.11252612238946... Limits 0 and 1.
    points = (
        Critical(-2.2563763963607931, -0.112526122390, -0.112526122389),
        Critical(1.4905711794854284, 1.088498161251, 1.088498161252),
    )
    return Smooth("mish", functional.mish, _mish_slope, points, (-0.112526122390, 1.088498161252), reach=40.0)


def _mish_slope(z: Tensor) -> Tensor:
    w = torch.tanh(_softplus(z, 1.0))
    return w + z * (1 - w.square()) * torch.sigmoid(z)


def hardswish() -> Smooth:
    """z min(max(z + 3, 0), 6) / 6: slopes [-1/2, 3/2]."""
    # phi' = 0 below -3, (2 z + 3) / 6 between, rising from -1/2 to 3/2, and 1 above 3: kinks at -3 and 3.
    kinks = (Critical(-3.0, -0.5, 0.0), Critical(3.0, 1.0, 1.5))
    return Smooth("hardswish", functional.hardswish, _hardswish_slope, kinks, (-0.5, 1.5), reach=4.0)


def _hardswish_slope(z: Tensor) -> Tensor:
    inner = (2 * z + 3) / 6
    return torch.where(z.abs() < 3, inner, (z > 0).to(z.dtype))


class Wave(Smooth):
    """sin or cos: phi' is 1 at `peak` + 2 k pi and -1 half a turn from there, for every integer k, and monotone between."""

    def __init__(self, name: str, phi: Callable[..., Tensor], derivative: Callable[..., Tensor], peak: float) -> None:
        super().__init__(name, phi, derivative, (), (-1.0, 1.0))
        self.peak = peak

    def slope_range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Both ends, and 1 and -1 where a place of theirs is inside; [-1, 1] where an end is infinite."""
        low, high = super().slope_range(lower, upper)
        # The place in turns is rounded by a few units, relative; NEAR is far above that up to |z| = 1e6, the second term beyond.
        slack = NEAR + 1e-14 * torch.maximum(lower.abs(), upper.abs())

        def meets(place: float) -> Tensor:
            turns = [(end - place) / (2 * math.pi) for end in (lower - slack, upper + slack)]
            return turns[1].floor() >= turns[0].ceil()

        finite = lower.isfinite() & upper.isfinite()
        low = torch.where(finite & ~meets(self.peak + math.pi), low, -torch.ones_like(low))
        return low, torch.where(finite & ~meets(self.peak), high, torch.ones_like(high))


def sin() -> Wave:
    """Slopes [-1, 1]: cos z, 1 at 0."""
    return Wave("sin", torch.sin, torch.cos, 0.0)


def cos() -> Wave:
    """Slopes [-1, 1]: -sin z, 1 at -pi / 2."""
    return Wave("cos", torch.cos, _cos_slope, -math.pi / 2)


def _cos_slope(z: Tensor) -> Tensor:
    return -torch.sin(z)

"""z Phi(z) and its tanh approximation."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from lipguard.network.activations.named import named
from lipguard.network.activations.smooth import Critical, Smooth


@named("gelu")
def gelu() -> Smooth:
    """z Phi(z), Phi the standard normal distribution: slopes about [-0.1289, 1.1289]."""
    # With the density p = Phi', p' = -z p: phi' = Phi + z p and phi'' = (2 - z^2) p, zero at -sqrt 2 and sqrt 2 only.
    # phi'(sqrt 2) = Phi(sqrt 2) + sqrt 2 p(sqrt 2) = 1.12890414518515..., and phi'(-z) = 1 - phi'(z). Limits 0 and 1.
    low, high = 1.128904145185, 1.128904145186
    points = (Critical(-math.sqrt(2), 1 - high - 1e-15, 1 - low + 1e-15), Critical(math.sqrt(2), low, high))
    return Smooth("gelu", functional.gelu, _gelu_slope, points, (points[0].low, high), reach=40.0)


def _gelu_slope(z: Tensor) -> Tensor:
    return torch.special.ndtr(z) + z * torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)


@named("gelu-tanh")
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

"""The error function, and its product with z."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipguard.network.activations.named import named
from lipguard.network.activations.smooth import Critical, Smooth


@named("erf")
def erf() -> Smooth:
    """The error function: slopes (0, 2 / sqrt(pi)]."""
    # phi' = c e^(-z^2), c = 2 / sqrt pi = 1.1283791670955126...: rises up to 0, falls after it; limits 0.
    low, high = 1.128379167095, 1.128379167096
    return Smooth("erf", torch.erf, _erf_slope, (Critical(0.0, low, high),), (0.0, high), reach=30.0)


def _erf_slope(z: Tensor) -> Tensor:
    return 2 / math.sqrt(math.pi) * torch.exp(-z.square())


@named("z-erf")
def z_erf() -> Smooth:
    """z erf(z): slopes about [-1.2579, 1.2579]."""
    # With c = 2 / sqrt pi: phi' = erf + c z e^(-z^2), odd; phi'' = 2 c (1 - z^2) e^(-z^2): zero at +-1, where |phi'| =
    # erf(1) + c / e = 1.25780829037027...; limits -1 and 1. (gelu(z) is z / 2 + phi(z / sqrt 2) / sqrt 2.)
    low, high = 1.257808290370, 1.257808290371
    points = (Critical(-1.0, -high, -low), Critical(1.0, low, high))
    return Smooth("z-erf", _z_erf, _z_erf_slope, points, (-high, high), reach=30.0)


def _z_erf(z: Tensor) -> Tensor:
    return z * torch.erf(z)


def _z_erf_slope(z: Tensor) -> Tensor:
    return torch.erf(z) + z * _erf_slope(z)

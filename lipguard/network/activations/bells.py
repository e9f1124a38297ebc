"""Functions of algebraic and Gaussian decay, and their products with z."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipguard.network.activations.named import named
from lipguard.network.activations.smooth import Critical, Smooth


@named("gauss")
def gauss() -> Smooth:
    """e^(-z^2): slopes about [-0.8578, 0.8578]."""
    # phi' = -2 z e^(-z^2), phi'' = (4 z^2 - 2) e^(-z^2): zero at +-1/sqrt 2, where |phi'| = sqrt(2 / e) = 0.857763884960706...
    low, high = 0.857763884960, 0.857763884961
    points = (Critical(-math.sqrt(0.5), low, high), Critical(math.sqrt(0.5), -high, -low))
    return Smooth("gauss", _gauss, _gauss_slope, points, (-high, high), reach=30.0)


def _gauss(z: Tensor) -> Tensor:
    return torch.exp(-z.square())


def _gauss_slope(z: Tensor) -> Tensor:
    return -2 * z * torch.exp(-z.square())


@named("z-gauss")
def z_gauss() -> Smooth:
    """z e^(-z^2): slopes about [-0.4463, 1]."""
    # phi' = (1 - 2 z^2) e^(-z^2), phi'' = 2 z (2 z^2 - 3) e^(-z^2): zero at 0, where phi' = 1, and at +-sqrt(3/2), where
    # phi' = -2 e^(-3/2) = -0.44626032029685...; limits 0.
    low, high = -0.446260320297, -0.446260320296
    points = tuple(Critical(z, low, high) for z in (-math.sqrt(1.5), math.sqrt(1.5)))
    return Smooth("z-gauss", _z_gauss, _z_gauss_slope, (Critical(0.0, 1.0, 1.0), *points), (low, 1.0), reach=30.0)


def _z_gauss(z: Tensor) -> Tensor:
    return z * torch.exp(-z.square())


def _z_gauss_slope(z: Tensor) -> Tensor:
    return (1 - 2 * z.square()) * torch.exp(-z.square())


@named("lorentz")
def lorentz() -> Smooth:
    """1 / (1 + z^2): slopes about [-0.6496, 0.6496]."""
    # phi' = -2 z / (1 + z^2)^2, phi'' = (6 z^2 - 2) / (1 + z^2)^3: zero at +-1/sqrt 3, where |phi'| = 3 sqrt 3 / 8 =
    # 0.649519052838329...; limits 0.
    low, high = 0.649519052838, 0.649519052839
    points = (Critical(-math.sqrt(1 / 3), low, high), Critical(math.sqrt(1 / 3), -high, -low))
    return Smooth("lorentz", _lorentz, _lorentz_slope, points, (-high, high), reach=1e100)


def _lorentz(z: Tensor) -> Tensor:
    return 1 / (1 + z.square())


def _lorentz_slope(z: Tensor) -> Tensor:
    # 1 / (1 + z^2) <= 1 / |2 z|: no square overflows before its quotient is 0.
    return -2 * (z / (1 + z.square())) / (1 + z.square())


@named("log-lorentz")
def log_lorentz() -> Smooth:
    """log(1 + z^2): slopes [-1, 1]."""
    # phi' = 2 z / (1 + z^2), phi'' = 2 (1 - z^2) / (1 + z^2)^2: zero at +-1, where |phi'| = 1; limits 0.
    points = (Critical(-1.0, -1.0, -1.0), Critical(1.0, 1.0, 1.0))
    return Smooth("log-lorentz", _log_lorentz, _log_lorentz_slope, points, (-1.0, 1.0), reach=1e100)


def _log_lorentz(z: Tensor) -> Tensor:
    # 2 log sqrt(1 + z^2): no square overflows.
    return torch.where(z.abs() < 1, torch.log1p(z.square()), 2 * torch.log(torch.hypot(z, torch.ones_like(z))))


def _log_lorentz_slope(z: Tensor) -> Tensor:
    return 2 * _z_lorentz(z)


@named("z-lorentz")
def z_lorentz() -> Smooth:
    """z / (1 + z^2): slopes [-1/8, 1]."""
    # phi' = (1 - z^2) / (1 + z^2)^2, phi'' = 2 z (z^2 - 3) / (1 + z^2)^3: zero at 0, where phi' = 1, and at +-sqrt 3, where
    # phi' = -1/8; limits 0.
    points = tuple(Critical(z, -0.125, -0.125) for z in (-math.sqrt(3), math.sqrt(3)))
    return Smooth("z-lorentz", _z_lorentz, _z_lorentz_slope, (Critical(0.0, 1.0, 1.0), *points), (-0.125, 1.0), reach=1e100)


def _z_lorentz(z: Tensor) -> Tensor:
    return torch.where(z.abs() < 1, z / (1 + z.square()), 1 / (z + 1 / z))


def _z_lorentz_slope(z: Tensor) -> Tensor:
    # (1 - z^2) / (1 + z^2) lies in [-1, 1].
    return (1 - z.square()) / (1 + z.square()) / (1 + z.square())

"""Functions made of the root of 1 + z^2."""

from __future__ import annotations

import torch
from torch import Tensor

from lipguard.network.activations.named import named
from lipguard.network.activations.smooth import Critical, Smooth


@named("root")
def root() -> Smooth:
    """sqrt(1 + z^2): slopes (-1, 1)."""
    # phi' = z / sqrt(1 + z^2), phi'' = (1 + z^2)^(-3/2) > 0: no critical point; limits -1 and 1.
    return Smooth("root", _root, _z_root, (), (-1.0, 1.0), reach=1e100)


def _root(z: Tensor) -> Tensor:
    return torch.hypot(z, torch.ones_like(z))


@named("z-root")
def z_root() -> Smooth:
    """z / sqrt(1 + z^2): slopes (0, 1]."""
    # phi' = (1 + z^2)^(-3/2) rises up to 0, where it is 1, and falls after it; limits 0.
    return Smooth("z-root", _z_root, _z_root_slope, (Critical(0.0, 1.0, 1.0),), (0.0, 1.0), reach=1e100)


def _z_root(z: Tensor) -> Tensor:
    # z / sqrt(1 + z^2), also where z is infinite: beyond 1e100 it is 1 or -1 to the last digit.
    near = z.clamp(-1e100, 1e100)
    return near / _root(near)


def _z_root_slope(z: Tensor) -> Tensor:
    return 1 / _root(z) / _root(z) / _root(z)


@named("atan")
def atan() -> Smooth:
    """The inverse tangent: slopes (0, 1]."""
    # phi' = 1 / (1 + z^2) rises up to 0, where it is 1, and falls after it; limits 0.
    return Smooth("atan", torch.atan, _atan_slope, (Critical(0.0, 1.0, 1.0),), (0.0, 1.0), reach=1e100)


def _atan_slope(z: Tensor) -> Tensor:
    return 1 / (1 + z.square())


@named("asinh")
def asinh() -> Smooth:
    """The inverse hyperbolic sine: slopes (0, 1]."""
    # phi' = 1 / sqrt(1 + z^2) rises up to 0, where it is 1, and falls after it; limits 0.
    return Smooth("asinh", torch.asinh, _asinh_slope, (Critical(0.0, 1.0, 1.0),), (0.0, 1.0), reach=1e100)


def _asinh_slope(z: Tensor) -> Tensor:
    return 1 / _root(z)

"""Exponential linear units: ELU, SELU, CELU."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from lipguard.errors import InvalidModel
from lipguard.network.activations.named import named
from lipguard.network.activations.smooth import Critical, Smooth


@named("elu")
def elu(alpha: float = 1.0) -> Smooth:
    """z for z > 0, alpha (e^z - 1) below: slopes between 0, 1 and alpha."""
    # Left of 0, phi' = alpha e^z is monotone between 0 and alpha; right of 0 it is 1. At 0: alpha on the left, 1 on the right.
    kink = Critical(0.0, min(alpha, 1.0), max(alpha, 1.0))
    return Smooth("elu", functional.elu, _elu_slope, (kink,), (min(alpha, 0.0), max(alpha, 1.0)), (alpha,))


def _elu_slope(z: Tensor, alpha: float) -> Tensor:
    return torch.where(z > 0, torch.ones_like(z), alpha * torch.exp(z.clamp(max=0)))


@named("selu")
def selu() -> Smooth:
    """scale elu(z, alpha) with torch's constants: slopes between 0 and scale alpha = 1.7580993408473768..."""
    # Left of 0, phi' = scale alpha e^z in (0, scale alpha); right of 0 it is scale; alpha, scale are torch's float64 constants.
    scale = 1.0507009873554804934193349852946
    left = math.nextafter(_SELU * scale, math.inf)
    return Smooth("selu", torch.selu, _selu_slope, (Critical(0.0, scale, left),), (0.0, left), (), reach=100.0)


_SELU = 1.6732632423543772848170429916717


def _selu_slope(z: Tensor) -> Tensor:
    return 1.0507009873554804934193349852946 * _elu_slope(z, _SELU)


@named("celu")
def celu(alpha: float = 1.0) -> Smooth:
    """z for z > 0, alpha (e^(z / alpha) - 1) below, alpha > 0: slopes (0, 1]."""
    if not alpha > 0:
        raise InvalidModel(f"celu has alpha = {alpha}: its slope e^(z / alpha) has no bound. Use alpha > 0.")
    # Left of 0, phi' = e^(z / alpha) rises from 0 to 1; right of 0 it is 1.
    return Smooth("celu", _celu, _celu_slope, (Critical(0.0, 1.0, 1.0),), (0.0, 1.0), (alpha,))


def _celu(z: Tensor, alpha: float) -> Tensor:
    # Not functional.celu: its autograd derivative is off by 2e-8, which would show as a slope above 1.
    return torch.where(z > 0, z, alpha * torch.expm1(z.clamp(max=0) / alpha))


def _celu_slope(z: Tensor, alpha: float) -> Tensor:
    return torch.exp(z.clamp(max=0) / alpha)

"""z tanh(log(1 + e^z))."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lipguard.network.activations.named import named
from lipguard.network.activations.smooth import Critical, Smooth
from lipguard.network.activations.softplus import softplus_value


@named("mish")
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
    w = torch.tanh(softplus_value(z, 1.0))
    return w + z * (1 - w.square()) * torch.sigmoid(z)

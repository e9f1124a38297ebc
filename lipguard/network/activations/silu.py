"""z times the logistic function of z."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lipguard.network.activations.named import named
from lipguard.network.activations.smooth import Critical, Smooth


@named("silu")
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

"""The hyperbolic tangent."""

from __future__ import annotations

import torch
from torch import Tensor

from lipguard.network.activations.named import named
from lipguard.network.activations.smooth import Critical, Smooth


@named("tanh")
def tanh() -> Smooth:
    """Slopes (0, 1]."""
    # phi' = 1 - tanh^2, phi'' = -2 tanh (1 - tanh^2): zero at 0 only, where phi' = 1; limits 0.
    return Smooth("tanh", torch.tanh, _tanh_slope, (Critical(0.0, 1.0, 1.0),), (0.0, 1.0), reach=100.0)


def _tanh_slope(z: Tensor) -> Tensor:
    return 1 / torch.cosh(z).square()

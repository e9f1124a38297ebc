"""z min(max(z + 3, 0), 6) / 6."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lipguard.network.activations.named import named
from lipguard.network.activations.smooth import Critical, Smooth


@named("hardswish")
def hardswish() -> Smooth:
    """z min(max(z + 3, 0), 6) / 6: slopes [-1/2, 3/2]."""
    # phi' = 0 below -3, (2 z + 3) / 6 between, rising from -1/2 to 3/2, and 1 above 3: kinks at -3 and 3.
    kinks = (Critical(-3.0, -0.5, 0.0), Critical(3.0, 1.0, 1.5))
    return Smooth("hardswish", functional.hardswish, _hardswish_slope, kinks, (-0.5, 1.5), reach=4.0)


def _hardswish_slope(z: Tensor) -> Tensor:
    inner = (2 * z + 3) / 6
    return torch.where(z.abs() < 3, inner, (z > 0).to(z.dtype))

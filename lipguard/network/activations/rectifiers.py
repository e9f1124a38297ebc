"""max(z, 0) and its leaky relatives."""

from __future__ import annotations

import torch
from torch import Tensor

from lipguard.network.activations.piecewise import PiecewiseLinear, number, numbers


def relu() -> PiecewiseLinear:
    """max(z, 0): slopes 0 and 1."""
    return PiecewiseLinear("relu", numbers(0.0), numbers(0.0, 1.0))


def leaky_relu(slope: float | Tensor, name: str = "leaky-relu") -> PiecewiseLinear:
    """z for z > 0, slope z below: slopes `slope` and 1; one slope, or one per entry (PReLU), of any sign and size."""
    left = number(slope)
    return PiecewiseLinear(name, numbers(0.0, like=left), torch.stack([left, torch.ones_like(left)]))

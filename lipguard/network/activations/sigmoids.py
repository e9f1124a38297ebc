"""The logistic function and its logarithm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lipguard.network.activations.named import named
from lipguard.network.activations.smooth import Critical, Smooth


@named("sigmoid")
def sigmoid() -> Smooth:
    """Slopes (0, 1/4]."""
    # phi' = s (1 - s), phi'' = s (1 - s) (1 - 2 s): zero where s = 1/2, at 0 only; phi'(0) = 1/4; limits 0.
    return Smooth("sigmoid", torch.sigmoid, _sigmoid_slope, (Critical(0.0, 0.25, 0.25),), (0.0, 0.25))


def _sigmoid_slope(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z)


@named("logsigmoid")
def logsigmoid() -> Smooth:
    """log(1 / (1 + e^-z)): slopes (0, 1)."""
    # phi' = s(-z), phi'' = -s(z) s(-z) < 0: no critical point; limits 1 and 0.
    return Smooth("logsigmoid", functional.logsigmoid, _logsigmoid_slope, (), (0.0, 1.0))


def _logsigmoid_slope(z: Tensor) -> Tensor:
    return torch.sigmoid(-z)

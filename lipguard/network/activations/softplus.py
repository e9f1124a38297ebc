"""log(1 + e^z), scaled."""

from __future__ import annotations

import torch
from torch import Tensor

from lipguard.errors import InvalidModel
from lipguard.network.activations.named import named
from lipguard.network.activations.smooth import Smooth


@named("softplus")
def softplus(beta: float = 1.0) -> Smooth:
    """log(1 + e^(beta z)) / beta, beta > 0: slopes (0, 1).

    torch replaces it by z where beta z > threshold, a jump of log(1 + e^-threshold) / beta < 2.1e-9 / beta at the
    default threshold of 20. That step is a device of evaluation; this is the function without it.
    """
    if not beta > 0:
        raise InvalidModel(f"softplus has beta = {beta}; only beta > 0 is a softplus.")
    # phi' = s(beta z), phi'' = beta s (1 - s) > 0: no critical point; limits 0 and 1.
    return Smooth("softplus", softplus_value, _softplus_slope, (), (0.0, 1.0), (beta,))


def softplus_value(z: Tensor, beta: float) -> Tensor:
    """Without overflow for any z."""
    t = z * beta
    return torch.logaddexp(t, torch.zeros_like(t)) / beta


def _softplus_slope(z: Tensor, beta: float) -> Tensor:
    return torch.sigmoid(z * beta)

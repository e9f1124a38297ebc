"""`ReLUTheta`: a ReLU with a learnable ceiling, which leaves more neurons without slope on a ball of inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lipguard.errors import UnsupportedQuery


class ReLUTheta(nn.Module):
    """min(max(z, 0), theta), with theta >= 0 one number for each feature, or one for all.

    A neuron whose pre-activation stays below 0 or above theta on a ball has slope 0 there: the local bound drops its row
    and its column. A theta that training drives below 0 counts as 0.

    Args:
        features: number of thetas: 1, or the size of the dimension behind the batch (features, or channels).
        theta: first value, >= 0.

    Source: Huang et al. 2021, arXiv:2111.01395, section 4.
    """

    def __init__(self, features: int = 1, theta: float = 1.0) -> None:
        super().__init__()
        if features < 1 or not theta >= 0:
            raise UnsupportedQuery(f"ReLUTheta: features={features!r} must be at least 1 and theta={theta!r} at least 0.")
        self.theta = nn.Parameter(torch.full((features,), float(theta)))

    def forward(self, z: Tensor) -> Tensor:
        """The function, entry by entry, of (batch, features, ...)."""
        theta = self.theta.clamp_min(0.0)
        if theta.numel() > 1:
            theta = theta.reshape(-1, *[1] * (z.ndim - 2))
        return torch.clamp(z, torch.zeros_like(theta), theta)

    def extra_repr(self) -> str:
        """The number of thetas."""
        return f"features={self.theta.numel()}"

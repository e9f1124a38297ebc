"""z / (1 + |z|)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from lipguard.network.activations.named import named
from lipguard.network.activations.smooth import Critical, Smooth


@named("softsign")
def softsign() -> Smooth:
    """z / (1 + |z|): slopes (0, 1]."""
    # phi' = 1 / (1 + |z|)^2 rises up to 0, falls after it; phi'(0) = 1; limits 0.
    return Smooth("softsign", functional.softsign, _softsign_slope, (Critical(0.0, 1.0, 1.0),), (0.0, 1.0))


def _softsign_slope(z: Tensor) -> Tensor:
    return 1 / (1 + z.abs()).square()

"""min(max(z, lower), upper)."""

from __future__ import annotations

import torch
from torch import Tensor

from lipguard.network.activations.piecewise import PiecewiseLinear, number


def clip(lower: float | Tensor | None = None, upper: float | Tensor | None = None, name: str = "clip") -> PiecewiseLinear:
    """min(max(z, lower), upper): slopes 0 and 1 (Hardtanh, ReLU6, clamp); the ends may be one per entry.

    With lower > upper torch.clamp is the constant `upper`; both break points are then put there, with slope 0 between
    and on both sides.
    """
    ends = [number(end) for end in (lower, upper) if end is not None]
    if len(ends) == 2:
        low, high = torch.broadcast_tensors(*ends)
        crossed = low > high
        low = torch.where(crossed, high, low)
        middle = torch.where(crossed, torch.zeros_like(low), torch.ones_like(low))
        zero = torch.zeros_like(low)
        return PiecewiseLinear(name, torch.stack([low, high]), torch.stack([zero, middle, zero]), low)
    if not ends:
        raise ValueError("clip needs a lower or an upper end.")
    zero, one = torch.zeros_like(ends[0]), torch.ones_like(ends[0])
    return PiecewiseLinear(name, ends[0][None], torch.stack([zero, one] if upper is None else [one, zero]), ends[0])

"""`PiecewiseLinear`: functions by break points and slopes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lipguard.network.activations.base import Elementwise


class PiecewiseLinear(Elementwise):
    """Continuous and piecewise linear, phi(anchor) = value: ReLU, LeakyReLU, PReLU, Hardtanh, ReLU6, Hardsigmoid.

    Args:
        breaks: increasing break points, shape (k,) or (k, size).
        pieces: slopes left of the first break, between breaks, right of the last; shape (k + 1,) or (k + 1, size).
        value: phi at the first break.
        rounded: the pieces are themselves rounded to float64 (a sixth), so that the slopes must be widened outward.
    """

    def __init__(self, name: str, breaks: Tensor, pieces: Tensor, value: Tensor | float = 0.0, rounded: bool = False) -> None:
        self.name = name
        self.rounded = rounded
        self.breaks = breaks
        self.pieces = pieces
        self.value = torch.as_tensor(value, dtype=torch.float64, device=breaks.device)

    def __call__(self, z: Tensor) -> Tensor:
        """phi(z), by the piece that z lies on; at a break point autograd gives the slope of the piece on its left."""
        start = self.value
        result = start + self.pieces[0] * (z - self.breaks[0])
        for i, left in enumerate(self.breaks):
            if i > 0:
                start = start + self.pieces[i] * (left - self.breaks[i - 1])
            result = torch.where(z > left, start + self.pieces[i + 1] * (z - left), result)
        return result

    @property
    def slopes(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest slope: exact, or widened by one floating-point number."""
        return self._outward(self.pieces.amin(0), self.pieces.amax(0))

    def slope_range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Slopes of the pieces that meet [lower, upper]; a break point at an end counts both its sides."""
        low, high = torch.full_like(lower, torch.inf), torch.full_like(lower, -torch.inf)
        for i in range(len(self.pieces)):
            meets = torch.ones_like(lower, dtype=torch.bool)
            if i > 0:
                meets &= upper >= self.breaks[i - 1]
            if i < len(self.breaks):
                meets &= lower <= self.breaks[i]
            slope = self.pieces[i].expand_as(lower)
            low, high = torch.where(meets, torch.minimum(low, slope), low), torch.where(meets, torch.maximum(high, slope), high)
        return self._outward(low, high)

    def rounding(self, z: Tensor) -> Tensor:
        """Every piece is reached from the first break point, however distant: its size counts as well as that of z."""
        # Sums of at most k + 2 products s_i (b_i - b_{i-1}) or s (z - b), three roundings each.
        reach = z.abs() + 3 * self.breaks.abs().sum(0)
        mass = self.value.abs() + self.steepest * reach
        return (8 * len(self.breaks) + 16) * 2.0**-53 * mass

    def tensors(self) -> tuple[Tensor, ...]:
        """Break points, slopes and the value at the first break."""
        return self.breaks, self.pieces, self.value

    @property
    def piecewise(self) -> PiecewiseLinear:
        """Itself."""
        return self

    def to(self, device: torch.device) -> PiecewiseLinear:
        """The function with its break points and slopes on a device."""
        return PiecewiseLinear(
            self.name, self.breaks.to(device), self.pieces.to(device), self.value.to(device), rounded=self.rounded
        )

    def to_record(self) -> dict[str, Any]:
        """Name, break points, slopes and value: they are the function. Whether slopes are rounded, the name says.

        Raises:
            UnsupportedLayer: it is of a subclass, which has no record form of its own.
        """
        if type(self) is not PiecewiseLinear:
            return super().to_record()
        return {"kind": "PiecewiseLinear", "name": self.name, "breaks": self.breaks, "pieces": self.pieces, "value": self.value}

    def _outward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if not self.rounded:
            return low, high
        infinity = torch.full_like(low, torch.inf)  # zero is a slope no rounding has touched
        low = torch.where(low == 0, low, torch.nextafter(low, -infinity))
        return low, torch.where(high == 0, high, torch.nextafter(high, infinity))


def numbers(*values: float, like: Tensor | None = None) -> Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64, device="cpu" if like is None else like.device)


def number(value: float | Tensor) -> Tensor:
    """A float64 tensor."""
    return value.to(torch.float64) if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")

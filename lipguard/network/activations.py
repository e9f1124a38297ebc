"""Elementwise functions with proven slope intervals, on all of R and on intervals."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Elementwise(ABC):
    """A function phi: R -> R applied entry by entry, with alpha <= (phi(s) - phi(t)) / (s - t) <= beta.

    Parameters may be one number for all entries or one per entry (shape (size,)).
    """

    name: str

    @abstractmethod
    def __call__(self, z: Tensor) -> Tensor:
        """phi(z), entry by entry, float64."""

    @property
    @abstractmethod
    def slopes(self) -> tuple[Tensor, Tensor]:
        """(alpha, beta) on all of R, rounded outward; 0-d or (size,)."""

    @abstractmethod
    def slope_range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Enclosure of every slope (generalised derivative) of phi on [lower, upper], entry by entry, rounded outward."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters, for the digest."""
        return ()


class PiecewiseLinear(Elementwise):
    """Continuous and piecewise linear, phi(anchor) = value: ReLU, LeakyReLU, PReLU, Hardtanh, ReLU6, Hardsigmoid.

    Args:
        breaks: increasing break points, shape (k,) or (k, size).
        pieces: slopes left of the first break, between breaks, right of the last; shape (k + 1,) or (k + 1, size).
        value: phi at the first break.
    """

    def __init__(self, name: str, breaks: Tensor, pieces: Tensor, value: Tensor | float = 0.0) -> None:
        self.name = name
        self.breaks = breaks
        self.pieces = pieces
        self.value = torch.as_tensor(value, dtype=torch.float64)

    def __call__(self, z: Tensor) -> Tensor:
        """phi(z): the value at the first break plus the integral of the slopes."""
        first = self.breaks[0]
        result = self.value + self.pieces[0] * (z - first).clamp(max=0)
        for i in range(1, len(self.pieces)):
            end = self.breaks[i] if i < len(self.breaks) else None
            part = z.clamp(max=end) if end is not None else z
            result = result + self.pieces[i] * (part - self.breaks[i - 1]).clamp(min=0)
        return result

    @property
    def slopes(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest slope: exact."""
        return self.pieces.amin(0), self.pieces.amax(0)

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
        return low, high

    def tensors(self) -> tuple[Tensor, ...]:
        """Break points, slopes and the value at the first break."""
        return self.breaks, self.pieces, self.value


def relu() -> PiecewiseLinear:
    """max(z, 0): slopes 0 and 1."""
    return PiecewiseLinear("relu", torch.zeros(1, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64))

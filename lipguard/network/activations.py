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

    def rounding(self, z: Tensor) -> Tensor:
        """Upper bound of the rounding error of phi(z), entry by entry.

        Torch's elementary functions are accurate to a few ulps (2**-52); 2**-40 is granted, relative to phi(z) and to z.
        """
        alpha, beta = self.slopes
        return 2.0**-40 * (self(z).abs() + torch.maximum(alpha.abs(), beta.abs()) * z.abs())

    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters, for the digest."""
        return ()


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
        alpha, beta = self.slopes
        steepest = torch.maximum(alpha.abs(), beta.abs())
        # Sums of at most k + 2 products s_i (b_i - b_{i-1}) or s (z - b), three roundings each.
        reach = z.abs() + 3 * self.breaks.abs().sum(0)
        mass = self.value.abs() + steepest * reach
        return (8 * len(self.breaks) + 16) * 2.0**-53 * mass

    def tensors(self) -> tuple[Tensor, ...]:
        """Break points, slopes and the value at the first break."""
        return self.breaks, self.pieces, self.value

    def _outward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if not self.rounded:
            return low, high
        infinity = torch.full_like(low, torch.inf)  # zero is a slope no rounding has touched
        low = torch.where(low == 0, low, torch.nextafter(low, -infinity))
        return low, torch.where(high == 0, high, torch.nextafter(high, infinity))


def relu() -> PiecewiseLinear:
    """max(z, 0): slopes 0 and 1."""
    return PiecewiseLinear("relu", _numbers(0.0), _numbers(0.0, 1.0))


def leaky_relu(slope: float | Tensor, name: str = "leaky-relu") -> PiecewiseLinear:
    """z for z > 0, slope z below: slopes `slope` and 1; one slope, or one per entry (PReLU), of any sign and size."""
    left = _number(slope)
    return PiecewiseLinear(name, _numbers(0.0, like=left), torch.stack([left, torch.ones_like(left)]))


def clip(lower: float | Tensor | None = None, upper: float | Tensor | None = None, name: str = "clip") -> PiecewiseLinear:
    """min(max(z, lower), upper): slopes 0 and 1 (Hardtanh, ReLU6, clamp); the ends may be one per entry.

    With lower > upper torch.clamp is the constant `upper`; both break points are then put there, with slope 0 between
    and on both sides.
    """
    ends = [_number(end) for end in (lower, upper) if end is not None]
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


def absolute() -> PiecewiseLinear:
    """|z|: slopes -1 and 1."""
    return PiecewiseLinear("abs", _numbers(0.0), _numbers(-1.0, 1.0))


def hardsigmoid() -> PiecewiseLinear:
    """min(max(z + 3, 0), 6) / 6: slopes 0 and 1/6, which float64 rounds."""
    return PiecewiseLinear("hardsigmoid", _numbers(-3.0, 3.0), _numbers(0.0, 1 / 6, 0.0), rounded=True)


def softshrink(threshold: float) -> PiecewiseLinear:
    """z moved towards 0 by `threshold` >= 0, and 0 where it would cross it: slopes 1, 0, 1."""
    return PiecewiseLinear("softshrink", _numbers(-threshold, threshold), _numbers(1.0, 0.0, 1.0))


def _numbers(*values: float, like: Tensor | None = None) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu" if like is None else like.device)


def _number(value: float | Tensor) -> Tensor:
    return value.to(torch.float64) if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")

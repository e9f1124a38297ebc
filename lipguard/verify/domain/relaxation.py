"""Two lines around an elementwise function on an interval, proved: what linear propagation puts in place of a neuron.

For every slope s, phi(p) - s p <= max over the interval gives an upper line of slope s, and its minimum a lower one. The
slopes are chosen so that a smaller interval around the same centre gives lines at least as near: the chord, where it
lies on that side of the function, and else the slope at the centre, which does not depend on the interval. Where a phase
is known the slope is the piece's, and both lines are the piece itself, but for rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lipguard.network.activations import Elementwise, PiecewiseLinear
from lipguard.rounding import UNIT

_PIECES = 16
"""Parts of an interval on which a function that is not piecewise linear is enclosed by its slopes."""


@dataclass(frozen=True, eq=False)
class Lines:
    """low_slope p + low_height <= phi(p) <= high_slope p + high_height on the interval, (K, size) each."""

    low_slope: Tensor
    low_height: Tensor
    high_slope: Tensor
    high_height: Tensor


class Intervals:
    """phi on intervals [lower, upper], lower <= upper, (K, size): at the ends and at the breaks or equidistant points between."""

    def __init__(self, function: Elementwise, lower: Tensor, upper: Tensor) -> None:
        if isinstance(function, PiecewiseLinear):
            inner = [torch.minimum(torch.maximum(b, lower), upper) for b in function.breaks.to(lower)]
        else:
            step = (upper - lower) / _PIECES
            inner = [torch.minimum(lower + step * k, upper) for k in range(1, _PIECES)]
        self.function, self.points = function, torch.stack([lower, *inner, upper])
        self.values, self.rounding = function(self.points), function.rounding(self.points)

    def deviation(self, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Enclosure of the range of phi(p) - slope p on each interval."""
        function, points, values = self.function, self.points, self.values
        line = slope * points
        found = values - line
        # phi rounds as it says; slope p and the difference round by u of themselves each.
        error = (self.rounding + 4 * UNIT * (values.abs() + line.abs())).amax(0)
        if isinstance(function, PiecewiseLinear):
            # Linear between the ends and the breaks: the extremes are among these values.
            return found.amin(0) - error, found.amax(0) + error
        a, b = function.slope_range(points[:-1], points[1:])
        a, b = a - slope, b - slope
        # The length of an interval rounds by u of itself.
        h = (points[1:] - points[:-1]) * (1 + 2 * UNIT)
        first, last = found[:-1], found[1:]
        # Six roundings of `_peak`, each of at most the sizes that are added there.
        rounded = 16 * UNIT * (first.abs() + last.abs() + h * torch.maximum(a.abs(), b.abs()))
        high, low = _peak(first, last, a, b, h) + rounded, -_peak(-first, -last, -b, -a, h) - rounded
        return low.amin(0) - error, high.amax(0) + error

    def lines(self, center: Tensor, slopes: Tensor | None = None) -> Lines:
        """Lines around phi on each interval.

        Args:
            center: a point inside; any will do for the proof.
            slopes: of both lines where they are given, nan elsewhere; any will do for the proof.
        """
        if slopes is not None and not bool(slopes.isnan().any()):
            low, high = self.deviation(slopes)
            return Lines(slopes, low, slopes, high)
        points, values = self.points, self.values
        low, high = self.function.slope_range(center, center)
        tangent = (low + high) / 2
        width = points[-1] - points[0]
        chord = torch.where(width > 0, (values[-1] - values[0]) / width.clamp_min(1e-300), tangent)
        offset = values - values[0] - chord * (points - points[0])
        # A guess decides which slope is taken; the heights below are proved for whatever was taken.
        near = 1e-9 * (values[-1] - values[0]).abs()
        high_slope = torch.where((offset <= near).all(0), chord, tangent)
        low_slope = torch.where((offset >= -near).all(0), chord, tangent)
        if slopes is not None:
            low_slope, high_slope = (torch.where(slopes.isnan(), s, slopes) for s in (low_slope, high_slope))
        return Lines(low_slope, self.deviation(low_slope)[0], high_slope, self.deviation(high_slope)[1])


def _peak(first: Tensor, last: Tensor, a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """Largest value on an interval of length h of a function with these ends and slopes in [a, b].

    It lies below first + b x and below last - a (h - x); where a < 0 < b these meet at the value below.
    """
    share = b.clamp_min(0) / (b.clamp_min(0) - a.clamp_max(0)).clamp_min(1e-300)
    inside = first + share * (last - first) + h * share * -a.clamp_max(0)
    return torch.where((a < 0) & (b > 0), inside, torch.maximum(first, last))

"""Two lines around an elementwise function on an interval, proved: what linear propagation puts in place of a neuron.

For every slope s, phi(p) - s p <= max over the interval gives an upper line of slope s, and its minimum a lower one. The
slopes are chosen so that a smaller interval around the same centre gives lines at least as near: the chord, where it
lies on that side of the function, and else the slope at the centre, which does not depend on the interval.
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


def relax(function: Elementwise, lower: Tensor, upper: Tensor, center: Tensor) -> Lines:
    """Lines around phi on [lower, upper], entry by entry.

    Args:
        function: phi.
        lower, upper: ends, (K, size), lower <= upper.
        center: a point inside; any will do for the proof.
    """
    points = torch.stack(_grid(function, lower, upper))
    values = function(points)
    low, high = function.slope_range(center, center)
    tangent = (low + high) / 2
    width = upper - lower
    chord = torch.where(width > 0, (values[-1] - values[0]) / width.clamp_min(1e-300), tangent)
    offset = values - values[0] - chord * (points - points[0])
    # A guess decides which slope is taken; the heights below are proved for whatever was taken.
    near = 1e-9 * (values[-1] - values[0]).abs()
    high_slope = torch.where((offset <= near).all(0), chord, tangent)
    low_slope = torch.where((offset >= -near).all(0), chord, tangent)
    return Lines(
        low_slope, deviation(function, low_slope, lower, upper)[0], high_slope, deviation(function, high_slope, lower, upper)[1]
    )


def deviation(function: Elementwise, slope: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Enclosure of the range of phi(p) - slope p over [lower, upper], entry by entry, rounding included."""
    points = _grid(function, lower, upper)
    values, slack = [], []
    for p in points:
        value = function(p)
        values.append(value - slope * p)
        slack.append(function.rounding(p) + 4 * UNIT * (value.abs() + (slope * p).abs()))
    error = torch.stack(slack).amax(0)
    if isinstance(function, PiecewiseLinear):
        # Linear between the ends and the breaks: the extremes are among these values.
        found = torch.stack(values)
        return found.amin(0) - error, found.amax(0) + error
    low, high = values[0], values[0]
    for left, right, first, last in zip(points, points[1:], values, values[1:], strict=False):
        a, b = function.slope_range(left, right)
        a, b = a - slope, b - slope
        h = (right - left) * (1 + 2 * UNIT)
        rounded = 16 * UNIT * (first.abs() + last.abs() + h * torch.maximum(a.abs(), b.abs()))
        high = torch.maximum(high, _peak(first, last, a, b, h) + rounded)
        low = torch.minimum(low, -_peak(-first, -last, -b, -a, h) - rounded)
    return low - error, high + error


def _peak(first: Tensor, last: Tensor, a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """Largest value on an interval of length h of a function with these ends and slopes in [a, b].

    It lies below first + b x and below last - a (h - x); where a < 0 < b these meet at the value below.
    """
    share = b.clamp_min(0) / (b.clamp_min(0) - a.clamp_max(0)).clamp_min(1e-300)
    inside = first + share * (last - first) + h * share * -a.clamp_max(0)
    return torch.where((a < 0) & (b > 0), inside, torch.maximum(first, last))


def _grid(function: Elementwise, lower: Tensor, upper: Tensor) -> list[Tensor]:
    """Points from lower to upper, in order: the ends, and the breaks or equidistant points between."""
    if isinstance(function, PiecewiseLinear):
        breaks = function.breaks.to(lower)
        return [lower, *(torch.minimum(torch.maximum(b, lower), upper) for b in breaks), upper]
    step = (upper - lower) / _PIECES
    return [lower, *(torch.minimum(lower + step * k, upper) for k in range(1, _PIECES)), upper]

"""Soft shrinkage."""

from __future__ import annotations

from lipguard.network.activations.piecewise import PiecewiseLinear, numbers


def softshrink(threshold: float) -> PiecewiseLinear:
    """z moved towards 0 by `threshold` >= 0, and 0 where it would cross it: slopes 1, 0, 1."""
    return PiecewiseLinear("softshrink", numbers(-threshold, threshold), numbers(1.0, 0.0, 1.0))

"""The piecewise linear sigmoid."""

from __future__ import annotations

from lipguard.network.activations.piecewise import PiecewiseLinear, numbers


def hardsigmoid() -> PiecewiseLinear:
    """min(max(z + 3, 0), 6) / 6: slopes 0 and 1/6, which float64 rounds."""
    return PiecewiseLinear("hardsigmoid", numbers(-3.0, 3.0), numbers(0.0, 1 / 6, 0.0), rounded=True)

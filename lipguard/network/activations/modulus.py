"""The absolute value."""

from __future__ import annotations

from lipguard.network.activations.piecewise import PiecewiseLinear, numbers


def absolute() -> PiecewiseLinear:
    """|z|: slopes -1 and 1."""
    return PiecewiseLinear("abs", numbers(0.0), numbers(-1.0, 1.0))

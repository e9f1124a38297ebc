"""Sine and cosine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from lipguard.network.activations.named import named
from lipguard.network.activations.smooth import NEAR, Smooth


class Wave(Smooth):
    """sin or cos: phi' is 1 at `peak` + 2 k pi and -1 half a turn from there, for every integer k, and monotone between."""

    kind: ClassVar[str] = "Wave"

    def __init__(self, name: str, phi: Callable[..., Tensor], derivative: Callable[..., Tensor], peak: float) -> None:
        super().__init__(name, phi, derivative, (), (-1.0, 1.0))
        self.peak = peak

    def slope_range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Both ends, and 1 and -1 where a place of theirs is inside; [-1, 1] where an end is infinite."""
        low, high = super().slope_range(lower, upper)
        # The place in turns is rounded by a few units, relative; NEAR is far above that up to |z| = 1e6, the second term beyond.
        slack = NEAR + 1e-14 * torch.maximum(lower.abs(), upper.abs())

        def meets(place: float) -> Tensor:
            turns = [(end - place) / (2 * math.pi) for end in (lower - slack, upper + slack)]
            return turns[1].floor() >= turns[0].ceil()

        finite = lower.isfinite() & upper.isfinite()
        low = torch.where(finite & ~meets(self.peak + math.pi), low, -torch.ones_like(low))
        return low, torch.where(finite & ~meets(self.peak), high, torch.ones_like(high))


@named("sin")
def sin() -> Wave:
    """Slopes [-1, 1]: cos z, 1 at 0."""
    return Wave("sin", torch.sin, torch.cos, 0.0)


@named("cos")
def cos() -> Wave:
    """Slopes [-1, 1]: -sin z, 1 at -pi / 2."""
    return Wave("cos", torch.cos, _cos_slope, -math.pi / 2)


def _cos_slope(z: Tensor) -> Tensor:
    return -torch.sin(z)

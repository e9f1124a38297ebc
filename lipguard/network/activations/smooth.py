"""Smooth elementwise functions: each slope interval follows from the zeros of the second derivative.

Between two neighbouring zeros of phi'' the derivative phi' is monotone; its range on an interval is therefore spanned
by its values at the two ends and at the zeros inside. Each function states the zeros and proves that there are
no others. Where a zero has no closed form, the extremum is given as an enclosure; the tests prove it anew in interval
arithmetic.

Rounding: phi' at an end is evaluated in float64 by formulas whose error is below ERROR (1 + |phi'|); the enclosure is
widened by that much, and cut to the global slope interval, which is exact or rounded outward by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lipguard.errors import InvalidModel
from lipguard.network.activations.base import Elementwise

ERROR = 2.0**-40
"""Allowance for the evaluation of a derivative, absolute and relative: some thousand times what the formulas need."""

NEAR = 1e-9
"""A critical point this close to an interval counts as inside: its place is rounded, its value is not."""


@dataclass(frozen=True)
class Critical:
    """A zero of phi'', or a kink: place (to within 1e-12), and an enclosure of phi' there (of both sides at a kink)."""

    place: float
    low: float
    high: float


class Smooth(Elementwise):
    """phi with derivative phi', which is monotone between critical points.

    Args:
        name: for messages and the digest.
        phi, derivative: called with the entries and the parameters.
        critical: all zeros of phi'' and kinks of phi.
        bounds: slopes on all of R, rounded outward.
        parameters: numbers passed on to phi and derivative.
        reach: beyond it, phi' differs from its limit by less than 2**-50.
    """

    def __init__(
        self,
        name: str,
        phi: Callable[..., Tensor],
        derivative: Callable[..., Tensor],
        critical: tuple[Critical, ...],
        bounds: tuple[float, float],
        parameters: tuple[float, ...] = (),
        reach: float = math.inf,
    ) -> None:
        if not all(map(math.isfinite, parameters)):
            raise InvalidModel(f"{name} has a parameter that is no number: {parameters}.")
        self.name = name
        self.critical = critical
        self.bounds = bounds
        self.parameters = parameters
        self.reach = reach
        self._phi = phi
        self._derivative = derivative

    def __call__(self, z: Tensor) -> Tensor:
        """phi(z), entry by entry."""
        return self._phi(z, *self.parameters)

    def derivative(self, z: Tensor) -> Tensor:
        """phi'(z) with an error below ERROR (1 + |phi'(z)|); z may be infinite. At a kink, the slope of one side."""
        return self._derivative(z.clamp(-self.reach, self.reach), *self.parameters)

    @property
    def slopes(self) -> tuple[Tensor, Tensor]:
        """(alpha, beta) on all of R, 0-d, rounded outward."""
        return tuple(torch.tensor(end, dtype=torch.float64, device="cpu") for end in self.bounds)  # type: ignore[return-value]

    def slope_range(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Range of phi' on [lower, upper]: both ends, and the critical points inside."""
        left, right = self.derivative(lower), self.derivative(upper)
        low, high = torch.minimum(left, right), torch.maximum(left, right)
        low, high = low - ERROR * (1 + low.abs()), high + ERROR * (1 + high.abs())
        for point in self.critical:
            inside = (lower <= point.place + NEAR) & (upper >= point.place - NEAR)
            low = torch.where(inside, low.clamp(max=point.low), low)
            high = torch.where(inside, high.clamp(min=point.high), high)
        return low.clamp(min=self.bounds[0]), high.clamp(max=self.bounds[1])

    kind: ClassVar[str] = "Smooth"

    def parameters_of_record(self) -> tuple[float, ...]:
        """The parameters, as numbers."""
        return tuple(map(float, self.parameters))

    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters."""
        return (torch.tensor(self.parameters, dtype=torch.float64, device="cpu"),)

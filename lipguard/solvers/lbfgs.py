"""L-BFGS for objectives with a domain, and the inverse Hessian it may start from."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Valued(Protocol):
    """What is known of an objective at a point."""

    @property
    def value(self) -> float:
        """The objective."""
        ...

    @property
    def gradient(self) -> Tensor:
        """Its gradient, (n,)."""
        ...

    @property
    def curvature(self) -> Tensor:
        """The size of its second derivatives along single coordinates, (n,)."""
        ...


def lbfgs(
    function: Callable[[Tensor], Valued | None],
    x: Tensor,
    memory: int,
    ends: Callable[[list[float]], bool],
    floor: float | None = None,
    change: float = math.inf,
) -> tuple[Tensor, int]:
    """Minimise by L-BFGS with an Armijo line search that treats None as an infinite value (Nocedal, Wright, 7.2).

    Args:
        function: x -> value, gradient and curvature, or None outside the domain.
        x: start, (n,).
        memory: pairs kept.
        ends: asked before every step with all values so far.
        floor: start the inverse Hessian from the curvature along single coordinates and this part of its mean, so that
            coordinates of little energy move as much as others; None: from a multiple of the identity. Of multipliers near
            the optimum two or three steps then do what ten do without; far from it (24 layers of 20 from the closed form)
            many plain steps get further.
        change: largest change of a coordinate in one step.
    Returns:
        The last point and the number of steps.
    """
    current = function(x)
    if current is None:
        return x, 0
    values = [current.value]
    scale = torch.ones_like(x) if floor is None else inverse(current.curvature, floor)
    pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=memory)
    while not ends(values):
        gradient = current.gradient
        direction = _two_loops(gradient, pairs, scale)
        slope = float(gradient @ direction)
        if slope >= 0:
            pairs.clear()
            direction = -scale * gradient
            slope = float(gradient @ direction)
        # Multipliers live on a logarithmic scale: a first step changes none by more than a tenth, a preconditioned one by half.
        largest = max(float(direction.abs().max()), 1e-30)
        first, most = (1.0, math.inf if pairs else 0.1) if floor is None else (0.5, 0.5)
        length = min(1.0 if pairs else first, min(most, change) / largest)
        # What a step promises is compared with values that are known to rounding only.
        known = torch.finfo(x.dtype).eps * max(1.0, abs(current.value))
        for _ in range(30):
            if -length * slope < known:
                return x, len(values) - 1
            candidate = function(x + length * direction)
            if candidate is not None and candidate.value <= current.value + 1e-4 * length * slope:
                break
            length /= 2
        else:
            break
        s, y = length * direction, candidate.gradient - gradient
        curvature = float(s @ y)
        if curvature > 1e-12 * float(torch.linalg.vector_norm(y)) * float(torch.linalg.vector_norm(s)):
            pairs.append((s, y, 1 / curvature))
        x, current = x + s, candidate
        values.append(current.value)
    return x, len(values) - 1


def inverse(curvature: Tensor, floor: float = 0.1) -> Tensor:
    """Diagonal of the inverse Hessian to start from; a part of the mean keeps dead neurons still."""
    return 1 / (curvature + floor * curvature.mean()).clamp_min(torch.finfo(curvature.dtype).tiny ** 0.5)


def _two_loops(gradient: Tensor, pairs: deque[tuple[Tensor, Tensor, float]], scale: Tensor) -> Tensor:
    """-H gradient for the inverse Hessian H that L-BFGS builds from its pairs and a multiple of diag(scale)."""
    q, weights = gradient.clone(), []
    for s, y, inverse in reversed(pairs):
        weight = inverse * float(s @ q)
        weights.append(weight)
        q -= weight * y
    q *= scale
    if pairs:
        _, y, inverse = pairs[-1]
        q /= inverse * float(y @ (scale * y))
    for (s, y, inverse), weight in zip(pairs, reversed(weights), strict=True):
        q += (weight - inverse * float(y @ q)) * s
    return -q

"""Constants that are folded along the data path, enclosed: what the fold itself rounds is kept as a radius.

What a forward computes from weights alone is what is deployed, and is taken bit for bit. What is computed here, because two
affine maps become one, is not deployed: the function that is meant has the real numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lipguard.errors import InvalidModel
from lipguard.network.operators import Operator
from lipguard.rounding import TINY, UNIT, gamma, powers_of_two, two_sum


@dataclass(frozen=True, eq=False)
class Constant:
    """A vector that is added, known up to a radius: |true - center| <= radius entry by entry (None: exactly)."""

    center: Tensor
    radius: Tensor | None = None

    @classmethod
    def of(cls, center: Tensor, radius: Tensor) -> Constant:
        """With the radius left out where it is 0.

        Raises:
            InvalidModel: a constant is too large for float64.
        """
        if not bool(center.isfinite().all()):
            raise InvalidModel("a bias, moved behind the scaling that follows it, overflows float64. Rescale the layers.")
        return cls(center, radius if bool(radius.any()) else None)

    def through(self, operator: Operator) -> Constant:
        """operator(constant)."""
        center, x = operator(self.center), self.center.detach()
        size = operator.abs()(x.abs())
        present = operator.mapped(lambda t: (t != 0).to(t))((x != 0).to(x)) > 0
        single = operator.terms <= 1 and all(powers_of_two(t) for t in operator.tensors() if t.is_floating_point())
        # k products added are off by gamma_k of their magnitudes, by nothing where entries are moved or times a power of two; the
        # operator itself by rho of them. Below the normal range each product loses less than TINY.
        error = (0.0 if single else gamma(operator.terms + 2)) + operator.rho * (1 + 4 * UNIT)
        small = present & (center.detach().abs() < TINY) if single else present
        radius = size * error + small.to(size) * (operator.terms * TINY)
        if self.radius is not None:
            radius = radius + operator.abs()(self.radius) * (1 + 2 * gamma(operator.terms + 2))
        return Constant.of(center, radius * (1 + 8 * UNIT))

    def __add__(self, other: Constant) -> Constant:
        """The sum: what it rounds is known exactly."""
        _, lost = two_sum(self.center.detach(), other.center.detach())
        radius = lost.abs()
        for part in (self.radius, other.radius):
            radius = radius if part is None else radius + part
        return Constant.of(self.center + other.center, radius * (1 + 4 * UNIT))


def reciprocals(divisor: Tensor) -> tuple[Tensor, float] | None:
    """1 / divisor and its relative radius: one rounding, none of powers of two; None where it leaves the normal range."""
    found = 1 / divisor
    size = found.detach().abs()
    if not bool(((size >= TINY) & size.isfinite()).all()):
        return None
    return found, 0.0 if powers_of_two(divisor.detach()) else UNIT


def number(value: float | int) -> tuple[float, float]:
    """A Python number in float64, and the relative radius of an integer that float64 does not hold.

    Raises:
        OverflowError: it is larger than every number of float64.
    """
    held = float(value)
    return held, 0.0 if held == value else UNIT

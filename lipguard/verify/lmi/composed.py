"""Products of many maps, enclosed to about twice the working precision.

A radius in working precision grows along a linear path by |W_k| ... |W_1|, far faster than the product itself: behind ten
orthogonal layers of 64 a unit of rounding is a millionth. Here a matrix is an unevaluated sum high + low, and products are
formed without rounding, slice by slice (Ozaki, Ogita, Oishi, Rump, Numerical Algorithms 59, 2012): numbers of so few bits
on a common grid that every sum of their products is a floating-point number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipguard.network import Diagonal, Operator
from lipguard.rounding import TINY, UNIT, gamma, powers_of_two, two_sum
from lipguard.verify.enclosed import Enclosed

_LARGEST = 200
"""Powers of two beyond which products might leave the normal range; then the matrix is treated in working precision."""


@dataclass(frozen=True, eq=False)
class Composed:
    """A matrix high + low, up to an entrywise radius; |low| <= u |high|.

    It answers what an `Enclosed` answers where maps are composed: `through`, `sum`, `rounded`.
    """

    high: Tensor
    low: Tensor
    radius: Tensor

    @classmethod
    def of(cls, matrix: Tensor, rho: float = 0.0) -> Composed:
        """A matrix of floating-point numbers, known up to a relative radius."""
        return cls(matrix, torch.zeros_like(matrix), Enclosed.of(matrix, rho).spread)

    @classmethod
    def sum(cls, parts: Sequence[Composed]) -> Composed:
        """The sum of matrices."""
        radius = torch.stack([part.radius for part in parts]).sum(0)
        return _sum([part.high for part in parts], [part.low for part in parts], radius)

    def rounded(self) -> Enclosed:
        """The same in working precision: `low` goes into the radius; no radius where there is none."""
        radius = (self.low.abs() + self.radius) * (1 + 4 * UNIT)
        return Enclosed(self.high, radius if bool(radius.any()) else None)

    def through(self, operator: Operator) -> Composed:
        """operator v for every row v."""
        if not operator.terms:  # entries are moved
            return Composed(operator(self.high), operator(self.low), operator(self.radius))
        if isinstance(operator, Diagonal) and not operator.rho and powers_of_two(operator.scale):
            return self._shifted(operator)
        k, magnitude = operator.shape[1], operator.abs()
        bits, error = (53 - max(k - 1, 1).bit_length()) // 2, gamma(k + 8)
        left, right = _operator_slices(operator, bits), _slices(self.high, bits)
        # The operator itself is off by rho of the magnitudes.
        mass = self.high.abs() + self.low.abs()
        own = self.radius + operator.rho * mass if operator.rho else self.radius
        if left is None or right is None:
            # Working precision: high + low rounds by u, k products by gamma_k, below the normal range by TINY each.
            radius = magnitude((own + error * mass) * (1 + 4 * UNIT)) * (1 + 4 * error) + k * TINY
            high = operator(self.high + self.low)
            return Composed(high, torch.zeros_like(high), radius)
        # (w1 + w2 + w3) (h1 + h2 + h3 + low) = the four products of the slices, exact, + w (h3 + low) + w3 (h1 + h2), small:
        # of the small ones gamma_k times their magnitudes is lost.
        (first, second, rest), (h1, h2, h3) = left, right
        exact = [w(h) for w in (first, second) if w is not None for h in (h1, h2)]
        tail, coarse = h3 + self.low, h1 + h2
        small = operator(tail)
        radius = magnitude((own + error * (h3.abs() + self.low.abs())) * (1 + 4 * UNIT))
        if rest is not None:
            small = small + rest(coarse)
            radius = radius + error * rest.abs()(coarse.abs())
        radius = radius * (1 + 4 * error)
        if rest is not None or operator.rho or bool(tail.any()):
            radius = radius + k * TINY  # products below the normal range lose less than TINY each
        return _sum(exact, [small], radius)

    def _shifted(self, operator: Diagonal) -> Composed:
        """Through powers of two: exact but for what leaves the normal range, less than TINY of each part."""
        high, low, radius = operator(self.high), operator(self.low), operator.abs()(self.radius)
        below = (self.high != 0) & ((high.abs() < TINY) | ((self.low != 0) & (low.abs() < TINY)))
        # A Python number times a mask would be rounded to float32, where TINY is 0.
        return Composed(high, low, radius + TINY * (below.to(radius) + (radius > 0).to(radius)))


def _sum(exact: list[Tensor], small: list[Tensor], radius: Tensor) -> Composed:
    """The sum of both lists, the first without rounding but for what goes into `low`."""
    high = exact[0]
    lows = list(small)
    for term in exact[1:]:
        high, missed = two_sum(high, term)
        lows.append(missed)
    total = torch.stack(lows).sum(0) if len(lows) > 1 else lows[0]
    error = gamma(len(lows) + 4)
    high, low = two_sum(high, total)
    # The sum of the lows rounds by gamma of their magnitudes.
    lost = error * torch.stack([low.abs() for low in lows]).sum(0) if len(lows) > 1 else torch.zeros_like(high)
    return Composed(high, low, (radius + lost) * (1 + 2 * gamma(len(lows) + 8)))


def _slices(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """x = x1 + x2 + x3, exactly: x1 and x2 of `bits` bits on grids common to all entries; None where those leave the range."""
    top = float(x.abs().max()) if x.numel() else 0.0
    exponent = math.frexp(top)[1]
    if not math.isfinite(top) or (top and abs(exponent) > _LARGEST):
        return None
    unit = 2.0 ** (exponent - bits)
    x1 = (x / unit).round() * unit
    rest = x - x1
    unit = unit * 2.0**-bits
    x2 = (rest / unit).round() * unit
    return x1, x2, rest - x2


def _operator_slices(operator: Operator, bits: int) -> tuple[Operator, Operator | None, Operator | None] | None:
    """The same of an operator's coefficients; zeros and ones need one slice."""
    if operator.weightless:
        return operator, None, None
    (coefficients,) = operator.tensors()
    parts = _slices(coefficients, bits)
    if parts is None:
        return None
    first, *small = (operator.mapped(lambda _, part=part: part) for part in parts)
    second, rest = (made if bool(part.any()) else None for made, part in zip(small, parts[1:], strict=True))
    return first, second, rest

"""Intervals of real numbers in float64, rounded outward, unbounded ends allowed: an end of inf bounds nothing, and is no number.

A sum, product or quotient of two numbers rounds to the nearest number (`lipguard.rounding`), so that the next number beyond
it is an end. Nothing is known where an operation is not defined: the interval is then the whole line.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lipguard.network.activations.base import Elementwise

LIBRARY = 2.0**-46
"""Allowance for exp, log and square roots of torch, relative: they are accurate to a few units of 2^-52."""

_SMALL = 1e-290
"""Far above what is lost below the normal range."""


@dataclass(frozen=True, eq=False)
class Interval:
    """Numbers between `low` and `high`, entry by entry, of one shape or broadcast to one."""

    low: Tensor
    high: Tensor

    @classmethod
    def outward(cls, low: Tensor, high: Tensor) -> Interval:
        """[low, high] with both ends rounded once: moved to the next number beyond; the whole line where an end is nan."""
        infinity = torch.full((), torch.inf, dtype=torch.float64, device=low.device)
        low, high = torch.nextafter(low, -infinity), torch.nextafter(high, infinity)
        # An overflow to the wrong infinity cannot bound anything; the largest number does.
        largest = torch.finfo(torch.float64).max
        low, high = (
            low.nan_to_num(nan=-torch.inf, posinf=largest, neginf=-torch.inf),
            high.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-largest),
        )
        return cls(low, high)

    @classmethod
    def of(cls, number: Tensor) -> Interval:
        """A number itself."""
        return cls(number, number)

    def __add__(self, other: Interval) -> Interval:
        """Sums; a sum with an end of 0 is exact."""
        total = Interval.outward(self.low + other.low, self.high + other.high)
        return Interval(*(_kept(a, b, s) for a, b, s in zip(self, other, total, strict=True)))

    def __mul__(self, other: Interval) -> Interval:
        """Products: between the products of the ends, 0 inf counting as 0, as ends of inf stand for numbers without bound."""
        ends = torch.stack(torch.broadcast_tensors(*(_times(a, b) for a in self for b in other)))
        product = Interval.outward(ends.amin(0), ends.amax(0))
        # Products with 0 are exact: a sign that is known is kept.
        low = torch.where((ends.amin(0) == 0), 0.0, product.low)
        return Interval(low, torch.where((ends.amax(0) == 0), 0.0, product.high))

    def scaled(self, factor: Tensor) -> Interval:
        """Products with numbers; the factor 1 is exact."""
        product = self * Interval.of(factor)
        one = factor == 1
        return Interval(torch.where(one, self.low, product.low), torch.where(one, self.high, product.high))

    def __iter__(self):  # noqa: ANN204 - two tensors
        yield self.low
        yield self.high

    def power(self, n: int) -> Interval:
        """n-th powers, n >= 1: an even one is at least 0, and grows with the absolute value."""
        if n == 1:
            return self
        if n % 2:
            return self.power(n - 1) * self
        straddles = (self.low < 0) & (self.high > 0)
        small = torch.where(straddles, 0.0, torch.minimum(self.low.abs(), self.high.abs()))
        size = Interval(small, torch.maximum(self.low.abs(), self.high.abs()))
        result = size
        for _ in range(n - 1):
            result = result * size
        return Interval(result.low.clamp_min(0), result.high)

    def inverse(self) -> Interval:
        """1 / z; the whole line where 0 may be among the numbers."""
        away = (self.low > 0) | (self.high < 0)
        line = _line(self)
        found = Interval.outward(1 / self.high, 1 / self.low)
        # The sign is that of z: 1 / inf is 0, and not below it.
        low = torch.where(self.low > 0, found.low.clamp_min(0), found.low)
        high = torch.where(self.high < 0, found.high.clamp_max(0), found.high)
        return Interval(torch.where(away, low, line.low), torch.where(away, high, line.high))

    def exp(self) -> Interval:
        """e^z, positive."""
        low, high = torch.exp(self.low) * (1 - LIBRARY), torch.exp(self.high) * (1 + LIBRARY)
        # Below the normal range the error is not relative: 0 is below, and _SMALL above. An overflow is no lower end.
        low = torch.where(low < _SMALL, 0.0, low).clamp_max(torch.finfo(torch.float64).max)
        return Interval(low, high + _SMALL)

    def log(self) -> Interval:
        """The logarithm; the whole line where a number may not be positive."""
        ends = [torch.log(end) for end in self]
        # The error is relative to log z, and near z = 1 absolute.
        low, high = (ends[0] - LIBRARY * (1 + ends[0].abs()), ends[1] + LIBRARY * (1 + ends[1].abs()))
        return _where_positive(self, low, high)

    def sqrt(self) -> Interval:
        """The square root; the whole line where a number may be negative."""
        low, high = self.low.sqrt() * (1 - LIBRARY), self.high.sqrt() * (1 + LIBRARY)
        there = self.low >= 0
        line = _line(self)
        return Interval(torch.where(there, low, line.low), torch.where(there, high, line.high))

    def rising(self, function: Elementwise) -> Interval:
        """What an increasing function makes of the numbers."""
        low, high = (function(end) for end in self)
        return Interval(low - _error(function, self.low, low), high + _error(function, self.high, high))

    def valley(self, function: Elementwise) -> Interval:
        """What an even function that grows with |z| makes of the numbers."""
        small = torch.where((self.low < 0) & (self.high > 0), 0.0, torch.minimum(self.low.abs(), self.high.abs()))
        return Interval(small, torch.maximum(self.low.abs(), self.high.abs())).rising(function)

    def slopes(self, function: Elementwise) -> Interval:
        """The function's slopes on the numbers."""
        return Interval(*function.slope_range(self.low, self.high))


def _error(function: Elementwise, z: Tensor, value: Tensor) -> Tensor:
    # At an end of inf the value is a limit: a finite one is allowed the same relative error.
    finite = z.isfinite()
    return torch.where(finite, function.rounding(torch.where(finite, z, 0.0)), 2.0**-40 * value.abs().nan_to_num(0.0, 0.0, 0.0))


def _kept(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
    return torch.where(a == 0, b, torch.where(b == 0, a, total))


def _times(a: Tensor, b: Tensor) -> Tensor:
    return torch.where((a == 0) | (b == 0), 0.0, a * b)


def _line(like: Interval) -> Interval:
    infinity = torch.full_like(like.low, torch.inf)
    return Interval(-infinity, infinity)


def _where_positive(z: Interval, low: Tensor, high: Tensor) -> Interval:
    there, line = z.low > 0, _line(z)
    return Interval(torch.where(there, low, line.low), torch.where(there, high, line.high))

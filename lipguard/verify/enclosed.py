"""`Enclosed`: numbers known up to a radius, with the arithmetic of the checks; every rounding is added to the radius.

The rules of floating point that all of it rests on, u = 2^-53 (Higham 2002, sections 2.2 and 3.1):

    a sum           rounds by at most u |result|, and not at all if a term is 0; it does not underflow;
    a product       rounds by at most u |result|, or, below the normal range, by less than TINY;
    k products      added in any order, with or without fused multiply-add, are off by at most gamma_k sum |a_i b_i| + k TINY.

A radius is itself computed in floating point: a few nonnegative terms, whose own roundings the last factor 1 + ... covers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lipguard.network import Operator
from lipguard.network.activations import Elementwise
from lipguard.rounding import TINY, UNIT, gamma, up


@dataclass(frozen=True, eq=False)
class Enclosed:
    """A vector, a matrix, or a batch of them, real or complex: |true - center| <= radius entry by entry (None: exactly).

    A radius with one dimension less than a batch of matrices (F, n, m), (n, m), holds for all of them alike.
    """

    center: Tensor
    radius: Tensor | None = None

    @classmethod
    def of(cls, matrix: Tensor, rho: float = 0.0) -> Enclosed:
        """A matrix known up to a relative radius: `operator.dense()` and `operator.rho`."""
        if not rho:
            return cls(matrix)
        # One rounding of the product, or less than TINY below the normal range.
        return cls(matrix, matrix.abs() * (rho * (1 + 4 * UNIT)) + _below(matrix != 0, 1))

    @classmethod
    def between(cls, low: Tensor, high: Tensor) -> Enclosed:
        """The intervals [low, high]; exact where the ends are equal."""
        wide = low != high
        middle = torch.where(wide, (low + high) / 2, low)
        # The differences round by u of themselves each, below the normal range not at all.
        around = torch.maximum(high - middle, middle - low) * (1 + 4 * UNIT) + _below(wide, 2)
        return cls(middle, around * wide)

    @classmethod
    def sum(cls, parts: Sequence[Enclosed]) -> Enclosed:
        """The sum of at least one part."""
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    @classmethod
    def cat(cls, parts: Sequence[Enclosed], dim: int) -> Enclosed:
        """Parts beside each other (dim=-1) or below each other (dim=-2)."""
        center = torch.cat([part.center for part in parts], dim)
        radii = [part.radius for part in parts if part.radius is not None]
        if not radii:
            return cls(center)
        if min(r.ndim for r in radii) == center.ndim:
            return cls(center, torch.cat([part.spread for part in parts], dim))
        return cls(center, torch.cat([part.shared.spread for part in parts], dim))

    @property
    def shared(self) -> Enclosed:
        """With one radius for all of a batch (F, n, m)."""
        spread = torch.zeros_like(self.center[0], dtype=torch.float64) if self.radius is None else self.radius
        return Enclosed(self.center, spread.amax(0) if spread.ndim == self.center.ndim else spread)

    @property
    def spread(self) -> Tensor:
        """The radius as a tensor."""
        return torch.zeros_like(self.center, dtype=torch.float64) if self.radius is None else self.radius

    @property
    def exact(self) -> bool:
        """Whether nothing is uncertain."""
        return self.radius is None or not bool(self.radius.any())

    @cached_property
    def zero(self) -> bool:
        """Whether all are exactly 0."""
        return not self.center.count_nonzero() and self.exact

    def magnitude(self) -> Tensor:
        """Upper bound of the absolute values, in the shape of the radius."""
        if self.radius is None:
            return self._size()
        # A complex absolute value is off by two units, the sum rounds once more.
        return (self._size() + self.radius) * (1 + 4 * UNIT)

    def _size(self) -> Tensor:
        """|center|, the largest of a batch where one radius holds for all."""
        size = self.center.abs()
        return size.amax(0) if self.radius is not None and self.radius.ndim < self.center.ndim else size

    def ends(self) -> tuple[Tensor, Tensor]:
        """Lower and upper ends of real numbers, rounded outward."""
        if self.radius is None:
            return self.center, self.center
        # center -+ radius rounds by u of at most |center| + radius.
        radius = self.radius * (1 + 4 * UNIT) + (self.center.abs() * (2 * UNIT) + TINY) * (self.radius > 0).to(self.radius)
        return self.center - radius, self.center + radius

    def rounded(self) -> Enclosed:
        """Itself; a matrix in twice the working precision (`Composed`) has it as well."""
        return self

    @property
    def mT(self) -> Enclosed:  # noqa: N802 - torch's name
        """The transposed matrices."""
        return Enclosed(self.center.mT, None if self.radius is None else self.radius.mT)

    @property
    def mH(self) -> Enclosed:  # noqa: N802 - torch's name
        """The adjoint matrices."""
        return Enclosed(self.center.mH, None if self.radius is None else self.radius.mT)

    def __getitem__(self, index: object) -> Enclosed:
        """Center and radius at an index."""
        return Enclosed(self.center[index], None if self.radius is None else self.radius[index])  # type: ignore[index]

    def at(self, batch: Tensor | int) -> Enclosed:
        """Those of the batch at an index (F',), or one of them."""
        shared = self.radius is None or self.radius.ndim < self.center.ndim
        return Enclosed(self.center[batch], self.radius if shared else self.radius[batch])  # type: ignore[index]

    def to(self, dtype: torch.dtype) -> Enclosed:
        """With centers of another type, complex for real: exact."""
        return Enclosed(self.center.to(dtype), self.radius)

    def __neg__(self) -> Enclosed:
        """Exact."""
        return Enclosed(-self.center, self.radius)

    def __add__(self, other: Enclosed) -> Enclosed:
        """The sum of two of one shape."""
        center = self.center + other.center
        # One rounding, unless a term is 0.
        both = (self.center != 0) & (other.center != 0)
        radius = center.abs() * both * (2 * UNIT)
        for part in (self.radius, other.radius):
            if part is not None:
                radius = (radius.amax(0) if part.ndim < radius.ndim else radius) + part
        return Enclosed(center, radius * (1 + 8 * UNIT))

    def __sub__(self, other: Enclosed) -> Enclosed:
        """The difference of two of one shape."""
        return self + -other

    def __mul__(self, other: Enclosed | Tensor) -> Enclosed:
        """The product entry by entry; a tensor stands for itself."""
        factor = other if isinstance(other, Enclosed) else Enclosed(other)
        center = self.center * factor.center
        # |ab - true| <= |a| r_b + r_a (|b| + r_b), and one rounding of ab, four for complex numbers.
        present = (self.center != 0) & (factor.center != 0)
        radius = center.abs() * (8 * UNIT if center.is_complex() else 2 * UNIT) + _below(present, 4)
        if self.radius is not None and self.radius.ndim < center.ndim:
            radius = radius.amax(0)
        if self.radius is not None:
            radius = radius + self.radius * factor.magnitude()
        if factor.radius is not None:
            radius = radius + self._size() * factor.radius
        return Enclosed(center, radius * (1 + 8 * UNIT))

    def __matmul__(self, other: Enclosed) -> Enclosed:
        """The matrix product."""
        count = self.center.shape[-1]
        center = self.center @ other.center
        left, right = self.magnitude(), other.magnitude()
        if left.ndim != right.ndim:
            left, right = (m.amax(0) if m.ndim == 3 else m for m in (left, right))
        # Sums of `count` products; of complex ones twice as many for each part: sqrt(2) gamma_2k < 4 gamma_k.
        error = gamma(count + 8) * (4 if center.is_complex() else 1)
        # Of the products of the center and of the radii, those below the normal range lose less than TINY each.
        radius = (left @ right) * error + 4 * count * TINY
        # |AB - true| <= r_A |B| + |A| r_B, with |A|, |B| bounds of the true magnitudes.
        if self.radius is not None:
            radius = radius + self.radius @ right
        if other.radius is not None:
            radius = radius + left @ other.radius
        return Enclosed(center, radius * (1 + 4 * gamma(count + 8)))

    def through(self, operator: Operator, bias: Tensor | None = None, bias_radius: Tensor | None = None) -> Enclosed:
        """operator v + bias for every row v; of a matrix M, operator M is `M.mT.through(operator).mT`."""
        center, magnitude, terms = operator(self.center), operator.abs(), operator.terms
        if not terms and bias is None:  # entries are moved, nothing is added
            return Enclosed(center, None if self.radius is None else magnitude(self.radius))
        mass = magnitude(self.center.abs())
        # Where all products are zero nothing rounds, and a bias is taken over as it is.
        rounds = torch.ones_like(mass, dtype=torch.bool) if self._vanishes(operator) else mass > 0
        if bias is not None:
            center, mass = center + bias, (mass + bias.abs()) * rounds
        error = gamma(terms + 4)
        radius = relative_error(operator, terms + 4) * mass + _below(rounds, terms + 4)
        if self.radius is not None:
            radius = radius + magnitude(self.radius)
        if bias_radius is not None:
            radius = radius + bias_radius
        return Enclosed(center, radius * (1 + 4 * error))

    def _vanishes(self, operator: Operator) -> bool:
        """Whether a product of a coefficient and an entry, neither of them 0, might be 0 in floating point."""
        numbers = (x for x in (self.center, *operator.tensors()) if x.is_floating_point())
        return any(bool(((x != 0) & (x.abs() < 2.0**-480)).any()) for x in numbers)


def relative_error(operator: Operator, roundings: int) -> float:
    """e such that sums of products with the operator's coefficients W, of so many roundings, are off by at most e |W| |v|.

    With W~ what is meant: |fl(W v) - W~ v| <= |fl(W v) - W v| + |W - W~| |v| <= (gamma + rho) |W| |v|, and |W| is at most
    `operator.abs()`, which is above |W~| as well: what a radius r of v adds is at most |W~| r.
    """
    return up(gamma(roundings) + operator.rho)


def image(function: Elementwise, z: Enclosed) -> Enclosed:
    """phi(z), entry by entry: off by what the steepest slope makes of the radius, and by the function's own rounding."""
    alpha, beta = function.slopes
    steepest = torch.maximum(alpha.abs(), beta.abs())
    return Enclosed(function(z.center), (steepest * z.spread + function.rounding(z.center)) * (1 + 8 * UNIT))


def slopes_at(function: Elementwise, z: Enclosed) -> Enclosed:
    """All slopes of phi throughout the radius: beside a kink its whole range there."""
    return Enclosed.between(*function.slope_range(*z.ends()))


def _below(where: Tensor, count: int) -> Tensor:
    """What `count` products below the normal range may lose, where there are any."""
    # A Python number times a mask would be rounded to float32, where TINY is 0.
    return where.to(torch.float64) * (count * TINY)

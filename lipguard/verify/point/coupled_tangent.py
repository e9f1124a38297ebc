"""Values and tangents through coupled nodes, enclosed: what a maximum, a sort or a reflection does beside a point.

Where rounding leaves open which entry is the largest, or on which side of the mirror a point lies, every possibility
enters: the tangent is enclosed by the hull of theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lipguard.errors import NotCertified
from lipguard.network import Coupling
from lipguard.network.contraction import Contraction, Length, LogSumExp, Softmax
from lipguard.network.coupled import Groups, Maxima, Reflection, Sort
from lipguard.rounding import TINY, UNIT, gamma
from lipguard.verify.enclosed import Enclosed


@dataclass(frozen=True, eq=False)
class Beside(Groups[tuple[Enclosed, Enclosed]]):
    """The value of each kind of function of groups, and its derivative along the tangent."""

    at: Enclosed
    tangent: Enclosed

    def maxima(self, function: Maxima) -> tuple[Enclosed, Enclosed]:
        """A maximum changes by no more than the largest change of an entry."""
        # An absent entry (index -1) reads the appended -inf, and is never the largest.
        ends = (self.at.center, *self.at.ends())
        z, low, high = (torch.cat([t, t.new_full((1,), -math.inf)])[function.index] for t in ends)
        e = torch.cat([self.at.spread, z.new_zeros(1)])[function.index]
        largest = high >= low.amax(1, keepdim=True)
        return Enclosed(z.amax(1), e.amax(1)), _hull(self.tangent, function.index.clamp_min(0), largest)

    def sort(self, function: Sort) -> tuple[Enclosed, Enclosed]:
        """The k-th largest entry changes by no more than the largest change of an entry."""
        index = function.index
        g = index.shape[1]
        low, high = (end[index] for end in self.at.ends())
        # Entry j is the k-th largest (k from 0) only if at most k others surely exceed it and at most g - 1 - k are surely below.
        above = (low[:, None, :] > high[:, :, None]).sum(2)
        below = (high[:, None, :] < low[:, :, None]).sum(2)
        k = torch.arange(g, device=index.device)[:, None]
        possible = (above[:, None, :] <= k) & (below[:, None, :] <= g - 1 - k)
        turned = _hull(self.tangent, index[:, None, :].expand(-1, g, -1), possible)
        e = self.at.spread[index].amax(1, keepdim=True).expand(-1, g)
        order = index.flatten().argsort()
        return Enclosed(function(self.at.center), e.flatten()[order]), _flat(turned, order)

    def reflection(self, function: Reflection) -> tuple[Enclosed, Enclosed]:
        """z + 2 v max(-p, 0), p = v'z; its derivative t - 2 v s q, q = v't, s the slope: 0 for p > 0, 1 for p < 0."""
        v, order = function.directions, function.index.flatten().argsort()
        z, t = self.at[function.index], self.tangent[function.index]
        p, q = ((e[:, None] @ Enclosed(v)[:, :, None])[:, :, 0] for e in (z, t))
        beyond = Enclosed(p.center.neg().clamp_min(0), p.radius)  # the error does not grow
        away, behind = p.center > p.spread, p.center < -p.spread
        slope = Enclosed.between(behind.to(v), (~away).to(v))
        return _flat(z + beyond * (2 * v), order), _flat(t - (q * slope) * (2 * v), order)

    def softmax(self, function: Softmax) -> tuple[Enclosed, Enclosed]:
        """2 p, and its derivative 2 p (t - p't)."""
        z, t = self.at[function.index], self.tangent[function.index]
        p = _probabilities(z)
        order, two = function.index.flatten().argsort(), torch.tensor(2.0, dtype=torch.float64, device=p.center.device)
        return _flat(p * two, order), _flat(p * (t - _total(p * t)) * two, order)

    def log_sum_exp(self, function: LogSumExp) -> tuple[Enclosed, Enclosed]:
        """Log-sum-exp changes by no more than the largest change of an entry; its derivative p't."""
        z, t = self.at[function.index], self.tangent[function.index]
        value = z.center.logsumexp(1, keepdim=True)
        own = _LIBRARY * (value.abs() + z.center.abs().amax(1, keepdim=True) + 1)
        reach = z.spread.amax(1, keepdim=True)
        return self._one(function, Enclosed(value, (reach + own) * (1 + 8 * UNIT))), self._one(
            function, _total(_probabilities(z) * t)
        )

    def length(self, function: Length) -> tuple[Enclosed, Enclosed]:
        """|z|, whose error is at most the length rho of that of z; its derivative u't, u = z / |z|.

        For vectors z and y that are not 0, |z/|z| - y/|y|| <= 2 |z - y| / |z|; no unit vector is off by more than 2 from
        another, nor by more than 1 from 0, which stands for u where |z| is 0.
        """
        z, t = self.at[function.index], self.tangent[function.index]
        size = gamma(z.center.shape[1] + 8)
        rho = torch.linalg.vector_norm(z.spread, dim=1, keepdim=True) * (1 + 2 * size) + _SMALLEST
        length = torch.linalg.vector_norm(z.center, dim=1, keepdim=True)
        here = length > _SMALLEST
        u = torch.where(here, z.center / length.clamp_min(TINY), 0.0)
        off = torch.where(here, 2 * rho / length.clamp_min(TINY), 1.0).clamp_max(2.0) * (1 + 8 * UNIT) + 2 * size
        value = Enclosed(length, (rho + 2 * size * length) * (1 + 8 * UNIT))
        return self._one(function, value), self._one(function, _total(Enclosed(u, off.expand_as(u)) * t))

    def _one(self, function: Contraction, first: Enclosed) -> Enclosed:
        """(value, 0, ..., 0) in every group, at the places of the entries; zeros are exact."""
        order, rest = function.index.flatten().argsort(), first.center.new_zeros(len(function.index), function.index.shape[1] - 1)
        return Enclosed(*(torch.cat([part, rest], 1).flatten()[order] for part in (first.center, first.spread)))

    def other(self, function: Coupling) -> tuple[Enclosed, Enclosed]:
        """No other kind is known."""
        raise NotCertified(f"no check knows the function {type(function).__name__}.")


_LIBRARY = 2.0**-40
"""Allowance for torch's softmax and log-sum-exp, relative, as for elementary functions (`Elementwise.rounding`)."""

_SMALLEST = 2.0**-500
"""Above the root of what squares below the normal range lose, g TINY: lengths below it count as 0."""


def _probabilities(z: Enclosed) -> Enclosed:
    """softmax in every group: entries that move by s at most change a probability by a factor between e^(-2 s) and e^(2 s)."""
    p = z.center.softmax(1)
    s = z.spread.amax(1, keepdim=True)
    # e^(2 s) - 1 >= 1 - e^(-2 s); the sum of g exponentials, and the exponentials themselves, round.
    grown = torch.expm1(2 * s * (1 + 4 * UNIT)) * (1 + _LIBRARY) + _LIBRARY + 4 * gamma(z.center.shape[1] + 4)
    return Enclosed(p, p * grown * (1 + 8 * UNIT) + TINY)


def _total(parts: Enclosed) -> Enclosed:
    """Sums of every group, (groups, 1)."""
    k = gamma(parts.center.shape[1] + 2)
    reach, mass = parts.spread.sum(1, keepdim=True), parts.center.abs().sum(1, keepdim=True)
    return Enclosed(parts.center.sum(1, keepdim=True), (reach + k * mass) * (1 + 4 * k))


def _flat(grouped: Enclosed, order: Tensor) -> Enclosed:
    return Enclosed(grouped.center.flatten()[order], grouped.spread.flatten()[order])


def _hull(values: Enclosed, index: Tensor, possible: Tensor) -> Enclosed:
    """The smallest interval, along the last dimension of the index, that holds the possible entries."""
    picked = Enclosed(values.center[index], values.spread[index])
    low, high = picked.ends()
    infinity = torch.full_like(low, math.inf)
    hull = Enclosed.between(torch.where(possible, low, infinity).amin(-1), torch.where(possible, high, -infinity).amax(-1))
    # One possibility is known as well as its entry.
    single = possible.sum(-1) == 1
    only = possible.to(torch.int8).argmax(-1, keepdim=True)
    own, own_radius = (part.gather(-1, only)[..., 0] for part in (picked.center, picked.spread))
    return Enclosed(torch.where(single, own, hull.center), torch.where(single, own_radius, hull.spread))

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
from lipguard.network.coupled import Groups, Maxima, Reflection, Sort
from lipguard.rounding import TINY, gamma
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
        p, q = _inner(v, z), _inner(v, t)
        beyond = Enclosed(p.center.neg().clamp_min(0), p.radius)  # the error does not grow
        away, behind = p.center > p.spread, p.center < -p.spread
        slope = Enclosed.between(behind.to(v), (~away).to(v))
        return _flat(z + beyond * (2 * v), order), _flat(t - (q * slope) * (2 * v), order)

    def other(self, function: Coupling) -> tuple[Enclosed, Enclosed]:
        """No other kind is known."""
        raise NotCertified(f"no check knows the function {type(function).__name__}.")


def _flat(grouped: Enclosed, order: Tensor) -> Enclosed:
    return Enclosed(grouped.center.flatten()[order], grouped.spread.flatten()[order])


def _inner(v: Tensor, z: Enclosed) -> Enclosed:
    """v'z in every group, (groups, 1): a sum of products, and what the radius moves it by."""
    k = v.shape[1] + 2
    product = v * z.center
    mass, reach = product.abs().sum(1, keepdim=True), (v.abs() * z.spread).sum(1, keepdim=True)
    return Enclosed(product.sum(1, keepdim=True), (reach + gamma(k) * mass) * (1 + 4 * gamma(k)) + k * TINY)


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
